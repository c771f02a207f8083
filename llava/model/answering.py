"""Prompts with images to answers, and P(fake) where an answer's verdict is predicted: what all language models share.

Suffixes: B images, P tokens of an image, D width, V words.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import OptionError
from llava.mm_utils import tokenize_placeholders
from llava.model.decoding import Decoded, PromptCache, Sampler, decode, prefill_rows, word_logits
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.llava_arch import EncodedImages, SplicedBatch, splice
from llava.model.multimodal_fusion.base import FusionOutput
from llava.model.prompt_lookup import Guesses, Lookup
from llava.model.static_steps import whole_rows
from llava.model.token_sources import VisionContext
from llava.report import ScoreSource
from llava.systems.base import AnalyzeOptions, AnswerFormat, Listener

_CLOSING_TAIL = 24
"""Ids at an answer's end whose text is asked whether the answer is complete."""
_CPU_BATCH = 16
_VISION_BATCH_CPU = 2
"""Images that a CPU's towers see at a time: the activations of more do not stay in its caches."""
_NOT_ASKED = 0.5
"""P(fake) where a beginning is given: nothing was decided there."""
_LARGEST_BATCH = 64
_PROMPT_TEXT = 192
"""Tokens of a prompt beside its image in the estimate of what a row takes."""
_MEMORY_SHARE = 0.6
"""Share of the free GPU memory that caches may take; the rest is for activations."""

_CONTEXT_IDS = 4
"""Ids before a new one that its text can depend on."""

Embeddings = Mapping[int, Tensor]
"""What takes each placeholder's place, ``[B, n, D]`` by the placeholder's id; one of each for every image."""


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: As decoded, a given beginning included.
        fake_probability: P(fake) at its verdict.
        source: ``verdict``, or ``forced`` where the answer has none and was completed up to it for one forward.
    """

    text: str
    fake_probability: float
    source: ScoreSource


@dataclass(frozen=True)
class ImageAnswers:
    """What is answered about one image.

    Attributes:
        answers: As many as ``options.samples``.
        prompt_probability: P(fake) without an answer; None unless asked for.
    """

    answers: list[Answer]
    prompt_probability: float | None = None


class Answering:
    """Asks a language model about images, in batches.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        context_length: Longest sequence in tokens.
        answer_format: The words of its system.
        temperature: Of the two verdict words' logits; published for FakeReasoning: 10.
        tokenize: Gives a prompt's ids, placeholders among them; default: as LLaVA does.
    """

    def __init__(
        self,
        model: LlavaLlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int,
        answer_format: AnswerFormat,
        *,
        temperature: float = 1.0,
        tokenize: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.answer_format = answer_format
        self.verdict = model.verdict_tokens
        self.temperature = temperature
        self.placeholders = model.get_model().placeholders()
        self.tokenize = tokenize or (lambda prompt: tokenize_placeholders(prompt, tokenizer, self.placeholders))
        self.listener: Listener | None = None
        self._lookup = Lookup()

    def batch_size(self, options: AnalyzeOptions) -> int:
        """On a GPU as many images as their caches fit into free memory; on a CPU what was fastest."""
        if self.model.device.type != "cuda":
            return max(1, _CPU_BATCH // options.samples)
        config = self.model.config
        width = config.num_key_value_heads * config.head_dim * config.num_hidden_layers
        answer = 0 if options.score_only else options.max_new_tokens
        prompt = sum(self.model.get_model().placeholder_tokens().values()) + _PROMPT_TEXT
        positions = min(self.context_length, prompt + answer)
        row = 2 * width * self.model.dtype.itemsize * positions
        rows = min(_LARGEST_BATCH, int(self._free_bytes() * _MEMORY_SHARE) // row)
        if not options.score_only and self.model.step_runner.may_compile(self.model):
            rows = whole_rows(rows)
        return max(1, rows // options.samples)

    def _free_bytes(self) -> int:
        """Bytes of the GPU that are free, or that PyTorch or the last batch's cache holds for the next one."""
        device = self.model.device
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused + self.model.step_runner.kept_bytes

    def encode_images(self, pixels_B3SS: Tensor, *, attention: bool = False) -> FusionOutput:
        """Returns image tokens, what they are of, and the fusion's attention; on a CPU a few images at a time."""
        size = _VISION_BATCH_CPU if pixels_B3SS.device.type == "cpu" else len(pixels_B3SS)
        parts = [self.model.encode_images(part, return_attention=attention) for part in pixels_B3SS.split(size)]
        maps = [part.attention for part in parts if part.attention is not None]
        described = [part.description for part in parts if part.description is not None]
        return FusionOutput(
            torch.cat([part.tokens for part in parts]),
            torch.cat(maps) if maps else None,
            torch.cat(described) if described else None,
        )

    def encode(
        self, pixels_B3SS: Tensor, extras: Mapping[str, Tensor] | None = None, *, attention: bool = False
    ) -> EncodedImages:
        """Returns what takes each placeholder's place, and what reports say of it; on a CPU a few images at a time.

        Args:
            pixels_B3SS: Shared pixels.
            extras: A system's further inputs.
            attention: Also give the fusion's attention.
        """
        core, parts, descriptions = self.model.get_model(), [], []
        if not core.token_sources:
            fused = self.encode_images(pixels_B3SS, attention=attention)
            return EncodedImages({IMAGE_TOKEN_INDEX: fused.tokens}, fused.attention, {}, fused.description)
        size = _VISION_BATCH_CPU if pixels_B3SS.device.type == "cpu" else len(pixels_B3SS)
        for start in range(0, len(pixels_B3SS), size):
            pixels = pixels_B3SS[start : start + size]
            own = {name: values[start : start + size] for name, values in (extras or {}).items()}
            outputs, description = core.look(pixels)
            descriptions.append(description)
            parts.append(core.encode(VisionContext(pixels, outputs, own), return_attention=attention))
        maps = [part.attention for part in parts if part.attention is not None]
        return EncodedImages(
            {index: torch.cat([part.embeddings[index] for part in parts]) for index in parts[0].embeddings},
            torch.cat(maps) if maps else None,
            {name: torch.cat([part.readings[name] for part in parts]) for name in parts[0].readings},
            torch.cat(descriptions),
        )

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
        """Decodes answers and reads P(fake) at their verdicts.

        Args:
            prompt: What is asked, up to where the answer begins; the same for all images.
            embeddings: Of the placeholders.
            digests: Digest of each image, B of them; sampling depends on it.
            options: How answers are decoded.
            prefix: Beginning of the answer that the model is given.
            score_prompt: Also read P(fake) without an answer, from the prompts that were run already.

        Raises:
            OptionError: The prompt is longer than the model's context.
        """
        prompt_ids = self.tokenize(prompt)
        start_ids = self.tokenize(self._continued(prompt, prefix).rstrip(" ")) if prefix else prompt_ids
        prefix_ids = start_ids[len(prompt_ids) :]
        budget = min(options.max_new_tokens, self._free_context(start_ids, embeddings))
        if prefix and self.listener:
            for row in range(len(digests)):  # heard too, so that the pieces make up the answer
                self.listener.heard(row, prefix, 0.0, _NOT_ASKED)
        guesses = self._guesses(prompt, start_ids, len(digests) * options.samples)
        decoded, cache = self._decode(start_ids, prefix_ids, embeddings, digests, options, budget, guesses)
        answers_ids = [[*prefix_ids, *one.ids] for one in decoded]
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers_ids]
        scores, sources = self._scores_while_decoding(prompt, answers_ids, decoded, texts)
        unread = [row for row, score in enumerate(scores) if score is None]
        completed = [self._continued(prompt, self.answer_format.complete_to_verdict(texts[row])) for row in unread]
        images = [row // options.samples for row in unread]
        for row, score in zip(unread, self._score_again(completed, images, start_ids, cache, embeddings), strict=True):
            scores[row] = score
        answers = [Answer(*each) for each in zip(texts, map(_known, scores), sources, strict=True)]
        without: list[float | None] = [None] * len(digests)
        if score_prompt:
            opened = [self._continued(prompt, self.answer_format.verdict_prefix)] * len(digests)
            without = [*self._score_again(opened, range(len(digests)), start_ids, cache, embeddings)]
        size = options.samples
        return [ImageAnswers(answers[i * size : (i + 1) * size], score) for i, score in enumerate(without)]

    def prompt_scores(self, prompt: str, embeddings: Embeddings, number: int) -> list[float]:
        """Returns P(fake) of each of B images where the verdict's opening follows the prompt at once.

        Raises:
            OptionError: The prompt is longer than the model's context.
        """
        text = self._continued(prompt, self.answer_format.verdict_prefix)
        self._free_context(self.tokenize(text), embeddings)
        return self._score_texts([text] * number, embeddings)

    def _continued(self, prompt: str, answer: str) -> str:
        """Returns a prompt and an answer; a placeholder in an answer is only a word and stands for nothing."""
        for mark in self.placeholders:
            answer = answer.replace(mark, "")
        return f"{prompt} {answer}" if answer else prompt

    def _free_context(self, prompt_ids: list[int], embeddings: Embeddings) -> int:
        """Returns how many tokens the context has left after a prompt with its placeholders filled; at least 1."""
        added = sum((tokens.shape[1] - 1) * prompt_ids.count(index) for index, tokens in embeddings.items())
        length = len(prompt_ids) + added
        if length >= self.context_length:
            raise OptionError(f"the prompt takes {length} tokens, but the model's context has {self.context_length}")
        return self.context_length - length

    def _decode(
        self,
        start_ids: list[int],
        prefix_ids: list[int],
        embeddings: Embeddings,
        digests: Sequence[str],
        options: AnalyzeOptions,
        budget: int,
        guesses: Guesses | None,
    ) -> tuple[list[Decoded], PromptCache | None]:
        embeds_BLD = self._embed([start_ids] * len(digests), embeddings).inputs_embeds
        if options.num_beams > 1:
            return self._beam_search(embeds_BLD, options.num_beams, budget), None
        streams = [f"{options.seed}/{digest}/{sample}" for digest in digests for sample in range(options.samples)]
        closing_ids = self._closing_ids
        return decode(
            self.model,
            embeds_BLD,
            sampler=Sampler(options.temperature, options.top_p, streams),
            max_new_tokens=budget,
            kept_words=(self.verdict.real, self.verdict.fake),
            is_complete=lambda ids: self._is_complete(prefix_ids, ids, closing_ids),
            samples=options.samples,
            follow=self._follower(self.listener, options.samples) if self.listener else None,
            guesses=guesses,
        )

    def _guesses(self, prompt: str, start_ids: list[int], rows: int) -> Guesses | None:
        """Returns the guesses for a batch of answers; they know the format's constant texts, and earlier answers."""
        if not self.model.prompt_lookup:
            return None
        for text in getattr(self.answer_format, "constant_texts", (self.answer_format.verdict_prefix,)):
            self._lookup.learn(self.tokenize(self._continued(prompt, text)))
        return Guesses(self._lookup, self.model.prompt_lookup, start_ids, rows)

    def _follower(self, listener: Listener, samples: int) -> Callable[[int, int, float, Tensor], bool]:
        return _Follower(listener, self.tokenizer, samples, self._end_ids, self.temperature)

    def _beam_search(self, embeds_BLD: Tensor, num_beams: int, budget: int) -> list[Decoded]:
        """Lets transformers search; no logits are kept, so scores are computed on the finished texts."""
        answers = self.model.generate(
            inputs_embeds=embeds_BLD,
            attention_mask=torch.ones(embeds_BLD.shape[:2], dtype=torch.long, device=embeds_BLD.device),
            num_beams=num_beams,
            do_sample=False,
            max_new_tokens=budget,
        ).tolist()
        pad = self.tokenizer.pad_token_id
        ends = [next((at for at, i in enumerate(ids) if i in self._end_ids), len(ids)) for ids in answers]
        cut = [ids[:end] for ids, end in zip(answers, ends, strict=True)]
        return [Decoded([i for i in ids if i != pad], torch.empty(0, 2)) for ids in cut]

    @cached_property
    def _end_ids(self) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's, and all that the checkpoint names."""
        named = self.model.generation_config.eos_token_id
        return frozenset([*(named if isinstance(named, list) else [named]), self.tokenizer.eos_token_id])

    @cached_property
    def _closing_ids(self) -> frozenset[int]:
        """Ids whose piece holds the last character of what completes an answer; only after them its text is read."""
        closing = self.answer_format.closing
        pieces = self.tokenizer.get_vocab().items() if closing else ()
        return frozenset(index for piece, index in pieces if closing[-1] in piece)

    def _is_complete(self, prefix_ids: list[int], ids: list[int], closing_ids: frozenset[int]) -> bool:
        if ids[-1] in self._end_ids:
            return True
        if ids[-1] not in closing_ids:
            return False
        tail = [*prefix_ids[-_CLOSING_TAIL:], *ids][-_CLOSING_TAIL:]
        return self.answer_format.closing in self.tokenizer.decode(tail, skip_special_tokens=True)

    def _scores_while_decoding(
        self, prompt: str, answers_ids: Sequence[list[int]], decoded: Sequence[Decoded], texts: Sequence[str]
    ) -> tuple[list[float | None], list[ScoreSource]]:
        """P(fake) of each answer from the logits of its decoding, where its text's verdict is predicted.

        Those logits count where the text's own ids are those that were decoded. Else (rare words are cut in several
        ways, beam search keeps no logits, there is no verdict) the text must be run once more, so that a score always
        belongs to its text: its score is None here.
        """
        start = len(self.tokenize(prompt))
        scores: list[float | None] = []
        sources: list[ScoreSource] = []
        for ids, one, text in zip(answers_ids, decoded, texts, strict=True):
            before = self.answer_format.complete_to_verdict(text)
            # The verdict is the model's own if its text continues where the completed one ends.
            has_verdict = text.startswith(before) and text[len(before) :].strip() != ""
            sources.append("verdict" if has_verdict else "forced")
            own = self.tokenize(self._continued(prompt, before))[start:]
            step = len(own) - (len(ids) - len(one.ids))
            if has_verdict and ids[: len(own)] == own and 0 <= step < len(one.kept_logits):
                scores.append(float((one.kept_logits[step].double() / self.temperature).softmax(dim=-1)[1]))
            else:
                scores.append(None)
        return scores, sources

    def _score_again(
        self,
        texts: Sequence[str],
        images: Sequence[int],
        start_ids: list[int],
        cache: PromptCache | None,
        embeddings: Embeddings,
    ) -> list[float]:
        """P(fake) where each text ends; what was run of its prompt, image included, is not run again.

        Args:
            texts: Prompts with answers.
            images: Number of each text's image in the batch.
            start_ids: Ids of what the cache holds.
            cache: Of the prompts that were run, or None.
            embeddings: Of the placeholders.
        """
        if not texts:
            return []
        tails = [self.tokenize(text) for text in texts]
        start = len(start_ids)
        if cache is None or any(ids[:start] != start_ids or len(ids) == start for ids in tails):
            return self._score_texts(texts, {index: tokens[list(images)] for index, tokens in embeddings.items()})
        device = self.model.device
        padded = pad_sequence([torch.tensor(ids[start:]) for ids in tails], batch_first=True).to(device)
        states_RTD = self.model.model(
            input_ids=padded, past_key_values=cache.of_rows(images), use_cache=True
        ).last_hidden_state
        lasts = torch.tensor([len(ids) - start - 1 for ids in tails], device=states_RTD.device)
        return self._probabilities(states_RTD[torch.arange(len(tails), device=states_RTD.device), lasts])

    def _score_texts(self, texts: Sequence[str], embeddings: Embeddings) -> list[float]:
        """P(fake) where each text ends, in one forward; on a CPU a few texts at a time."""
        batch = self._embed([self.tokenize(text) for text in texts], embeddings)
        scores: list[float] = []
        for rows in torch.arange(len(texts)).split(prefill_rows(batch.inputs_embeds)):
            own = rows.to(batch.inputs_embeds.device)
            mask_BL = batch.attention_mask[own]
            states_BLD = self.model.model(
                inputs_embeds=batch.inputs_embeds[own],
                attention_mask=None if bool(mask_BL.all()) else mask_BL,
                position_ids=batch.position_ids[own],
                use_cache=False,
            ).last_hidden_state
            scores += self._probabilities(states_BLD[:, -1])
        return scores

    def _probabilities(self, states_BD: Tensor) -> list[float]:
        """P(fake) where these last states predict the verdict's word."""
        logits_B2 = word_logits(self.model, states_BD, (self.verdict.real, self.verdict.fake))
        return self.verdict.probability_of_pair(logits_B2 / self.temperature).tolist()

    def _embed(self, rows: Sequence[list[int]], embeddings: Embeddings) -> SplicedBatch:
        """Prompts with their placeholders filled, padded on the left."""
        device = self.model.device
        padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side="left").to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(padded.shape[1], device=device) >= padded.shape[1] - lengths[:, None]
        filled = {index: [[own] for own in tokens] for index, tokens in embeddings.items()}
        return splice(padded, self.model.get_input_embeddings(), filled, attention_mask=mask, padding_side="left")


@dataclass
class _Pending:
    """An answer's last ids that were told, and those that are not told yet, with their common log-probability."""

    told: list[int] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    logprob: float = 0.0
    fake_probability: float = 0.0


class _Follower:
    """Turns the ids of answers, as they are decoded, into pieces of text for a listener.

    Args:
        listener: Follows the first answer of each image.
        tokenizer: The model's.
        samples: Answers an image.
        end_ids: Ids that are no text.
        temperature: Of the two verdict words' logits.
    """

    def __init__(
        self,
        listener: Listener,
        tokenizer: PreTrainedTokenizerBase,
        samples: int,
        end_ids: frozenset[int],
        temperature: float,
    ) -> None:
        self._listener = listener
        self._tokenizer = tokenizer
        self._samples = samples
        self._end_ids = end_ids
        self._temperature = temperature
        self._pending: dict[int, _Pending] = {}

    def __call__(self, answer: int, chosen: int, logprob: float, verdict_logits_W: Tensor) -> bool:
        """Takes an id; returns whether nobody waits for the answer."""
        row, sample = divmod(answer, self._samples)
        if sample == 0 and chosen not in self._end_ids:
            pending = self._pending.setdefault(row, _Pending())
            if not pending.new:
                logits_W = verdict_logits_W.double() / self._temperature
                pending.fake_probability = float(logits_W.softmax(dim=-1)[1])
            pending.new.append(chosen)
            pending.logprob += logprob
            # What an id adds depends on the ids before it, and half a character is told with its other half.
            known = self._tokenizer.decode(pending.told, skip_special_tokens=True)
            text = self._tokenizer.decode([*pending.told, *pending.new], skip_special_tokens=True)
            if not text.endswith("\ufffd"):
                self._listener.heard(row, text[len(known) :], pending.logprob, pending.fake_probability)
                self._pending[row] = _Pending(told=[*pending.told, *pending.new][-_CONTEXT_IDS:])
        return self._listener.is_gone(row)


def _known(score: float | None) -> float:
    assert score is not None
    return score
