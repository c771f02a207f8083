"""Any vision-language model behind an OpenAI-compatible endpoint, asked in plain words or in those of a system here."""

from llava.systems.base import CheckpointFiles, SystemSpec

_ROOM = "llava.systems.endpoint"
MODEL_TYPE = "openai_endpoint"


def identify(files: CheckpointFiles) -> bool:
    """Whether it is a folder that names an endpoint."""
    return bool(files.config.get("model_type") == MODEL_TYPE)


SPEC = SystemSpec(
    name="endpoint",
    title="Endpoint",
    identify=identify,
    system=f"{_ROOM}.system:EndpointSystem",
    answer_format=f"{_ROOM}.answer:FORMAT",
)
