"""What a file says of its own origin: C2PA manifest, digital source type, software, generators' parameters, camera.

It is never part of a verdict or a score: whoever forges an image can write or remove all of it. Imports no torch.
"""

import io
import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from PIL import ExifTags, Image, ImageFile, IptcImagePlugin

from llava.images import open_bytes

Origin = Literal["generated", "edited", "camera", "unknown"]
ORIGINS: dict[Origin, str] = {
    "generated": "says that it was made or changed by generative AI",
    "edited": "says that it was edited",
    "camera": "says that a camera took it",
    "unknown": "says something of its origin",
}
"""What a trace claims, in words."""
NOTHING = "The file says nothing of its origin, which is no sign for or against it"
_LONGEST = 200
"""Characters of a file's own text that are kept."""
_MOST_TEXT = 1 << 20
"""Bytes that a compressed text chunk may have, unpacked."""
_MOST_SEARCHED = 1 << 17
"""Characters of a text that are searched."""

_SOURCE_TYPES: dict[str, Origin] = {
    "trainedAlgorithmicMedia": "generated",
    "compositeWithTrainedAlgorithmicMedia": "generated",
    "algorithmicMedia": "generated",
    "compositeSynthetic": "generated",
    "algorithmicallyEnhanced": "edited",
    "humanEdits": "edited",
    "minorHumanEdits": "edited",
    "compositeCapture": "edited",
    "composite": "edited",
    "digitalCapture": "camera",
    "computationalCapture": "camera",
}
"""IPTC's digital source types (cv.iptc.org/newscodes/digitalsourcetype) that claim something of this kind."""
_GENERATORS = re.compile(
    r"stable[ -]?diffusion|midjourney|dall[·\-. ]?e|novelai|comfyui|invokeai|automatic1111|fooocus|firefly|imagen\b"
    r"|ideogram|leonardo\.ai|made with google ai|gpt-4o|gpt-image|chatgpt|openai|dreamstudio|\bflux\b|adobe_firefly"
    r"|bing image creator|image creator from|grok|meta ai|imagined with ai|recraft|playground ?ai|nightcafe|seedream",
    re.IGNORECASE,
)
_EDITORS = re.compile(
    r"photoshop|lightroom|gimp|affinity|capture one|snapseed|pixelmator|paint\.net|canva|faceapp|facetune|luminar"
    r"|darktable|rawtherapee|meitu|picsart|krita|corel|acdsee",
    re.IGNORECASE,
)
_PARAMETER_CHUNKS = {
    "parameters": "Stable Diffusion web UI",
    "prompt": "ComfyUI",
    "workflow": "ComfyUI",
    "generation_data": "a diffusion generator",
    "invokeai_metadata": "InvokeAI",
    "invokeai_graph": "InvokeAI",
    "sd-metadata": "InvokeAI",
    "dream": "InvokeAI",
    "fooocus_scheme": "Fooocus",
}
"""Keywords of text chunks in which known generators keep their parameters."""
_A1111 = re.compile(r"Steps: \d{1,4}, .{0,2000}?Sampler: ", re.DOTALL)
"""How the parameters of many diffusion front ends read, wherever they stand."""
_MIDJOURNEY = re.compile(r"Job ID: [0-9a-f]{8}-", re.IGNORECASE)
# Lengths are bounded, so that no text, however it was made, takes long to search.
_XMP_VALUE = (
    r"""(?:\s{0,9}=\s{0,9}(?P<quote>["'])(?P<attribute>.{0,500}?)(?P=quote)"""
    r"""|[^>]{0,300}?rdf:resource\s{0,9}=\s{0,9}["'](?P<resource>[^"']{0,500})"""
    r"""|[^>/]{0,300}>\s{0,99}(?:<[^>]{0,300}>\s{0,99}){0,4}(?P<element>[^<]{0,500}))"""
)
"""A property's value: an attribute, a resource, or an element, also in a list."""
_C2PA_TYPES = {name: f"image/{name.lower()}" for name in ("JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF", "GIF")}
_C2PA_TYPES["MPO"] = "image/jpeg"
_C2PA_OFFLINE = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
_SOFTWARE_TAG, _DESCRIPTION_TAG, _MAKE_TAG, _MODEL_TAG, _COMMENT_TAG = 0x0131, 0x010E, 0x010F, 0x0110, 0x9286


@dataclass(frozen=True)
class Trace:
    """One thing that a file says.

    Attributes:
        where: Which part of the file says it.
        origin: What it claims, see ``ORIGINS``.
        text: In words; what the file itself says is cut and has no control characters.
    """

    where: str
    origin: Origin
    text: str


@dataclass(frozen=True)
class Provenance:
    """What a file says of its own origin.

    Attributes:
        traces: In the order of their weight: signed ones first.
    """

    traces: tuple[Trace, ...] = ()

    @property
    def line(self) -> str:
        """One line for reading."""
        if not self.traces:
            return NOTHING
        strongest = next(origin for origin in ORIGINS if any(trace.origin == origin for trace in self.traces))
        named = "; ".join(f"{trace.where}: {trace.text}" for trace in self.traces)
        return f"The file {ORIGINS[strongest]} ({named})"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {"line": self.line, "traces": [asdict(trace) for trace in self.traces]}


def read_provenance(content: bytes) -> Provenance:
    """Reads what an encoded image says of its origin.

    Whatever cannot be read says nothing: parts that are damaged are left out, and so is a file that is no image.

    Args:
        content: The file's bytes.
    """
    try:
        image = open_bytes(content, "the image")
    except OSError:  # no image: whoever analyses it says so
        return Provenance()
    with image:
        format_name = image.format or ""
        found = [*_c2pa(content, format_name)]
        for reader in (_xmp, _exif, _iptc):
            # Pillow's parsers raise many kinds of exceptions on damaged parts.
            with suppress(Exception):
                found += reader(image)
    if format_name == "PNG":
        found += _text_chunks(content)
    return Provenance(tuple(dict.fromkeys(found)))


def read_file_provenance(file: Path) -> Provenance:
    """Reads what a file says of its origin; a file that cannot be read says nothing."""
    try:
        return read_provenance(file.read_bytes()) if file.is_file() else Provenance()
    except OSError:
        return Provenance()


def _cleaned(value: object) -> str:
    """A file's own text on one line, without control characters, cut."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    plain = " ".join("".join(c if c.isprintable() or c.isspace() else " " for c in text).split())
    return plain if len(plain) <= _LONGEST else plain[: _LONGEST - 1] + "…"


def _claim(text: str) -> Origin:
    """What the name of a program, or a text that one wrote, claims."""
    text = text[:_MOST_SEARCHED]
    if _GENERATORS.search(text) or _A1111.search(text) or _MIDJOURNEY.search(text):
        return "generated"
    return "edited" if _EDITORS.search(text) else "unknown"


# --- XMP, EXIF, IPTC


def _xmp_values(packet: str, name: str) -> Iterator[str]:
    """Values of a property, as an attribute or an element, of any namespace prefix."""
    for match in re.finditer(rf"[\w-]+:{name}\b{_XMP_VALUE}", packet, re.DOTALL):
        value = match["attribute"] or match["resource"] or match["element"]
        if value and value.strip():
            yield unescape(value.strip())


def _xmp(image: Image.Image) -> Iterator[Trace]:
    raw = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or getattr(image, "tag_v2", {}).get(700) or b""
    packet = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)
    packet = packet[:_MOST_SEARCHED]
    for value in dict.fromkeys(_xmp_values(packet, "DigitalSourceType")):
        yield _source_type(value, "XMP")
    for name in ("CreatorTool", "softwareAgent", "Credit", "AISystemUsed"):
        for value in dict.fromkeys(_xmp_values(packet, name)):
            origin = "generated" if name == "AISystemUsed" else _claim(value)
            if name != "Credit" or origin == "generated":
                yield Trace("XMP", origin, f"{name} {_cleaned(value)}")
    for value in _xmp_values(packet, "AIGC"):
        yield Trace("XMP", "generated", f"AIGC label {_cleaned(value)}")


def _source_type(value: str, where: str) -> Trace:
    name = value.rstrip("/").rpartition("/")[2]
    return Trace(where, _SOURCE_TYPES.get(name, "unknown"), f"digital source type {_cleaned(name)}")


def _exif(image: Image.Image) -> Iterator[Trace]:
    exif = image.getexif()
    inner = exif.get_ifd(ExifTags.IFD.Exif)
    software = exif.get(_SOFTWARE_TAG)
    if software:
        yield Trace("EXIF", _claim(_cleaned(software)), f"software {_cleaned(software)}")
    for name, value in (("description", exif.get(_DESCRIPTION_TAG)), ("comment", _comment(inner.get(_COMMENT_TAG)))):
        text = _cleaned(value or "")
        if _claim(str(value or "")) == "generated":
            yield Trace("EXIF", "generated", f"{name} {text}")
    maker = " ".join(_cleaned(part) for part in (exif.get(_MAKE_TAG), exif.get(_MODEL_TAG)) if part)
    if maker:
        yield Trace("EXIF", _camera_claim(maker), f"camera {maker}")


def _camera_claim(maker: str) -> Origin:
    return "generated" if _GENERATORS.search(maker) else "camera"


def _comment(value: object) -> str:
    """Text of an EXIF user comment, which begins with eight bytes that name its encoding."""
    if not isinstance(value, bytes):
        return str(value or "")
    if value.startswith(b"UNICODE"):
        body = value[8:]
        # The byte order is the file's, or not; of Latin letters one half of each pair is 0.
        return body.decode("utf-16-be" if body[:1] == b"\0" else "utf-16-le", "replace")
    return value[8:].decode("utf-8", "replace")


def _iptc(image: Image.Image) -> Iterator[Trace]:
    if not isinstance(image, ImageFile.ImageFile):
        return
    fields: Mapping[tuple[int, int], Any] = IptcImagePlugin.getiptcinfo(image) or {}
    for key, name in (((2, 65), "program"), ((2, 110), "credit"), ((2, 40), "instructions")):
        values = fields.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            text = _cleaned(value)
            if key == (2, 65) or _claim(text) == "generated":
                yield Trace("IPTC", _claim(text), f"{name} {text}")


# --- text chunks of PNG


def _text_chunks(content: bytes) -> Iterator[Trace]:
    for keyword, text in _png_texts(content):
        generator = _PARAMETER_CHUNKS.get(keyword.lower())
        where = f"PNG text {_cleaned(keyword)!r}"
        if generator is not None:
            yield Trace(where, "generated", f"parameters of {generator}: {_cleaned(text)}")
        elif keyword == "XML:com.adobe.xmp":
            continue
        elif keyword.lower() in ("software", "source", "comment", "description", "title"):
            origin = _claim(text)
            if origin == "generated" or keyword.lower() == "software":
                yield Trace(where, origin, _cleaned(text))


def _png_texts(content: bytes) -> Iterator[tuple[str, str]]:
    """Keyword and text of each text chunk (tEXt, zTXt, iTXt), whatever else is wrong with the file."""
    at = 8
    while at + 8 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        at += 12 + length
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            continue
        keyword, _, rest = body.partition(b"\0")
        with suppress(zlib.error, IndexError):
            yield keyword.decode("latin-1"), _chunk_text(kind, rest)


def _chunk_text(kind: bytes, rest: bytes) -> str:
    if kind == b"tEXt":
        return _plain(rest[:_MOST_TEXT])
    if kind == b"zTXt":
        return _plain(zlib.decompressobj().decompress(rest[1:], _MOST_TEXT))
    packed = rest[0] == 1
    text = rest[2:].split(b"\0", 2)[2]
    plain = zlib.decompressobj().decompress(text, _MOST_TEXT) if packed else text[:_MOST_TEXT]
    return plain.decode("utf-8", "replace")


def _plain(raw: bytes) -> str:
    """Text that should be Latin-1, and that many programs write as UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


# --- C2PA


def _c2pa(content: bytes, format_name: str) -> Iterator[Trace]:
    """What a C2PA manifest inside the file says, and whether its signature holds; nothing is fetched."""
    if b"c2pa" not in content or b"jumb" not in content or format_name not in _C2PA_TYPES:
        return
    if find_spec("c2pa") is None:
        yield Trace("C2PA", "unknown", "a manifest that was not checked (pip install c2pa-python)")
        return
    import c2pa

    try:
        with c2pa.Context(c2pa.Settings.from_dict(_C2PA_OFFLINE)) as context:
            reader = c2pa.Reader(_C2PA_TYPES[format_name], io.BytesIO(content), context=context)
            with reader:
                store = json.loads(reader.json())
    except (c2pa.C2paError, ValueError) as error:
        yield Trace("C2PA", "unknown", f"a manifest that cannot be read: {_cleaned(error)}")
        return
    yield from _manifest(store)


def _manifest(store: Mapping[str, Any]) -> Iterator[Trace]:
    manifest = store.get("manifests", {}).get(store.get("active_manifest"), {})
    state = str(store.get("validation_state", "unknown")).lower()
    signer = manifest.get("signature_info") or {}
    known = {"trusted": "its signer is on the trust list", "valid": "its signer is not on a trust list"}
    checked = f"signature {state}" + (f", {known[state]}" if state in known else "")
    generators = manifest.get("claim_generator_info") or [{"name": manifest.get("claim_generator", "")}]
    maker = _cleaned(" ".join(str(part.get("name", "")) for part in generators))
    issuer = _cleaned(signer.get("issuer") or signer.get("common_name") or "somebody unnamed")
    yield Trace("C2PA", _claim(maker), f"made by {maker or 'an unnamed program'}, signed by {issuer} ({checked})")
    for assertion in manifest.get("assertions", []):
        if not str(assertion.get("label", "")).startswith("c2pa.actions"):
            continue
        for action in (assertion.get("data") or {}).get("actions", []):
            if action.get("digitalSourceType"):
                yield _source_type(str(action["digitalSourceType"]), f"C2PA, {_cleaned(action.get('action', ''))}")
