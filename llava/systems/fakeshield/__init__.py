"""FakeShield (arXiv 2410.02761): a domain tag, a verdict with its explanation, and a mask of what was changed."""

from llava.systems.base import CheckpointFiles, SystemSpec

_ROOM = "llava.systems.fakeshield"
_PARTS = ("DTG.pth", "DTG.safetensors", "DTE-FDM", "MFLM")
_TAGGER_HEAD, _TAGGER_BLOCK = "fc.weight", "layer4.0.conv3.weight"


def identify(files: CheckpointFiles) -> bool:
    """Whether it is the published folder, its segmenter, or its tagger; a bare explainer is a plain LLaVA."""
    if files.folder.is_dir():
        if files.config.get("model_type") == "glamm":
            return files.has_tensor("text_hidden_fcs.")
        return not files.config and any((files.folder / name).exists() for name in _PARTS)
    if files.folder.suffix not in (".pth", ".safetensors"):
        return False
    from llava.errors import CheckpointError
    from llava.model.checkpoint_files import read_tensor_file  # loads torch, which pickled tensors need

    try:
        tensors = read_tensor_file(files.folder)
    except CheckpointError:
        return False
    return _TAGGER_BLOCK in tensors and _TAGGER_HEAD in tensors and tensors[_TAGGER_HEAD].shape[0] == 3


SPEC = SystemSpec(
    name="fakeshield",
    title="FakeShield",
    identify=identify,
    system=f"{_ROOM}.system:FakeShield",
    options=f"{_ROOM}.options:FakeShieldOptions",
    answer_format=f"{_ROOM}.answer:FORMAT",
    checkpoint_format="llava.model.checkpoint:PLAIN",
    protocol=f"{_ROOM}.protocol",
    networks={"tagger": f"{_ROOM}.training:TaggerTraining", "segmenter": f"{_ROOM}.training:SegmenterTraining"},
    weights=("zhipeixu/fakeshield-v1-22b", "openai/clip-vit-large-patch14-336"),
)
