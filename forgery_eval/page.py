"""What the pages have in common: one look, light or dark, and pictures that lie in the page itself."""

import base64
import html
import io
from collections.abc import Iterable

from PIL import Image

COLOURS = {"real": "#2a7f9e", "fake": "#d1495b"}
_STYLE = """
:root{color-scheme:light dark;--text:#1c2430;--soft:#5a6778;--paper:#fff;--raised:#f4f6f9;--line:#d5dbe3;
--warn:#d08a1d;--warned:#fdf6e9}
@media (prefers-color-scheme:dark){:root{--text:#e3e8ee;--soft:#9aa7b6;--paper:#14181d;--raised:#1d232b;--line:#343d48;
--warned:#2b2417}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--text);background:var(--paper);margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid var(--line);padding-bottom:.2rem}
small,.note{color:var(--soft)}
.notice{border-left:4px solid var(--warn);padding:.5rem .9rem;background:var(--warned)}
.card{border:1px solid var(--line);border-radius:6px;padding:.7rem;overflow-wrap:anywhere}
"""


def page(title: str, parts: Iterable[str], style: str) -> str:
    """Returns a whole page.

    Args:
        title: Its title, plain text.
        parts: HTML of its body.
        style: CSS beside that of all pages.
    """
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}{style}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def escaped(text: object) -> str:
    """Returns any text as HTML."""
    return html.escape(str(text))


def picture_source(picture: Image.Image) -> str:
    """Returns a picture as the source of an ``img``, so that the page needs no other file."""
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
