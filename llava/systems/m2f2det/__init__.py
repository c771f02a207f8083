"""M2F2-Det (arXiv 2503.20188): a face-forgery detector of CLIP and a CNN, and the language model that explains it."""

from llava.systems.base import CheckpointFiles, SystemSpec

_ROOM = "llava.systems.m2f2det"
_OWN_PARTS = ("deepfake_encoder.", "deepfake_projector.", "token_sources.deepfake.")


def identify(files: CheckpointFiles) -> bool:
    """Whether it is a detector (a folder of ours, or a file with a learned prompt and a CNN) or a LLaVA with one."""
    if files.folder.is_dir():
        kind = files.config.get("model_type")
        if kind not in ("llava", "llava_llama"):
            return bool(kind == "m2f2det")
        return any(name.startswith("deepfake_") for name in files.config) or files.has_tensor(*_OWN_PARTS)
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
    options=f"{_ROOM}.options:M2F2DetOptions",
    answer_format=f"{_ROOM}.answer:FORMAT",
    checkpoint_format=f"{_ROOM}.layout:FORMAT",
    protocol=f"{_ROOM}.protocol",
    components={"deepfake": f"{_ROOM}.token:DeepfakeToken", "patches": f"{_ROOM}.token:PatchesOnly"},
    networks={"detector": f"{_ROOM}.training:DetectorTraining"},
    weights=(
        "CHELSEA234/llava-v1.5-7b-M2F2-Det",
        "openai/clip-vit-large-patch14-336",
    ),
)
