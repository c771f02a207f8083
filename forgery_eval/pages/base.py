"""What the pages have in common: one look, light or dark, and images that lie in the page itself."""

import base64
import io
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

COLOURS = {"real": "#2a7f9e", "fake": "#d1495b"}


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
    return _environment().get_template(template).render(colours=COLOURS, **values)


def image_source(image: Image.Image) -> str:
    """Returns an image as the source of an ``img``, so that the page needs no other file."""
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
