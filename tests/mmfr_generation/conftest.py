import subprocess
import sys

import pytest

from tests.mmfr_generation.annotation_helpers import REPOSITORY, noise_image, script_environment
from tests.mmfr_generation.api_server import ApiServer


@pytest.fixture
def server():
    with ApiServer() as running:
        yield running


@pytest.fixture
def run_script():
    """Runs a script of the package in a process of its own, as its user does."""

    def run(name, *arguments, cwd, **environment):
        command = [sys.executable, str(REPOSITORY / "mmfr_generation" / f"{name}.py"), *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd, env=script_environment(**environment), capture_output=True, text=True, timeout=120
        )

    return run


@pytest.fixture
def make_images(tmp_path):
    """Makes a folder of images: ``make_images(names, folder)``."""

    def make(names, folder="photos", start=0):
        root = tmp_path / folder
        for seed, name in enumerate(names, start=start):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            noise_image(seed).save(path)
        return root

    return make
