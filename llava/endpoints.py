"""A client of OpenAI-compatible endpoints: repeats what may yet succeed, and says what cannot. Imports no torch.

The key comes from an environment variable and is written nowhere.
"""

import base64
import io
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from PIL import Image

from llava.cli import note_once
from llava.errors import OptionError, UserError

KEY_VARIABLE = "OPENAI_API_KEY"
TOP_LOGPROBS = 20
"""Most likely tokens that are asked for at each place."""
_TOKEN_ID = "token_id:"
_FAILURES_IN_A_ROW = 5
_LONGEST_PAUSE = 60.0
_FATAL = (401, 403, 404)
_REPEATED = (408, 409, 425, 429)
_Answered = TypeVar("_Answered")


class EndpointError(UserError):
    """An endpoint gave no usable answer to one question; the message says why."""


class EndpointDownError(UserError):
    """An endpoint cannot be used at all: wrong key, no such model, or it does not answer."""


@dataclass(frozen=True)
class TokenChoice:
    """A token of an answer.

    Attributes:
        text: The token.
        top: Log-probabilities of the likeliest tokens at its place, itself among them if the endpoint says so.
    """

    text: str
    top: Mapping[str, float]


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered.

    Attributes:
        text: The answer.
        tokens: Its tokens with their alternatives; empty where the endpoint gives none.
        prompt_tokens: Tokens of the question, image included, as the endpoint counts them.
        completion_tokens: Tokens of the answer.
    """

    text: str
    tokens: tuple[TokenChoice, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """How an endpoint continued prompt embeddings.

    Attributes:
        text: What it wrote.
        ids: Ids of the tokens; empty where the endpoint tells none.
        top: Log-probabilities of the likeliest tokens at each place, by their ids; as many as ``ids``.
        prompt_tokens: Length of the prompt, as the endpoint counts it.
        completion_tokens: Tokens of the text.
    """

    text: str
    ids: tuple[int, ...] = ()
    top: tuple[Mapping[int, float], ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0


class FailuresInARow:
    """Ends a run whose endpoint fails for one image after the other."""

    def __init__(self) -> None:
        self._number = 0
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Begins to count again, since an image was answered."""
        self._number = 0

    def add(self, error: EndpointError, base_url: str) -> None:
        """Counts a failure.

        Raises:
            EndpointDownError: It is one too many.
        """
        with self._lock:
            self._number += 1
            if self._number >= _FAILURES_IN_A_ROW:
                raise EndpointDownError(
                    f"{base_url} failed for {self._number} images in a row, the last time: {error}. Replies that came "
                    "are kept; run the same command again to resume"
                ) from error


@dataclass
class Endpoint:
    """A model behind an OpenAI-compatible endpoint. Its methods may be called from several threads.

    Attributes:
        base_url: Address up to and with ``/v1``.
        model: Name of the model there.
        key_variable: Environment variable that holds the key; a local server needs none.
        timeout: Longest wait for one reply, in seconds.
        retries: How often a question is asked again.
        first_pause: Seconds before the first repetition, where the server names none; doubled each time.
        repeated: How many questions were asked again so far.
    """

    base_url: str
    model: str
    key_variable: str = KEY_VARIABLE
    timeout: float = 120.0
    retries: int = 5
    first_pause: float = 1.0
    repeated: int = 0
    _has_logprobs: bool = True
    _client: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Checks the address.

        Raises:
            OptionError: It is none, or holds a password.
        """
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError(f"the address of an endpoint must begin with http:// or https://, not {self.base_url!r}")
        if parts.username or parts.password or parts.query:
            raise OptionError(
                f"the address of an endpoint must hold no name, password or query; the key is taken from the "
                f"environment variable {self.key_variable}"
            )

    def ask(self, messages: Sequence[Mapping[str, Any]], *, logprobs: bool = False, **settings: Any) -> Reply:
        """Asks once, and again where that may help.

        Args:
            messages: In OpenAI's form.
            logprobs: Whether the alternatives of each token are asked for; an endpoint that refuses goes without.
            **settings: ``temperature``, ``max_tokens``, ``seed``, …

        Raises:
            EndpointError: There is no usable answer to this question.
            EndpointDownError: The endpoint takes no question of ours.
        """
        asked = {"model": self.model, "messages": messages, **settings}
        top: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return self._repeat(
            lambda further: _read(self._opened().chat.completions.create(**asked, **further)), top if logprobs else {}
        )

    def complete(self, prompt_embeds: str, **settings: Any) -> Completion:
        """Lets a language model continue embeddings, once, and again where that may help.

        Args:
            prompt_embeds: Embeddings of the prompt ``[L, D]``, saved by torch, in base64: vLLM's own input.
            **settings: ``temperature``, ``max_tokens``, ``seed``, ``stop``, …

        Raises:
            EndpointError: There is no usable answer.
            EndpointDownError: The endpoint takes no question of ours.
        """
        own = {"prompt_embeds": prompt_embeds, "return_tokens_as_token_ids": True, "include_stop_str_in_output": True}
        # OpenAI's client insists on a prompt; an empty one adds nothing to the embeddings.
        asked = {"model": self.model, "prompt": "", "extra_body": own, **settings}
        return self._repeat(
            lambda further: _read_completion(self._opened().completions.create(**asked, **further)),
            {"logprobs": TOP_LOGPROBS},
        )

    def _repeat(self, ask: Callable[[dict[str, Any]], _Answered], logprobs: dict[str, Any]) -> _Answered:
        """Asks until there is an answer.

        Args:
            ask: Asks once, with further settings.
            logprobs: Settings that ask for log-probabilities; an endpoint that refuses goes without.
        """
        reason = ""
        for attempt in range(self.retries + 1):
            wanted = logprobs if self._has_logprobs else {}
            try:
                return ask(wanted)
            except UserError:
                raise
            except _Unusable as error:
                reason, pause = str(error), None
            except Exception as error:
                if wanted and _refuses_logprobs(error):
                    self._has_logprobs = False
                    note_once(f"{self.base_url} gives no log-probabilities; P(fake) is that of the verdict, 0 or 1")
                    continue
                reason, pause = self._judge(error)
            if attempt < self.retries:
                with self._lock:
                    self.repeated += 1
                time.sleep(_pause(self.first_pause, attempt) if pause is None else min(pause, _LONGEST_PAUSE))
        raise EndpointError(f"{reason} ({self.retries + 1} times asked)")

    def _judge(self, error: Exception) -> tuple[str, float | None]:
        """Returns what is wrong and how long to wait; raises what no repetition mends, and what is a bug of ours."""
        import openai

        if isinstance(error, openai.APIStatusError):
            status, message = error.status_code, _one_line(error.message)
            if status in _FATAL:
                hint = f"; the key is taken from {self.key_variable}" if status in (401, 403) else ""
                raise EndpointDownError(f"{self.base_url} refuses {self.model!r} ({status}): {message}{hint}") from None
            if "insufficient_quota" in str(error.body):
                raise EndpointDownError(f"{self.base_url}: the quota is used up: {message}") from None
            if status < 500 and status not in _REPEATED:
                raise EndpointError(f"the endpoint refuses the question ({status}): {message}") from None
            return f"the endpoint answers {status}: {message}", _retry_after(error.response.headers)
        if isinstance(error, openai.APITimeoutError):
            return f"no answer within {self.timeout:g} s", None
        if isinstance(error, openai.APIConnectionError):
            return f"the connection to {self.base_url} fails: {_one_line(str(error.__cause__ or error))}", None
        if isinstance(error, openai.APIError | ValueError):  # a body that is cut or no JSON
            return f"the answer cannot be read: {_one_line(str(error))}", None
        raise error

    def _opened(self) -> Any:
        with self._lock:
            if self._client is None:
                try:
                    import openai
                except ModuleNotFoundError:
                    raise OptionError(
                        "openai is not installed; it comes with: pip install 'fakereasoning[endpoint]'"
                    ) from None
                self._client = openai.OpenAI(
                    api_key=os.environ.get(self.key_variable) or "none",
                    base_url=self.base_url,
                    timeout=self.timeout,
                    max_retries=0,
                )
            return self._client


def image_url(image: Image.Image) -> str:
    """Returns an image as a data URL of PNG, which changes no pixel."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


class _Unusable(Exception):
    """An answer that came and says nothing."""


def _read(completion: Any) -> Reply:
    choices = getattr(completion, "choices", None)
    if not choices or choices[0].message is None:
        raise _Unusable("the answer holds no message")
    choice = choices[0]
    if choice.finish_reason == "content_filter" or choice.message.refusal:
        raise EndpointError(f"the endpoint declines to answer: {choice.message.refusal or 'content filter'}")
    found = choice.logprobs.content if choice.logprobs and choice.logprobs.content else []
    tokens = tuple(
        TokenChoice(token.token, {top.token: float(top.logprob) for top in token.top_logprobs or []}) for token in found
    )
    usage = completion.usage
    return Reply(
        choice.message.content or "",
        tokens,
        (usage.prompt_tokens or 0) if usage else 0,
        (usage.completion_tokens or 0) if usage else 0,
    )


def _read_completion(completion: Any) -> Completion:
    choices = getattr(completion, "choices", None)
    if not choices or choices[0].text is None:
        raise _Unusable("the answer holds no text")
    found, usage = choices[0].logprobs, completion.usage
    ids = [_token_id(token) for token in (found.tokens or [])] if found else []
    top = [_by_id(place or {}) for place in (found.top_logprobs or [])] if found else []
    if None in ids or len(top) != len(ids):  # of an engine that names tokens by their text
        ids, top = [], []
    return Completion(
        choices[0].text,
        tuple(index for index in ids if index is not None),
        tuple(top),
        (usage.prompt_tokens or 0) if usage else 0,
        (usage.completion_tokens or 0) if usage else 0,
    )


def _token_id(token: str) -> int | None:
    number = str(token).removeprefix(_TOKEN_ID)
    return int(number) if str(token).startswith(_TOKEN_ID) and number.isdecimal() else None


def _by_id(place: Mapping[str, float]) -> dict[int, float]:
    return {index: float(logprob) for token, logprob in place.items() if (index := _token_id(token)) is not None}


def _refuses_logprobs(error: Exception) -> bool:
    status = getattr(error, "status_code", None)
    return status in (400, 422, 501) and "logprob" in str(error).lower()


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait; None where it says nothing that is understood."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * scale)
        except (KeyError, ValueError):
            continue
    return None


def _pause(first: float, attempt: int) -> float:
    return float(min(_LONGEST_PAUSE, first * 2**attempt) * random.uniform(0.75, 1.25))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
