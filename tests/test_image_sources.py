"""Images of every kind: formats, colours, links, and what a caller may give."""

import base64
import io
import struct

import numpy as np
import pillow_heif
import pytest
import tifffile
import torch
from PIL import Image, ImageCms

from llava.errors import DataError, ImageReadError
from llava.images import list_images, load_image, walk_images
from llava.sources import load_source


def noise(size=(24, 16), seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["a.heic", "A.HEIF", "a.hif", "a.avif"])
def test_phone_formats_are_found_and_read(tmp_path, name):
    image = Image.new("RGB", (32, 24), (200, 40, 90))
    if name.endswith("avif"):
        image.save(tmp_path / name)
    else:
        pillow_heif.from_pillow(image).save(tmp_path / name)
    (file,) = list_images(tmp_path)
    assert np.abs(np.asarray(load_image(file)).astype(int) - (200, 40, 90)).max() < 12


def test_what_is_no_image_is_counted_and_litter_is_not(tmp_path):
    noise().save(tmp_path / "a.png")
    for name in ("clip.mp4", "draw.svg", "paper.PDF", "more.zip", "noend", "._a.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    others = []
    assert [file.name for file in list_images(tmp_path, others)] == ["a.png"]
    assert [file.name for file in others] == ["clip.mp4", "draw.svg", "more.zip", "noend", "paper.PDF"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"hold no image; passed over, no image: 5 files .*clip\.mp4"):
        list(list_images(tmp_path))


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    (root / "own").mkdir(parents=True)
    other.mkdir()
    for index in range(4):
        noise().save(other / f"{index}.png")
    noise().save(root / "own" / "x.png")
    (root / "first").symlink_to(other)
    (root / "second").symlink_to(other)
    (root / "own" / "up").symlink_to(root)
    (other / "back").symlink_to(root)
    found = [file.relative_to(root).as_posix() for file in walk_images(root)]
    assert found == [*(f"first/{i}.png" for i in range(4)), "own/x.png", *(f"second/{i}.png" for i in range(4))]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        (np.array([[0, 1 << 15, 65535]], np.int32), [0, 128, 255]),
        (np.array([[0, 1 << 30, (1 << 31) - 1]], np.int32), [0, 128, 255]),
        (np.array([[-100, 0, 155]], np.int32), [0, 100, 255]),
        (np.array([[0, 1 << 31, (1 << 32) - 1]], np.uint32), [0, 128, 255]),
    ],
)
def test_wide_integers_are_scaled(tmp_path, values, expected):
    tifffile.imwrite(tmp_path / "a.tif", values)
    assert np.asarray(load_image(tmp_path / "a.tif"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("samples", [2, 3, 5, 7])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_pages_of_several_samples(tmp_path, samples, kind, planar):
    shape = (2, 9, 11, samples) if planar == "contig" else (2, samples, 9, 11)
    values = np.random.default_rng(samples).integers(0, np.iinfo(kind).max, shape).astype(kind)
    photometric = "rgb" if samples == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", values, photometric=photometric, planarconfig=planar)
    first = values[0] if planar == "contig" else np.moveaxis(values[0], 0, -1)
    eight = (first >> (8 * (kind().itemsize - 1))).astype(np.uint8)
    expected = eight[..., :3] if samples >= 3 else np.repeat(eight[..., :1], 3, axis=-1)
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.tif")), expected)


def test_colours_are_converted_by_their_profile(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    plain = noise()
    # The channels of a Lab image are no colours of a screen: the profile must change them.
    image = plain.convert("RGB").copy()
    image = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    image.save(tmp_path / "lab.tif", icc_profile=lab)
    assert np.abs(np.asarray(load_image(tmp_path / "lab.tif")).astype(int) - np.asarray(plain)).mean() < 8
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("srgb", srgb), ("broken", b"no profile"), ("other", lab)):
        plain.save(tmp_path / f"{name}.png", icc_profile=profile)
        assert np.array_equal(np.asarray(load_image(tmp_path / f"{name}.png")), np.asarray(plain)), name


def rgb_profile(primaries: dict[str, tuple[float, float]], gamma: float) -> bytes:
    """A version 2 ICC profile of an RGB display: primaries (x, y), white D65 adapted to D50, and a gamma."""
    xyz = {name: np.array([x / y, 1, (1 - x - y) / y]) for name, (x, y) in primaries.items()}
    white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
    columns = np.stack([xyz[name] for name in "rgb"], axis=1)
    columns = columns * np.linalg.solve(columns, white)
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1, 0.8249])
    columns = np.linalg.inv(bradford) @ np.diag((bradford @ d50) / (bradford @ white)) @ bradford @ columns

    def fixed(values) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"wide\0" + bytes(79)
    parts = {
        **{f"{name}XYZ": b"XYZ " + bytes(4) + fixed(columns[:, i]) for i, name in enumerate("rgb")},
        **{f"{name}TRC": curve for name in "rgb"},
        **{"wtpt": b"XYZ " + bytes(4) + fixed(d50), "desc": text, "cprt": b"text" + bytes(4) + b"none\0\0\0\0"},
    }
    return icc_profile(b"mntrRGB XYZ ", parts)


def icc_profile(kind: bytes, parts: dict[str, bytes]) -> bytes:
    """A version 2 ICC profile of tagged parts."""
    table, body, start = b"", b"", 128 + 4 + 12 * len(parts)
    for name, content in parts.items():
        table += name.encode() + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = bytes(4) + b"lcms" + struct.pack(">I", 0x02100000) + kind + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">iii", 63190, 65536, 54061) + bytes(48)  # the illuminant D50
    whole = head + struct.pack(">I", len(parts)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def press_profile() -> bytes:
    """A version 2 ICC profile of a press whose inks are all grey: lightness is 100 (1 - k) (1 - (c + m + y) / 4)."""
    same = bytes(range(256))
    corners = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    lab = b"".join(bytes([round(255 * (1 - k) * (1 - (c + m + y) / 4)), 128, 128]) for c, m, y, k in corners)
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + same * 4 + lab + same * 3
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"grey\0" + bytes(79)
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    parts = {"A2B0": table, "wtpt": white, "desc": text, "cprt": b"text" + bytes(4) + b"none\0\0\0\0"}
    return icc_profile(b"prtrCMYKLab ", parts)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
@pytest.mark.parametrize(
    ("inks", "grey"), [((0, 0, 0, 0), 255), ((255, 0, 0, 0), 185), ((0, 255, 255, 0), 119), ((0, 0, 0, 255), 0)]
)
def test_inks_become_colours_by_their_press(tmp_path, kind, inks, grey):
    lossy = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    Image.new("CMYK", (16, 16), inks).save(tmp_path / "a", kind, icc_profile=press_profile(), **lossy)
    assert np.abs(np.asarray(load_image(tmp_path / "a"))[8, 8].astype(int) - grey).max() <= 3
    plain = np.asarray(load_image(tmp_path / "a", apply_profile=False))[8, 8].astype(int)
    assert np.abs(plain - [(255 - ink) * (255 - inks[3]) // 255 for ink in inks[:3]]).max() <= 3


ADOBE = rgb_profile({"r": (0.64, 0.33), "g": (0.21, 0.71), "b": (0.15, 0.06)}, 2.19921875)
P3 = rgb_profile({"r": (0.68, 0.32), "g": (0.265, 0.69), "b": (0.15, 0.06)}, 2.2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("profile", "stored", "shown"),
    [
        # The published conversions of these colours to sRGB.
        (ADOBE, (100, 150, 200), (63, 150, 202)),
        (ADOBE, (128, 128, 128), (127, 127, 127)),
        (ADOBE, (219, 0, 0), (255, 0, 0)),
        (P3, (234, 51, 35), (255, 0, 0)),
    ],
)
def test_wide_colours_become_those_of_a_screen(tmp_path, kind, profile, stored, shown):
    lossy = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    Image.new("RGB", (16, 16), stored).save(tmp_path / "a", kind, icc_profile=profile, **lossy)
    converted = np.asarray(load_image(tmp_path / "a"))[8, 8].astype(int)
    assert np.abs(converted - shown).max() <= 6, converted
    plain = np.asarray(load_image(tmp_path / "a", apply_profile=False))[8, 8].astype(int)
    assert np.abs(plain - stored).max() <= 2
    assert np.array_equal(np.asarray(load_source((tmp_path / "a").read_bytes()))[8, 8], converted)


def test_all_that_callers_have_is_the_same_image(tmp_path, monkeypatch):
    image = noise()
    pixels = np.asarray(image)
    file = tmp_path / "a b.png"
    image.save(file)
    content = file.read_bytes()
    monkeypatch.setenv("HOME", str(tmp_path))
    tensor = torch.from_numpy(pixels.copy())
    sources = [
        *(file, str(file), file.as_uri(), "~/a b.png", image, content, bytearray(content), io.BytesIO(content)),
        *(pixels, pixels / 255, (pixels / 255).astype(np.float32), np.dstack([pixels, pixels[..., 0]])),
        *(tensor, tensor.permute(2, 0, 1), tensor.permute(2, 0, 1) / 255),
        "data:image/png;base64," + base64.b64encode(content).decode(),
        pixels.astype(np.uint16) << 8,
    ]
    for source in sources:
        assert np.array_equal(np.asarray(load_source(source)), pixels), type(source)
    grey = pixels[..., 0]
    for source in (grey, grey[..., None], grey / 255, torch.from_numpy(grey.copy())[None]):
        assert np.array_equal(np.asarray(load_source(source))[..., 1], grey)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.com/a.jpg", r"https://example.com/a.jpg: addresses are not fetched; download"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,%%%", "no base64"),
        (b"", "empty"),
        (b"not an image", "no image in a known format"),
        (np.full((4, 4, 3), np.nan), "no numbers"),
        (np.full((4, 4, 3), 200.0), "within 0..1"),
        (np.zeros((3, 8, 9), np.uint8), "transpose"),
        (np.zeros((2, 8, 9, 3), np.uint8), "batch"),
        (np.zeros((8, 9), np.int64), "int64"),
        (io.StringIO("text"), "binary mode"),
        (7, "not int"),
    ],
)
def test_what_is_no_image_is_refused(source, message):
    with pytest.raises(ImageReadError, match=message):
        load_source(source)
