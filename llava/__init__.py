"""Tells AI-generated and manipulated images from real ones, and says why."""

import logging
from typing import TYPE_CHECKING, Any

from llava.interrupts import leave_at_once

leave_at_once()  # before anything that takes long to import

if TYPE_CHECKING:
    from llava.detector import ForgeryDetector
    from llava.model.builder import load_pretrained_model
    from llava.report import ForgeryReport

    __version__: str

# They warn of a kernel that nobody asked for, and of damaged files that are named anyway; --verbose shows it.
for _library in ("bitsandbytes", "tifffile"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)

__all__ = ["ForgeryDetector", "ForgeryReport", "__version__", "load_pretrained_model"]
DISTRIBUTION = "fakereasoning"
"""Name of the installed package, whose metadata has the version and the extras."""
_HOMES = {
    "ForgeryDetector": "llava.detector",
    "ForgeryReport": "llava.report",
    "load_pretrained_model": "llava.model.builder",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on its first use, so that ``import llava`` costs no torch."""
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'llava' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown (not installed)"
