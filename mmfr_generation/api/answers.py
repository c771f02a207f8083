"""Answers of the API on disk: one JSON object a line, in the layout of the Batch API's output files."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.files import file_errors

ENDPOINT = "/v1/chat/completions"
"""Where every request goes."""


_ID = re.compile(r"(?P<image>.+)#(?P<digest>[0-9a-f]{16})", flags=re.DOTALL)


def request_id(image: str, data: bytes) -> str:
    """Returns the ``custom_id`` of a request: the image's path in its set, and a digest of the bytes sent."""
    return f"{image}#{hashlib.sha256(data).hexdigest()[:16]}"


def image_of(custom_id: str) -> str:
    """Returns the image's path that a ``custom_id`` begins with; those of earlier versions have no digest."""
    match = _ID.fullmatch(custom_id)
    return match["image"] if match else custom_id


@dataclass(frozen=True)
class Answer:
    """One answered or failed request.

    Attributes:
        custom_id: Of the request, see ``request_id``; empty if the line does not say.
        text: What the annotator wrote; None if nothing.
        finish_reason: ``stop``; ``length`` if the token limit cut the text, ``content_filter`` if a filter did; empty
            if the server does not say.
        refusal: Why the annotator refused; empty if it did not.
        failure: Why there is no answer; empty if there is one.
        retryable: Whether asking again may help, as it may after a busy server or an expired batch.
    """

    custom_id: str
    text: str | None = None
    finish_reason: str = ""
    refusal: str = ""
    failure: str = ""
    retryable: bool = False


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields the number and the object of each line that is not blank; None where a line is no JSON object.

    Raises:
        FileError: The file cannot be read.
    """
    with file_errors(path, "read"), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                yield number, value if isinstance(value, dict) else None


def read_answer(line: dict[str, Any]) -> Answer:
    """Reads one line of an output or error file, whatever is missing in it."""
    custom_id = line.get("custom_id")
    custom_id = custom_id if isinstance(custom_id, str) else ""
    response = line.get("response")
    response = response if isinstance(response, dict) else {}
    status = response.get("status_code", 200)
    body = response.get("body")
    body = body if isinstance(body, dict) else {}
    error = line.get("error") or body.get("error")
    if error or not response or status != 200:
        return Answer(
            custom_id, failure=_describe(error, status), retryable=_is_retryable(error, status if response else 500)
        )
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    if not isinstance(message, dict):
        return Answer(custom_id, failure="the response holds no message", retryable=True)
    text, refusal, finish = message.get("content"), message.get("refusal"), choice.get("finish_reason")
    return Answer(
        custom_id,
        text=text if isinstance(text, str) else None,
        finish_reason=finish if isinstance(finish, str) else "",
        refusal=refusal if isinstance(refusal, str) else "",
    )


def _describe(error: Any, status: Any) -> str:
    if isinstance(error, dict):
        parts = [str(error[key]) for key in ("code", "message") if error.get(key)]
        if parts:
            return ": ".join(parts)
    return str(error) if error else f"status {status}"


def _is_retryable(error: Any, status: Any) -> bool:
    code = error.get("code") if isinstance(error, dict) else None
    if code in {"batch_expired", "batch_cancelled", "rate_limit_exceeded", "server_error", "no_answer"}:
        return True
    return status in {408, 409, 429} or (isinstance(status, int) and status >= 500)
