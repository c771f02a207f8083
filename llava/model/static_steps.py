"""Decoding steps of one shape: on a cache of fixed size, eagerly or compiled into a CUDA graph.

A step of few rows takes a GPU less time than launching its hundreds of kernels takes the processor. A graph launches
them at once, but only for the same shapes at the same addresses: so the cache has room for the longest answer from the
start, stays where it is for the next batch, and no row is dropped.

Suffixes: B rows, N new positions, L positions of the cache, D width, V words.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from llava.cli import note_once
from llava.errors import OptionError

if TYPE_CHECKING:
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

DECODE_MODES = ("auto", "eager", "static", "compile")
FIXED_MODES = ("static", "compile")
"""Ways to decode that need PyTorch's own attention (SDPA)."""
_EAGER_BATCHES = 2
"""Batches that ``auto`` decodes before it compiles: for fewer, compiling takes longer than it saves."""
_ROUND_LENGTH = 128
_ROUND_ROWS = 8
"""Sizes of the cache are multiples of these (few rows: powers of two), since each size is compiled anew."""
_MOST_SIZES = 16
"""Sizes that are compiled at most, after which steps are eager; PyTorch's own limit is 8."""


def round_rows(rows: int) -> int:
    """Returns the rows of the cache that so many rows are decoded in."""
    return 1 << (rows - 1).bit_length() if rows <= _ROUND_ROWS else -(-rows // _ROUND_ROWS) * _ROUND_ROWS


def whole_rows(most: int) -> int:
    """Returns the most rows, of at most so many, that fill a cache wholly."""
    return most // _ROUND_ROWS * _ROUND_ROWS if most >= _ROUND_ROWS else 1 << (max(1, most).bit_length() - 1)


class StaticCache(Cache):
    """A cache of a fixed number of rows and positions, which is filled by row.

    Args:
        layers: Number of layers.
        rows: Rows.
        length: Positions of each row.
    """

    layers: list[StaticLayer]

    def __init__(self, layers: int, rows: int, length: int) -> None:
        super().__init__(layers=[StaticLayer(length) for _ in range(layers)])
        self.rows = rows
        self.length = length

    def put(self, prompts: Sequence[CacheLayerMixin], first: int, repeats: int) -> None:
        """Takes prompts' keys and values, each so many times, as its rows from ``first`` on."""
        for own, prompt in zip(self.layers, prompts, strict=True):
            assert prompt.keys is not None and prompt.values is not None
            if not own.is_initialized:
                own.lazy_initialization(
                    *(part[:1].expand(self.rows, -1, -1, -1) for part in (prompt.keys, prompt.values))
                )
            for kept, new in ((own.keys, prompt.keys), (own.values, prompt.values)):
                assert kept is not None
                kept[first : first + len(new) * repeats, :, : new.shape[2]] = new.repeat_interleave(repeats, dim=0)

    def seek(self, position: int) -> None:
        """Lets the next step write from this position on."""
        for layer in self.layers:
            layer.cumulative_length.fill_(position)

    def prompts(self, rows: int, repeats: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Returns keys and values of the prompts in the first ``rows`` rows; the next batch overwrites them."""
        every = slice(0, rows, repeats)
        return [(layer.keys[every, :, :length], layer.values[every, :, :length]) for layer in self.layers]


def _step(
    model: "LlavaLlamaForCausalLM", cache: StaticCache, ids_BN: Tensor, shown_BL: Tensor, left_B1: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs new positions; returns their logits ``[B, N, V]`` and last states ``[B, N, D]``."""
    slots_N = torch.arange(ids_BN.shape[1], device=ids_BN.device) + cache.get_seq_length()
    slots_L = torch.arange(cache.length, device=ids_BN.device)
    mask_B1NL = (shown_BL[:, None, :] & (slots_L <= slots_N[:, None]))[:, None]
    states_BND = model.model(
        input_ids=ids_BN,
        attention_mask=mask_B1NL,
        position_ids=slots_N - left_B1,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return model.lm_head(states_BND), states_BND


class StepRunner:
    """Keeps a model's fixed cache and its compiled step from batch to batch.

    Args:
        mode: ``eager`` grows a cache with each answer. ``static`` has a cache of fixed size; ``compile`` also compiles
            the step. ``auto`` is ``eager`` on a CPU, and on one GPU ``compile`` once some batches were decoded.

    Raises:
        OptionError: The mode is unknown.
    """

    def __init__(self, mode: str = "eager") -> None:
        if mode not in DECODE_MODES:
            raise OptionError(f"unknown decode {mode!r}; it must be one of {', '.join(DECODE_MODES)}")
        self.mode = mode
        self._batches = 0
        self._cache: StaticCache | None = None
        self._compiled: Any = None

    @property
    def kept_bytes(self) -> int:
        """Bytes of the cache that is kept for the next batch."""
        layers = [] if self._cache is None else self._cache.layers
        return sum(part.nbytes for layer in layers for part in (layer.keys, layer.values) if part is not None)

    def may_compile(self, model: "LlavaLlamaForCausalLM") -> bool:
        """Whether batches of this model are compiled now or later, so that few sizes of them are better."""
        return self.mode == "compile" or (self.mode == "auto" and _is_on_one_gpu(model))

    def cache_for(self, model: "LlavaLlamaForCausalLM", rows: int, length: int) -> StaticCache | None:
        """Returns the cache for a batch of so many rows and positions; None where it is to grow as it is filled."""
        self._batches += 1
        waits = self.mode == "auto" and (self._batches <= _EAGER_BATCHES or not _is_on_one_gpu(model))
        if self.mode == "eager" or waits:
            return None
        kept = self._cache
        if kept is not None and kept.rows >= rows and kept.length >= length:
            return kept
        size = round_rows(rows), -(-length // _ROUND_LENGTH) * _ROUND_LENGTH
        if kept is not None:  # it only grows, so that batches by turns long and large are not compiled by turns
            size = max(size[0], kept.rows), max(size[1], kept.length)
        self._cache = kept = None  # its memory is free before more is taken
        self._cache = StaticCache(model.config.num_hidden_layers, *size)
        return self._cache

    def forget(self) -> None:
        """Gives the cache's memory back."""
        self._cache = None

    def run(
        self, model: "LlavaLlamaForCausalLM", cache: StaticCache, position: int, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs new positions from ``position`` on, see ``_step``; one alone by the compiled step, if any.

        Where it cannot be compiled, which is told once, this and all further batches go on eagerly.
        """
        if self.mode in ("auto", "compile") and inputs[0].shape[1] == 1:
            try:
                return self._run_compiled(model, cache, *inputs)
            except torch.OutOfMemoryError:
                self.forget()
                raise
            except Exception as error:  # compilers fail in many ways; what is the model's fault fails again below
                reason = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
                note_once(f"the decoding step cannot be compiled here, so answers are decoded eagerly: {reason}")
                self.mode, self._cache, self._compiled = "eager", None, None
                cache.seek(position)
        return _step(model, cache, *inputs)

    def _run_compiled(
        self, model: "LlavaLlamaForCausalLM", cache: StaticCache, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self._compiled is None:
            note_once("the decoding step is compiled once for each size of a batch; that takes a minute or two")
            self._compiled = torch.compile(_step, mode="reduce-overhead", fullgraph=True, dynamic=False)
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(recompile_limit=_MOST_SIZES):
            logits_BNV, states_BND = self._compiled(model, cache, *inputs)
        return logits_BNV, states_BND.clone()  # the graph's next replay overwrites its outputs, and states are kept


class StaticSteps:
    """The steps of one batch of answers on a fixed cache.

    Args:
        model: The model.
        cache: Holds the prompts.
        rows: Answers.
        length: Positions that the prompts take.
        mask_BL: False where a row is padded on its left; None where none is.
    """

    def __init__(
        self, model: "LlavaLlamaForCausalLM", cache: StaticCache, rows: int, length: int, mask_BL: Tensor | None
    ) -> None:
        self._model, self._cache, self._rows, self._length = model, cache, rows, length
        self._shown_BL = torch.ones(cache.rows, cache.length, dtype=torch.bool, device=model.device)
        if mask_BL is not None:
            self._shown_BL[:rows, :length] = mask_BL
        self._left_B1 = (~self._shown_BL).sum(dim=1, keepdim=True)
        cache.seek(length)

    def run(self, ids_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Runs new ids; returns logits ``[B, N, V]`` and last states ``[B, N, D]`` after each."""
        padded = torch.nn.functional.pad(ids_BN, (0, 0, 0, self._cache.rows - self._rows))
        runner = self._model.step_runner
        logits, states = runner.run(self._model, self._cache, self._length, padded, self._shown_BL, self._left_B1)
        self._length += ids_BN.shape[1]
        return logits[: self._rows], states[: self._rows]

    def undo(self, number: int) -> None:
        """Forgets the last positions."""
        self._length -= number
        self._cache.seek(self._length)


def _is_on_one_gpu(model: "LlavaLlamaForCausalLM") -> bool:
    """Whether a model lies whole on one GPU, with weights and an attention whose steps a graph can hold."""
    config = model.config
    plain = config._attn_implementation == "sdpa" and getattr(config, "quantization_config", None) is None
    return plain and model.device.type == "cuda" and len(set(getattr(model, "hf_device_map", {}).values())) <= 1
