"""FakeReasoning at work: opens a checkpoint, and turns batches of pictures into reports."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.errors import OptionError
from llava.mm_utils import grid_over_picture, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.decoding import Decoded, PromptCache, Sampler, decode
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.llava_arch import splice
from llava.model.multimodal_fusion.base import FusionOutput
from llava.model.multimodal_fusion.builder import fusion_class
from llava.report import ForgeryReport, ScoreSource
from llava.systems.base import AnswerFormat
from llava.systems.fakereasoning.answer import (
    FORMAT,
    QUESTION,
    VERDICT_PREFIX,
    complete_to_verdict,
    parse_answer,
)
from llava.systems.fakereasoning.options import FakeReasoningOptions

_CLOSING = "</CONCLUSION>"
_CLOSING_TAIL = 24
"""Ids at an answer's end in which its closing tag is looked for."""
_CPU_BATCH = 16
_LOOKS_ON_CPU = 2
"""Pictures that a CPU's towers see at a time: the activations of more do not stay in its caches."""
_LARGEST_BATCH = 64
_PROMPT_POSITIONS = 1280
"""Room for a prompt with its image in the estimate of what a row takes."""
_MEMORY_SHARE = 0.6
"""Share of the free GPU memory that caches may take; the rest is for activations."""


@dataclass(frozen=True)
class Prepared:
    """A picture as the model takes it: shared pixels ``[3, S, S]``, own width and height, a digest of the pixels."""

    pixels: Tensor
    size: tuple[int, int]
    digest: str


class FakeReasoning:
    """The published system (arXiv 2503.21210): an answer in four stages, and P(fake) at its verdict."""

    name = "FakeReasoning"
    options = FakeReasoningOptions
    answer_format: AnswerFormat = FORMAT

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: LlavaLlamaForCausalLM,
        image_processor: Any,
        context_length: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.image_processor = image_processor
        self.context_length = context_length
        self.notice: str = model.config.notice
        self._closing_ids = {index for piece, index in tokenizer.get_vocab().items() if _CLOSING[-1] in piece}

    @classmethod
    def load(cls, path: str, **options: Any) -> "FakeReasoning":
        """Opens a checkpoint; ``options`` are those of ``load_pretrained_model``."""
        return cls(*load_pretrained_model(path, **options))

    def prepare(self, image: Image.Image) -> Prepared:
        """Pads, resizes and normalises a picture."""
        pixels = process_images([image], self.image_processor, self.model.config)[0]
        return Prepared(pixels, image.size, hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).hexdigest())

    def batch_size(self, options: FakeReasoningOptions) -> int:
        """On a GPU as many images as their caches fit into free memory; on a CPU what was fastest."""
        if self.model.device.type != "cuda":
            return max(1, _CPU_BATCH // options.samples)
        config = self.model.config
        width = config.num_key_value_heads * config.head_dim * config.num_hidden_layers
        answer = 0 if options.score_only else options.max_new_tokens
        positions = min(self.context_length, _PROMPT_POSITIONS + answer)
        row = 2 * width * self.model.dtype.itemsize * positions * options.samples
        free, _ = torch.cuda.mem_get_info(self.model.device)
        return max(1, min(_LARGEST_BATCH // options.samples, int(free * _MEMORY_SHARE) // row))

    @torch.no_grad()
    def analyze_batch(self, prepared: Sequence[Prepared], options: FakeReasoningOptions) -> list[ForgeryReport]:
        """Judges a batch.

        Raises:
            ValueError: The options cannot be met, for example an attention that the fusion does not have, or a prompt
                that is longer than the model's context.
        """
        fusion = self.model.config.mm_fusion_type
        if options.attention and not fusion_class(fusion).has_attention:
            raise OptionError(f"the fusion {fusion!r} has no attention, so it cannot say where the model looked")
        pixels = torch.stack([item.pixels for item in prepared]).to(self.model.device, self.model.dtype)
        seen = self.look(pixels, attention=options.attention)
        prompt = self.prompt(options)
        if options.score_only:
            alone = _continued(prompt, VERDICT_PREFIX)
            self._room_after(tokenizer_image_token(alone, self.tokenizer), seen.tokens)
            texts = [alone] * len(prepared)
            reports = [self._score_report(chance) for chance in self._score_texts(texts, seen.tokens)]
        else:
            reports = self._answer(prompt, prepared, seen.tokens, options)
        if seen.attention is None:
            return reports
        maps = self._attention_maps(seen.attention, prepared)
        return [replace(report, attention=grid) for report, grid in zip(reports, maps, strict=True)]

    def look(self, pixels_B3SS: Tensor, *, attention: bool = False) -> FusionOutput:
        """Returns image tokens, and the fusion's attention if asked for; on a CPU a few pictures at a time."""
        at_a_time = _LOOKS_ON_CPU if pixels_B3SS.device.type == "cpu" else len(pixels_B3SS)
        parts = [self.model.encode_images(part, return_attention=attention) for part in pixels_B3SS.split(at_a_time)]
        maps = [part.attention for part in parts if part.attention is not None]
        return FusionOutput(torch.cat([part.tokens for part in parts]), torch.cat(maps) if maps else None)

    def describe(self, options: FakeReasoningOptions) -> dict[str, Any]:
        """All that changes an answer beside weights, options and pixels."""
        return {"prompt": self.prompt(options), "notice": self.notice}

    def prompt(self, options: FakeReasoningOptions) -> str:
        """Returns what the model is asked, up to where its answer begins."""
        mode = options.conv_mode or self.model.config.conv_mode
        if mode not in conv_templates:
            raise OptionError(f"unknown conv_mode {mode!r}; known: {', '.join(conv_templates)}")
        if DEFAULT_IMAGE_TOKEN in (options.question or ""):
            raise OptionError(f"the question must not hold {DEFAULT_IMAGE_TOKEN}: the picture's place is before it")
        conversation = conv_templates[mode].copy()
        conversation.append_message(conversation.roles[0], f"<image>\n{options.question or QUESTION}")
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()

    @property
    def _asks_off_distribution(self) -> bool:
        """Whether asking for the verdict alone is what the model was not trained for."""
        return bool(self.model.config.verdict_only_share == 0)

    def _score_report(self, chance: float) -> ForgeryReport:
        return ForgeryReport(
            label="fake" if chance >= 0.5 else "real",
            fake_probability=chance,
            score_source="prompt",
            system=self.name,
            off_distribution=self._asks_off_distribution,
            notice=self.notice,
        )

    def _answer(
        self, prompt: str, prepared: Sequence[Prepared], tokens_BPD: Tensor, options: FakeReasoningOptions
    ) -> list[ForgeryReport]:
        prompt_ids = tokenizer_image_token(prompt, self.tokenizer)
        begun = prompt
        if options.prefix:
            begun = _continued(prompt, options.prefix).rstrip(" ")
        begun_ids = tokenizer_image_token(begun, self.tokenizer)
        prefix_ids = begun_ids[len(prompt_ids) :]
        room = self._room_after(begun_ids, tokens_BPD)
        embeds = self._embed([begun_ids] * len(prepared), tokens_BPD).inputs_embeds
        budget = min(options.max_new_tokens, room)
        decoded, read = self._decode(embeds, prefix_ids, prepared, options, budget)
        answers = [[*prefix_ids, *one.ids] for one in decoded]
        texts = [self.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
        chances, sources, unread = self._read_scores(prompt, answers, decoded, texts)
        again = [_continued(prompt, complete_to_verdict(texts[row])) for row in unread]
        images = [row // options.samples for row in unread]
        for row, chance in zip(unread, self._score_again(again, images, begun_ids, read, tokens_BPD), strict=True):
            chances[row] = chance
        reports = []
        for start in range(0, len(decoded), options.samples):
            own = chances[start : start + options.samples]
            parsed = parse_answer(texts[start], tolerant=options.tolerant)
            reports.append(
                ForgeryReport(
                    label=parsed.verdict,
                    fake_probability=sum(own) / len(own),
                    score_source=sources[start],
                    stages=parsed.stages,
                    attributes=parsed.attributes,
                    text=texts[start],
                    system=self.name,
                    probabilities=own if options.samples > 1 else [],
                    notice=self.notice,
                )
            )
        if (self.model.config.default_score if options.score == "auto" else options.score) == "answer":
            return reports
        alone = [_continued(prompt, VERDICT_PREFIX)] * len(prepared)
        without = self._score_again(alone, range(len(prepared)), begun_ids, read, tokens_BPD)
        return [self._scored_without_answer(report, chance) for report, chance in zip(reports, without, strict=True)]

    def _scored_without_answer(self, report: ForgeryReport, chance: float) -> ForgeryReport:
        return replace(
            report,
            fake_probability=chance,
            score_source="prompt",
            answer_probability=report.fake_probability,
            off_distribution=self._asks_off_distribution,
        )

    def _room_after(self, prompt_ids: list[int], tokens_BPD: Tensor) -> int:
        """Returns how many tokens the context has left after a prompt with its image; at least 1."""
        length = len(prompt_ids) - 1 + tokens_BPD.shape[1]
        if length >= self.context_length:
            raise OptionError(f"the prompt takes {length} tokens, but the model's context has {self.context_length}")
        return self.context_length - length

    def _decode(
        self,
        embeds_BLD: Tensor,
        prefix_ids: list[int],
        prepared: Sequence[Prepared],
        options: FakeReasoningOptions,
        budget: int,
    ) -> tuple[list[Decoded], PromptCache | None]:
        if options.num_beams > 1:
            return self._beam_search(embeds_BLD, options.num_beams, budget), None
        verdict = self.model.probability_mapper.tokens
        streams = [f"{options.seed}/{item.digest}/{sample}" for item in prepared for sample in range(options.samples)]
        return decode(
            self.model,
            embeds_BLD,
            sampler=Sampler(options.temperature, options.top_p, streams),
            max_new_tokens=budget,
            kept_words=(verdict.real, verdict.fake),
            is_complete=lambda ids: self._is_complete(prefix_ids, ids),
            samples=options.samples,
        )

    def _beam_search(self, embeds_BLD: Tensor, num_beams: int, budget: int) -> list[Decoded]:
        """Lets transformers search; no logits are kept, so scores are computed on the finished texts."""
        mask = torch.ones(embeds_BLD.shape[:2], dtype=torch.long, device=embeds_BLD.device)
        answers = self.model.generate(
            inputs_embeds=embeds_BLD,
            attention_mask=mask,
            num_beams=num_beams,
            do_sample=False,
            max_new_tokens=budget,
        ).tolist()
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        cut = [ids[: ids.index(eos)] if eos in ids else ids for ids in answers]
        return [Decoded([i for i in ids if i != pad], torch.empty(0, 2)) for ids in cut]

    def _is_complete(self, prefix_ids: list[int], ids: list[int]) -> bool:
        if ids[-1] == self.tokenizer.eos_token_id:
            return True
        if ids[-1] not in self._closing_ids:
            return False
        tail = [*prefix_ids[-_CLOSING_TAIL:], *ids][-_CLOSING_TAIL:]
        return _CLOSING in self.tokenizer.decode(tail, skip_special_tokens=True)

    def _read_scores(
        self, prompt: str, answers: Sequence[list[int]], decoded: Sequence[Decoded], texts: Sequence[str]
    ) -> tuple[list[float], list[ScoreSource], list[int]]:
        """P(fake) of each answer from the logits of its decoding, where its text's verdict is predicted.

        Those logits count where the text's own ids are those that were decoded. Else (rare words are cut in several
        ways, beam search keeps no logits, there is no verdict) the text must be read once more, so that a score always
        belongs to its text.

        Returns:
            Scores, their sources, and the rows whose score is still to be found.
        """
        mapper = self.model.probability_mapper
        begun = len(tokenizer_image_token(prompt, self.tokenizer))
        chances: list[float] = [0.0] * len(decoded)
        sources: list[ScoreSource] = ["verdict"] * len(decoded)
        unread = []
        for row, (ids, one, text) in enumerate(zip(answers, decoded, texts, strict=True)):
            if text.partition(VERDICT_PREFIX)[2].strip() == "":
                sources[row] = "forced"
            place = self._verdict_place(prompt, begun, ids, text) if sources[row] == "verdict" else None
            step = None if place is None else place - (len(ids) - len(one.ids))
            if step is None or not 0 <= step < len(one.kept_logits):
                unread.append(row)
            else:
                chances[row] = float((one.kept_logits[step] / mapper.temperature).softmax(dim=-1)[1])
        return chances, sources, unread

    def _score_again(
        self,
        texts: Sequence[str],
        images: Sequence[int],
        begun_ids: list[int],
        read: PromptCache | None,
        tokens_BPD: Tensor,
    ) -> list[float]:
        """P(fake) where each text ends; what was read of its prompt, image included, is not read again.

        Args:
            texts: Prompts with answers.
            images: Number of each text's image in the batch.
            begun_ids: Ids of what was read.
            read: Cache of what was read, or None.
            tokens_BPD: Image tokens.
        """
        if not texts:
            return []
        tails = [tokenizer_image_token(text, self.tokenizer) for text in texts]
        begun = len(begun_ids)
        if read is None or any(ids[:begun] != begun_ids or len(ids) == begun for ids in tails):
            return self._score_texts(texts, tokens_BPD[list(images)])
        lasts = torch.tensor([len(ids) - begun - 1 for ids in tails], device=tokens_BPD.device)
        wanted, places = lasts.unique(return_inverse=True)
        padded = pad_sequence([torch.tensor(ids[begun:]) for ids in tails], batch_first=True).to(tokens_BPD.device)
        output = self.model(
            input_ids=padded, past_key_values=read.of_rows(images), use_cache=True, logits_to_keep=wanted
        )
        rows = torch.arange(len(tails), device=output.logits.device)
        at_verdict_RV = output.logits[rows, places.to(output.logits.device)]
        return self.model.probability_mapper.fake_probability(at_verdict_RV).tolist()

    def _verdict_place(self, prompt: str, begun: int, ids: list[int], text: str) -> int | None:
        """Place of the verdict word among an answer's ids, or None if the text's own ids are others up to there.

        Args:
            prompt: What was asked.
            begun: Its length in ids.
            ids: The answer's ids.
            text: The answer.
        """
        before = tokenizer_image_token(_continued(prompt, complete_to_verdict(text)), self.tokenizer)
        own = before[begun:]
        return len(own) if ids[: len(own)] == own else None

    def _score_texts(self, texts: Sequence[str], tokens_BPD: Tensor) -> list[float]:
        """P(fake) where each text ends, in one forward."""
        batch = self._embed([tokenizer_image_token(text, self.tokenizer) for text in texts], tokens_BPD)
        output = self.model(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=None if bool(batch.attention_mask.all()) else batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=1,
        )
        return self.model.probability_mapper.fake_probability(output.logits[:, -1]).tolist()

    def _embed(self, rows: Sequence[list[int]], tokens_BPD: Tensor) -> Any:
        """Prompts with their images spliced in, padded on the left."""
        ids = [torch.tensor(row) for row in rows]
        padded = pad_sequence(ids, batch_first=True, padding_side="left").to(tokens_BPD.device)
        lengths = torch.tensor([len(row) for row in rows], device=padded.device)
        mask = torch.arange(padded.shape[1], device=padded.device) >= padded.shape[1] - lengths[:, None]
        images = [[tokens] for tokens in tokens_BPD]
        embed = self.model.get_input_embeddings()
        return splice(padded, embed, {IMAGE_TOKEN_INDEX: images}, attention_mask=mask, padding_side="left")

    def _attention_maps(self, attention_BHPP: Tensor, prepared: Sequence[Prepared]) -> list[Any]:
        """Mean over heads and queries, laid over each picture."""
        dino = self.model.get_model().dino_tower
        assert dino is not None
        grids = attention_BHPP.float().mean(dim=(1, 2)).unflatten(1, dino.grid).cpu().numpy()
        mode = self.model.config.image_aspect_ratio
        return [grid_over_picture(grid, item.size, mode) for grid, item in zip(grids, prepared, strict=True)]


def _continued(prompt: str, answer: str) -> str:
    """A prompt and an answer; the mark of an image in an answer is only a word and stands for no image."""
    return f"{prompt} {answer.replace(DEFAULT_IMAGE_TOKEN, '')}"
