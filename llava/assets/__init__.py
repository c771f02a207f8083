"""What comes with the package: a small model and sample images. Imports no torch."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "demo_model"
SAMPLES = Path(__file__).parent / "samples"


def demo_model_folder() -> Path | None:
    """Returns the folder of the embedded demonstration model; None where an installation is without it."""
    return DEMO_MODEL if (DEMO_MODEL / "config.json").is_file() else None
