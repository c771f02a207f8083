"""Sends requests one by one, several at a time, for servers that have no batches."""

import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from llava.cli import progress
from llava.files import JsonlLog
from mmfr_generation.api.answer_store import AnswerStore, check_one_setting
from mmfr_generation.api.answers import read_answer, read_lines
from mmfr_generation.api.chat_client import ChatClient, ChatError, is_fatal


class DirectJobs(AnswerStore):
    """Sends each request by itself, several at one time, for servers that have no batches.

    Args:
        client: An ``openai.OpenAI`` client, for example from ``make_client``.
        input_folder: Folder of request files.
        output_folder: Folder for the answers.
        concurrency: Most requests that are on their way at one time.

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
    ) -> None:
        super().__init__(input_folder, output_folder)
        self.chat = ChatClient(client)
        self.concurrency = concurrency

    def run(self) -> list[str]:
        """Asks every request that has no answer yet; each answer is on disk before the next one is asked for.

        Returns:
            The requests that are without an answer, each with the reason.

        Raises:
            UserError: The server does not accept the key, does not know the model, or cannot be reached.
        """
        failed = []
        check_one_setting({path: self.requests(path).setting for path in self.files})
        for path in self.files:
            answered = {
                custom_id for custom_id, line in self.answers(path.name).items() if not read_answer(line).failure
            }
            total = len(self.ids(path))
            with progress(total=total, initial=min(len(answered), total), desc=path.name, unit=" requests") as bar:
                self._ask_file(path, answered, bar)
            failed += self.publish(path)
        return failed

    def _ask_file(self, path: Path, answered: set[str], bar: Any) -> None:
        lock = threading.Lock()  # the log takes one line at a time
        pending: set[Future[None]] = set()
        with (
            JsonlLog(self.raw_path(path, "direct")) as log,
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
                        if len(pending) >= self.concurrency:
                            pending = _settle(pending)
                        pending.add(pool.submit(work, request))
                while pending:
                    pending = _settle(pending)
            except BaseException:
                # Requests that were sent are answered and written before the pool closes; no other one is sent.
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sends one request; returns its answer or failure as a line of a batch's output file."""
        line: dict[str, Any] = {"custom_id": request["custom_id"], "response": None, "error": None}
        client = self.chat.client
        try:
            body = self.chat.ask(lambda: client.post("/chat/completions", body=request["body"], cast_to=object))
            line["response"] = {"status_code": 200, "body": body}
        except ChatError as error:
            cause: Any = error.cause
            if is_fatal(cause):
                raise
            line["response"] = {"status_code": cause.status_code, "body": None}
            line["error"] = {"code": cause.code, "message": self.chat.without_key(str(cause))}
        return line


def _settle(pending: set[Future[None]]) -> set[Future[None]]:
    """Waits for a request to end; returns what is still pending."""
    done, rest = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return rest
