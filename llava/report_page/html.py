"""The pages as HTML: the server's, the one of its API, and a report that needs no other file. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

STATIC = Path(__file__).parent / "static"
_TEMPLATES = Path(__file__).parent / "templates"


@cache
def _environment() -> Environment:
    """The templates; all that is put into them is escaped."""
    made = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.policies["json.dumps_kwargs"] = {"sort_keys": False}  # stages stand in the order of the answer
    return made


@cache
def strings() -> dict[str, str]:
    """Every English text of the pages, by its name."""
    found: dict[str, str] = json.loads((STATIC / "strings.json").read_text(encoding="utf-8"))
    return found


def front_page(about: Mapping[str, Any]) -> str:
    """Returns the server's page.

    Args:
        about: The model and the limits, for the page's script.
    """
    return _render("page.html", data={"strings": strings(), "about": about})


def api_page(described: Mapping[str, Any]) -> str:
    """Returns a page about the API.

    Args:
        described: What ``/openapi.json`` has.
    """
    calls = [
        {"method": method.upper(), "path": path, **call}
        for path, methods in described["paths"].items()
        for method, call in methods.items()
    ]
    return _render("api.html", calls=calls, title=described["info"]["title"], about=described["info"]["description"])


def report_file(results: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """Returns a report of some images that needs no other file.

    Args:
        results: What ``result`` gives of each, with a preview.
        about: The model: its system and what must be known of it.
    """
    own = {name: Markup((STATIC / name).read_text(encoding="utf-8")) for name in ("style.css", "report.js", "file.js")}
    data = {"strings": strings(), "about": about, "results": results}
    return _render("file.html", data=data, own=own)


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(text=strings(), **values)
