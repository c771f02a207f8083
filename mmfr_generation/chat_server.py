"""A server that speaks the chat API, with one policy for what goes wrong on the way to it."""

import email.utils
import os
import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import openai

from llava.cli import log
from llava.errors import UserError

Result = TypeVar("Result")

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
    # The client must not try again by itself: after a lost reply to an upload the server is asked what it has.
    return openai.OpenAI(api_key=key or "none", base_url=base_url, timeout=timeout, max_retries=0)


class ServerError(UserError):
    """The server refused a call or could not be reached.

    Attributes:
        cause: What the client raised.
    """

    def __init__(self, text: str, cause: openai.APIError) -> None:
        super().__init__(text)
        self.cause = cause


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
            log(f"the server is busy or out of reach ({self.without_key(str(error))[:200]}); next try in {pause:.0f} s")
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
