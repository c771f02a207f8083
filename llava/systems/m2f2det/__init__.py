"""M2F2-Det (arXiv 2503.20188): a face-forgery detector of CLIP and a CNN, with its own score."""

from llava.systems.base import CheckpointFiles, SystemSpec

_ROOM = "llava.systems.m2f2det"


def identify(files: CheckpointFiles) -> bool:
    """Whether it is a detector: a folder of ours, or a file with a learned prompt and a CNN."""
    if files.folder.is_dir():
        return files.config.get("model_type") == "m2f2det"
    if files.folder.suffix not in (".pth", ".safetensors"):
        return False
    from llava.errors import CheckpointError
    from llava.systems.m2f2det.checkpoint import read_detector_tensors  # loads torch, which pickled tensors need

    try:
        return "clip_text_encoder.prompt_tokens" in read_detector_tensors(files.folder)
    except CheckpointError:
        return False


SPEC = SystemSpec(
    name="m2f2det",
    title="M2F2-Det",
    identify=identify,
    system=f"{_ROOM}.system:M2F2Det",
    networks={"detector": f"{_ROOM}.training:DetectorTraining"},
    weights=("openai/clip-vit-large-patch14-336",),
)
