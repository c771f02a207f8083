"""Baselines to measure against: a linear probe on frozen features, and a small convolutional network."""

from llava.systems.base import CheckpointFiles, SystemSpec

_ROOM = "llava.systems.baseline"
PROBE, CNN = "linear_probe", "small_cnn"


def identify(files: CheckpointFiles) -> bool:
    """Whether it is a baseline that was saved here."""
    return files.config.get("model_type") in (PROBE, CNN)


SPEC = SystemSpec(
    name="baseline",
    title="Baseline",
    identify=identify,
    system=f"{_ROOM}.system:Baseline",
    networks={"cnn": f"{_ROOM}.cnn:CnnTraining"},
)
