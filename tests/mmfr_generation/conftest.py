import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from api_server import KEY, ApiServer
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "tests" / "data"


@pytest.fixture
def server():
    with ApiServer() as running:
        yield running


def script_environment(**more):
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OPENAI_API_KEY": KEY, **more}


@pytest.fixture
def run_script():
    """Runs a script of the package in a process of its own, as its user does."""

    def run(name, *arguments, cwd, **environment):
        command = [sys.executable, str(REPOSITORY / "mmfr_generation" / f"{name}.py"), *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd, env=script_environment(**environment), capture_output=True, text=True, timeout=120
        )

    return run


def noise_image(seed, size=(64, 48)):
    """A smooth random picture: different seeds look different, and scaling or compressing hardly changes it."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def pictures(tmp_path):
    """Makes a folder of images: ``pictures(names, folder)``."""

    def make(names, folder="photos", start=0):
        root = tmp_path / folder
        for seed, name in enumerate(names, start=start):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            noise_image(seed).save(path)
        return root

    return make
