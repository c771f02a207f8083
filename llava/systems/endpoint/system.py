"""Images to an endpoint, answers to reports: concurrent, each reply on disk when it came. Imports no torch."""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava.endpoints import KEY_VARIABLE, Endpoint, EndpointError, FailuresInARow, Reply, image_url
from llava.errors import CheckpointError, OptionError
from llava.files import JsonlLog, digest_json
from llava.report import ForgeryReport
from llava.systems import registry
from llava.systems.base import AnalyzeOptions, AnswerFormat, resolve
from llava.systems.endpoint.scores import verdict_probability

_ONE_AFTER_ANOTHER = 4
"""Images of a batch for each request under way, so that a slow answer does not hold the others up."""
_FIELDS = ("base_url", "model", "words", "key_variable")


@dataclass(frozen=True)
class Sent:
    """An image as it is sent: its data URL, and a digest of its pixels."""

    url: str
    digest: str


class EndpointSystem:
    """A model behind an endpoint.

    Args:
        endpoint: Where it is.
        words: System in whose words it is asked and its answers are read.
    """

    name = "endpoint"
    notice = ""

    def __init__(self, endpoint: Endpoint, words: str = "endpoint") -> None:
        self.endpoint = endpoint
        self.words = words
        found = registry.answer_format(words)
        if found is None:
            raise OptionError(f"{registry.spec(words).title} has no question to ask an endpoint; name another system")
        self.answer_format: AnswerFormat = found
        self.options: type[AnalyzeOptions] = resolve(registry.spec(words).options)
        self.concurrency = 8
        self._replies = _Replies()
        self._failures = FailuresInARow()

    @classmethod
    def load(cls, path: str, **options: Any) -> "EndpointSystem":
        """Opens a folder whose config names an endpoint.

        Raises:
            CheckpointError: The config lacks something, or names what there is not.
        """
        config = registry.read_files(path).config
        missing = [name for name in ("base_url", "model") if not isinstance(config.get(name), str)]
        if missing:
            raise CheckpointError(f"{path}: the config of an endpoint needs {' and '.join(missing)}")
        endpoint = Endpoint(config["base_url"], config["model"], config.get("key_variable") or KEY_VARIABLE)
        return cls(endpoint, config.get("words") or cls.name)

    @staticmethod
    def config(**values: str) -> dict[str, str]:
        """Returns the config of a folder that ``load`` opens, from base_url, model, words and key_variable."""
        return {"model_type": "openai_endpoint", **{name: values[name] for name in _FIELDS if name in values}}

    def tune(self, *, concurrency: int, timeout: float, retries: int, replies: Path) -> None:
        """Says how requests are made, which changes no answer, and where replies are kept.

        Args:
            concurrency: Requests at a time.
            timeout: Longest wait for a reply, in seconds.
            retries: How often a question is asked again.
            replies: File of all replies that came; what it has is not asked again.
        """
        self.concurrency = concurrency
        self.endpoint.timeout, self.endpoint.retries = timeout, retries
        self._replies = _Replies(replies)

    def close(self) -> None:
        """Closes the file of replies."""
        self._replies.close()

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of all kept replies, those of earlier runs too; how many there are, and of how many none are told."""
        return self._replies.usage

    def prepare(self, image: Image.Image) -> Sent:
        """Encodes an image as PNG, which changes no pixel."""
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        return Sent(image_url(image), digest)

    def batch_size(self, options: AnalyzeOptions) -> int:
        """Several images for each request that may be under way."""
        return _ONE_AFTER_ANOTHER * self.concurrency

    def describe(self, options: AnalyzeOptions) -> dict[str, Any]:
        """What is asked, of which model."""
        return {
            "model": self.endpoint.model,
            "base_url": self.endpoint.base_url,
            "prompt": self._question(options),
            "image": "png",
        }

    def analyze_batch(self, prepared: Sequence[Sent], options: AnalyzeOptions) -> list[ForgeryReport]:
        """Asks about each image.

        Raises:
            OptionError: Beams or attention are asked for, which no endpoint has.
            EndpointDownError: The endpoint takes no question of ours, or failed for several images in a row.
        """
        for name, plain in (("num_beams", 1), ("samples", 1), ("attention", False)):
            if getattr(options, name) != plain:
                raise OptionError(f"an endpoint has no {name}")
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = [pool.submit(self._ask, image, options) for image in prepared]
            try:
                return [future.result() for future in asked]
            except BaseException:
                for future in asked:
                    future.cancel()
                raise

    def _question(self, options: AnalyzeOptions) -> str:
        return options.question or self.answer_format.question

    def _ask(self, image: Sent, options: AnalyzeOptions) -> ForgeryReport:
        question = self._question(options)
        settings: dict[str, Any] = {"temperature": options.temperature, "max_tokens": options.max_new_tokens}
        settings |= {} if options.top_p is None else {"top_p": options.top_p}
        settings |= {"seed": options.seed} if options.temperature else {}
        key = digest_json([self.endpoint.base_url, self.endpoint.model, question, settings, image.digest])
        reply = self._replies.get(key)
        if reply is None:
            parts = [{"type": "image_url", "image_url": {"url": image.url}}, {"type": "text", "text": question}]
            try:
                reply = self.endpoint.ask([{"role": "user", "content": parts}], logprobs=True, **settings)
            except EndpointError as error:
                self._failures.add(error, self.endpoint.base_url)
                return ForgeryReport(None, None, None, system=self.name, error=str(error))
            self._failures.reset()
            self._replies.add(key, reply, self._token_probability(reply, options))
        return self._report(reply, self._replies.probability(key), options)

    def _token_probability(self, reply: Reply, options: AnalyzeOptions) -> float | None:
        if self.answer_format.parse(reply.text, tolerant=options.tolerant).verdict is None:
            return None
        return verdict_probability(reply.text, reply.tokens, self.answer_format)

    def _report(self, reply: Reply, probability: float | None, options: AnalyzeOptions) -> ForgeryReport:
        parsed = self.answer_format.parse(reply.text, tolerant=options.tolerant)
        by_verdict = None if parsed.verdict is None else float(parsed.verdict == "fake")
        return ForgeryReport(
            label=parsed.verdict,
            fake_probability=by_verdict if probability is None else probability,
            score_source=None if parsed.verdict is None else "verdict",
            stages=parsed.stages,
            attributes=parsed.attributes,
            text=reply.text,
            system=self.name,
            details={"score": "none" if parsed.verdict is None else "verdict" if probability is None else "logprobs"},
        )


class _Replies:
    """Replies on disk, by a digest of what was asked; without a path they are kept in memory.

    Raises:
        UserError: The file cannot be read or written, or holds something else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._known: dict[str, Mapping[str, Any]] = {}
        self._lock = threading.Lock()
        self._log = None if path is None else JsonlLog(path, self._read)

    def _read(self, number: int, record: dict[str, Any]) -> None:
        self._known[str(record.get("key"))] = record

    def get(self, key: str) -> Reply | None:
        """Returns a reply that came before."""
        record = self._known.get(key)
        return None if record is None else Reply(str(record["text"]))

    def probability(self, key: str) -> float | None:
        """Returns P(fake) by the log-probabilities of that reply, if they told it."""
        found: float | None = self._known[key]["fake_probability"]
        return found

    def add(self, key: str, reply: Reply, probability: float | None) -> None:
        """Keeps a reply; returns when it is on disk."""
        tokens = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
        record = {"key": key, "text": reply.text, "fake_probability": probability, **tokens}
        with self._lock:
            self._known[key] = record
            if self._log is not None:
                self._log.append(record)

    @property
    def usage(self) -> dict[str, int]:
        """Sums over the replies."""
        sums = {name: sum(r[name] for r in self._known.values()) for name in ("prompt_tokens", "completion_tokens")}
        uncounted = sum(not r["completion_tokens"] for r in self._known.values())
        return {"replies": len(self._known), "uncounted": uncounted, **sums}

    def close(self) -> None:
        """Closes the file."""
        if self._log is not None:
            self._log.close()
