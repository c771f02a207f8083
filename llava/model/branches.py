"""Names of an image's branches and of their parts.

A branch is a tower and the projector behind it. The first one is ``clip``: its pixels are those that all towers share,
and its parts bear LLaVA's names. A further branch ``<name>`` has ``<name>_tower`` and ``<name>_mm_projector``.
"""

from collections.abc import Iterable

FIRST = "clip"


def tower_name(branch: str) -> str:
    """Returns the name of a branch's tower within the model."""
    return "vision_tower" if branch == FIRST else f"{branch}_tower"


def projector_name(branch: str) -> str:
    """Returns the name of a branch's projector within the model."""
    return "mm_projector" if branch == FIRST else f"{branch}_mm_projector"


def source_field(branch: str) -> str:
    """Returns the config field that says where the tower's weights came from."""
    return f"mm_{tower_name(branch)}"


def attention_name(branch: str) -> str:
    """Returns the name under which a tower's attention stands beside its features."""
    return f"{branch}_attention"


# --- parts of a model that are trained or frozen together

LANGUAGE_MODEL = "language_model"
SOURCES = "token_sources"
LORA = "lora"
_LANGUAGE_MODEL_PREFIXES = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")


def part_of(name: str) -> str:
    """Returns the part that a parameter belongs to: ``language_model``, or the module of ``model`` that holds it.

    The parts of a token source are ``<source>_<module>``.

    Args:
        name: Its name without what adapters put before and into it.
    """
    if name.startswith(_LANGUAGE_MODEL_PREFIXES):
        return LANGUAGE_MODEL
    first, *rest = name.split(".")
    if first != "model":
        return first
    # A token source has a part of its own for each module in it, such as a projector that is trained apart.
    return "_".join(rest[1:3]) if rest[0] == SOURCES and len(rest) > 3 else rest[0]


def part_path(part: str, modules: Iterable[str]) -> str:
    """Returns the path within ``model`` of the module that a part is.

    Args:
        part: Its name.
        modules: Paths within ``model`` of all modules; a part that is none of them is returned as it is.
    """
    inside = [path for path in modules if path.startswith(f"{SOURCES}.") and part_of(f"model.{path}.x") == part]
    return min(inside, key=len, default=part)


def is_tower(part: str) -> bool:
    """Whether a part is a tower."""
    return part.endswith("_tower")


def is_projector(part: str) -> bool:
    """Whether a part is a projector."""
    return part.endswith("mm_projector")
