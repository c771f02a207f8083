"""Sends request files to a chat API, as batches or directly, and brings the answers home.

The answers of ``requests/x.jsonl`` come to stand in ``answers/x.jsonl``, one line a request and in the same order.
What is needed to go on after a stop is kept in ``answers/.batch_api``; a kill at any point loses nothing.
"""

import email.utils
import json
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import openai
from tqdm import tqdm

from mmfr_generation.answers import read_answer, read_lines
from mmfr_generation.command_line import Parser, UserError, name_some, positive_float, positive_int, run_script, say
from mmfr_generation.files import (
    JsonLog,
    only_one_at_work,
    read_json,
    replaced_when_complete,
    sha256_of,
    write_json,
    write_json_lines,
)
from mmfr_generation.get_jsonl import ENDPOINT

Result = TypeVar("Result")

LIVE = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
"""States of a batch that will still change."""
LIMIT_CODES = frozenset({"token_limit_exceeded", "rate_limit_exceeded", "request_limit_exceeded"})
"""Errors of a failed batch that pass when earlier batches have ended."""
_LONGEST_PAUSE = 120.0
_TRIES = 10


def make_client(base_url: str | None = None, *, key_variable: str = "OPENAI_API_KEY", timeout: float = 600.0) -> Any:
    """Returns an ``openai.OpenAI`` client whose key comes from the environment.

    Args:
        base_url: Address of another server that speaks the API; by default ``OPENAI_BASE_URL``, else OpenAI's own.
        key_variable: Environment variable that holds the key. With another server it may be unset.
        timeout: Longest wait for one reply, in seconds.

    Raises:
        UserError: The variable is not set and the server is OpenAI's own.
    """
    base_url = base_url or os.environ.get("OPENAI_BASE_URL")
    key = os.environ.get(key_variable)
    if not key and not base_url:
        raise UserError(f"the environment variable {key_variable} is not set; it must hold the API key")
    # Retries are this module's own: a lost reply to an upload must lead to a look at the server, not to another one.
    return openai.OpenAI(api_key=key or "none", base_url=base_url, timeout=timeout, max_retries=0)


class ServerError(UserError):
    """The server refused a call or could not be reached.

    Attributes:
        cause: What the client raised.
    """

    def __init__(self, text: str, cause: openai.APIError) -> None:
        super().__init__(text)
        self.cause = cause


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


class Server:
    """The client, with one policy for what goes wrong on the way.

    Args:
        client: An ``openai.OpenAI`` client.
        first_pause: Wait after the first failure in seconds; it doubles with each further one. A ``Retry-After`` of
            the server goes before it.
    """

    def __init__(self, client: Any, *, first_pause: float = 1.0) -> None:
        self.client = client.with_options(max_retries=0)
        self.first_pause = first_pause
        self.stopped = threading.Event()

    def ask(self, call: Callable[[], Result], recover: Callable[[], Result | None] = lambda: None) -> Result:
        """Calls the server until it answers.

        Args:
            call: The call.
            recover: Asked after each failure whether the call was done all the same; its result then counts.

        Raises:
            ServerError: The server refuses, or has failed too often.
        """
        failures = 0
        while True:
            try:
                return call()
            except openai.APIError as error:
                failures += 1
                if not may_pass(error) or failures == _TRIES or self.stopped.is_set():
                    raise ServerError(self.describe(error), error) from None
                self._pause(error, failures)
            done = recover()
            if done is not None:
                return done

    def describe(self, error: openai.APIError) -> str:
        """Says what went wrong and what to do; never shows the key."""
        text = self.without_key(str(error))
        if isinstance(error, openai.AuthenticationError):
            return f"the server does not accept the API key: {text}"
        if isinstance(error, openai.APIConnectionError):
            address = self.client.base_url
            return f"no answer from {address} ({text}); check --base-url and the network, then run the same command"
        return f"the server refuses: {text}"

    def without_key(self, text: str) -> str:
        """Returns a text with the API key blanked out."""
        key = self.client.api_key
        return text.replace(key, "[key]") if len(key) > 4 else text

    def _pause(self, error: openai.APIError, failures: int) -> None:
        pause = _retry_after(error)
        if pause is None:
            pause = self.first_pause * 2 ** (failures - 1) * random.uniform(0.75, 1.0)
        pause = min(pause, _LONGEST_PAUSE)
        if pause >= 5:
            say(f"the server is busy or out of reach ({self.without_key(str(error))[:200]}); next try in {pause:.0f} s")
        self.stopped.wait(pause)


def may_pass(error: openai.APIError) -> bool:
    """Says whether an error may be gone at the next try: a lost connection, a busy or a broken server."""
    if isinstance(error, openai.APIConnectionError):
        return True
    if isinstance(error, openai.RateLimitError):
        return error.code != "insufficient_quota"
    return isinstance(error, openai.APIStatusError) and (error.status_code in {408, 409} or error.status_code >= 500)


def _retry_after(error: openai.APIError) -> float | None:
    """Returns the wait in seconds that the server asks for, given as a number or as a date."""
    if not isinstance(error, openai.APIStatusError):
        return None
    headers = error.response.headers
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        text = headers.get("retry-after", "")
        if re.fullmatch(r"\d+(\.\d+)?", text):
            return float(text)
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def request_files(folder: Path) -> list[Path]:
    """Returns the request files of a folder by name.

    Raises:
        UserError: There is none.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"there is no .jsonl file in {folder}; write request files with get_jsonl.py first")
    return files


def request_ids(path: Path) -> list[str]:
    """Returns the ``custom_id`` of each request in a file, in order.

    Raises:
        UserError: A line is no request, or an id stands twice.
    """
    ids: dict[str, int] = {}
    for number, request in read_lines(path):
        custom_id = (request or {}).get("custom_id")
        if request is None or not isinstance(custom_id, str) or not isinstance(request.get("body"), dict):
            raise UserError(f"{path}, line {number}, is not a request with a custom_id and a body")
        if custom_id in ids:
            raise UserError(f"{path}, line {number}, asks about {custom_id} again, as line {ids[custom_id]} does")
        ids[custom_id] = number
    if not ids:
        raise UserError(f"{path} holds no request")
    return list(ids)


class AnswerStore:
    """The answers of a folder of request files on disk.

    Args:
        input_folder: Folder of request files.
        output_folder: Folder for the answers; ``.batch_api`` in it holds what is needed to go on after a stop.
    """

    def __init__(self, input_folder: Path | str, output_folder: Path | str) -> None:
        self.input_folder = Path(input_folder)
        self.output_folder = Path(output_folder)
        self.work_folder = self.output_folder / ".batch_api"
        self.files = request_files(self.input_folder)
        self._ids: dict[Path, list[str]] = {}

    def ids(self, path: Path) -> list[str]:
        """Returns the ``custom_id`` of each request in a file, which is read once: request files are large."""
        if path not in self._ids:
            self._ids[path] = request_ids(path)
        return self._ids[path]

    def raw_answers(self, name: str) -> list[Path]:
        """Returns every file with answers to a request file, oldest first."""
        stem = re.escape(Path(name).stem)
        pattern = re.compile(rf"{stem}\.(?:batch(\d+)\.(?:error|output)|direct)\.jsonl")
        found = [(match, path) for path in self.work_folder.glob("*.jsonl") if (match := pattern.fullmatch(path.name))]
        return [path for match, path in sorted(found, key=lambda pair: (int(pair[0][1] or 0), pair[1].name))]

    def answers(self, name: str) -> dict[str, dict[str, Any]]:
        """Returns the best line for each request of a file: its last answer, else its last failure."""
        best: dict[str, dict[str, Any]] = {}
        answered: set[str] = set()
        for path in self.raw_answers(name):
            for _, line in read_lines(path):
                if line is None:
                    continue
                answer = read_answer(line)
                if not answer.failure:
                    answered.add(answer.custom_id)
                if not answer.failure or answer.custom_id not in answered:
                    best[answer.custom_id] = line
        return best

    def unanswered(self, path: Path) -> list[str]:
        """Returns the requests of a file that have neither an answer nor a failure that would come again."""
        best = self.answers(path.name)
        return [
            custom_id
            for custom_id in self.ids(path)
            if custom_id not in best or ((answer := read_answer(best[custom_id])).failure and answer.again)
        ]

    def publish(self, path: Path) -> list[str]:
        """Writes the answers of a request file in the order of its requests; returns those without an answer."""
        best = self.answers(path.name)
        lines, failed = [], []
        for custom_id in self.ids(path):
            line = best.get(custom_id) or {
                "custom_id": custom_id,
                "response": None,
                "error": {"code": "no_answer", "message": "the server gave neither an answer nor an error"},
            }
            failure = read_answer(line).failure
            if failure:
                failed.append(f"{custom_id}: {failure}")
            lines.append(line)
        write_json_lines(self.output_folder / path.name, lines)
        return failed


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
                        self._fetch(file_id, self.work_folder / f"{path.stem}.batch{number}.{kind}.jsonl")
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


class DirectJobs(AnswerStore):
    """Sends each request by itself, several at one time, for servers that have no batches.

    Args:
        client: An ``openai.OpenAI`` client, for example from ``make_client``.
        input_folder: Folder of request files.
        output_folder: Folder for the answers.
        concurrency: Most requests that are on their way at one time.
        first_pause: See ``Server``.

    Raises:
        UserError: There is no request file.
    """

    def __init__(
        self,
        client: Any,
        input_folder: Path | str,
        output_folder: Path | str,
        *,
        concurrency: int = 4,
        first_pause: float = 1.0,
    ) -> None:
        super().__init__(input_folder, output_folder)
        self.server = Server(client, first_pause=first_pause)
        self.concurrency = concurrency

    def run(self) -> list[str]:
        """Asks every request that has no answer yet; each answer is on disk before the next one is asked for.

        Returns:
            The requests that are without an answer, each with the reason.

        Raises:
            UserError: The server does not accept the key, does not know the model, or cannot be reached.
        """
        failed = []
        for path in self.files:
            answered = {
                custom_id for custom_id, line in self.answers(path.name).items() if not read_answer(line).failure
            }
            total = len(self.ids(path))
            with tqdm(total=total, initial=min(len(answered), total), desc=path.name, unit=" requests") as bar:
                self._ask_file(path, answered, bar)
            failed += self.publish(path)
        return failed

    def _ask_file(self, path: Path, answered: set[str], bar: Any) -> None:
        lock = threading.Lock()
        under_way: set[Future[None]] = set()
        with (
            JsonLog(self.work_folder / f"{path.stem}.direct.jsonl") as log,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):

            def work(request: dict[str, Any]) -> None:
                line = self._ask(request)
                with lock:
                    log.append(line)
                    bar.update()

            try:
                for _, request in read_lines(path):
                    if request and request["custom_id"] not in answered:
                        if len(under_way) >= self.concurrency:
                            under_way = _settle(under_way)
                        under_way.add(pool.submit(work, request))
                while under_way:
                    under_way = _settle(under_way)
            except BaseException:
                # What is on its way comes home and is written before the pool closes; nothing further is asked.
                self.server.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sends one request; returns its answer or failure as a line of a batch's output file."""
        line: dict[str, Any] = {"custom_id": request["custom_id"], "response": None, "error": None}
        try:
            body = self.server.ask(
                lambda: self.server.client.post("/chat/completions", body=request["body"], cast_to=object)
            )
            line["response"] = {"status_code": 200, "body": body}
        except ServerError as error:
            cause = error.cause
            if not isinstance(cause, openai.APIStatusError) or _hopeless(cause):
                raise
            line["response"] = {"status_code": cause.status_code, "body": None}
            line["error"] = {"code": cause.code, "message": self.server.without_key(str(cause))}
        return line


def _settle(under_way: set[Future[None]]) -> set[Future[None]]:
    """Waits for a request to end; returns what is still under way."""
    done, rest = wait(under_way, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return rest


def _hopeless(error: openai.APIStatusError) -> bool:
    """Says whether every further request would fail in the same way."""
    return (
        isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError | openai.NotFoundError)
        or error.code == "insufficient_quota"
    )


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
                say(f"{waiting} files wait for a place (--max-pending); watch or run submits them")
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
    say(f"without an answer: {len(failed)} requests\n{name_some(failed)}\nrun the same command to ask again")
    return 1


if __name__ == "__main__":
    run_script(main)
