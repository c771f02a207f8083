"""Images of every kind: formats, colours, links, and what a caller may give."""

import base64
import io
import random

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


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "PPM", "TGA", "ICO", "JPEG2000")


def mutated(content: bytes, random_: random.Random) -> bytes:
    changed = bytearray(content)
    way = random_.randrange(4)
    if way == 0:
        return bytes(changed[: random_.randrange(len(changed))])
    span = len(changed) if way == 1 else min(64, len(changed))
    for _ in range(random_.randint(1, 20)):
        changed[random_.randrange(span)] ^= 1 << random_.randrange(8)
    return bytes(changed) if way < 3 else bytes(changed) + random_.randbytes(50)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_images_are_read_or_named(tmp_path, count):
    random_ = random.Random(14)
    whole = [encoded(noise((40, 30), seed), kind) for seed, kind in enumerate(FORMATS)]
    for number in range(count):
        file = tmp_path / f"{number}.{random_.choice(('png', 'jpg', 'tif', 'heic'))}"
        file.write_bytes(mutated(whole[number % len(whole)], random_))
        try:
            assert load_source(file).mode == "RGB"
        except ImageReadError as error:
            assert file.name in str(error)
