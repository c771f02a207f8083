"""What systems with a LLaVA language model share: opening, pixels, batches, and the way from answers to reports."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.errors import OptionError
from llava.mm_utils import grid_over_image, process_images
from llava.model.answering import Answering, ImageAnswers
from llava.model.builder import load_pretrained_model
from llava.model.cpu_bfloat16 import lay_out
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_fusion.builder import fusion_class
from llava.model.served import ServedAnswering, ServedAnswers, load_client, served_settings
from llava.report import ForgeryReport
from llava.systems import registry
from llava.systems.base import AnalyzeOptions, AnswerFormat, Listener


@dataclass(frozen=True)
class PreparedImage:
    """An image as the model takes it.

    Attributes:
        pixels: Shared pixels ``[3, S, S]``.
        size: Own width and height.
        digest: Of the pixels.
        extras: Further inputs of token sources, by name.
    """

    pixels: Tensor
    size: tuple[int, int]
    digest: str
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class LanguageModelSystem(ABC):
    """A system whose language model answers about an image, and whose P(fake) is read at the answer's verdict.

    Args:
        tokenizer: The model's.
        model: The model.
        image_processor: The model's.
        context_length: Longest sequence in tokens.
    """

    name: str
    options: ClassVar[type[AnalyzeOptions]] = AnalyzeOptions
    answer_format: AnswerFormat

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
        self.answering = Answering(
            model, tokenizer, context_length, self.answer_format, temperature=self.verdict_temperature
        )

    @property
    def has_attention(self) -> bool:
        """Whether the system can say where it looked."""
        return bool(fusion_class(self.model.config.mm_fusion_type).has_attention)

    @property
    def verdict_temperature(self) -> float:
        """Temperature of the two verdict words' logits."""
        return 1.0

    @classmethod
    def load(cls, path: str, **options: Any) -> "LanguageModelSystem":
        """Opens a checkpoint, or the client of a served one; ``options`` are those of ``load_pretrained_model``."""
        settings = served_settings(path)
        if settings is None:
            return cls(*load_pretrained_model(path, **{"system": cls.name, **options}, for_inference=True))
        client = load_client(path, settings, registry.spec(cls.name).name, **options)
        lay_out(client.model)
        system = cls(client.tokenizer, client.model, client.image_processor, client.context_length)
        system.answering = ServedAnswering(client, cls.answer_format, temperature=system.verdict_temperature)
        return system

    @property
    def served(self) -> ServedAnswering | None:
        """What asks the language model, if that is served elsewhere."""
        return self.answering if isinstance(self.answering, ServedAnswering) else None

    @abstractmethod
    def prompt(self, options: Any) -> str:
        """Returns what the model is asked, up to where its answer begins."""

    @abstractmethod
    def report(self, answers: ImageAnswers, options: Any) -> ForgeryReport:
        """Turns what was answered about one image into a report."""

    @property
    def looks_by_attention(self) -> bool:
        """Whether the fusion's attention says where the model looked; else ``add_readings`` may."""
        return True

    def add_readings(
        self, report: ForgeryReport, readings: Mapping[str, Tensor], image: PreparedImage, options: Any
    ) -> ForgeryReport:
        """Adds what token sources say of an image to its report; by default nothing.

        Args:
            report: What was answered.
            readings: Of this image, by name.
            image: The image.
            options: The system's options.
        """
        return report

    def validation_question(self, asked: str) -> str | None:
        """Returns what a validation image is asked; None for the system's own question.

        Args:
            asked: What the image's record asks. Where it holds facts of the image beside the question, a model that
                was trained on them needs them.
        """
        return None

    def answer_prefix(self, options: Any) -> str:
        """Returns the beginning of the answer that the model is given."""
        return ""

    def reports_prompt_score(self, options: Any) -> bool:
        """Whether P(fake) without an answer is asked for beside the answer."""
        return False

    def describe(self, options: Any) -> dict[str, Any]:
        """All that changes an answer beside weights, options and pixels; the dtype is what ``auto`` came to."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        described = {"prompt": self.prompt(options), "notice": self.notice, "dtype": dtype}
        return described if self.served is None else {**described, "served": self.served.endpoint.model}

    def prepare(self, image: Image.Image) -> PreparedImage:
        """Pads or crops, resizes and normalises an image."""
        pixels = process_images([image], self.image_processor, self.model.config)[0]
        extras = self.model.get_model().image_inputs(image, self.image_processor)
        return self.prepare_pixels(pixels, image.size, extras)

    def prepare_pixels(
        self, pixels: Tensor, size: tuple[int, int] | None = None, extras: Mapping[str, Tensor] | None = None
    ) -> PreparedImage:
        """Takes shared pixels ``[3, S, S]`` that were made elsewhere, of an image of this width and height."""
        digest = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).hexdigest()
        return PreparedImage(pixels, size or (pixels.shape[-1], pixels.shape[-2]), digest, extras or {})

    def batch_size(self, options: AnalyzeOptions) -> int:
        """A batch that fits and is fast on this device."""
        return self.answering.batch_size(options)

    @torch.no_grad()
    def analyze_batch(self, prepared: Sequence[PreparedImage], options: AnalyzeOptions) -> list[ForgeryReport]:
        """Analyses a batch.

        Raises:
            OptionError: The options cannot be met, for example an attention that the fusion does not have, or a prompt
                that is longer than the model's context.
        """
        if options.attention and self.looks_by_attention and not self.has_attention:
            fusion = self.model.config.mm_fusion_type
            raise OptionError(f"the fusion {fusion!r} has no attention, so it cannot say where the model looked")
        # Each tower casts its own pixels.
        pixels = on_device(torch.stack([item.pixels for item in prepared]), self.model.device)
        extras = {
            name: on_device(values, self.model.device).to(self.model.dtype)
            for name, values in self.further_inputs(prepared, options).items()
        }
        encoded = self.answering.encode(pixels, extras, attention=options.attention and self.looks_by_attention)
        embeddings = encoded.embeddings
        if options.score_only:
            scores = self.answering.prompt_scores(self.prompt(options), embeddings, len(prepared))
            reports = [
                self.score_report(score) if isinstance(score, float) else self._failed(score) for score in scores
            ]
        else:
            reports = self._answer(embeddings, prepared, options)
        readings = [{name: values[row] for name, values in encoded.readings.items()} for row in range(len(prepared))]
        triples = zip(reports, readings, prepared, strict=True)
        reports = [each[0] if each[0].error else self.add_readings(*each, options) for each in triples]
        if encoded.description is not None:
            features = encoded.description.cpu().numpy()
            reports = [replace(report, features=row) for report, row in zip(reports, features, strict=True)]
        if encoded.attention is None:
            return reports
        maps = self._attention_maps(encoded.attention, prepared)
        return [replace(report, attention=grid) for report, grid in zip(reports, maps, strict=True)]

    def further_inputs(self, prepared: Sequence[PreparedImage], options: Any) -> dict[str, Tensor]:
        """Returns what the model takes of a batch beside its pixels, by name, each ``[B, ...]``."""
        return {name: torch.stack([item.extras[name] for item in prepared]) for name in prepared[0].extras}

    @torch.no_grad()
    def image_features(self, prepared: Sequence[PreparedImage]) -> np.ndarray:
        """Returns what each tower says of the images, one tower after the other."""
        pixels_B3HW = on_device(torch.stack([item.pixels for item in prepared]), self.model.device)
        description = self.answering.encode_images(pixels_B3HW).description
        assert description is not None
        features: np.ndarray = description.cpu().numpy()
        return features

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Lets somebody follow the answers that are decoded inside the block."""
        self.answering.listener = listener
        try:
            yield
        finally:
            self.answering.listener = None

    def _answer(
        self, embeddings: Mapping[int, Tensor], prepared: Sequence[PreparedImage], options: AnalyzeOptions
    ) -> list[ForgeryReport]:
        answers = self.answering.answer(
            self.prompt(options),
            embeddings,
            [item.digest for item in prepared],
            options,
            prefix=self.answer_prefix(options),
            score_prompt=self.reports_prompt_score(options),
        )
        return [self._served_report(e, options) if self.served else self.report(e, options) for e in answers]

    def _served_report(self, answers: ImageAnswers, options: AnalyzeOptions) -> ForgeryReport:
        """Returns the report of what a served model answered; its details say where P(fake) comes from."""
        assert isinstance(answers, ServedAnswers)
        if answers.error:
            return self._failed(answers.error)
        report = self.report(answers, options)
        report = replace(report, details={**report.details, "score": answers.score})
        return report if answers.has_score else replace(report, fake_probability=None, score_source=None)

    def _failed(self, error: Any) -> ForgeryReport:
        return ForgeryReport(None, None, None, system=self.name, error=str(error))

    def score_report(self, score: float) -> ForgeryReport:
        """Returns the report of an image of which only P(fake) without an answer was asked."""
        return ForgeryReport(
            label="fake" if score >= 0.5 else "real",
            fake_probability=score,
            score_source="prompt",
            system=self.name,
            off_distribution=self.score_is_off_distribution,
            notice=self.notice,
        )

    @property
    def score_is_off_distribution(self) -> bool:
        """Whether asking for the verdict alone is what the model was not trained for."""
        return bool(self.model.config.verdict_only_share == 0)

    def _attention_maps(self, attention_BHPP: Tensor, prepared: Sequence[PreparedImage]) -> list[Any]:
        """Mean over heads and queries, laid over each image; keys are patches of the fusion's second branch."""
        core = self.model.get_model()
        keys = core.tower(core.fusion.branches[-1])
        grids = attention_BHPP.float().mean(dim=(1, 2)).unflatten(1, keys.grid).cpu().numpy()
        mode = self.model.config.image_aspect_ratio
        return [grid_over_image(grid, item.size, mode) for grid, item in zip(grids, prepared, strict=True)]


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Returns values on a device; to a GPU they are copied from pinned memory, while this process goes on."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def fill_conversation(mode: str, question: str) -> str:
    """Returns a template's prompt with an image and a question, up to where the answer begins.

    Raises:
        OptionError: There is no such template, or the question shows an image itself.
    """
    if mode not in conv_templates:
        raise OptionError(f"unknown conv_mode {mode!r}; known: {', '.join(conv_templates)}")
    if DEFAULT_IMAGE_TOKEN in question:
        raise OptionError(f"the question must not hold {DEFAULT_IMAGE_TOKEN}: the image stands before it")
    conversation = conv_templates[mode].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()
