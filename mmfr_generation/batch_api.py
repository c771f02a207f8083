"""Sends request files to a chat API, as batches or directly, and brings the answers home.

The answers of ``requests/x.jsonl`` come to stand in ``answers/x.jsonl``, one line a request and in the same order.
What is needed to go on after a stop is kept in ``answers/.batch_api``; a kill at any point loses nothing.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import openai
from tqdm import tqdm

from llava.cli import format_list, log, positive_float, positive_int
from llava.errors import UserError
from mmfr_generation.answer_store import AnswerStore, request_files
from mmfr_generation.answers import read_lines
from mmfr_generation.chat_server import Server, make_client
from mmfr_generation.command_line import Parser, run_script
from mmfr_generation.direct_api import DirectJobs
from mmfr_generation.files import only_one_at_work, read_json, replaced_when_complete, sha256_of, write_json
from mmfr_generation.get_jsonl import ENDPOINT

LIVE = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
"""States of a batch that will still change."""
LIMIT_CODES = frozenset({"token_limit_exceeded", "rate_limit_exceeded", "request_limit_exceeded"})
"""Errors of a failed batch that pass when earlier batches have ended."""


@dataclass
class Attempt:
    """One batch, from the intention to the downloaded answers.

    Attributes:
        upload_name: Name of the file on the server; it contains a hash of its content.
        file_id: The server's id of the uploaded file.
        batch_id: The server's id of the batch.
        status: ``new``, or the server's word for the state of the batch.
        output_file_id: The server's id of the answers.
        error_file_id: The server's id of the failures.
        downloaded: Whether answers and failures are on disk.
        problem: What the server said of a batch that failed.
        problem_codes: Its codes for that.
    """

    upload_name: str
    file_id: str = ""
    batch_id: str = ""
    status: str = "new"
    output_file_id: str = ""
    error_file_id: str = ""
    downloaded: bool = False
    problem: str = ""
    problem_codes: list[str] = field(default_factory=list)

    @property
    def live(self) -> bool:
        """Whether the batch is or may be at work on the server."""
        return self.status in LIVE

    @property
    def may_succeed(self) -> bool:
        """Whether to start it again unasked: not if it was cancelled, or failed for another reason than a limit."""
        if self.status == "failed":
            return bool(LIMIT_CODES & set(self.problem_codes))
        return self.status != "cancelled"


@dataclass
class RequestFile:
    """A request file and what was done with it.

    Attributes:
        sha256: Hash of its content when it was first met.
        stamp: Its size in bytes and its time of change in nanoseconds when it was last hashed.
        requests: Number of requests in it.
        attempts: Its batches, oldest first; the first asks everything, each later one what is still without an answer.
    """

    sha256: str
    stamp: list[int]
    requests: int
    attempts: list[Attempt] = field(default_factory=list)


class BatchJobs(AnswerStore):
    """Submits request files as batches, watches them and downloads their answers; each step can be repeated.

    Every step is written to the state file before and after it is done. After a stop between the two, the server is
    asked for a file or batch of the same name, so that nothing is uploaded twice.

    Args:
        client: An ``openai.OpenAI`` client, for example from ``make_client``.
        input_folder: Folder of request files.
        output_folder: Folder for the answers.
        poll_seconds: Pause between two looks at the server.
        max_pending: Most batches of this folder that are at work on the server at one time.
        first_pause: See ``Server``.

    Raises:
        UserError: There is no request file, or one has changed since it was submitted.
    """

    def __init__(
        self,
        client: Any,
        input_folder: Path | str,
        output_folder: Path | str,
        *,
        poll_seconds: float = 30.0,
        max_pending: int = 16,
        first_pause: float = 1.0,
    ) -> None:
        super().__init__(input_folder, output_folder)
        self.server = Server(client, first_pause=first_pause)
        self.poll_seconds = poll_seconds
        self.max_pending = max_pending
        self._state_path = self.work_folder / "state.json"
        self._uploads: dict[str, str] | None = None
        self._batches: dict[tuple[str, str], Any] | None = None
        self._progress: Counter[str] = Counter()
        self.state = self._load_state()

    def submit(self) -> int:
        """Submits what has neither an answer nor a live batch; returns how many files wait for a place."""
        self._plan(failed_too=True)
        return self._submit_planned()

    def refresh(self) -> int:
        """Asks for the state of every live batch; returns how many are still live."""
        changed = False
        for attempt in self._last_attempts():
            if attempt.live:
                before = attempt.status
                self._note(attempt, self._retrieve(attempt.batch_id))
                changed |= attempt.status != before
        if changed:
            self._save_state()
        return self._live()

    def download(self) -> int:
        """Fetches the answers of every batch that has ended; returns how many batches that were."""
        fetched = 0
        for path in self.files:
            for number, attempt in enumerate(self.state[path.name].attempts, start=1):
                if attempt.live or attempt.status == "new" or attempt.downloaded:
                    continue
                for kind, file_id in (("output", attempt.output_file_id), ("error", attempt.error_file_id)):
                    if file_id:
                        self._fetch(file_id, self.raw_path(path, f"batch{number}.{kind}"))
                attempt.downloaded = True
                self._save_state()
                self.publish(path)
                fetched += 1
        return fetched

    def watch(self) -> None:
        """Waits until no batch is live; downloads each as soon as it ends and submits what waits for its place."""
        total = sum(self.state[path.name].requests for path in self.files)
        with tqdm(total=total, desc="answers", unit="") as bar:
            while True:
                self.refresh()
                self.download()
                waiting = self._submit_planned()
                bar.n = self._answered()
                bar.refresh()
                if not waiting and not self._live():
                    return
                time.sleep(self.poll_seconds)

    def run(self, *, rounds: int = 3) -> list[str]:
        """Submits, watches and downloads, and asks again for what expired or failed on the way.

        Args:
            rounds: How often a request is asked at most, counting this call alone.

        Returns:
            The requests that are without an answer, each with the reason.
        """
        self._plan(failed_too=True)
        for number in range(1, rounds + 1):
            self._submit_planned()
            self.watch()
            if number == rounds or not self._plan(failed_too=False):
                break
        return [failure for path in self.files for failure in self.publish(path)]

    def summary(self) -> str:
        """Says how many batches are in which state, and what the server said of failed ones."""
        last = list(self._last_attempts())
        counts = Counter(attempt.status for attempt in last)
        counts["not submitted"] = len(self.files) - len(last)
        lines = [f"{count} {status}" for status, count in sorted(counts.items()) if count]
        problems = Counter(attempt.problem for attempt in last if attempt.problem)
        lines += [f"the server says of {count}: {problem}" for problem, count in problems.items()]
        return "\n".join(["batches:", *(f"  {line}" for line in lines)])

    def _plan(self, *, failed_too: bool) -> bool:
        """Notes an attempt for each file that has requests worth asking and no batch for them.

        Args:
            failed_too: Also those that were cancelled, or that the server refused for a reason that does not pass.

        Returns:
            Whether there is anything to submit.
        """
        for path in self.files:
            entry = self.state[path.name]
            last = entry.attempts[-1] if entry.attempts else None
            if last is None:
                entry.attempts.append(Attempt(_upload_name(path.stem, entry.sha256)))
            elif last.downloaded and (failed_too or last.may_succeed) and (unanswered := self.unanswered(path)):
                number = len(entry.attempts) + 1
                entry.attempts.append(Attempt(self._write_upload(path, number, frozenset(unanswered))))
        self._save_state()
        return any(attempt.status == "new" for attempt in self._last_attempts())

    def _submit_planned(self) -> int:
        waiting = 0
        for path in self.files:
            for attempt in self.state[path.name].attempts[-1:]:
                if attempt.status != "new":
                    continue
                if self._live() >= self.max_pending:
                    waiting += 1
                else:
                    self._submit(path, attempt, len(self.state[path.name].attempts))
        return waiting

    def _write_upload(self, path: Path, number: int, wanted: frozenset[str]) -> str:
        """Writes the file for an attempt and returns its name on the server."""
        upload = self._upload_path(path, number)
        with path.open("rb") as source, replaced_when_complete(upload) as target:
            target.writelines(line for line in source if line.strip() and json.loads(line)["custom_id"] in wanted)
        return _upload_name(path.stem, sha256_of(upload))

    def _upload_path(self, path: Path, number: int) -> Path:
        return path if number == 1 else self.work_folder / "again" / f"{path.stem}.{number}.jsonl"

    def _submit(self, path: Path, attempt: Attempt, number: int) -> None:
        if not attempt.file_id:
            attempt.file_id = self._upload(self._upload_path(path, number), attempt.upload_name)
            self._save_state()
        self._note(attempt, self._create_batch(attempt.file_id, path.name, number))
        self._save_state()

    def _upload(self, path: Path, name: str) -> str:
        def there() -> str | None:
            self._uploads = None
            return self._uploaded().get(name)

        def upload() -> str:
            with path.open("rb") as file:
                uploaded = self.server.client.files.create(file=(name, file, "application/jsonl"), purpose="batch")
            self._uploaded()[name] = str(uploaded.id)
            return str(uploaded.id)

        return self._uploaded().get(name) or self.server.ask(upload, there)

    def _uploaded(self) -> dict[str, str]:
        """Returns the ids of the batch files on the server by name."""
        if self._uploads is None:

            def list_files() -> dict[str, str]:
                return {file.filename: file.id for file in self.server.client.files.list(purpose="batch")}

            self._uploads = self.server.ask(list_files)
        return self._uploads

    def _create_batch(self, file_id: str, name: str, number: int) -> Any:
        metadata = {"request_file": name[-500:], "attempt": str(number)}

        def there() -> Any | None:
            self._batches = None
            return self._started().get((file_id, metadata["attempt"]))

        def create() -> Any:
            return self.server.client.batches.create(
                input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h", metadata=metadata
            )

        return self._started().get((file_id, metadata["attempt"])) or self.server.ask(create, there)

    def _started(self) -> dict[tuple[str, str], Any]:
        """Returns the batches on the server by their input file and attempt, as they were when this was first asked."""
        if self._batches is None:

            def list_batches() -> dict[tuple[str, str], Any]:
                batches = self.server.client.batches.list(limit=100)
                return {(batch.input_file_id, (batch.metadata or {}).get("attempt", "1")): batch for batch in batches}

            self._batches = self.server.ask(list_batches)
        return self._batches

    def _retrieve(self, batch_id: str) -> Any:
        return self.server.ask(lambda: self.server.client.batches.retrieve(batch_id))

    def _note(self, attempt: Attempt, batch: Any) -> None:
        attempt.batch_id = batch.id
        attempt.status = batch.status
        attempt.output_file_id = batch.output_file_id or ""
        attempt.error_file_id = batch.error_file_id or ""
        errors = (batch.errors.data if batch.errors else None) or []
        attempt.problem = self.server.without_key("; ".join(error.message or "" for error in errors))
        attempt.problem_codes = [error.code for error in errors if error.code]
        counts = batch.request_counts
        self._progress[batch.id] = counts.completed + counts.failed if counts else 0

    def _fetch(self, file_id: str, path: Path) -> None:
        """Downloads a file of JSON lines whole; a broken connection or a torn line is tried again."""

        def fetch() -> None:
            with (
                self.server.client.files.with_streaming_response.content(file_id) as response,
                replaced_when_complete(path) as file,
            ):
                file.writelines(_body(response))
            if any(line is None for _, line in read_lines(path)):
                raise openai.APIConnectionError(message="a torn line in the answers", request=response.http_request)

        self.server.ask(fetch)

    def _last_attempts(self) -> Iterator[Attempt]:
        for path in self.files:
            yield from self.state[path.name].attempts[-1:]

    def _live(self) -> int:
        return sum(attempt.live for attempt in self._last_attempts())

    def _answered(self) -> int:
        """Returns how many requests have ended, by what the server has said so far."""
        count = 0
        for path in self.files:
            for attempt in self.state[path.name].attempts[-1:]:
                count += self.state[path.name].requests if attempt.downloaded else self._progress[attempt.batch_id]
        return count

    def _load_state(self) -> dict[str, RequestFile]:
        state: dict[str, RequestFile] = {}
        if self._state_path.exists():
            for name, entry in read_json(self._state_path)["files"].items():
                attempts = [Attempt(**attempt) for attempt in entry["attempts"]]
                state[name] = RequestFile(entry["sha256"], entry["stamp"], entry["requests"], attempts)
        for path in tqdm(self.files, desc="checking request files", unit="", delay=2, leave=False):
            entry = state.get(path.name)
            stamp = [path.stat().st_size, path.stat().st_mtime_ns]
            if entry is None:
                state[path.name] = RequestFile(sha256_of(path), stamp, len(self.ids(path)))
            elif entry.stamp != stamp and entry.sha256 != sha256_of(path):
                raise UserError(
                    f"{path} has changed since it was submitted; put changed requests into a file of another name, "
                    "or take another output folder"
                )
        return {name: state[name] for name in sorted(state)}

    def _save_state(self) -> None:
        files = {name: asdict(entry) for name, entry in self.state.items()}
        write_json(self._state_path, {"files": files})


def _upload_name(stem: str, sha256: str) -> str:
    """Returns a name for the server that says what a file holds and that any server keeps as it is."""
    return f"{re.sub('[^A-Za-z0-9._-]', '_', stem)[:100]}-{sha256[:32]}.jsonl"


def _body(response: Any) -> Iterator[bytes]:
    """Yields a streamed response; whatever breaks the stream is a lost connection."""
    chunks = response.iter_bytes()
    while True:
        try:
            chunk = next(chunks, None)
        except Exception as error:
            raise openai.APIConnectionError(message=str(error), request=response.http_request) from error
        if chunk is None:
            return
        yield chunk


def build_parser() -> Parser:
    """Returns the options of this script."""
    parser = Parser(
        description="Send request files to a chat API and bring the answers home. Killed anywhere and run again, it "
        "goes on from there. The key is read from the environment and written nowhere."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help="what to do", parser_class=Parser
    )
    for name, text in (
        ("run", "submit, watch and download batches, and ask again for what expired"),
        ("submit", "upload the request files and start their batches, then end"),
        ("watch", "wait until the batches have ended, and download them"),
        ("download", "download what has ended by now, then end"),
        ("direct", "send the requests one by one, for a server without batches"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("--input-folder", type=Path, required=True, help="folder of request files (.jsonl)")
        command.add_argument("--output-folder", type=Path, required=True, help="folder for the answers")
        command.add_argument("--base-url", help="address of another server that speaks the API, up to /v1")
        command.add_argument("--api-key-env", default="OPENAI_API_KEY", help="environment variable that holds the key")
        command.add_argument("--timeout", type=positive_float, default=600.0, help="longest wait for a reply, seconds")
        command.add_argument("--retry-pause", type=positive_float, default=1.0, help="first pause after a failure, s")
        if name == "direct":
            command.add_argument("--concurrency", type=positive_int, default=4, help="requests on their way at a time")
            continue
        command.add_argument("--poll-seconds", type=positive_float, default=30.0, help="pause between looks, seconds")
        command.add_argument("--max-pending", type=positive_int, default=16, help="batches at work at one time")
        if name == "run":
            command.add_argument("--rounds", type=positive_int, default=3, help="how often a request is asked at most")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 1 if a request is without an answer at the end."""
    options = build_parser().parse_args(arguments)
    folders = (options.input_folder, options.output_folder)
    request_files(options.input_folder)
    client = make_client(options.base_url, key_variable=options.api_key_env, timeout=options.timeout)
    with only_one_at_work(options.output_folder / ".batch_api"):
        if options.command == "direct":
            failed = DirectJobs(
                client, *folders, concurrency=options.concurrency, first_pause=options.retry_pause
            ).run()
            return _finish(failed, options.output_folder)
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
            return _finish(failed, options.output_folder)
        if options.command == "submit":
            waiting = jobs.submit()
            if waiting:
                log(f"{waiting} files wait for a place (--max-pending); watch or run submits them")
        elif options.command == "watch":
            jobs.watch()
        else:
            jobs.refresh()
            print(f"batches downloaded: {jobs.download()}")
        print(jobs.summary())
    return 0


def _finish(failed: Sequence[str], output_folder: Path) -> int:
    print(f"answers are in {output_folder}")
    if not failed:
        return 0
    log(f"without an answer: {len(failed)} requests\n{format_list(failed)}\nrun the same command to ask again")
    return 1


if __name__ == "__main__":
    run_script(main)
