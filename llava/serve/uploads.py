"""What comes in: bodies of requests to images, everything checked before it is decoded. Imports no torch."""

import base64
import binascii
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from llava.errors import ImageReadError
from llava.images import PixelLimitError, decode, open_bytes
from llava.serve.limits import Limits, RequestError

Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF", "JPEG2000", "JXL")
    if name in Image.OPEN
)
"""Pillow's names of what is taken: formats of photographs, and none that runs other programs or holds others."""
_LONGEST_NAME = 200
_FIELDS = 32
_FIELD_BYTES = 1 << 20


@dataclass
class Upload:
    """An encoded image, and the name that its sender gave it; its bytes go when it is decoded."""

    name: str
    content: bytes


class Wants(BaseModel):
    """What is wanted of a report."""

    model_config = ConfigDict(extra="forbid")

    options: dict[str, Any] = Field(default={}, description="Options of the answer, such as score_only.")
    attention: bool = Field(default=False, description="Also give where the model looked, as a PNG.")
    mask: bool = Field(default=False, description="Also give the mask of forged pixels, if there is one.")
    preview: bool = Field(default=False, description="Also give the image as a small JPEG.")
    stream: bool = Field(default=False, description="Send the answers as server-sent events while they are decoded.")


class AnalyzeBody(Wants):
    """Images as data URLs, and what is wanted of them."""

    image: str | None = Field(default=None, description="A data URL; addresses are never fetched.")
    images: list[str] = Field(default=[], description="Several data URLs.")


class StabilityBody(BaseModel):
    """An image as a data URL."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(description="A data URL; addresses are never fetched.")
    options: dict[str, Any] = Field(default={}, description="Options of the answer, such as score_only.")


@dataclass(frozen=True)
class Asked:
    """A request as it was read."""

    uploads: list[Upload]
    wants: Wants


async def read_asked(request: Request, limits: Limits) -> Asked:
    """Reads a request with images, as a form or as JSON.

    Raises:
        RequestError: It is of another type, or not as it must be.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = read_model(AnalyzeBody, await read_body(request))
        urls = [*([] if body.image is None else [body.image]), *body.images]
        uploads = [data_upload(url, f"image {number}") for number, url in enumerate(urls, start=1)]
        asked = Asked(uploads, Wants(**{name: getattr(body, name) for name in Wants.model_fields}))
    elif kind == "multipart/form-data":
        asked = await _read_form(request, limits)
    else:
        raise RequestError(
            415, "unsupported_type", "send multipart/form-data with the field image, or application/json with image"
        )
    if not asked.uploads:
        raise RequestError(422, "no_image", "there is no image: give it as the field image")
    if len(asked.uploads) > limits.images:
        raise RequestError(413, "too_many_images", f"at most {limits.images} images a request are taken")
    return asked


async def read_body(request: Request) -> bytes:
    """Returns the whole body; what is too large or too slow was refused on its way."""
    try:
        return await request.body()
    except ClientDisconnect:
        raise gone() from None


def gone() -> RequestError:
    """The answer to somebody who is no longer there; nobody reads it."""
    return RequestError(499, "client_gone", "the client has gone")


def read_model(model: type[Any], body: bytes) -> Any:
    """Reads JSON as a model.

    Raises:
        RequestError: 422, it is none, or has other fields or values.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise RequestError(422, "bad_request", _first_fault(error)) from None


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg']}" if where else str(fault["msg"])


async def _read_form(request: Request, limits: Limits) -> Asked:
    try:
        form = await request.form(max_files=limits.images + 1, max_fields=_FIELDS, max_part_size=_FIELD_BYTES)
    except ClientDisconnect:
        raise gone() from None
    except HTTPException as error:
        status, code = (413, "too_many_images") if "Too many" in error.detail else (422, "bad_form")
        raise RequestError(status, code, f"the form cannot be taken: {error.detail}") from None
    except (ValueError, LookupError, AssertionError) as error:
        # Starlette turns what it finds into its own exception; the parser below it has others for odd boundaries.
        raise RequestError(422, "bad_form", f"this is no multipart form: {error}") from None
    try:
        return await _form_contents(form)
    finally:
        await form.close()


async def _form_contents(form: FormData) -> Asked:
    uploads, given = [], {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            uploads.append(Upload(plain_name(value.filename or name), await value.read()))
        elif name in Wants.model_fields:
            given[name] = value
        elif name not in ("image", "images"):
            raise RequestError(422, "unknown_field", f"there is no field {plain_name(name)!r}")
        elif value:
            raise RequestError(422, "no_file", f"the field {name} must be a file")
    values: dict[str, Any] = dict(given)
    try:
        if "options" in given:
            values["options"] = TypeAdapter(dict[str, Any]).validate_json(given["options"] or "{}")
        return Asked(uploads, Wants(**values))
    except ValidationError as error:
        raise RequestError(422, "bad_request", _first_fault(error)) from None


def plain_name(name: str) -> str:
    """A name that its sender gave, without what cannot be shown, cut."""
    return "".join(letter if letter.isprintable() else " " for letter in name)[:_LONGEST_NAME]


def data_upload(url: str, name: str) -> Upload:
    """Reads a data URL.

    Raises:
        RequestError: 422, it is none; addresses are never fetched.
    """
    if url[:5].lower() != "data:":
        raise RequestError(422, "no_data_url", f"{name}: addresses are never fetched; send the image as a data URL")
    head, comma, body = url[5:].partition(",")
    if not comma:
        raise RequestError(422, "no_data_url", f"{name}: the data URL has no comma before its data")
    if not head.lower().rstrip().endswith(";base64"):
        return Upload(name, unquote_to_bytes(body))
    try:
        return Upload(name, base64.b64decode("".join(body.split()), validate=True))
    except (binascii.Error, ValueError):
        raise RequestError(422, "no_data_url", f"{name}: the data URL is no base64") from None


def open_upload(upload: Upload, limits: Limits) -> Image.Image:
    """Decodes an image as RGB, after its size was looked at.

    Raises:
        RequestError: 422, it has too many pixels, or is no image that is taken.
    """
    try:
        with open_bytes(upload.content, upload.name, formats=FORMATS, most_pixels=limits.pixels) as image:
            return decode(image, upload.name)
    except PixelLimitError as error:
        raise RequestError(422, "too_many_pixels", str(error)) from None
    except ImageReadError as error:
        raise RequestError(422, "unreadable_image", str(error)) from None
