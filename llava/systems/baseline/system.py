"""A baseline as a system: images in, P(fake) out, no words."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from llava.errors import OptionError
from llava.labels import LABELS
from llava.report import ForgeryReport
from llava.systems.base import AnalyzeOptions
from llava.systems.baseline import CNN
from llava.systems.baseline.backbone import Backbone, open_backbone
from llava.systems.baseline.cnn import CnnTraining
from llava.systems.baseline.probe import Probe, fit_probe

_BATCH = 16
_NO_MEANING = {"attention": False, "question": None, "temperature": 0.0, "samples": 1, "num_beams": 1}


class Baseline:
    """A linear probe on a frozen backbone, or a small convolutional network.

    Args:
        scorer: Which of them.
        title: What reports call it.
        notice: What must be known of it.
    """

    name = "baseline"
    answer_format = None
    options: ClassVar[type[AnalyzeOptions]] = AnalyzeOptions

    def __init__(self, scorer: "_ProbeScorer | _CnnScorer", notice: str = "") -> None:
        self.scorer = scorer
        self.notice = notice
        self.prepare = scorer.prepare
        if isinstance(scorer, _ProbeScorer):
            self.image_features = scorer.backbone.features

    @classmethod
    def load(cls, path: str, **options: Any) -> "Baseline":
        """Opens a folder that ``fit`` or the CNN's training has written.

        Raises:
            CheckpointError: It, or the backbone that it names, cannot be opened.
        """
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        device = _device(str(options.get("device") or "auto"))
        if config.get("model_type") == CNN:
            return cls(_CnnScorer(CnnTraining.open(path, {}), device))
        return cls(_ProbeScorer(Probe.load(Path(path)), device))

    @staticmethod
    def fit(backbone: str, data: Sequence[Path], folder: Path, cache: Path, **options: Any) -> dict[str, Any]:
        """Fits a linear probe and writes it into a folder; see ``fit_probe``."""
        return fit_probe(backbone, data, folder, cache, device=_device(str(options.pop("device", "auto"))), **options)

    def batch_size(self, options: AnalyzeOptions) -> int:
        """A batch that fits."""
        return _BATCH

    def describe(self, options: AnalyzeOptions) -> dict[str, Any]:
        """Says which baseline it is, what it was fitted on, and its dtype."""
        return {**self.scorer.about, "dtype": "float32"}

    @torch.no_grad()
    def analyze_batch(self, prepared: Sequence[Any], options: AnalyzeOptions) -> list[ForgeryReport]:
        """Scores a batch.

        Raises:
            OptionError: Words or attention are asked for, which a baseline has not.
        """
        wrong = [name for name, plain in _NO_MEANING.items() if getattr(options, name) != plain]
        if wrong:
            raise OptionError(f"a baseline gives no answers and shows no attention, so {wrong[0]} has no meaning")
        return [
            ForgeryReport(LABELS[int(score >= 0.5)], float(score), "detector", system=self.name, notice=self.notice)
            for score in self.scorer.scores(prepared)
        ]


class _ProbeScorer:
    def __init__(self, probe: Probe, device: str) -> None:
        self.probe = probe
        self.backbone: Backbone = open_backbone(probe.backbone, device)
        self.prepare = self.backbone.prepare
        self.about: Mapping[str, Any] = {"model": f"linear probe on {probe.backbone}", "fitted_on": dict(probe.about)}

    def scores(self, prepared: Sequence[Any]) -> np.ndarray:
        return self.probe(self.backbone.features(prepared))


class _CnnScorer:
    def __init__(self, training: CnnTraining, device: str) -> None:
        self.training, self.device = training, device
        training.network.eval().to(device)
        self.about: Mapping[str, Any] = {"model": "small CNN", "side": training.side}

    def prepare(self, image: Image.Image) -> Any:
        return self.training.prepare(image, None)

    def scores(self, prepared: Sequence[Any]) -> np.ndarray:
        logits = self.training.network.cnn(torch.stack(list(prepared)).to(self.device))
        scores: np.ndarray = logits.double().sigmoid().cpu().numpy()
        return scores


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
