"""A client of a chat API, and what to do when a call fails."""

import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import openai

from llava.errors import UserError

Result = TypeVar("Result")

_RETRIES = 10
_LONGEST_PAUSE = 120.0
_QUOTA = "insufficient_quota"


def make_client(
    base_url: str | None = None,
    *,
    key_variable: str = "OPENAI_API_KEY",
    timeout: float = 600.0,
    first_pause: float = 1.0,
) -> Any:
    """Returns an ``openai.OpenAI`` client whose key comes from the environment.

    The client itself repeats a call after a lost connection or a reply of a busy server.

    Args:
        base_url: Address of another server that speaks the API; by default ``OPENAI_BASE_URL``, else OpenAI's own.
        key_variable: Environment variable that holds the key. With another server it may be unset.
        timeout: Longest wait for one reply, in seconds.
        first_pause: Pause in seconds after the first reply of a busy server that does not name one; each further
            reply doubles it.

    Raises:
        UserError: The variable is not set and the server is OpenAI's own.
    """
    base_url = base_url or os.environ.get("OPENAI_BASE_URL")
    key = os.environ.get(key_variable)
    if not key and not base_url:
        raise UserError(f"the environment variable {key_variable} is not set; it must hold the API key")

    def advise(response: Any) -> None:
        """Writes into a server's reply whether and when the client is to try again, if the server does not say."""
        if response.status_code == 429 and _QUOTA.encode() in response.read():
            response.headers["x-should-retry"] = "false"  # waiting brings no quota back
        elif response.status_code >= 400 and not {"retry-after", "retry-after-ms"} & set(response.headers):
            retries = int(response.request.headers.get("x-stainless-retry-count", 0))
            response.headers["retry-after-ms"] = str(1000 * _pause(first_pause, retries))

    http_client = openai.DefaultHttpxClient(event_hooks={"response": [advise]})
    return openai.OpenAI(
        api_key=key or "none", base_url=base_url, timeout=timeout, max_retries=_RETRIES, http_client=http_client
    )


def _pause(first_pause: float, failures: int) -> float:
    """Returns the seconds to wait; the random part keeps clients that failed together from returning together."""
    return min(first_pause * 2**failures, _LONGEST_PAUSE) * random.uniform(0.75, 1.0)


class ChatError(UserError):
    """The server refused a call or could not be reached.

    Attributes:
        cause: What the client raised.
    """

    def __init__(self, text: str, cause: openai.APIError) -> None:
        super().__init__(text)
        self.cause = cause


class ChatClient:
    """An ``openai.OpenAI`` client whose failures become one line.

    Args:
        client: The client; ``ask`` leaves retries to it.
        first_pause: Pause of ``repeat`` after the first failure in seconds; each further one doubles it.

    Attributes:
        client: The client.
        single: The same client without retries of its own.
    """

    def __init__(self, client: Any, *, first_pause: float = 1.0) -> None:
        self.client = client
        self.single = client.with_options(max_retries=0)
        self.first_pause = first_pause

    def ask(self, call: Callable[[], Result]) -> Result:
        """Makes a call.

        Raises:
            ChatError: The server refuses, or could not be reached.
        """
        try:
            return call()
        except openai.APIError as error:
            raise ChatError(self.describe(error), error) from None

    def repeat(self, call: Callable[[], Result], find: Callable[[], Result | None] = lambda: None) -> Result:
        """Repeats a call until it succeeds.

        Args:
            call: The call, made through ``single``. The client cannot repeat it by itself: a reply can be lost after
                the server did what was asked, and doing it twice would upload or pay twice.
            find: Asked after each failure whether the server did it all the same; its result then counts.

        Raises:
            ChatError: The server refuses, or has failed too often.
        """
        failures = 0
        while True:
            try:
                return call()
            except openai.APIError as error:
                if not is_retryable(error) or failures == _RETRIES:
                    raise ChatError(self.describe(error), error) from None
            time.sleep(_pause(self.first_pause, failures))
            failures += 1
            found = find()
            if found is not None:
                return found

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


def is_retryable(error: openai.APIError) -> bool:
    """Whether the next try may succeed: after a lost connection, or with a busy or broken server."""
    if isinstance(error, openai.APIConnectionError):
        return True
    if isinstance(error, openai.RateLimitError):
        return error.code != _QUOTA
    return isinstance(error, openai.APIStatusError) and (error.status_code in {408, 409} or error.status_code >= 500)


def is_fatal(error: openai.APIError) -> bool:
    """Whether every further request would fail in the same way."""
    final = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
    return not isinstance(error, openai.APIStatusError) or isinstance(error, final) or error.code == _QUOTA
