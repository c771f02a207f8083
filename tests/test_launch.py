"""How processes are started, and what is printed when one ends too early."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from llava.train import launch

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, sys, time
rank = os.environ["RANK"]
if sys.argv[1] == "well":
    sys.stdout.write(f"{rank} of {os.environ['WORLD_SIZE']}\\n")
elif rank == "1":
    print("error: one sentence", file=sys.stderr)
    sys.exit(3)
else:
    time.sleep(60)
"""


def raising(error: BaseException):
    def torchrun(arguments):
        raise error

    return torchrun


@pytest.mark.parametrize(
    ("exitcode", "status", "message"),
    [(1, 1, ""), (7, 7, ""), (-9, 137, "error: process 2 was ended by SIGKILL"), (-11, 139, "ended by SIGSEGV")],
)
def test_the_status_is_that_of_the_process_that_failed_first(monkeypatch, capsys, exitcode, status, message):
    first = SimpleNamespace(exitcode=exitcode, timestamp=1)
    failures = {0: SimpleNamespace(exitcode=-15, timestamp=2), 2: first}
    error = ChildFailedError.__new__(ChildFailedError)
    error.failures = failures
    monkeypatch.setattr(launch, "torchrun", raising(error))
    assert launch.main([]) == status
    heard = capsys.readouterr().err
    assert message in heard and bool(heard) == bool(message)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["--standalone", "x.py"], ["--local-addr", "127.0.0.1", "--standalone", "x.py"]), (["--nnodes", "2"],) * 2],
)
def test_processes_of_one_machine_need_no_name_that_resolves(monkeypatch, given, expected):
    seen = []
    monkeypatch.setattr(launch, "torchrun", seen.append)
    assert launch.main(given) == 0 and seen == [expected]


def test_a_signal_to_the_launcher_is_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(launch, "torchrun", raising(SignalException("stopped", sigval=signal.SIGTERM)))
    assert launch.main([]) == 143
    assert capsys.readouterr().err == "\ninterrupted by SIGTERM\n"


@pytest.mark.slow
def test_processes_run_and_only_their_own_words_are_heard(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "llava.train.launch", "--standalone", "--nproc_per_node", "2", str(program)]
    well = subprocess.run([*command, "well"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert well.returncode == 0 and sorted(well.stdout.splitlines()) == ["0 of 2", "1 of 2"]
    badly = subprocess.run([*command, "badly"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert badly.returncode == 3
    # torch's own notes: about threads, and from its sockets where names do not resolve.
    notes = ("OMP_NUM_THREADS", "[W")
    lines = badly.stderr.splitlines()
    message = [line for line in lines if not any(note in line for note in notes) and set(line) != {"*"}]
    assert message == ["error: one sentence"]
