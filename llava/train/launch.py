"""torchrun, silent about a process that has itself reported why it ended."""

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from llava.interrupts import begin_work


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts processes as torchrun does, with its options; its messages start below a progress bar's line.

    Returns:
        The exit status of the process that failed first, 128 and the signal's number after a signal, or 0.
    """
    begin_work()
    _quiet_loggers()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--standalone" in given:
        # Processes of one machine find each other by a name that need not resolve; its own address always does.
        given = ["--local-addr", "127.0.0.1", *given]
    try:
        torchrun(given)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        print(f"\nerror: process {rank} was ended by {name}{hint}", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as stopped:
        print(f"\ninterrupted by {stopped.sigval.name}", file=sys.stderr)
        return 128 + stopped.sigval
    return 0


def _quiet_loggers() -> None:
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main())
