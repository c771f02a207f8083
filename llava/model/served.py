"""Answers of a language model that an engine serves: images become prompt embeddings here, and text comes back.

P(fake) is read from the log-probabilities of the two verdict words: their difference is that of the logits.
"""

import base64
import hashlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava.endpoints import KEY_VARIABLE, Completion, Endpoint, EndpointError, FailuresInARow
from llava.errors import CheckpointError, OptionError
from llava.files import read_json
from llava.model.answering import Answer, Answering, Embeddings, ImageAnswers
from llava.model.builder import (
    automatic_dtype,
    check_aspect_ratio,
    load_tokenizer,
    materialize,
    resolve_device,
    resolve_dtype,
    set_generation_defaults,
)
from llava.model.checkpoint import PLAIN, SERVED, Checkpoint, check_keys, complete_config
from llava.model.checkpoint_files import main_dtype, read_tensors
from llava.model.decoding import Decoded
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.systems.base import AnalyzeOptions, AnswerFormat

LOGPROBS, BOUND, NO_LOGPROBS = "logprobs", "logprobs, a bound", "verdict"
"""Where P(fake) comes from: log-probabilities of both verdict words; those of one, the other not being among those that
are told; or the verdict itself, 0 or 1."""
_ONE_AFTER_ANOTHER = 4
"""Images of a batch for each request under way, so that a slow answer does not hold the others up."""
_MEANINGLESS = (
    "model_base",
    "device_map",
    "load_8bit",
    "load_4bit",
    "vision_tower",
    "dino_weights",
    "detector",
    "prompt_lookup",
)
"""Options of opening that mean nothing where the language model is elsewhere and the towers are at hand."""


@dataclass(frozen=True)
class ServedAnswers(ImageAnswers):
    """What an engine answered about one image.

    Attributes:
        error: Why there is no answer; empty if there is one.
        score: Where P(fake) comes from.
        has_score: Whether there is any.
    """

    error: str = ""
    score: str = LOGPROBS
    has_score: bool = True


@dataclass(frozen=True)
class Client:
    """All of a model but its layers.

    Attributes:
        tokenizer: The model's.
        model: The model, without layers.
        image_processor: The model's.
        context_length: Longest sequence in tokens.
        endpoint: Where the layers are.
        dtype: Of the language model there.
    """

    tokenizer: PreTrainedTokenizerBase
    model: LlavaLlamaForCausalLM
    image_processor: Any
    context_length: int
    endpoint: Endpoint
    dtype: torch.dtype


def served_settings(path: str | os.PathLike[str]) -> Mapping[str, Any] | None:
    """Returns where a client's language model is; None for any other checkpoint.

    Raises:
        CheckpointError: The settings are incomplete.
    """
    file = Path(path).expanduser() / "config.json"
    content = read_json(file) if file.is_file() else None
    settings = content.get(SERVED) if isinstance(content, dict) else None
    if settings is None:
        return None
    needed = ("base_url", "model", "dtype")
    wrong = [name for name in needed if not isinstance(settings, dict) or not isinstance(settings.get(name), str)]
    if wrong:
        raise CheckpointError(f"{file}: {SERVED} must say {', '.join(wrong)}")
    dtype = getattr(torch, settings["dtype"], None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"{file}: {SERVED} names an unknown dtype {settings['dtype']!r}")
    found: Mapping[str, Any] = settings
    return found


def load_client(path: str | os.PathLike[str], settings: Mapping[str, Any], system: str, **options: Any) -> Client:
    """Opens a client's folder.

    Args:
        path: The folder.
        settings: What ``served_settings`` returned.
        system: Short name of the system that it belongs to.
        **options: As for ``load_pretrained_model``.

    Raises:
        CheckpointError: Something is missing, unexpected or of another shape; the message names it.
        OptionError: An option means nothing here.
    """
    refused = [name for name in _MEANINGLESS if options.get(name)]
    if refused:
        raise OptionError(f"the language model of {path} is served elsewhere, so {', '.join(refused)} would do nothing")
    folder = Path(path).expanduser()
    values = {name: value for name, value in read_json(folder / "config.json").items() if name != SERVED}
    # The layers and the output layer are elsewhere: none of the first, and the second stands for the embedding.
    values |= {"num_hidden_layers": 0, "tie_word_embeddings": True}
    checkpoint, config = complete_config(Checkpoint(folder, values, read_tensors(folder), folder, PLAIN, system))
    if options.get("image_aspect_ratio"):
        config.image_aspect_ratio = check_aspect_ratio(options["image_aspect_ratio"])
    check_keys(config, checkpoint)
    device = resolve_device(options.get("device", "auto"))
    tokenizer = load_tokenizer(folder)
    model = materialize(
        config,
        checkpoint.tensors,
        dtype=_dtype(options.get("dtype", "auto"), checkpoint, device),
        device_map={"": device},
    )
    set_generation_defaults(model, None, tokenizer)
    model.get_model().freeze_towers()
    model.set_tokenizer(tokenizer)
    length = config.tokenizer_model_max_length or config.max_position_embeddings
    endpoint = Endpoint(settings["base_url"], settings["model"], str(settings.get("key_variable") or KEY_VARIABLE))
    dtype: torch.dtype = getattr(torch, settings["dtype"])
    return Client(tokenizer, model.eval(), model.image_processor, length, endpoint, dtype)


def _dtype(name: str | torch.dtype, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if name != "auto":
        return resolve_dtype(name, checkpoint, device)
    return automatic_dtype(main_dtype(checkpoint.tensors), device)


class ServedAnswering(Answering):
    """Asks a language model behind an endpoint about images; see ``Answering``.

    Args:
        client: What makes the prompt embeddings, and where they go.
        answer_format: The words of its system.
        temperature: Of the two verdict words' logits.
    """

    def __init__(self, client: Client, answer_format: AnswerFormat, *, temperature: float = 1.0) -> None:
        super().__init__(client.model, client.tokenizer, client.context_length, answer_format, temperature=temperature)
        self.endpoint = client.endpoint
        self.dtype = client.dtype
        self.concurrency = 8
        self._failures = FailuresInARow()

    def batch_size(self, options: AnalyzeOptions) -> int:
        """Several images for each request that may be under way."""
        return _ONE_AFTER_ANOTHER * self.concurrency

    def answer(
        self,
        prompt: str,
        embeddings: Embeddings,
        digests: Sequence[str],
        options: AnalyzeOptions,
        *,
        prefix: str = "",
        score_prompt: bool = False,
    ) -> list[ImageAnswers]:
        """Asks about each image, and reads P(fake) at the verdicts; see ``Answering.answer``.

        Returns:
            A ``ServedAnswers`` an image, which may say why there is no answer.

        Raises:
            OptionError: The prompt is longer than the model's context, or the options ask for what no endpoint has.
            EndpointDownError: The endpoint takes no request of ours, or failed for several images in a row.
        """
        for name in ("num_beams", "samples"):
            if getattr(options, name) != 1:
                raise OptionError(f"a served model has no {name}")
        prompt_ids = self.tokenize(prompt)
        start_ids = self.tokenize(self._continued(prompt, prefix).rstrip(" ")) if prefix else prompt_ids
        budget = min(options.max_new_tokens, self._free_context(start_ids, embeddings))
        rows = range(len(digests))
        settings = [self._settings(options, digest, budget) for digest in digests]
        found = self._ask([start_ids] * len(digests), rows, embeddings, settings)
        prefix_ids = start_ids[len(prompt_ids) :]
        read = [self._read(prompt, prefix, prefix_ids, each) for each in found if isinstance(each, Completion)]
        given = iter(read)
        answers: list[Any] = [each if isinstance(each, EndpointError) else next(given) for each in found]
        self._complete_scores(prompt, embeddings, answers)
        without: list[Any] = [None] * len(answers)
        if score_prompt:
            asked = [row for row, each in enumerate(answers) if isinstance(each, _Read)]
            texts = [self._continued(prompt, self.answer_format.verdict_prefix)] * len(asked)
            for row, score in zip(asked, self._scores_of(texts, asked, embeddings), strict=True):
                without[row] = score
        return [_image_answers(each, score) for each, score in zip(answers, without, strict=True)]

    def prompt_scores(self, prompt: str, embeddings: Embeddings, number: int) -> list[Any]:
        """Returns P(fake) of each image where the verdict's opening follows the prompt at once, or why there is none.

        Raises:
            OptionError: The prompt is longer than the model's context.
            EndpointDownError: The endpoint takes no request of ours, or failed for several images in a row.
        """
        text = self._continued(prompt, self.answer_format.verdict_prefix)
        self._free_context(self.tokenize(text), embeddings)
        found = self._scores_of([text] * number, range(number), embeddings)
        none = EndpointError("the endpoint gives no log-probabilities of the verdict words, so no score without answer")
        return [none if each is None else each if isinstance(each, EndpointError) else each[0] for each in found]

    def _settings(self, options: AnalyzeOptions, digest: str, budget: int) -> dict[str, Any]:
        settings: dict[str, Any] = {"temperature": options.temperature, "max_tokens": budget}
        settings |= {"stop": [self.answer_format.closing]} if self.answer_format.closing else {}
        if options.temperature:
            stream = hashlib.blake2b(f"{options.seed}/{digest}".encode(), digest_size=4).digest()
            settings |= {"seed": int.from_bytes(stream, "big") >> 1}
            settings |= {} if options.top_p is None else {"top_p": options.top_p}
        return settings

    def _ask(
        self,
        texts_ids: Sequence[list[int]],
        images: Sequence[int],
        embeddings: Embeddings,
        settings: Sequence[Mapping[str, Any]],
    ) -> list[Completion | EndpointError]:
        """Sends prompts, concurrently; tokenizer and model are used by this thread alone."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked: list[Future[Completion | EndpointError]] = []
            for ids, image, own in zip(texts_ids, images, settings, strict=True):
                one = {index: tokens[image : image + 1] for index, tokens in embeddings.items()}
                embeds_LD = self._embed([ids], one).inputs_embeds[0].to("cpu", self.dtype)
                asked.append(pool.submit(self._send, embeds_LD, own))
            try:
                return [future.result() for future in asked]
            except BaseException:
                for future in asked:
                    future.cancel()
                raise

    def _send(self, embeds_LD: Tensor, settings: Mapping[str, Any]) -> Completion | EndpointError:
        try:
            found = self.endpoint.complete(encode_embeddings(embeds_LD), **settings)
        except EndpointError as error:
            self._failures.add(error, self.endpoint.base_url)
            return error
        self._failures.reset()
        return found

    def _read(self, prompt: str, prefix: str, prefix_ids: list[int], found: Completion) -> "_Read":
        """Reads an answer's text, and its score where the log-probabilities of its own tokens tell it."""
        if not found.ids:
            text = f"{prefix}{found.text}".strip()
            before = self.answer_format.complete_to_verdict(text)
            has_verdict = text.startswith(before) and text[len(before) :].strip() != ""
            return _Read(text, "verdict" if has_verdict else "forced", has_logprobs=False)
        ids = [*prefix_ids, *found.ids]
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        pairs = torch.tensor([self._pair(place) for place in found.top], dtype=torch.float64)
        bounds = torch.tensor([self._pair(place, bounded=True) for place in found.top], dtype=torch.float64)
        for score, kept in ((LOGPROBS, pairs), (BOUND, bounds)):
            # Log-probabilities differ from logits by what is the same for all words.
            one = Decoded(list(found.ids), kept)
            (fake_probability,), (source,) = self._scores_while_decoding(prompt, [ids], [one], [text])
            if fake_probability is not None and not math.isnan(fake_probability):
                return _Read(text, source, fake_probability, score)
        return _Read(text, source)

    def _complete_scores(self, prompt: str, embeddings: Embeddings, answers: list[Any]) -> None:
        """Asks again for the scores that the answers' own tokens do not tell, each text completed up to its verdict."""
        unread = [row for row, each in enumerate(answers) if isinstance(each, _Read) and each.fake_probability is None]
        asked = [row for row in unread if answers[row].has_logprobs]
        texts = [self._continued(prompt, self.answer_format.complete_to_verdict(answers[row].text)) for row in asked]
        scores: dict[int, Any] = dict(zip(asked, self._scores_of(texts, asked, embeddings), strict=True))
        for row in unread:
            score = scores.get(row)
            if isinstance(score, EndpointError):
                answers[row] = score
            elif score is not None:
                answers[row] = replace(answers[row], fake_probability=score[0], score=score[1])
            else:
                verdict = self.answer_format.parse(answers[row].text, tolerant=True).verdict
                own = None if verdict is None else float(verdict == "fake")
                answers[row] = replace(answers[row], fake_probability=own, score=NO_LOGPROBS)

    def _scores_of(
        self, texts: Sequence[str], images: Sequence[int], embeddings: Embeddings
    ) -> list[tuple[float, str] | EndpointError | None]:
        """P(fake) where each text ends, and where it comes from; why there is none; or None without log-probabilities.

        Args:
            texts: Prompts with answers.
            images: Number of each text's image in the batch.
            embeddings: Of the placeholders.
        """
        if not texts:
            return []
        one = [{"temperature": 0.0, "max_tokens": 1}] * len(texts)
        found = self._ask([self.tokenize(text) for text in texts], images, embeddings, one)
        return [each if isinstance(each, EndpointError) else self._score_of(each) for each in found]

    def _score_of(self, found: Completion) -> tuple[float, str] | None:
        for score, is_bounded in ((LOGPROBS, False), (BOUND, True)):
            pair = self._pair(found.top[0], bounded=is_bounded) if found.top else (math.nan, math.nan)
            if not any(map(math.isnan, pair)):
                logits = torch.tensor(pair, dtype=torch.float64) / self.temperature
                return float(logits.softmax(dim=-1)[1]), score
        return None

    def _pair(self, place: Mapping[int, float], *, bounded: bool = False) -> tuple[float, float]:
        """Log-probabilities of real and fake; NaN for one that is not told.

        Args:
            place: Those that are told.
            bounded: Give one that is not told the most that it can have, if the other is told: the least that is told,
                and what is left of 1.
        """
        told = [place.get(word) for word in (self.verdict.real, self.verdict.fake)]
        rest = math.nan
        if bounded and told != [None, None]:
            left = 1 - sum(map(math.exp, place.values()))
            rest = min(min(place.values()), math.log(left) if left > 0 else math.inf)
        real, fake = (rest if logprob is None else logprob for logprob in told)
        return real, fake


@dataclass(frozen=True)
class _Read:
    """One answer as it was read."""

    text: str
    source: Any
    fake_probability: float | None = None
    score: str = NO_LOGPROBS
    has_logprobs: bool = True


def _image_answers(read: "_Read | EndpointError", without: Any) -> ServedAnswers:
    if isinstance(read, EndpointError):
        return ServedAnswers([], error=str(read))
    if isinstance(without, EndpointError):
        return ServedAnswers([], error=str(without))
    known = read.fake_probability is not None
    answer = Answer(read.text, read.fake_probability if read.fake_probability is not None else math.nan, read.source)
    score = read.score if without is None else without[1]
    return ServedAnswers([answer], None if without is None else without[0], "", score, known or without is not None)


def encode_embeddings(embeds_LD: Tensor) -> str:
    """Returns embeddings ``[L, D]`` as an engine takes them: saved by torch, in base64."""
    stream = io.BytesIO()
    torch.save(embeds_LD.detach().contiguous().clone(), stream)
    return base64.b64encode(stream.getvalue()).decode()
