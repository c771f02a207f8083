"""What tests share: no network, one thread a worker, and the reference folder."""

import os
import threading
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # small models lose more by waiting for a second thread than they gain

import pytest
from tqdm import tqdm

from llava import assets, cli
from tests.reference import Reference
from tests.trained import NOTICE, change_config, trained_folder

GOLDENS = Path(__file__).parent / "data" / "goldens"

# tqdm's own lock is shared with forked copies: one that a test kills while it draws would keep it from this process.
tqdm.set_lock(threading.RLock())


@pytest.fixture(autouse=True)
def fresh_notes(monkeypatch) -> None:
    """Lets each test begin as a process does: nothing was said, and notes are wanted."""
    monkeypatch.setattr(cli, "_said", set())
    monkeypatch.setattr(cli, "_quiet", False)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """Keeps what is kept between runs out of the user's home; processes that tests start inherit it."""
    os.environ["FORGERY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def bundled() -> Reference:
    """The reference folder that the repository has."""
    return Reference(GOLDENS)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with a small model that answers in the published format."""
    return trained_folder(tmp_path_factory.mktemp("trained") / "model", GOLDENS / "base")


@pytest.fixture
def default_model(trained, tmp_path, monkeypatch) -> Path:
    """The small model in the place of the embedded one, with a notice."""
    folder = tmp_path / "default"
    folder.mkdir()
    for file in trained.iterdir():
        (folder / file.name).symlink_to(file)
    change_config(folder, notice=NOTICE)
    monkeypatch.setattr(assets, "DEMO_MODEL", folder)
    return folder
