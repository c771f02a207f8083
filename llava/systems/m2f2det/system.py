"""The detector of M2F2-Det at work: P(fake) and its forgery map, without an answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.errors import CheckpointError, OptionError
from llava.labels import LABELS
from llava.model.builder import resolve_device
from llava.model.multimodal_encoder.clip_encoder import image_processor_settings
from llava.report import ForgeryReport
from llava.systems.base import AnalyzeOptions
from llava.systems.m2f2det.checkpoint import open_detector
from llava.systems.m2f2det.detector_net import M2F2Detector

NOTICE = (
    "The published training of this detector leaves the prompt of the forgery map at random, so the map says nothing "
    "of where an image was changed."
)
_BATCH = {"cuda": 64}


class M2F2Det:
    """The detector alone (stage 1)."""

    name = "M2F2-Det"
    notice = NOTICE
    answer_format = None
    has_attention = True
    options: ClassVar[type[AnalyzeOptions]] = AnalyzeOptions

    def __init__(self, detector: M2F2Detector, device: torch.device) -> None:
        self.detector = detector.to(device).requires_grad_(False)
        self.device = device
        self.size = int(detector.config.vision["image_size"])
        self.processor = CLIPImageProcessorPil(**image_processor_settings(self.size))

    @classmethod
    def load(cls, path: str, **options: Any) -> "M2F2Det":
        """Opens a stage-1 file, or a folder with a detector.

        Raises:
            CheckpointError: It is no detector, or one without a vision tower of its own.
            OptionError: An option for language models was given.
        """
        refused = [
            name
            for name in ("model_base", "load_8bit", "load_4bit", "device_map", "vision_tower", "dino_weights")
            if options.get(name)
        ]
        if refused:
            raise OptionError(f"{cls.name} has no language model, so {', '.join(refused)} would do nothing")
        if str(options.get("dtype", "auto")) not in ("auto", "float32", "fp32", "torch.float32"):
            raise OptionError(f"{cls.name} runs in float32; leave out dtype {options['dtype']}")
        detector = open_detector(Path(path).expanduser())
        if detector.config.fusion != "bridge":
            raise CheckpointError(
                f"{path} is the detector of stages 2 and 3, which takes the features of a language model's tower and "
                "has none of its own; give a stage-1 file"
            )
        return cls(detector, torch.device(resolve_device(options.get("device", "auto"))))

    def prepare(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """Returns normalised pixels ``[3, S, S]`` and the image's own height and width."""
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels, (image.height, image.width)

    def batch_size(self, options: AnalyzeOptions) -> int:
        """Returns a batch that fits."""
        return _BATCH.get(self.device.type, 8)

    def describe(self, options: AnalyzeOptions) -> dict[str, Any]:
        """Returns the detector's config."""
        return self.detector.config.to_dict()

    def analyze_batch(
        self, prepared: Sequence[tuple[Tensor, tuple[int, int]]], options: AnalyzeOptions
    ) -> list[ForgeryReport]:
        """Returns a report an image; the map is its ``attention`` where that is asked for.

        Raises:
            OptionError: A question was given, which a detector cannot answer.
        """
        if options.question:
            raise OptionError(f"{self.name} without its language model answers no question")
        pixels = torch.stack([pixels for pixels, _ in prepared]).to(self.device)
        with torch.inference_mode():
            output = self.detector(pixels)
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
            details={"forgery_map": [[round(float(value), 4) for value in row] for row in scores]},
            system=self.name,
            notice=self.notice,
        )


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
