"""Ray's processes: found or started, with room for the workers, and ended whatever happens. Imports no torch."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from llava.cli import log
from llava.errors import OptionError

_STORE_BYTES = 256 << 20
_TEMPORARY = "/tmp"
"""Where Ray's folder lies: the paths of its sockets have 107 characters at most."""
_JOINING_S = 300
"""How long the machines of a cluster may take to join it."""
_WATCH = """
import os, pathlib, shutil, sys, time
folder, driver = sys.argv[1:]
spared = {str(os.getpid()), driver}

def belongs(process):
    try:
        if folder.encode() in (process / "cmdline").read_bytes():
            return True
        return any(os.readlink(file).startswith(folder + "/") for file in (process / "fd").iterdir())
    except OSError:
        return False

sys.stdin.read()
calm = 0
while calm < 3:
    found = [p.name for p in pathlib.Path("/proc").glob("[0-9]*") if p.name not in spared and belongs(p)]
    for name in found:
        try:
            os.kill(int(name), 9)
        except OSError:
            pass
    calm = 0 if found else calm + 1
    time.sleep(0.2)
shutil.rmtree(folder, ignore_errors=True)
"""
"""Waits until whoever holds its input has ended, then ends all processes of Ray's folder, and removes it.

A process names the folder in its command line, or has files in it open. Some begin late, so it looks several times.
"""


def connect(ray: Any, workers: int, address: str | None) -> Callable[[], None]:
    """Finds or starts Ray; returns what ends what was started here.

    Raises:
        OptionError: No cluster answers at the address.
    """
    if ray.is_initialized():
        return _nothing
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or Ray would tell its makers
    os.environ.setdefault("RAY_worker_niceness", "0")  # or workers would wait for all else on the machine
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError) as error:
            raise OptionError(f"--ray-address {address}: no Ray cluster answers there: {error}") from None
        return lambda: ray.shutdown()
    cores = max(os.cpu_count() or 1, workers)
    folder = tempfile.mkdtemp(prefix="forgery-", dir=os.environ.get("RAY_TMPDIR", _TEMPORARY))
    # Before Ray starts: what a killed command leaves would live on for a minute, or for ever.
    watch = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCH, folder, str(os.getpid())],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )

    def end() -> None:
        ray.shutdown()
        watch.communicate()

    try:
        # An address in the environment would be taken before a start of its own.
        sizes = {"num_cpus": cores, "object_store_memory": _STORE_BYTES}
        ray.init("local", _temp_dir=folder, include_dashboard=False, **sizes, **common)
    except BaseException:
        end()
        raise
    return end


def _nothing() -> None:
    pass


def resources(ray: Any, workers: int, device: str, *, may_join: bool) -> dict[str, Any]:
    """What each worker has of the cluster: a GPU where there is any, else a CPU.

    Args:
        ray: The module.
        workers: How many there are.
        device: Of the command line.
        may_join: Whether further machines may join, which are waited for.

    Raises:
        OptionError: There is not enough.
    """
    kind = _kind(ray, device)
    until = time.monotonic() + (_JOINING_S if may_join else 0)
    waits = False
    while (found := int(ray.cluster_resources().get(kind, 0))) < workers:
        if time.monotonic() >= until:
            other = "; ask for as many, or add --device cpu" if kind == "GPU" else ""
            raise OptionError(f"--workers {workers}: there are only {found} {kind}s{other}")
        if not waits:
            log(f"waiting for {workers} {kind}s; the cluster has {found}")
            waits = True
        time.sleep(1)
    return {"num_gpus": 1, "num_cpus": 0} if kind == "GPU" else {"num_cpus": 1}


def _kind(ray: Any, device: str) -> str:
    if device == "auto":
        return "GPU" if ray.cluster_resources().get("GPU", 0) else "CPU"
    return "CPU" if device == "cpu" else "GPU"
