"""The model in OpenAI's form: chat completions about an image, whole or token by token. Imports no torch."""

import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from llava.serve.events import KEEP_ALIVE, Emit, event, while_working
from llava.serve.limits import RequestError
from llava.serve.service import Accepted, Service
from llava.serve.uploads import Upload, Wants, data_upload

_TINY = 1e-300
_ASKED = ("temperature", "top_p", "seed")


class ImageAddress(BaseModel):
    """Where the image is: in a data URL."""

    url: str = Field(description="A data URL. Addresses are never fetched.")


class Part(BaseModel):
    """A part of a message."""

    type: str
    text: str | None = None
    image_url: ImageAddress | None = None


class Message(BaseModel):
    """A message of the conversation."""

    role: str
    content: str | list[Part] | None = None


class ChatBody(BaseModel):
    """A question about an image in OpenAI's form; without a text the system asks its own question."""

    model_config = ConfigDict(extra="ignore")

    model: str
    messages: list[Message]
    stream: bool | None = None
    logprobs: bool | None = Field(default=None, description="Give each token's log-probability.")
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    n: int | None = None
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Token:
    """A piece of an answer, its log-probability, and P(fake) if it is the verdict."""

    text: str
    logprob: float
    fake_probability: float | None

    def to_dict(self) -> dict[str, Any]:
        """Returns it in OpenAI's form; the verdict has log P(real) and log P(fake) beside it."""
        fake = self.fake_probability
        pairs = [] if fake is None else [("real", 1 - fake), ("fake", fake)]
        top = [_named(word, math.log(max(probability, _TINY))) for word, probability in pairs]
        return {**_named(self.text, self.logprob), "top_logprobs": top}


def _named(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class Listening:
    """Follows an answer while it is decoded, and knows its verdict when it comes.

    Args:
        words: The system's ``answer_format``; None for one without answers.
    """

    def __init__(self, words: Any) -> None:
        self._words = words
        self._text = ""
        self.tokens: list[Token] = []

    def heard(self, piece: str, logprob: float, fake_probability: float) -> Token | None:
        """Takes the next piece; returns it as a token, or None if it is only a blank at the beginning."""
        piece = piece if self.tokens else piece.lstrip()  # the report's text has no blanks at its ends
        if not piece:
            return None
        is_verdict = bool(piece.strip()) and self._verdict_is_next()
        token = Token(piece, logprob, fake_probability if is_verdict else None)
        self.tokens.append(token)
        self._text += piece
        return token

    def _verdict_is_next(self) -> bool:
        if self._words is None or any(token.fake_probability is not None for token in self.tokens):
            return False
        return self._words.complete_to_verdict(self._text).rstrip() == self._text.rstrip()


def read_chat(body: ChatBody, service: Service) -> tuple[Upload, Wants]:
    """Returns the image and what is wanted of it.

    Raises:
        RequestError: The model is unknown, there is not one image, or something is asked for that there is not.
    """
    if body.model != service.name:
        raise RequestError(404, "model_not_found", f"there is no model {body.model[:80]!r} here, but {service.name!r}")
    if body.n not in (None, 1) or body.tools:
        raise RequestError(422, "unsupported", "one answer is given (n = 1), and there are no tools")
    asked = [message for message in body.messages if message.role == "user"]
    contents = [part for message in asked for part in _parts(message)]
    images = [part.image_url.url for part in contents if part.image_url is not None]
    if len(images) != 1:
        raise RequestError(422, "one_image", f"a question is about one image, not {len(images)}: give one image_url")
    texts = [part.text for part in (_parts(asked[-1]) if asked else []) if part.text and part.text.strip()]
    options: dict[str, Any] = {name: value for name in _ASKED if (value := getattr(body, name)) is not None}
    if texts:
        options["question"] = "\n".join(texts)
    tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if tokens is not None:
        options["max_new_tokens"] = tokens
    return data_upload(images[0], "the image"), Wants(options=options)


def _parts(message: Message) -> list[Part]:
    if isinstance(message.content, list):
        return message.content
    return [Part(type="text", text=message.content)] if message.content else []


def _content(report: dict[str, Any]) -> str:
    """What the answer says; a verdict that is not given, or that has no words, is said in a sentence."""
    if report["abstained"]:
        return f"No verdict: {report['abstained_because'] or 'the system declines to give one'}."
    if report["text"] or report["label"] is None:
        return str(report["text"])
    return f"This image is {report['label']}."


def _logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    return {"content": [token.to_dict() for token in tokens], "refusal": None}


async def complete(body: ChatBody, service: Service) -> dict[str, Any]:
    """Returns a whole completion."""
    listening = Listening(service.detector.system.answer_format)
    accepted = await service.accept(*read_chat(body, service))
    found = await service.result(accepted, listening.heard)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": _content(found["report"]), "refusal": None},
        "logprobs": _logprobs(listening.tokens) if body.logprobs else None,
        "finish_reason": "stop",
    }
    return {**_head(service, "chat.completion"), "choices": [choice], "forgery": found}


async def stream(body: ChatBody, accepted: Accepted, service: Service) -> AsyncIterator[bytes]:
    """Yields a completion's chunks as server-sent events.

    The last chunk has the whole report. What goes wrong on the way is an event with the error.
    """
    listening = Listening(service.detector.system.answer_format)
    head = _head(service, "chat.completion.chunk")

    async def work(emit: Emit) -> None:
        def heard(piece: str, logprob: float, fake_probability: float) -> None:
            token = listening.heard(piece, logprob, fake_probability)
            if token is not None:
                emit(_chunk(head, {"content": token.text}, _logprobs([token]) if body.logprobs else None))

        found = await service.result(accepted, heard)
        if not listening.tokens:  # answers that cannot be followed come whole
            emit(_chunk(head, {"content": _content(found["report"])}))
        emit({**_chunk(head, {}, finish="stop"), "forgery": found})

    yield event(_chunk(head, {"role": "assistant", "content": ""}))
    try:
        async for chunk in while_working(work, service.limits.timeout, service.late()):
            yield KEEP_ALIVE if chunk is None else event(chunk)
    except RequestError as error:
        yield event(error.body)
    yield b"data: [DONE]\n\n"


def _head(service: Service, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid4().hex}", "object": kind, "created": int(time.time()), "model": service.name}


def _chunk(
    head: dict[str, Any],
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish: str | None = None,
) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return {**head, "choices": [choice]}
