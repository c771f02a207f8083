"""What files say of their own origin, as real programs write it, and as nobody should."""

import io
import json
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from llava import provenance
from llava.provenance import NOTHING, read_file_provenance, read_provenance

ALGORITHMIC = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP = {
    "attribute": f'<rdf:Description Iptc4xmpExt:DigitalSourceType="{ALGORITHMIC}"/>',
    "resource": f'<Iptc4xmpExt:DigitalSourceType rdf:resource="{ALGORITHMIC}"/>',
    "element": f"<Iptc4xmpExt:DigitalSourceType>{ALGORITHMIC}</Iptc4xmpExt:DigitalSourceType>",
    "list": f"<x:DigitalSourceType><rdf:Bag><rdf:li>{ALGORITHMIC}</rdf:li></rdf:Bag></x:DigitalSourceType>",
}
PARAMETERS = "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1"


def encoded(format_name: str, **settings: object) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 24), (10, 90, 200)).save(stream, format_name, **settings)
    return stream.getvalue()


def packet(body: str) -> bytes:
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF>{body}</rdf:RDF></x:xmpmeta>'.encode()


def exif(**tags: object) -> bytes:
    found = Image.Exif()
    numbers = {"software": 0x0131, "make": 0x010F, "model": 0x0110, "description": 0x010E}
    for name, value in tags.items():
        if name == "comment":
            found.get_ifd(0x8769)[0x9286] = value
        else:
            found[numbers[name]] = value
    return found.tobytes()


def png_with(**texts: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text)
    return encoded("PNG", pnginfo=info)


def told(content: bytes) -> list[tuple[str, str]]:
    return [(trace.origin, trace.text) for trace in read_provenance(content).traces]


@pytest.mark.parametrize("form", XMP)
@pytest.mark.parametrize("format_name", ["JPEG", "WEBP", "AVIF", "HEIF"])
def test_the_digital_source_type_is_read_in_every_form(format_name, form):
    content = encoded(format_name, xmp=packet(XMP[form]))
    assert told(content) == [("generated", "digital source type trainedAlgorithmicMedia")]


def test_xmp_is_read_in_png_and_tiff():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet(XMP["attribute"]).decode())
    assert told(encoded("PNG", pnginfo=info))[0][0] == "generated"
    assert told(encoded("TIFF", tiffinfo={700: packet(XMP["attribute"])}))[0][0] == "generated"


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("compositeWithTrainedAlgorithmicMedia", "generated"),
        ("digitalCapture", "camera"),
        ("humanEdits", "edited"),
        ("somethingNew", "unknown"),
    ],
)
def test_each_source_type_claims_what_it_says(name, origin):
    content = encoded("JPEG", xmp=packet(f'<a b:DigitalSourceType="http://x/{name}"/>'))
    assert told(content) == [(origin, f"digital source type {name}")]


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ({"software": "Adobe Photoshop 26.1"}, ("edited", "software Adobe Photoshop 26.1")),
        ({"software": "NovelAI"}, ("generated", "software NovelAI")),
        ({"software": "HDR+ 1.0"}, ("unknown", "software HDR+ 1.0")),
        ({"make": "Canon", "model": "EOS R5"}, ("camera", "camera Canon EOS R5")),
        ({"description": "a cat Job ID: 01234567-89ab"}, ("generated", "description a cat Job ID: 01234567-89ab")),
        ({"comment": b"UNICODE\0" + PARAMETERS.encode("utf-16-be")}, ("generated", None)),
        ({"comment": b"UNICODE\0" + PARAMETERS.encode("utf-16-le")}, ("generated", None)),
        ({"comment": b"ASCII\0\0\0" + PARAMETERS.encode()}, ("generated", None)),
    ],
)
def test_exif_names_software_camera_and_parameters(tags, wanted):
    for format_name in ("JPEG", "PNG", "WEBP", "HEIF"):
        (found,) = told(encoded(format_name, exif=exif(**tags)))
        assert found[0] == wanted[0] and (wanted[1] is None or found[1] == wanted[1])
        assert wanted[1] or "Steps: 20" in found[1]


@pytest.mark.parametrize(
    ("keyword", "text", "part"),
    [
        ("parameters", PARAMETERS, "Stable Diffusion web UI"),
        ("prompt", '{"3": {"class_type": "KSampler"}}', "ComfyUI"),
        ("invokeai_metadata", "{}", "InvokeAI"),
        ("Software", "NovelAI", "NovelAI"),
        ("Description", "a cat --v 6 Job ID: 01234567-89ab", "Job ID"),
        ("Comment", "made with Midjourney", "Midjourney"),
    ],
)
def test_text_chunks_of_known_generators_are_named(keyword, text, part):
    for packed in (False, True):
        info = PngImagePlugin.PngInfo()
        info.add_text(keyword, text, zip=packed)
        international = PngImagePlugin.PngInfo()
        international.add_itxt(keyword, text, zip=packed)
        for content in (encoded("PNG", pnginfo=info), encoded("PNG", pnginfo=international)):
            ((origin, found),) = told(content)
            assert origin == "generated" and part in found


def test_texts_that_claim_nothing_are_left_out():
    assert told(png_with(Comment="my holidays", Title="By the sea")) == []
    assert read_provenance(encoded("JPEG")).line == NOTHING


def test_the_strongest_claim_leads_the_line():
    content = encoded("JPEG", xmp=packet(XMP["attribute"]), exif=exif(make="Canon", software="GIMP 3"))
    line = read_provenance(content).line
    assert line.startswith("The file says that it was made or changed by generative AI (XMP: digital source type")
    assert "EXIF: software GIMP 3" in line and "EXIF: camera Canon" in line
    plain = read_provenance(encoded("JPEG", exif=exif(make="Canon"))).to_dict()
    assert plain["line"] == "The file says that a camera took it (EXIF: camera Canon)"
    assert json.loads(json.dumps(plain)) == plain


def test_a_files_text_is_cut_and_has_no_control_characters():
    ((_, text),) = told(png_with(Software="NovelAI\x1b[31m\r\n\x00" + "x" * 5000))
    assert len(text) <= 200 and text.isprintable() and "\n" not in text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        encoded("JPEG")[:300],
        png_with(parameters=PARAMETERS)[:-30],
        encoded("JPEG", exif=b"Exif\0\0" + b"\xff" * 200),
        encoded("JPEG", xmp=b"<x:xmpmeta " + b"\xff\xfe" * 500),
        encoded("PNG")[:33] + b"\xff\xff\xff\xfftEXt" + b"x" * 20,
        encoded("JPEG") + b"jumb c2pa",
    ],
)
def test_what_is_damaged_says_nothing_and_breaks_nothing(content):
    assert isinstance(read_provenance(content).line, str)


@pytest.mark.parametrize(
    "body",
    ["x:DigitalSourceType " * 40_000, 'x:DigitalSourceType="' * 40_000, "x:DigitalSourceType>" + "<a>" * 200_000],
)
def test_no_packet_takes_long_to_search(body):
    start = time.process_time()
    read_provenance(encoded("WEBP", xmp=packet(body)))
    read_provenance(png_with(Comment="Steps: 1, " * 60_000))
    assert time.process_time() - start < 3


def test_a_file_is_read_and_a_missing_one_says_nothing(tmp_path):
    (tmp_path / "a.png").write_bytes(png_with(parameters=PARAMETERS))
    assert read_file_provenance(tmp_path / "a.png").traces[0].origin == "generated"
    assert read_file_provenance(tmp_path / "absent.png").line == read_file_provenance(tmp_path).line == NOTHING


# --- C2PA


@pytest.fixture(scope="module")
def signer(tmp_path_factory):
    """A signer whose certificate nobody trusts."""
    c2pa = pytest.importorskip("c2pa")
    folder = tmp_path_factory.mktemp("certificates")
    return c2pa.C2paSignerInfo(c2pa.C2paSigningAlg.ES256, *certificates(folder), None)


def certificates(folder: Path) -> tuple[bytes, bytes]:
    """A certificate chain and its key, made by openssl."""
    usage = "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=emailProtection\n"
    (folder / "ext").write_text(f"{usage}subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n")
    for command in (
        "openssl ecparam -genkey -name prime256v1 -noout -out ca.key",
        "openssl req -x509 -new -key ca.key -subj /CN=TestCA/O=Test -days 3000 -out ca.pem",
        "openssl ecparam -genkey -name prime256v1 -noout -out ec.key",
        "openssl pkcs8 -topk8 -nocrypt -in ec.key -out own.key",
        "openssl req -new -key own.key -subj /CN=Signer/O=<b>Example -out own.csr",
        "openssl x509 -req -in own.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2000 -extfile ext -out own.pem",
    ):
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return (folder / "own.pem").read_bytes() + (folder / "ca.pem").read_bytes(), (folder / "own.key").read_bytes()


def signed(signer, format_name: str, source_type: str = ALGORITHMIC) -> bytes:
    """An image with a manifest."""
    import c2pa

    actions = {"actions": [{"action": "c2pa.created", "digitalSourceType": source_type}]}
    manifest = {
        "claim_generator_info": [{"name": "Example Camera", "version": "1"}],
        "assertions": [{"label": "c2pa.actions", "data": actions}],
    }
    out = io.BytesIO()
    with c2pa.Signer.from_info(signer) as own, c2pa.Builder(manifest) as builder:
        builder.sign(own, f"image/{format_name.lower()}", io.BytesIO(encoded(format_name)), out)
    return out.getvalue()


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
def test_a_manifest_is_read_and_its_signature_checked(signer, format_name):
    manifest, source = told(signed(signer, format_name))
    assert manifest[1] == (
        "made by Example Camera, signed by <b>Example (signature valid, its signer is not on a trust list)"
    )
    assert source == ("generated", "digital source type trainedAlgorithmicMedia")
    capture = told(signed(signer, format_name, ALGORITHMIC.replace("trainedAlgorithmicMedia", "digitalCapture")))
    assert capture[1][0] == "camera"


def test_a_changed_image_does_not_keep_a_valid_signature(signer):
    content = bytearray(signed(signer, "JPEG"))
    content[-20] ^= 0x55
    assert "signature invalid" in told(bytes(content))[0][1]


def test_without_the_library_a_manifest_is_named_and_not_judged(signer, monkeypatch):
    monkeypatch.setattr(provenance, "find_spec", lambda name: None)
    assert told(signed(signer, "JPEG")) == [("unknown", "a manifest that was not checked (pip install c2pa-python)")]
