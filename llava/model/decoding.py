"""Batched decoding that keeps, of all logits, only those of a few words.

Suffixes: B rows, L positions of the prompt, D width, V words, W words that are kept, T new tokens.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from llava.errors import OptionError
from llava.model.cpu_bfloat16 import exact_logits
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.prompt_lookup import Guesses
from llava.model.static_steps import FIXED_MODES, StaticCache, StaticSteps, StepRunner

_CACHE_CHUNK = 128
"""Positions by which a cache grows at a time."""
_PREFILL_BATCH_CPU = {torch.float32: 4, torch.bfloat16: 1}
"""Prompts that a CPU prefills at a time: the activations of more do not stay in its caches."""
_PREFILL_POSITIONS = 8192
"""Positions that a GPU prefills at a time: enough to keep it busy, and the activations of more only take memory."""
_COMPACT_EVERY = 8
"""Finished rows are dropped once they are one in so many: dropping copies the cache of all others."""


class PreallocatedLayer(DynamicLayer):
    """A cache layer that grows by chunks, so that a step writes its own position and does not copy all earlier ones."""

    keys: Tensor
    values: Tensor
    _keys: Tensor | None = None
    _values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``[B, heads, new, width]``; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self._keys is None or self._values is None or end > self._keys.shape[-2]:
            self._keys = self._grown(self.keys, key_states, length, end)
            self._values = self._grown(self.values, value_states, length, end)
        self._keys[..., length:end, :] = key_states
        self._values[..., length:end, :] = value_states
        self.keys, self.values = self._keys[..., :end, :], self._values[..., :end, :]
        return self.keys, self.values

    def put(self, part: "PreallocatedLayer", first: int, number: int) -> None:
        """Takes a part's rows as its own from ``first`` on; all ``number`` are put in before anything else is done."""
        if self._keys is None or self._values is None:
            self.lazy_initialization(part.keys, part.values)
            end = part.get_seq_length()
            self._keys, self._values = (
                self._grown(own, own[:1].expand(number, -1, -1, -1), 0, end) for own in (part.keys, part.values)
            )
            self.keys, self.values = self._keys[..., :end, :], self._values[..., :end, :]
        rows = slice(first, first + len(part.keys))
        self.keys[rows], self.values[rows] = part.keys, part.values

    @staticmethod
    def _grown(old: Tensor, new: Tensor, length: int, end: int) -> Tensor:
        larger = new.new_empty((*new.shape[:-2], -(-end // _CACHE_CHUNK) * _CACHE_CHUNK, new.shape[-1]))
        if length:
            larger[..., :length, :] = old
        return larger

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        super().batch_repeat_interleave(repeats)
        self._keys = self._values = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only these rows."""
        super().batch_select_indices(indices.to(self.keys.device))
        self._keys = self._values = None


@dataclass(frozen=True)
class Decoded:
    """One answer.

    Attributes:
        ids: New ids, the closing one included.
        kept_logits: Raw logits of the kept words at each step, ``[T, W]``, float32, on the CPU.
        states: Last states that predicted the asked-for id, ``[n, D]``; empty unless asked for.
    """

    ids: list[int]
    kept_logits: Tensor
    states: Tensor = field(default_factory=lambda: torch.empty(0, 0))


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of B prompts, a pair ``[B, heads, L, width]`` a layer, so that prompts run once."""

    layers: list[tuple[Tensor, Tensor]]

    def of_rows(self, rows: Sequence[int]) -> Cache:
        """Returns a cache that continues these prompts."""
        layers = []
        for keys, values in self.layers:
            layer = PreallocatedLayer()
            chosen = torch.tensor(rows, device=keys.device)
            layer.update(keys[chosen], values[chosen])
            layers.append(layer)
        return Cache(layers=layers)


class Sampler:
    """Chooses the next ids; each row draws from a random stream of its own, whatever batch it is in.

    Args:
        temperature: 0 chooses the likeliest word.
        top_p: Sample from the smallest set of words that has this probability; None means all.
        seeds: What each row's stream is made from.
    """

    def __init__(self, temperature: float, top_p: float | None, seeds: Sequence[str]) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self._streams = [random.Random(seed) for seed in seeds]

    def choose(self, logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        """Returns the next id of each row, ``[B]``; ``rows`` are the rows' numbers."""
        if self.temperature == 0:
            return logits_BV.argmax(dim=-1)
        probabilities_BV = (logits_BV.float() / self.temperature).softmax(dim=-1)
        if self.top_p is not None:
            sorted_BV, words_BV = probabilities_BV.sort(dim=-1, descending=True)
            outside_BV = sorted_BV.cumsum(dim=-1) - sorted_BV >= self.top_p
            probabilities_BV = probabilities_BV.masked_fill(outside_BV.scatter(1, words_BV, outside_BV), 0.0)
        # In the vocabulary's order, not that of probabilities: words that are about equally likely swap places in it
        # with the rounding of another batch, and the draw would fall on another word.
        reached_BV = probabilities_BV.cumsum(dim=-1).masked_fill(probabilities_BV == 0, 0.0)
        draws = [1 - self._streams[row].random() for row in rows]  # above 0, at most 1
        targets_B1 = torch.tensor(draws, device=logits_BV.device)[:, None] * reached_BV.amax(dim=-1, keepdim=True)
        return (reached_BV >= targets_B1).int().argmax(dim=-1)


@torch.no_grad()
def decode(
    model: LlavaLlamaForCausalLM,
    prompts_BLD: Tensor,
    *,
    sampler: Sampler,
    max_new_tokens: int,
    kept_words: Sequence[int],
    is_complete: Callable[[list[int]], bool],
    samples: int = 1,
    attention_mask: Tensor | None = None,
    states_of: int | None = None,
    follow: Callable[[int, int, float, Tensor], bool] | None = None,
    guesses: Guesses | None = None,
) -> tuple[list[Decoded], PromptCache]:
    """Continues prompts until each is complete.

    Args:
        model: The model; its ``step_runner`` says how steps are run.
        prompts_BLD: Embedded prompts.
        sampler: How words are chosen; it has one stream for each of the B × samples answers.
        max_new_tokens: Longest answer.
        kept_words: Ids whose raw logits are kept at every step.
        is_complete: Whether an answer ends with its last id.
        samples: Answers a prompt; the prompt runs once.
        attention_mask: ``[B, L]``, False where a prompt is padded on its left; None where none is.
        states_of: Also keep the model's last states, behind its norm, wherever they predict this id and it is chosen.
        follow: Takes the answer's number, its new id, that id's log-probability and the kept logits ``[W]`` at it;
            returns whether the answer may end.
        guesses: Guesses next ids, which greedy decoding then checks in one step.

    Returns:
        B × samples answers, those of one prompt side by side, and the prompts' own cache, which holds until the next
        batch is decoded.
    """
    padding = None if attention_mask is None or bool(attention_mask.all()) else Padding(attention_mask.bool())
    logits_BV, states_BD, steps, prompts = _begin(model, prompts_BLD, padding, samples, max_new_tokens)
    answers = _Answers(model, len(logits_BV), max_new_tokens, kept_words, is_complete, states_of, follow, guesses)
    while True:
        ids_B = sampler.choose(logits_BV, answers.rows)
        if answers.take(ids_B, logits_BV, states_BD):
            return answers.decoded(prompts_BLD), prompts
        if isinstance(steps, _GrowingSteps) and (kept_rows := answers.drop_finished()) is not None:
            ids_B = ids_B[kept_rows]
            steps.keep(kept_rows)
        guessed_BN = answers.guessed(ids_B) if sampler.temperature == 0 else ids_B[:, None]
        logits_BNV, states_BND = steps.run(guessed_BN)
        right = answers.count_right(guessed_BN, logits_BNV)
        for at in range(right):
            if answers.take(guessed_BN[:, at + 1], logits_BNV[:, at], states_BND[:, at]):
                return answers.decoded(prompts_BLD), prompts
        if right < guessed_BN.shape[1] - 1:
            steps.undo(guessed_BN.shape[1] - 1 - right)
        logits_BV, states_BD = logits_BNV[:, right], states_BND[:, right]


class _Answers:
    """The answers of a batch as they grow, see ``decode``.

    Attributes:
        rows: Number of the answer that each row of the batch belongs to.
    """

    def __init__(
        self,
        model: LlavaLlamaForCausalLM,
        number: int,
        max_new_tokens: int,
        kept_words: Sequence[int],
        is_complete: Callable[[list[int]], bool],
        states_of: int | None,
        follow: Callable[[int, int, float, Tensor], bool] | None,
        guesses: Guesses | None,
    ) -> None:
        self._model = model
        self._ids: list[list[int]] = [[] for _ in range(number)]
        self._states: list[list[Tensor]] = [[] for _ in range(number)]
        self._kept_BTW = torch.zeros(number, max_new_tokens, len(kept_words), device=model.device)
        self._kept_words, self._is_complete, self._states_of = kept_words, is_complete, states_of
        self._follow, self._guesses = follow, guesses
        self._finished: set[int] = set()
        self._length = 0
        self.rows = list(range(number))

    def take(self, ids_B: Tensor, logits_BV: Tensor, states_BD: Tensor) -> bool:
        """Adds an id to each row, with the logits and states that predict it; returns whether all is done."""
        self._kept_BTW[self.rows, self._length] = word_logits(self._model, states_BD, self._kept_words, logits_BV)
        logprobs_B = _logprobs(logits_BV, ids_B) if self._follow else [0.0] * len(self.rows)
        for index, (row, chosen, logprob) in enumerate(zip(self.rows, ids_B.tolist(), logprobs_B, strict=True)):
            if row in self._finished:
                continue
            self._ids[row].append(chosen)
            if self._guesses:
                self._guesses.add(row, chosen)
            if chosen == self._states_of:
                self._states[row].append(states_BD[index])
            unwanted = self._follow is not None and self._follow(
                row, chosen, logprob, self._kept_BTW[row, self._length]
            )
            if unwanted or self._is_complete(self._ids[row]):
                self._finished.add(row)
        self._length += 1
        return len(self._finished) == len(self._ids) or self._length == self._kept_BTW.shape[1]

    def drop_finished(self) -> Tensor | None:
        """Drops the rows of finished answers; returns the places of those that stay, or None while all do."""
        places = _unfinished_rows(self.rows, self._finished)
        if places is None:
            return None
        self.rows = [self.rows[place] for place in places]
        return torch.tensor(places, device=self._kept_BTW.device)

    def guessed(self, ids_B: Tensor) -> Tensor:
        """Returns the last ids with those that are guessed to follow them, ``[B, 1 + guesses]``."""
        free = self._kept_BTW.shape[1] - self._length - 1
        asked = [row for row in self.rows if row not in self._finished]
        found = self._guesses.of_rows(asked, free) if self._guesses else []
        if not found:
            return ids_B[:, None]
        by_row = dict(zip(asked, found, strict=True))  # a finished answer's row only runs along
        rest = [by_row.get(row, found[0]) for row in self.rows]
        return torch.cat((ids_B[:, None], torch.tensor(rest, device=ids_B.device)), dim=1)

    def count_right(self, guessed_BN: Tensor, logits_BNV: Tensor) -> int:
        """Returns how many guesses, from the first on, are what every unfinished answer goes on with."""
        if guessed_BN.shape[1] == 1:
            return 0
        own = [place for place, row in enumerate(self.rows) if row not in self._finished]
        right_BN = guessed_BN[own, 1:] == logits_BNV[own, :-1].argmax(dim=-1)
        return int(right_BN.all(dim=0).long().cumprod(dim=0).sum())

    def decoded(self, prompts_BLD: Tensor) -> list[Decoded]:
        """Returns the answers."""
        kept, nothing = self._kept_BTW.cpu(), prompts_BLD.new_empty(0, prompts_BLD.shape[-1])
        return [
            Decoded(ids, kept[row, : len(ids)], torch.stack(last) if last else nothing)
            for row, (ids, last) in enumerate(zip(self._ids, self._states, strict=True))
        ]


def word_logits(
    model: LlavaLlamaForCausalLM, states_BD: Tensor, words: Sequence[int], logits_BV: Tensor | None = None
) -> Tensor:
    """Returns raw logits of some words after last states, ``[B, W]`` in float32; ``logits_BV`` where they are known."""
    exact = exact_logits(model.lm_head, states_BD, tuple(words))
    if exact is not None:
        return exact
    known_BV = model.lm_head(states_BD) if logits_BV is None else logits_BV
    return known_BV[:, list(words)].float()


def _unfinished_rows(rows: Sequence[int], finished: set[int]) -> list[int] | None:
    """Which rows go on, by their place; None while too few have finished for dropping them to pay."""
    unfinished = [index for index, row in enumerate(rows) if row not in finished]
    return unfinished if (len(rows) - len(unfinished)) * _COMPACT_EVERY >= len(rows) else None


@dataclass(frozen=True)
class Padding:
    """Which positions of B rows hold something.

    Attributes:
        mask: ``[B, L]``, False where a row is padded on its left.
    """

    mask: Tensor

    def of_rows(self, indices: Tensor) -> "Padding":
        """Returns that of these rows."""
        return Padding(self.mask[indices.to(self.mask.device)])

    def extended(self, new: int = 1) -> "Padding":
        """Returns that of rows with so many more positions each."""
        return Padding(torch.nn.functional.pad(self.mask, (0, new), value=True))

    def without(self, last: int) -> "Padding":
        """Returns that of rows without their last positions."""
        return Padding(self.mask[:, :-last])

    def inputs(self, new: int) -> dict[str, Tensor]:
        """Returns what the model takes of it for a step that runs the last ``new`` positions."""
        counted_BL = (self.mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return {"attention_mask": self.mask, "position_ids": counted_BL[:, -new:]}


def _run(
    model: LlavaLlamaForCausalLM, cache: Cache, padding: Padding | None, **inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs further positions; returns logits ``[B, V]`` and last states ``[B, D]`` of the last one."""
    states_B1D = _states(model, cache, padding, **inputs)[:, -1:]
    return model.lm_head(states_B1D)[:, -1], states_B1D[:, -1]


def _states(model: LlavaLlamaForCausalLM, cache: Cache, padding: Padding | None, **inputs: Tensor) -> Tensor:
    given = {} if padding is None else padding.inputs(next(iter(inputs.values())).shape[1])
    states_BND: Tensor = model.model(past_key_values=cache, use_cache=True, **given, **inputs).last_hidden_state
    return states_BND


class _GrowingSteps:
    """The steps of one batch of answers on a cache that grows with them."""

    def __init__(self, model: LlavaLlamaForCausalLM, cache: Cache, padding: Padding | None) -> None:
        self._model, self._cache, self._padding = model, cache, padding

    def keep(self, indices: Tensor) -> None:
        """Drops all other rows."""
        self._cache.batch_select_indices(indices)
        self._padding = self._padding and self._padding.of_rows(indices)

    def run(self, ids_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Runs new ids; returns logits ``[B, N, V]`` and last states ``[B, N, D]`` after each."""
        self._padding = self._padding and self._padding.extended(ids_BN.shape[1])
        if ids_BN.shape[1] == 1:
            logits_BV, states_BD = _run(self._model, self._cache, self._padding, input_ids=ids_BN)
            return logits_BV[:, None], states_BD[:, None]
        states_BND = _states(self._model, self._cache, self._padding, input_ids=ids_BN)
        return self._model.lm_head(states_BND), states_BND

    def undo(self, number: int) -> None:
        """Forgets the last positions."""
        self._cache.crop(-number)
        self._padding = self._padding and self._padding.without(number)


def _logprobs(logits_BV: Tensor, ids_B: Tensor) -> list[float]:
    """Log-probabilities of chosen words, ``[B]``."""
    chosen: list[float] = logits_BV.float().log_softmax(dim=-1).gather(1, ids_B[:, None])[:, 0].tolist()
    return chosen


def _begin(
    model: LlavaLlamaForCausalLM, prompts_BLD: Tensor, padding: Padding | None, samples: int, max_new_tokens: int
) -> tuple[Tensor, Tensor, _GrowingSteps | StaticSteps, PromptCache]:
    """Runs the prompts; returns logits ``[B, V]`` and states ``[B, D]`` after them, further steps, and their cache."""
    rows, length = len(prompts_BLD) * samples, prompts_BLD.shape[1]
    fixed = model.step_runner.cache_for(model, rows, length + max_new_tokens)
    try:
        logits_BV, states_BD, layers = _prefill(model, prompts_BLD, padding, fixed, samples)
    except torch.OutOfMemoryError:
        model.step_runner.forget()  # smaller batches need a smaller one
        raise
    if samples > 1:
        logits_BV, states_BD = (values.repeat_interleave(samples, dim=0) for values in (logits_BV, states_BD))
        padding = padding and padding.of_rows(torch.arange(len(prompts_BLD)).repeat_interleave(samples))
    if fixed is not None:
        steps = StaticSteps(model, fixed, rows, length, padding.mask if padding else None)
        return logits_BV, states_BD, steps, PromptCache(fixed.prompts(rows, samples, length))
    prompts = PromptCache([(layer.keys, layer.values) for layer in layers])
    cache = Cache(layers=layers)
    if samples > 1:
        cache.batch_repeat_interleave(samples)
    return logits_BV, states_BD, _GrowingSteps(model, cache, padding), prompts


def _prefill(
    model: LlavaLlamaForCausalLM, prompts_BLD: Tensor, padding: Padding | None, fixed: StaticCache | None, repeats: int
) -> tuple[Tensor, Tensor, list[PreallocatedLayer]]:
    """Runs the prompts, as many at a time as their activations should be.

    Returns:
        Logits ``[B, V]`` and states ``[B, D]`` after them, and the layers of their cache, which are empty where
        ``fixed`` takes it in their place, each prompt ``repeats`` times.
    """
    number = len(prompts_BLD)
    layers = [PreallocatedLayer() for _ in range(model.config.num_hidden_layers)]
    logits, states = [], []
    for rows in torch.arange(number).split(prefill_rows(prompts_BLD)):
        own = [PreallocatedLayer() for _ in layers]
        part = prompts_BLD[rows.to(prompts_BLD.device)]
        after = _run(model, Cache(layers=own), padding and padding.of_rows(rows), inputs_embeds=part)
        logits.append(after[0])
        states.append(after[1])
        if fixed is not None:
            fixed.put(own, int(rows[0]) * repeats, repeats)
        elif len(rows) == number:
            return *after, own
        else:
            for layer, one in zip(layers, own, strict=True):
                layer.put(one, int(rows[0]), number)
    return torch.cat(logits), torch.cat(states), layers


def prefill_rows(prompts_BLD: Tensor) -> int:
    """Returns how many of these embedded prompts are run at a time."""
    if prompts_BLD.device.type == "cpu":
        return _PREFILL_BATCH_CPU.get(prompts_BLD.dtype, 4)
    return max(1, _PREFILL_POSITIONS // prompts_BLD.shape[1])


def set_decoding(model: LlavaLlamaForCausalLM, mode: str, prompt_lookup: int = 0) -> None:
    """Says how a model's answers are decoded, which does not change them.

    Args:
        model: The model.
        mode: See ``StepRunner``.
        prompt_lookup: Ids that are guessed at a time, see ``Guesses``; 0 for none.

    Raises:
        OptionError: The mode is unknown or cannot be had with the model's attention, or the number is negative.
    """
    attention = model.config._attn_implementation
    if mode in FIXED_MODES and attention != "sdpa":
        raise OptionError(f"decode {mode} needs the attention sdpa, not {attention}")
    if prompt_lookup < 0:
        raise OptionError(f"prompt_lookup must not be negative, but is {prompt_lookup}")
    model.step_runner, model.prompt_lookup = StepRunner(mode), prompt_lookup
