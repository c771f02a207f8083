"""FakeShield at work: a domain tag, an answer with P(fake), and a mask of what was changed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import CheckpointError, DataError, OptionError
from llava.files import atomic_folder
from llava.model.answering import ImageAnswers
from llava.model.builder import load_pretrained_model, resolve_device, resolve_dtype
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.saving import save_published
from llava.report import ForgeryReport
from llava.systems.base import AnalyzeOptions, AnswerFormat
from llava.systems.fakeshield import tagger as tagger_parts
from llava.systems.fakeshield.answer import (
    DOMAIN_TITLES,
    DOMAINS,
    FORMAT,
    QUESTION,
    gate_is_open,
    is_tagged,
    mask_request,
    parse_answer,
    tag_sentence,
)
from llava.systems.fakeshield.checkpoint import (
    EXPLAINER,
    SEGMENTER,
    TAGGER,
    SegmenterFiles,
    find_parts,
    known_tower,
    load_segmenter,
    read_segmenter,
    write_segmenter,
)
from llava.systems.fakeshield.options import FakeShieldOptions
from llava.systems.fakeshield.segmenter import (
    Segmentation,
    SegmenterAnswering,
    SegmenterPixels,
    prepare_pixels,
    share_vision_tower,
)
from llava.systems.fakeshield.tagger import Tagger, open_tagger, save_tagger
from llava.systems.language_model import LanguageModelSystem, PreparedImage, fill_conversation

NAME = "FakeShield"
_LANGUAGE_MODEL_OPTIONS = ("device", "dtype", "device_map", "load_8bit", "load_4bit", "attn_implementation", "decode")
_NO_SEGMENT = "the segmenter found nothing to mark, so the mask is empty"
_NOT_ASKED = "no mask was asked for, since the answer does not call the image changed"


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keeps transformers' progress bar from standing in the middle of another one."""
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows_bars:
            logging.enable_progress_bar()


class TaggerPart:
    """The tagger, opened when it is first used.

    Args:
        file: Where it lies.
        device: Where it computes.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        self.file = file
        self.device = device

    @cached_property
    def net(self) -> Tagger:
        """The network."""
        return open_tagger(self.file).to(self.device).requires_grad_(False)

    @torch.no_grad()
    def logits(self, crops: Sequence[np.ndarray]) -> Tensor:
        """Returns logits ``[B, 3]`` on the CPU."""
        logits: Tensor = self.net(tagger_parts.normalize(crops).to(self.device)).cpu()
        return logits


class SegmenterPart:
    """The segmenter, whose weights are read when it is first used.

    Args:
        files: What ``read_segmenter`` gave.
        options: As for ``load_segmenter``.
        shared: A model whose CLIP tower it uses instead of an equal one of its own, where both compute in one dtype.
    """

    def __init__(
        self, files: SegmenterFiles, options: Mapping[str, Any], shared: LlavaLlamaForCausalLM | None = None
    ) -> None:
        self.files = files
        self.options = dict(options)
        self.shared = shared
        self.processor = LlavaLlamaForCausalLM.image_processor.fget(files)  # type: ignore[attr-defined]
        self.side = int(files.sam_config.vision_config.image_size)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; reads no weight."""
        device = resolve_device(self.options.get("device", "auto"))
        return resolve_dtype(self.options.get("dtype", "auto"), self.files.checkpoint, device)

    @cached_property
    def answering(self) -> SegmenterAnswering:
        """The segmenter at work."""
        with quiet_loading():
            tokenizer, segmenter = load_segmenter(self.files, **self.options)
        if self.shared is not None and self.shared.dtype == segmenter.language_model.dtype:
            share_vision_tower(segmenter, self.shared)
        return SegmenterAnswering(segmenter.requires_grad_(False), tokenizer, self.files.context_length)

    def prepare(self, image: Image.Image) -> SegmenterPixels:
        """Turns an image into the segmenter's pixels; reads no weight."""
        return prepare_pixels(image, self.processor, self.files.config, self.side)


@dataclass(frozen=True)
class PreparedPhoto(PreparedImage):
    """An image as all three parts take it.

    Attributes:
        crop: The tagger's, ``[224, 224, 3]``; None without a tagger.
        segmenter: The segmenter's pixels; None without one, or where it cannot take the image.
        unmarked: Why it cannot.
    """

    crop: np.ndarray | None = None
    segmenter: SegmenterPixels | None = None
    unmarked: str = ""


class FakeShield(LanguageModelSystem):
    """The published system (arXiv 2410.02761), with or without its tagger and its segmenter.

    Args:
        tokenizer: The explainer's.
        model: The explainer.
        image_processor: The explainer's.
        context_length: The explainer's longest sequence in tokens.
        tagger: The tagger, or None.
        segmenter: The segmenter, or None.
        folder: Where the explainer lies; None where it was made here.
    """

    name = NAME
    options: ClassVar[type[AnalyzeOptions]] = FakeShieldOptions
    answer_format: AnswerFormat = FORMAT

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: LlavaLlamaForCausalLM,
        image_processor: Any,
        context_length: int,
        tagger: TaggerPart | None = None,
        segmenter: SegmenterPart | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__(tokenizer, model, image_processor, context_length)
        self.folder = folder
        self.tagger = tagger
        self.segmenter = segmenter

    @classmethod
    def load(cls, path: str, **options: Any) -> Any:
        """Opens the published folder or one of its parts.

        Without an explainer it is a ``SegmenterAlone`` or a ``TaggerAlone``.

        Raises:
            CheckpointError: It holds no part of FakeShield, or a part is incomplete.
            OptionError: An option means nothing to it.
        """
        parts = find_parts(Path(path).expanduser())
        if options.get("dino_weights"):
            raise OptionError(f"{NAME} has no DINO tower, so dino_weights would do nothing")
        own = {name: options[name] for name in _LANGUAGE_MODEL_OPTIONS if name in options}
        tower = options.get("vision_tower")
        device = resolve_device(options.get("device", "auto"))
        tagger = TaggerPart(parts.tagger, device) if parts.tagger else None
        if parts.explainer is None:
            if parts.segmenter is not None:
                return SegmenterAlone(SegmenterPart(read_segmenter(parts.segmenter, vision_tower=tower), own))
            assert tagger is not None
            return TaggerAlone(tagger)
        opened = load_pretrained_model(parts.explainer, **{**options, "system": "fakeshield"})
        segmenter = None
        if parts.segmenter is not None:
            files = read_segmenter(parts.segmenter, vision_tower=tower, known_tower=known_tower(opened[1]))
            segmenter = SegmenterPart(files, own, opened[1] if files.shares_tower else None)
        return cls(*opened, tagger, segmenter, parts.explainer)

    def save(self, folder: Path) -> None:
        """Writes the parts that there are as the published folder has them; the segmenter with its CLIP.

        Raises:
            CheckpointError: The explainer was not opened from files, or has adapters that are not merged.
            FileError: The folder exists and is not empty, or cannot be written.
        """
        if self.folder is None:
            raise CheckpointError("an explainer that was made here is written by its training, not by this")
        with atomic_folder(folder) as partial:
            if self.tagger is not None:
                save_tagger(self.tagger.net, partial / TAGGER)
            save_published(self.model, partial / EXPLAINER, self.model.config.to_dict(), self.folder)
            if self.segmenter is not None:
                (partial / SEGMENTER).mkdir()
                answering, unused = self.segmenter.answering, self.segmenter.files.unused
                write_segmenter(answering.segmenter, answering.tokenizer, partial / SEGMENTER, unused=unused)

    def prompt(self, options: FakeShieldOptions) -> str:
        """Returns what the explainer is asked without a tag; see ``tagged_prompt``."""
        return self.tagged_prompt(options, None)

    def tagged_prompt(self, options: FakeShieldOptions, domain: int | None) -> str:
        """Returns what the explainer is asked, up to where its answer begins, with the sentence of a domain if any."""
        tag = "" if domain is None else tag_sentence(domain)
        return fill_conversation(options.conv_mode, f"{tag}{options.question or QUESTION}")

    def validation_question(self, asked: str) -> str | None:
        """Returns a question with its domain's sentence, where the record has one: no tagger runs in training."""
        return asked if is_tagged(asked) else None

    def describe(self, options: FakeShieldOptions) -> dict[str, Any]:
        """All that changes an answer beside weights, options and pixels."""
        return {
            **super().describe(options),
            "tagger": self.tagger is not None,
            "mask_request": mask_request("{answer}", options.mask_question - 1) if self.segmenter else None,
        }

    def prepare(self, image: Image.Image) -> PreparedPhoto:
        """Makes the pixels of every part that is there."""
        segmenter, unmarked = None, ""
        try:
            segmenter = self.segmenter.prepare(image) if self.segmenter else None
        except DataError as error:
            unmarked = f"no mask: {error}"
        crop = tagger_parts.crop_image(image) if self.tagger else None
        return PreparedPhoto(**vars(super().prepare(image)), crop=crop, segmenter=segmenter, unmarked=unmarked)

    @torch.no_grad()
    def analyze_batch(self, prepared: Sequence[PreparedImage], options: AnalyzeOptions) -> list[ForgeryReport]:
        """Analyses a batch.

        Raises:
            OptionError: The options cannot be met, for example an attention, which the model does not have.
        """
        assert isinstance(options, FakeShieldOptions)
        if options.attention:
            raise OptionError(f"{NAME} has no attention between branches, so it cannot say where the model looked")
        if options.description and self.segmenter is None:
            raise OptionError("description is for the mask, but this checkpoint has no segmenter")
        domains, details = self._domains(prepared, options)
        pixels = torch.stack([item.pixels for item in prepared]).to(self.model.device, self.model.dtype)
        encoded = self.answering.encode_images(pixels)
        tokens, features = encoded.tokens, None if encoded.description is None else encoded.description.cpu().numpy()
        reports: list[Any] = [None] * len(prepared)
        for domain in sorted(set(domains), key=str):
            rows = [row for row, own in enumerate(domains) if own == domain]
            embeddings = {IMAGE_TOKEN_INDEX: tokens[rows]}
            for row, report in zip(rows, self._reports_of(embeddings, prepared, rows, domain, options), strict=True):
                tag = "" if domain is None else DOMAIN_TITLES[domain]
                own = None if features is None else features[row]
                reports[row] = replace(report, tag=tag, details={**details[row], **report.details}, features=own)
        return self._with_masks(reports, prepared, options)

    def _domains(
        self, prepared: Sequence[PreparedImage], options: FakeShieldOptions
    ) -> tuple[list[int | None], list[dict[str, Any]]]:
        """The domain whose sentence each image's question gets, and what the tagger says of it."""
        if options.tag != "own":
            domain = None if options.tag == "none" else DOMAINS.index(options.tag)
            return [domain] * len(prepared), [{} for _ in prepared]
        crops = [item.crop for item in prepared if isinstance(item, PreparedPhoto) and item.crop is not None]
        if self.tagger is None or len(crops) < len(prepared):
            return [None] * len(prepared), [{} for _ in prepared]
        logits = self.tagger.logits(crops)
        return [int(row.argmax()) for row in logits], [{"tag_logits": _named_logits(row)} for row in logits]

    def _reports_of(
        self,
        embeddings: Mapping[int, Tensor],
        prepared: Sequence[PreparedImage],
        rows: Sequence[int],
        domain: int | None,
        options: FakeShieldOptions,
    ) -> list[ForgeryReport]:
        """Reports without masks of the images of one domain."""
        prompt = self.tagged_prompt(options, domain)
        if options.score_only:
            scores = self.answering.prompt_scores(prompt, embeddings, len(rows))
            return [self.score_report(score) for score in scores]
        answers = self.answering.answer(prompt, embeddings, [prepared[row].digest for row in rows], options)
        return [self.report(each, options) for each in answers]

    def report(self, answers: ImageAnswers, options: FakeShieldOptions) -> ForgeryReport:
        """Turns answers into a report without tag and mask: text of the first one, mean of the scores."""
        first, scores = answers.answers[0], [answer.fake_probability for answer in answers.answers]
        parsed = parse_answer(first.text, tolerant=options.tolerant)
        return ForgeryReport(
            label=parsed.verdict,
            fake_probability=sum(scores) / len(scores),
            score_source=first.source,
            stages=parsed.stages,
            text=first.text,
            system=NAME,
            probabilities=scores if options.samples > 1 else [],
            notice=self.notice,
        )

    def _with_masks(
        self, reports: list[ForgeryReport], prepared: Sequence[PreparedImage], options: FakeShieldOptions
    ) -> list[ForgeryReport]:
        """Adds masks to the reports whose answer calls for one."""
        if self.segmenter is None or not options.makes_masks:
            return reports
        asked = []
        for row, report in enumerate(reports):
            calls, unmarked = calls_for_mask(report, options.gate), getattr(prepared[row], "unmarked", "")
            if calls and not unmarked:
                asked.append(row)
            else:
                details = {**report.details, "mask": unmarked if calls else _NOT_ASKED}
                reports[row] = replace(report, details=details)
        if not asked:
            return reports
        photos: list[Any] = [prepared[row] for row in asked]
        answering, variant = self.segmenter.answering, options.mask_question - 1
        requests = [answering.request(options.description or reports[row].text, variant) for row in asked]
        found = answering.segment([photo.segmenter for photo in photos], [request for request, _ in requests])
        for row, photo, one, (_, is_cut) in zip(asked, photos, found, requests, strict=True):
            report = add_mask(reports[row], one, photo.segmenter.shape, soft=options.soft_mask)
            reports[row] = replace(report, details={**report.details, "description_cut": True}) if is_cut else report
        return reports


def _named_logits(logits: Tensor) -> dict[str, float]:
    return {name: round(float(value), 6) for name, value in zip(DOMAINS, logits, strict=True)}


def calls_for_mask(report: ForgeryReport, gate: str) -> bool:
    """Whether an image gets a mask, by its answer; where that says neither, by P(fake)."""
    if gate == "published":
        return gate_is_open(report.text)
    if report.label is not None:
        return report.label == "fake"
    return report.fake_probability is not None and report.fake_probability >= 0.5


def add_mask(report: ForgeryReport, found: Segmentation, shape: tuple[int, int], *, soft: bool) -> ForgeryReport:
    """Returns a report with the mask that a segmenter gave: changed where the logit is above 0.

    Args:
        report: The report.
        found: What the segmenter said; several masks are one already.
        shape: The image's height and width.
        soft: Give probabilities rather than 0 and 1.
    """
    details: dict[str, Any] = {"segmenter": found.text, "segments": found.count}
    if found.logits is None:
        mask = np.zeros(shape, bool)
        details |= {"mask_area": 0.0, "mask_confidence": None, "mask": _NO_SEGMENT}
        return replace(report, mask=mask, details={**report.details, **details})
    inside = found.logits > 0
    probabilities = 1 / (1 + np.exp(-found.logits.astype(np.float64)))
    details["mask_area"] = round(float(inside.mean()), 6)
    details["mask_confidence"] = round(float(probabilities[inside].mean()), 6) if inside.any() else None
    mask = probabilities.astype(np.float32) if soft else inside
    return replace(report, mask=mask, details={**report.details, **details})


class _Alone:
    """What the parts that give no verdict share."""

    name = NAME
    notice = ""
    answer_format: AnswerFormat | None = FORMAT
    options: ClassVar[type[AnalyzeOptions]] = FakeShieldOptions

    @classmethod
    def load(cls, path: str, **options: Any) -> Any:
        """Opens whatever part there is."""
        return FakeShield.load(path, **options)

    def refuse(self, options: AnalyzeOptions, why: str) -> None:
        """Refuses options of an explainer.

        Raises:
            OptionError: One was given.
        """
        given = [name for name in ("question", "score_only", "attention") if getattr(options, name)]
        if given:
            raise OptionError(f"this checkpoint {why}, so {', '.join(given)} would do nothing")


class SegmenterAlone(_Alone):
    """The segmenter without an explainer: a mask of each image, by a given description or without one.

    Args:
        segmenter: The segmenter.
    """

    def __init__(self, segmenter: SegmenterPart) -> None:
        self.segmenter = segmenter

    def prepare(self, image: Image.Image) -> SegmenterPixels:
        """Makes the segmenter's pixels."""
        return self.segmenter.prepare(image)

    def batch_size(self, options: AnalyzeOptions) -> int:
        """A batch that fits."""
        return 4

    def describe(self, options: AnalyzeOptions) -> dict[str, Any]:
        """What the segmenter is asked, and its dtype."""
        assert isinstance(options, FakeShieldOptions)
        return {
            "mask_request": mask_request(options.description, options.mask_question - 1),
            "dtype": str(self.segmenter.dtype).removeprefix("torch."),
        }

    def analyze_batch(self, prepared: Sequence[SegmenterPixels], options: AnalyzeOptions) -> list[ForgeryReport]:
        """Returns a report with a mask and without a verdict for each image.

        Raises:
            OptionError: No mask is wanted, or an answer is.
        """
        assert isinstance(options, FakeShieldOptions)
        self.refuse(options, "is a segmenter alone")
        if not options.makes_masks:
            raise OptionError("this checkpoint is a segmenter alone, so without masks there is nothing to do")
        request, _ = self.segmenter.answering.request(options.description, options.mask_question - 1)
        found = self.segmenter.answering.segment(prepared, [request] * len(prepared))
        empty = ForgeryReport(label=None, fake_probability=None, score_source=None, system=NAME)
        return [
            add_mask(empty, one, image.shape, soft=options.soft_mask)
            for image, one in zip(prepared, found, strict=True)
        ]


class TaggerAlone(_Alone):
    """The tagger alone: the kind of data that an image resembles.

    Args:
        tagger: The tagger.
    """

    def __init__(self, tagger: TaggerPart) -> None:
        self.tagger = tagger

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Makes the tagger's crop."""
        return tagger_parts.crop_image(image)

    def batch_size(self, options: AnalyzeOptions) -> int:
        """A batch that fits."""
        return 16

    def describe(self, options: AnalyzeOptions) -> dict[str, Any]:
        """The domains, and the tagger's dtype."""
        return {"domains": list(DOMAINS), "dtype": "float32"}

    def analyze_batch(self, prepared: Sequence[np.ndarray], options: AnalyzeOptions) -> list[ForgeryReport]:
        """Returns a report with a tag and without a verdict for each image.

        Raises:
            OptionError: An answer is wanted.
        """
        self.refuse(options, "is a tagger alone")
        return [
            ForgeryReport(
                label=None,
                fake_probability=None,
                score_source=None,
                tag=DOMAIN_TITLES[int(logits.argmax())],
                details={"tag_logits": _named_logits(logits)},
                system=NAME,
            )
            for logits in self.tagger.logits(prepared)
        ]
