"""Ray's processes: found or started, with room for the workers, and ended whatever happens. Imports no torch."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from llava.cli import log
from llava.errors import OptionError

_STORE_BYTES = 256 << 20
_JOINING_S = 300
"""How long the machines of a cluster may take to join it."""
_WATCH = """
import os, pathlib, sys
sys.stdin.read()
for file in pathlib.Path("/proc").glob("[0-9]*/fd/*"):
    try:
        is_open = os.readlink(file).startswith(sys.argv[1] + "/")
        if is_open and (file.parents[1] / "cmdline").read_bytes().startswith(b"ray::"):
            os.kill(int(file.parts[2]), 9)
    except OSError:
        pass
"""
"""Waits until whoever holds its input has ended, then ends Ray's processes that have files of a folder open."""


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
    # An address in the environment would be taken before a start of its own.
    started = ray.init("local", num_cpus=cores, object_store_memory=_STORE_BYTES, include_dashboard=False, **common)
    # Ray's helpers would outlive a killed command by a minute.
    watch = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCH, started.address_info["session_dir"]],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )

    def end() -> None:
        ray.shutdown()
        watch.communicate()

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
