"""FakeReasoning (arXiv 2503.21210): four tagged stages, CLIP and DINOv2 joined by forgery-aware fusion, and P(fake)."""

from llava.systems.base import CheckpointFiles, SystemSpec

_ROOM = "llava.systems.fakereasoning"
_OWN_PARTS = ("model.crossattention.", "model.fusion.", "model.dino_mm_projector.", "dino_tower.")


def identify(files: CheckpointFiles) -> bool:
    """Whether it is a LLaVA-Llama checkpoint, merged or as LoRA, with a second branch or a fusion."""
    if files.config.get("model_type") != "llava_llama":
        return False
    return files.config.get("cpm_tokens") is not None or files.has_tensor(*_OWN_PARTS)


SPEC = SystemSpec(
    name="fakereasoning",
    title="FakeReasoning",
    identify=identify,
    system=f"{_ROOM}.system:FakeReasoning",
    options=f"{_ROOM}.options:FakeReasoningOptions",
    answer_format=f"{_ROOM}.answer:FORMAT",
    checkpoint_format=f"{_ROOM}.checkpoint:FORMAT",
    objective=f"{_ROOM}.training:FakeReasoningObjective",
    protocol=f"{_ROOM}.protocol",
    weights=("AnnaGao/FakeReasoning", "openai/clip-vit-large-patch14-336"),
)
