"""FakeVLM (arXiv 2503.14905): LLaVA-1.5 fine-tuned whole to answer with a verdict sentence and a list of clues."""

from llava.systems.base import CheckpointFiles, SystemSpec

_ROOM = "llava.systems.fakevlm"
_WEIGHTS = "lingcco/fakeVLM"


def identify(files: CheckpointFiles) -> bool:
    """Whether it is the authors' repository.

    Its files are those of any LLaVA-1.5. What is trained here names its system; other copies need ``--system``.
    """
    return files.config.get("model_type") == "llava" and files.source.lower() == _WEIGHTS.lower()


SPEC = SystemSpec(
    name="fakevlm",
    title="FakeVLM",
    identify=identify,
    system=f"{_ROOM}.system:FakeVLM",
    options=f"{_ROOM}.options:FakeVLMOptions",
    answer_format=f"{_ROOM}.answer:FORMAT",
    checkpoint_format=f"{_ROOM}.checkpoint:FORMAT",
    protocol=f"{_ROOM}.protocol",
    weights=(_WEIGHTS,),
)
