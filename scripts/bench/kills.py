"""Kills evaluations and their workers at random points, and resumes them; prints a line of JSON a kill.

Every round evaluates the embedded model on its samples with two workers, kills the command or one of its workers by
SIGKILL at a random moment, looks for processes that stay behind, and resumes to the end. The merged predictions must be
those of an unbroken run, byte by byte. From the repository's root:

    python -m scripts.bench.kills --kills 20
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava.assets import SAMPLES
from llava.cli import OptionParser, positive_int, run_cli
from llava.errors import DataError

_LEAVING_S = 15.0
"""How long the processes of a killed command may take to end."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=positive_int, default=20, help="default: 20")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--copies", type=positive_int, default=3, help="copies of each sample (default: 3)")
    parser.add_argument("--model-path", help="default: the embedded model")
    return parser.parse_args(arguments)


# --- processes


def below(root: int) -> dict[int, str]:
    """Returns the processes below one, with their command lines."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if state[0] != "Z":
            parents[int(folder.name)], titles[int(folder.name)] = int(state[1]), title
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return {process: titles[process] for process in found[1:]}


def workers(root: int) -> list[int]:
    """The processes below one that analyse images."""
    return [process for process, title in below(root).items() if title.startswith("ray::_Worker")]


def left(processes: dict[int, str], seconds: float = _LEAVING_S) -> dict[int, str]:
    """Returns those of some processes that do not end within a time."""
    until = time.monotonic() + seconds
    while True:
        here = {process: title for process, title in processes.items() if _is_alive(process, title)}
        if not here or time.monotonic() > until:
            return here
        time.sleep(0.2)


def _is_alive(process: int, title: str) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        # Another process can have the number by now.
        now = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return False
    return state != "Z" and now.split(" ")[0].split(":")[0] == title.split(" ")[0].split(":")[0]


# --- rounds


def merged(results: Path) -> bytes:
    """The one run's file.

    Raises:
        DataError: There are several, or shards are left.
    """
    files = sorted((results / "predictions").glob("*"))
    runs = [file for file in files if file.suffix == ".jsonl"]
    if len(runs) != 1 or any(file.suffix == ".shards" for file in files):
        raise DataError(f"{results} must hold one run and no shards; there: {[file.name for file in files]}")
    ids = Counter(json.loads(line).get("id") for line in runs[0].read_bytes().splitlines()[1:])
    if any(count > 1 for count in ids.values()):
        raise DataError(f"{runs[0]} has a prediction twice: {ids.most_common(1)}")
    return runs[0].name.encode() + runs[0].read_bytes()


def start(command: list[str], log: Path) -> "subprocess.Popen[bytes]":
    """Starts a command, and keeps what it says."""
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream)


def kill_once(command: list[str], log: Path, choice: random.Random, usual: float, driver: bool) -> dict[str, Any]:
    """Starts a command, kills it or one of its workers at a random moment, and waits for what is left of it.

    Args:
        command: The command.
        log: Where what it says goes.
        choice: Chooses the moment, from the start of the command (or of its first worker) to its usual end.
        usual: How long the command takes, in s.
        driver: Whether the command itself is killed.
    """
    begin = time.monotonic()
    process = start(command, log)
    while not driver and process.poll() is None and not workers(process.pid):
        time.sleep(0.1)
    with suppress(subprocess.TimeoutExpired):
        process.wait(choice.uniform(0.5, max(1.0, begin + usual - time.monotonic())))
    children, here = below(process.pid), workers(process.pid)
    moment = round(time.monotonic() - begin, 1)
    victim = process.pid if driver else choice.choice(here) if here else None
    if process.poll() is not None or victim is None:
        status = process.wait()
        return {"killed": None, "status": status, "seconds": time.monotonic() - begin, "left": []}
    os.kill(victim, signal.SIGKILL)
    status = process.wait()
    told = {"killed": "driver" if driver else "worker", "after_s": moment, "workers_up": len(here)}
    return {**told, "status": status, "left": list(left(children).values())}


def campaign(arguments: argparse.Namespace) -> int:
    """Kills so often, resuming; prints a line a kill and one of the whole.

    Returns:
        0 if all predictions were equal and no process was left.
    """
    choice = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_data(folder / "data", arguments.copies)
        command = [sys.executable, "-m", "llava", "eval", "--dataset_path", str(folder / "data"), "--device", "cpu"]
        command += ["--score-only", "--batch-size", "2", "--workers", "2", "--result_folder"]
        if arguments.model_path:
            command[4:4] = ["--model-path", arguments.model_path]
        log = folder / "log"
        begin = time.monotonic()
        if start([*command, str(folder / "whole")], log).wait() != 0:
            raise DataError(f"the unbroken run failed: {log.read_text(errors='replace')[-2000:]}")
        usual = time.monotonic() - begin
        whole = merged(folder / "whole")
        print(json.dumps({"images": images, "unbroken_s": round(usual, 1)}), flush=True)
        killed, wrong = 0, 0
        while killed < arguments.kills:
            told = kill_once([*command, str(folder / "cut")], log, choice, usual, driver=killed % 2 == 1)
            killed += told["killed"] is not None
            usual = min(usual, told.pop("seconds", usual))
            # Of the killed commands, some are killed again before they have finished.
            finishes = told["status"] == 0 or choice.random() < 0.5 or killed == arguments.kills
            if finishes and told["status"] != 0:
                told["resumed"] = start([*command, str(folder / "cut")], log).wait()
            if finishes:
                told["equal"] = merged(folder / "cut") == whole
                wrong += not told["equal"]
                shutil.rmtree(folder / "cut")
            wrong += bool(told["left"])
            print(json.dumps({"kill": killed, **told}), flush=True)
        print(json.dumps({"kills": killed, "wrong": wrong, "seconds": round(time.monotonic() - begin)}))
    return 1 if wrong else 0


def write_data(folder: Path, copies: int) -> int:
    """Writes the samples into folders real and fake, several times; returns how many images there are."""
    files = [file for file in sorted(SAMPLES.iterdir()) if file.suffix != ".json" and "_mask" not in file.name]
    for copy in range(copies):
        for file in files:
            target = folder / ("fake" if "fake" in file.name else "real") / f"{copy}-{file.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    return copies * len(files)


if __name__ == "__main__":
    sys.exit(run_cli(lambda: campaign(parse_arguments())))
