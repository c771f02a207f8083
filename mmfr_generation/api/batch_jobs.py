"""Submits request files as batches, and resumes after a stop at any point without uploading twice."""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import openai

from llava.cli import log, progress
from llava.errors import DataError
from llava.files import atomic_file, atomic_write, digest_file, file_errors, read_json, write_json
from mmfr_generation.api.answer_store import AnswerStore, check_one_setting
from mmfr_generation.api.answers import ENDPOINT, read_lines
from mmfr_generation.api.chat_client import ChatClient, ChatError, is_retryable

LIVE = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
"""States of a batch that will still change."""
LIMIT_CODES = frozenset({"token_limit_exceeded", "rate_limit_exceeded", "request_limit_exceeded"})
"""Errors of a failed batch that pass when earlier batches have ended."""
_FAILED_POLLS = 10


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
        problem: Why the server says that the batch failed.
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
        setting: What its requests have in common, see ``Requests``; empty in the state of an earlier version.
        attempts: Its batches, oldest first; the first asks everything, each later one what is still without an answer.
    """

    sha256: str
    stamp: list[int]
    requests: int
    setting: str = ""
    attempts: list[Attempt] = field(default_factory=list)


class BatchJobs(AnswerStore):
    """Submits request files as batches, watches them and downloads their answers; each step can be repeated.

    Every step is written to the state file before and after it is done. After a stop between the two, the server is
    asked for a file or batch of the same name, so that nothing is uploaded twice.

    Args:
        client: An ``openai.OpenAI`` client, for example from ``make_client``.
        input_folder: Folder of request files.
        output_folder: Folder for the answers.
        poll_seconds: Pause between two questions for the state of the batches.
        max_pending: Most batches of this folder that the server processes at one time.
        first_pause: Pause in seconds before an upload that failed is repeated.

    Raises:
        UserError: There is no request file, or one has changed since its submission.
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
        self.chat = ChatClient(client, first_pause=first_pause)
        self.poll_seconds = poll_seconds
        self.max_pending = max_pending
        self._state_path = self.work_folder / "state.json"
        self._uploads: dict[str, str] | None = None
        self._batches: dict[tuple[str, str], Any] | None = None
        self._progress: Counter[str] = Counter()
        self.state = self._load_state()

    def submit(self) -> int:
        """Submits what has neither an answer nor a live batch; returns how many files wait for an earlier batch."""
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
        """Waits until no batch is live; downloads each when it ends and submits what waits for an earlier one.

        A server that is out of reach for some minutes only delays this.

        Raises:
            ChatError: The server refuses, or was out of reach at ten polls in a row.
        """
        total = sum(self.state[path.name].requests for path in self.files)
        failures = 0
        with progress(total=total, desc="answers", unit="") as bar:
            while True:
                try:
                    self.refresh()
                    self.download()
                    waiting = self._submit_planned()
                    failures = 0
                except ChatError as error:
                    failures += 1
                    if failures == _FAILED_POLLS or not is_retryable(error.cause):
                        raise
                    log(f"{error}; next try in {self.poll_seconds:g} s")
                    waiting = 1
                bar.n = self._answered()
                bar.refresh()
                if not waiting and not self._live():
                    return
                time.sleep(self.poll_seconds)

    def run(self, *, rounds: int = 3) -> list[str]:
        """Submits, watches and downloads, and asks again for what expired or failed.

        Args:
            rounds: How often this call asks a request at most.

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
            failed_too: Also those that were cancelled, or that failed for a reason that remains.

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
        with file_errors(path, "read"), path.open("rb") as source, atomic_file(upload) as target:
            target.writelines(line for line in source if line.strip() and json.loads(line)["custom_id"] in wanted)
        return _upload_name(path.stem, digest_file(upload))

    def _upload_path(self, path: Path, number: int) -> Path:
        return path if number == 1 else self.work_folder / "again" / f"{path.stem}.{number}.jsonl"

    def _submit(self, path: Path, attempt: Attempt, number: int) -> None:
        if not attempt.file_id:
            attempt.file_id = self._upload(self._upload_path(path, number), attempt.upload_name)
            self._save_state()
        self._note(attempt, self._create_batch(attempt.file_id, path.name, number))
        self._save_state()

    def _upload(self, path: Path, name: str) -> str:
        def find() -> str | None:
            self._uploads = None
            return self._uploaded().get(name)

        def upload() -> str:
            with file_errors(path, "read"), path.open("rb") as file:
                uploaded = self.chat.single.files.create(file=(name, file, "application/jsonl"), purpose="batch")
            self._uploaded()[name] = str(uploaded.id)
            return str(uploaded.id)

        return self._uploaded().get(name) or self.chat.repeat(upload, find)

    def _uploaded(self) -> dict[str, str]:
        """Returns the ids of the batch files on the server by name."""
        if self._uploads is None:
            files = self.chat.client.files
            self._uploads = self.chat.ask(lambda: {file.filename: file.id for file in files.list(purpose="batch")})
        return self._uploads

    def _create_batch(self, file_id: str, name: str, number: int) -> Any:
        metadata = {"request_file": name[-500:], "attempt": str(number)}

        def find() -> Any | None:
            self._batches = None
            return self._started().get((file_id, metadata["attempt"]))

        def create() -> Any:
            return self.chat.single.batches.create(
                input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h", metadata=metadata
            )

        return self._started().get((file_id, metadata["attempt"])) or self.chat.repeat(create, find)

    def _started(self) -> dict[tuple[str, str], Any]:
        """Returns the batches on the server by their input file and attempt, as they were at the first call."""
        if self._batches is None:

            def list_batches() -> dict[tuple[str, str], Any]:
                batches = self.chat.client.batches.list(limit=100)
                return {(batch.input_file_id, (batch.metadata or {}).get("attempt", "1")): batch for batch in batches}

            self._batches = self.chat.ask(list_batches)
        return self._batches

    def _retrieve(self, batch_id: str) -> Any:
        return self.chat.ask(lambda: self.chat.client.batches.retrieve(batch_id))

    def _note(self, attempt: Attempt, batch: Any) -> None:
        attempt.batch_id = batch.id
        attempt.status = batch.status
        attempt.output_file_id = batch.output_file_id or ""
        attempt.error_file_id = batch.error_file_id or ""
        errors = (batch.errors.data if batch.errors else None) or []
        attempt.problem = self.chat.without_key("; ".join(error.message or "" for error in errors))
        attempt.problem_codes = [error.code for error in errors if error.code]
        counts = batch.request_counts
        self._progress[batch.id] = counts.completed + counts.failed if counts else 0

    def _fetch(self, file_id: str, path: Path) -> None:
        """Downloads a file of JSON lines; one with a torn line is downloaded again."""

        def fetch() -> None:
            reply = self.chat.client.files.content(file_id)
            atomic_write(path, reply.content)
            if any(line is None for _, line in read_lines(path)):
                raise openai.APIConnectionError(message="a torn line in the answers", request=reply.response.request)

        self.chat.repeat(fetch)

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
                setting = entry.get("setting", "")
                state[name] = RequestFile(entry["sha256"], entry["stamp"], entry["requests"], setting, attempts)
        for path in progress(self.files, desc="checking request files", unit="", delay=2, leave=False):
            entry = state.get(path.name)
            stamp = [path.stat().st_size, path.stat().st_mtime_ns]
            if entry is None or (entry.stamp != stamp and entry.sha256 != digest_file(path)):
                requests = self.requests(path)
                state[path.name] = RequestFile(digest_file(path), stamp, len(requests.ids), requests.setting)
                if entry is not None:
                    state[path.name].attempts = self._attempts_of_changed(path, entry)
        state = {path.name: state[path.name] for path in self.files}
        check_one_setting({path: state[path.name].setting for path in self.files})
        return {name: state[name] for name in sorted(state)}

    def _attempts_of_changed(self, path: Path, entry: RequestFile) -> list[Attempt]:
        """Returns what was done with a file whose requests were withdrawn or added since.

        An id says what is asked and of which image, so that answers stay right while the setting is the same.

        Raises:
            DataError: The setting is another, or not known, or a batch of the old requests may have begun.
        """
        attempts = list(entry.attempts)
        if attempts and attempts[-1].status == "new" and not attempts[-1].file_id:
            attempts.pop()  # it was only planned
        begun = bool(attempts) and attempts[-1].status == "new"
        same = entry.setting and entry.setting == self.requests(path).setting
        if begun or (attempts and not same):
            raise DataError(
                f"{path} has changed since its submission; put changed requests into a file of another name, "
                "or name another output folder"
            )
        return attempts

    def _save_state(self) -> None:
        files = {name: asdict(entry) for name, entry in self.state.items()}
        write_json(self._state_path, {"files": files})


def _upload_name(stem: str, sha256: str) -> str:
    """Returns a name for the server that says what a file holds and that any server keeps as it is."""
    return f"{re.sub('[^A-Za-z0-9._-]', '_', stem)[:100]}-{sha256[:32]}.jsonl"
