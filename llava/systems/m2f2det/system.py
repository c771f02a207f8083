"""M2F2-Det at work: the detector alone, P(fake) and its map; or the language model that explains it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.errors import OptionError
from llava.labels import LABELS
from llava.mm_utils import grid_over_image
from llava.model.answering import ImageAnswers
from llava.model.builder import resolve_device
from llava.model.checkpoint_files import read_json
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_encoder.clip_encoder import image_processor_settings
from llava.report import ForgeryReport
from llava.systems.base import AnalyzeOptions, AnswerFormat
from llava.systems.language_model import LanguageModelSystem, PreparedImage
from llava.systems.m2f2det.answer import FORMAT, PUBLISHED, fill_prompt, parse_answer
from llava.systems.m2f2det.checkpoint import open_detector, open_tower
from llava.systems.m2f2det.detector_net import M2F2Detector
from llava.systems.m2f2det.options import M2F2DetOptions
from llava.systems.m2f2det.token import MAP, NAME, PROBABILITIES, SWAPPED

NOTICE = (
    "The published training of this detector leaves the prompt of the forgery map at random, so the map says nothing "
    "of where an image was changed."
)
SWAPPED_NOTICE = "This answer was given to a token whose two probabilities were exchanged, as a test."
_BATCH = {"cuda": 64}
_LANGUAGE_OPTIONS = (
    "model_base",
    "load_8bit",
    "load_4bit",
    "device_map",
    "dino_weights",
    "image_aspect_ratio",
    "prompt_lookup",
    "detector",
)
"""Options of opening that mean nothing to a detector alone."""


class DetectorAlone:
    """The detector alone (stage 1).

    Args:
        detector: The detector.
        device: Where it computes.
        tower: The tower whose features a cosine detector takes.
    """

    name = "M2F2-Det"
    answer_format = None
    has_attention = True
    options: ClassVar[type[AnalyzeOptions]] = M2F2DetOptions

    def __init__(self, detector: M2F2Detector, device: torch.device, tower: VisionTower | None = None) -> None:
        self.detector = detector.to(device).requires_grad_(False)
        self.device = device
        self.tower = None if tower is None else tower.to(device)
        untrained = detector.config.fusion == "bridge" and detector.config.prompt_in_loss == "off"
        self.notice = NOTICE if untrained else ""
        self.size = detector.image_size
        self.processor = CLIPImageProcessorPil(**image_processor_settings(self.size))

    @classmethod
    def load(cls, path: str, **options: Any) -> "DetectorAlone":
        """Opens a stage-1 file, or a folder with a detector.

        Raises:
            CheckpointError: It is none, or a detector without a vision tower.
            OptionError: An option for language models was given.
        """
        place = Path(path).expanduser()
        refused = [name for name in _LANGUAGE_OPTIONS if options.get(name)]
        if refused:
            raise OptionError(f"{cls.name} has no language model, so {', '.join(refused)} would do nothing")
        if str(options.get("dtype", "auto")) not in ("auto", "float32", "fp32", "torch.float32"):
            raise OptionError(f"{cls.name} runs in float32; leave out dtype {options['dtype']}")
        detector = open_detector(place)
        source = options.get("vision_tower")
        if detector.config.fusion == "bridge" and source:
            raise OptionError(f"{path} has a vision tower of its own, so vision_tower would do nothing")
        tower = None if detector.config.fusion == "bridge" else open_tower(detector, source, place)
        return cls(detector, torch.device(resolve_device(options.get("device", "auto"))), tower)

    def prepare(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """Returns normalised pixels ``[3, S, S]`` and the image's own height and width."""
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels, (image.height, image.width)

    def batch_size(self, options: AnalyzeOptions) -> int:
        """Returns a batch that fits."""
        return _BATCH.get(self.device.type, 8)

    def describe(self, options: AnalyzeOptions) -> dict[str, Any]:
        """Returns the detector's config, and its dtype."""
        return {"detector": self.detector.config.to_dict(), "dtype": "float32"}

    def analyze_batch(
        self, prepared: Sequence[tuple[Tensor, tuple[int, int]]], options: AnalyzeOptions
    ) -> list[ForgeryReport]:
        """Returns a report an image; the map is its ``attention`` where that is asked for.

        Raises:
            OptionError: A question was given, which a detector cannot answer, or another token for a prompt.
        """
        if getattr(options, "detector_token", "own") != "own":
            raise OptionError(f"{self.name} without its language model puts no token into a prompt")
        if options.question or getattr(options, "prompt", "auto") != "auto":
            raise OptionError(f"{self.name} without its language model answers no question")
        pixels = torch.stack([pixels for pixels, _ in prepared]).to(self.device)
        with torch.inference_mode():
            output = self.detector(pixels, None if self.tower is None else self.tower(pixels).features)
        maps = output.scores.float().cpu().numpy()
        side = round(maps.shape[1] ** 0.5)
        return [
            self._report(float(probability), own.reshape(side, side), shape, options.attention)
            for probability, own, (_, shape) in zip(output.fake_probability.tolist(), maps, prepared, strict=True)
        ]

    def _report(
        self, fake_probability: float, scores: np.ndarray, shape: tuple[int, int], with_map: bool
    ) -> ForgeryReport:
        return ForgeryReport(
            label=LABELS[int(fake_probability >= 0.5)],
            fake_probability=fake_probability,
            score_source="detector",
            attention=over_image((scores + 1) / 2, shape) if with_map else None,
            details={"forgery_map": rounded(scores)},
            system=self.name,
            notice=self.notice,
        )


class M2F2Det(LanguageModelSystem):
    """The language model of stages 2 and 3; label and score are the detector's."""

    name = "M2F2-Det"
    options: ClassVar[type[AnalyzeOptions]] = M2F2DetOptions
    answer_format: AnswerFormat = FORMAT

    @classmethod
    def load(cls, path: str, **options: Any) -> Any:
        """Opens a language model with its detector, or a detector alone, whichever lies at the path.

        Raises:
            CheckpointError: It is neither.
            OptionError: An option means nothing to it.
        """
        if not is_language_model(Path(path).expanduser()):
            return DetectorAlone.load(path, **options)
        return super().load(path, **options)

    def prompt(self, options: M2F2DetOptions) -> str:
        """Returns what the model is asked, up to where its answer begins."""
        mode, name = self.model.config.conv_mode, str(options.prompt)
        if name == "auto" and mode == PUBLISHED:
            name = "judge" if options.question is None else "explain"
        template = "v1" if mode == PUBLISHED else mode
        return fill_prompt("training" if name == "auto" else name, options.question, template)

    def describe(self, options: M2F2DetOptions) -> dict[str, Any]:
        """All that changes an answer beside weights, options and pixels; the detector's settings are among it."""
        return {**super().describe(options), "detector": self._detector_config}

    @property
    def _detector_config(self) -> dict[str, Any]:
        found: dict[str, Any] = (self.model.config.token_source_configs or {})[NAME]
        return found

    @property
    def score_is_off_distribution(self) -> bool:
        """No: the score that is reported is the detector's."""
        return False

    @property
    def has_attention(self) -> bool:
        """Yes: the detector's map."""
        return True

    @property
    def looks_by_attention(self) -> bool:
        """No: the detector's map says where it looked."""
        return False

    def further_inputs(self, prepared: Sequence[PreparedImage], options: AnalyzeOptions) -> dict[str, Tensor]:
        """Returns what the detector takes of a batch, and whether the token is to be swapped."""
        inputs = super().further_inputs(prepared, options)
        return {**inputs, SWAPPED: torch.ones(len(prepared))} if _is_swapped(options) else inputs

    def report(self, answers: ImageAnswers, options: M2F2DetOptions) -> ForgeryReport:
        """Turns answers into a report: text of the first one, mean of the scores."""
        first, scores = answers.answers[0], [answer.fake_probability for answer in answers.answers]
        parsed = parse_answer(first.text, tolerant=options.tolerant)
        return ForgeryReport(
            label=parsed.verdict,
            fake_probability=sum(scores) / len(scores),
            score_source=first.source,
            stages=parsed.stages,
            text=first.text,
            system=self.name,
            probabilities=scores if options.samples > 1 else [],
            notice=self.notice,
        )

    def add_readings(
        self, report: ForgeryReport, readings: Mapping[str, Tensor], image: PreparedImage, options: AnalyzeOptions
    ) -> ForgeryReport:
        """Puts the detector's label, score and map into a report; what the answer says stands beside them."""
        fake_probability = float(readings[PROBABILITIES].float()[1])
        scores_P = readings[MAP].float().cpu().numpy()
        side = round(len(scores_P) ** 0.5)
        grid = scores_P.reshape(side, side)
        told = SWAPPED_NOTICE if _is_swapped(options) else ""
        return replace(
            report,
            label=LABELS[int(fake_probability >= 0.5)],
            fake_probability=fake_probability,
            score_source="detector",
            answer_label=(report.label or "") if report.text else None,
            answer_probability=report.fake_probability,
            attention=self._overlay(grid, image) if options.attention else None,
            details={**report.details, "forgery_map": rounded(grid)},
            notice=f"{report.notice} {told}".strip(),
        )

    def _overlay(self, grid: np.ndarray, image: PreparedImage) -> np.ndarray:
        """A cosine detector's map lies over what the language model's tower saw, a bridge's over the middle square."""
        fusion = self._detector_config["detector"]["fusion"]
        mode = self.model.config.image_aspect_ratio if fusion == "cosine" else "crop"
        return grid_over_image(((grid + 1) / 2).clip(0, 1), image.size, mode)


def is_language_model(place: Path) -> bool:
    """Whether a folder is a language model's, or an adapter's or projectors' of one, rather than a detector's."""
    if not place.is_dir():
        return False
    file = place / "config.json"
    has_adapter = (place / "adapter_config.json").is_file()
    return has_adapter or (file.is_file() and read_json(file).get("model_type") in ("llava", "llava_llama"))


def rounded(scores: np.ndarray) -> list[list[float]]:
    """Returns a map as plain JSON values."""
    return [[round(float(value), 4) for value in row] for row in scores]


def over_image(grid: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Lays a map of the central square, which is all that the detector sees, over the whole image.

    Args:
        grid: ``[n, n]`` in 0..1.
        shape: The image's height and width.

    Returns:
        ``[height, width]`` in 0..1; 0 beside the square.
    """
    height, width = shape
    side = min(shape)
    square = Image.fromarray(grid.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    whole = np.zeros(shape, np.float32)
    top, left = (height - side) // 2, (width - side) // 2
    whole[top : top + side, left : left + side] = np.asarray(square).clip(0, 1)
    return whole


def _is_swapped(options: AnalyzeOptions) -> bool:
    return isinstance(options, M2F2DetOptions) and options.detector_token == "swapped"
