"""Sends request files to a chat API, as batches or directly, and downloads the answers.

The answers of ``requests/x.jsonl`` are written to ``answers/x.jsonl``, one line a request and in the same order.
What is needed to resume is kept in ``answers/.batch_api``; a kill at any point loses nothing.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from llava.cli import (
    DefaultsHelpFormatter,
    OptionParser,
    exit_status,
    format_list,
    inform,
    log,
    positive_float,
    positive_int,
    run_cli,
)
from llava.files import exclusive_lock
from mmfr_generation.api.answer_store import AnswerStore, request_files
from mmfr_generation.api.batch_jobs import BatchJobs
from mmfr_generation.api.chat_client import make_client
from mmfr_generation.api.direct_jobs import DirectJobs


def build_parser() -> OptionParser:
    """Returns the options of this script."""
    parser = OptionParser(
        description="Send request files to a chat API and download the answers. Killed at any point and run again, it "
        "resumes. The key is read from the environment and written nowhere.",
        formatter_class=DefaultsHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help="what to do", parser_class=OptionParser
    )
    for name, text in (
        ("run", "submit, watch and download batches, and ask again for what expired"),
        ("submit", "upload the request files and start their batches, then end"),
        ("watch", "wait until the batches have ended, and download them"),
        ("download", "download what has ended by now, then end"),
        ("direct", "send the requests one by one, for a server without batches"),
    ):
        command = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=DefaultsHelpFormatter
        )
        command.add_argument("--input-folder", type=Path, required=True, help="folder of request files (.jsonl)")
        command.add_argument("--output-folder", type=Path, required=True, help="folder for the answers")
        command.add_argument("--base-url", help="address of another server that speaks the API, up to /v1")
        command.add_argument("--api-key-env", default="OPENAI_API_KEY", help="environment variable that holds the key")
        command.add_argument("--timeout", type=positive_float, default=600.0, help="longest wait for a reply, seconds")
        command.add_argument(
            "--retry-pause", type=positive_float, default=1.0, help="first pause when the server is busy, seconds"
        )
        if name == "direct":
            command.add_argument("--concurrency", type=positive_int, default=4, help="requests sent at one time")
            continue
        command.add_argument("--poll-seconds", type=positive_float, default=30.0, help="pause between polls, seconds")
        command.add_argument("--max-pending", type=positive_int, default=16, help="batches processed at one time")
        if name == "run":
            command.add_argument("--rounds", type=positive_int, default=3, help="how often a request is asked at most")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    options = build_parser().parse_args(arguments)
    folders = (options.input_folder, options.output_folder)
    request_files(options.input_folder)
    client = make_client(
        options.base_url,
        key_variable=options.api_key_env,
        timeout=options.timeout,
        first_pause=options.retry_pause,
    )
    with exclusive_lock(options.output_folder / ".batch_api" / "state.json"):
        if options.command == "direct":
            direct = DirectJobs(client, *folders, concurrency=options.concurrency)
            return _finish(direct, direct.run())
        jobs = BatchJobs(
            client,
            *folders,
            poll_seconds=options.poll_seconds,
            max_pending=options.max_pending,
            first_pause=options.retry_pause,
        )
        if options.command == "run":
            failed = jobs.run(rounds=options.rounds)
            print(jobs.summary())
            return _finish(jobs, failed)
        if options.command == "submit":
            waiting = jobs.submit()
            if waiting:
                inform(f"{waiting} files wait for earlier batches (--max-pending); watch or run submits them")
        elif options.command == "watch":
            jobs.watch()
        else:
            jobs.refresh()
            print(f"batches downloaded: {jobs.download()}")
        print(jobs.summary())
    return 0


def _finish(store: AnswerStore, failed: Sequence[str]) -> int:
    print(f"answers are in {store.output_folder}")
    if failed:
        log(f"without an answer: {len(failed)} requests\n{format_list(failed)}\nrun the same command to ask again")
    asked = sum(len(store.ids(path)) for path in store.files)
    return exit_status(done=asked - len(failed), left_out=len(failed))


if __name__ == "__main__":
    sys.exit(run_cli(main))
