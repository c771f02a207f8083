"""Names of an image's branches and of their parts.

A branch is a tower and the projector behind it. The first one is ``clip``: its pixels are those that all towers share,
and its parts bear LLaVA's names. A further branch ``<name>`` has ``<name>_tower`` and ``<name>_mm_projector``.
"""

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
LORA = "lora"
_LANGUAGE_MODEL_PREFIXES = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")


def part_of(name: str) -> str:
    """Returns the part that a parameter belongs to: ``language_model``, or the module of ``model`` that holds it.

    Args:
        name: Its name without what adapters put before and into it.
    """
    if name.startswith(_LANGUAGE_MODEL_PREFIXES):
        return LANGUAGE_MODEL
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "model" else first


def is_tower(part: str) -> bool:
    """Whether a part is a tower."""
    return part.endswith("_tower")


def is_projector(part: str) -> bool:
    """Whether a part is a projector."""
    return part.endswith("mm_projector")
