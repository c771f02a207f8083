"""What several tests of the data pipeline share."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from tests.mmfr_generation.api_server import KEY

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "tests" / "data"


def script_environment(**more):
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OPENAI_API_KEY": KEY, **more}


def noise_image(seed, size=(64, 48)):
    """A smooth random image: different seeds look different, and scaling or compressing hardly changes it."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
