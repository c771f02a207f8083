"""What the pages have in common: one look, light or dark, and images that lie in the page itself."""

import base64
import hashlib
import io
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageOps

from forgery_eval.pages.tables import HEATS

COLOURS = {"real": "#2a7f9e", "fake": "#d1495b"}
THUMBNAIL = 224
"""Longer side of shown images, in pixels."""


@cache
def _environment() -> Environment:
    """The templates; all that is put into them is escaped unless a template says otherwise."""
    return Environment(
        loader=PackageLoader("forgery_eval.pages", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )


def render(template: str, **values: Any) -> str:
    """Returns a page.

    Args:
        template: Name of its template.
        **values: What the template shows; texts are escaped.
    """
    shared = {"colours": COLOURS, "heats": HEATS, "sort_script": _sort_script(), "policy": content_policy()}
    return _environment().get_template(template).render(**shared, **values)


@cache
def _sort_script() -> Markup:
    """The pages' only script, which sorts tables; they are read without it too."""
    return Markup((Path(__file__).parent / "templates" / "sort.js").read_text(encoding="utf-8"))


@cache
def content_policy() -> str:
    """Returns what a browser may load and run in a page: its own styles and images, and that one script."""
    digest = base64.b64encode(hashlib.sha256(_sort_script().encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def thumbnail(file: Path) -> Image.Image | None:
    """Returns an image small enough for a page; None if it cannot be shown."""
    try:
        with Image.open(file) as image:
            small = ImageOps.exif_transpose(image).convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
    except Exception:  # Pillow's plugins raise many kinds; an image that cannot be shown is no fault of the report
        return None
    return small


def image_source(image: Image.Image) -> str:
    """Returns an image as the source of an ``img``, so that the page needs no other file."""
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
