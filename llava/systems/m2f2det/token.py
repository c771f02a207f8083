"""The detector's token in the prompt: what its two probabilities are to the language model (arXiv 2503.20188)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from llava.mm_utils import to_rgb
from llava.model.multimodal_fusion.base import FusionOutput
from llava.model.multimodal_fusion.single_branch import ClipOnlyFusion
from llava.model.token_sources import TokenSource, VisionContext
from llava.systems.m2f2det.detector_net import DetectorConfig, DetectorOutput, M2F2Detector

NAME = "deepfake"
"""Of the token source in a model's config."""
PIXELS = "deepfake_pixels"
"""Input with the pixels of the whole image's middle, where the shared ones are padded."""
SWAPPED = "deepfake_swapped"
"""Input whose presence exchanges the two probabilities that the token is made of."""
PROBABILITIES, MAP = "deepfake_probabilities", "deepfake_map"
_PROJECTOR_STD = 0.1


class PatchesOnly(ClipOnlyFusion):
    """CLIP's patches; the class token, which the detector takes, is projected like them and then left out."""

    def num_tokens(self, patches: Mapping[str, int]) -> int:
        """Returns the number of patches without the class token."""
        return super().num_tokens(patches) - 1

    def forward(self, inputs: Mapping[str, Tensor], *, return_attention: bool = False) -> FusionOutput:
        """Returns the branch's patches."""
        return FusionOutput(super().forward(inputs, return_attention=return_attention).tokens[:, 1:])


class ProjectorLinear(nn.Linear):
    """A layer of the detector's projector, which begins as published: N(0, 0.1), bias 0."""

    def reset_parameters(self) -> None:
        """Draws new weights."""
        nn.init.normal_(self.weight, std=_PROJECTOR_STD)
        nn.init.zeros_(self.bias)


class DeepfakeToken(TokenSource):
    """One token made of P(real) and P(fake).

    Config: ``detector``, fields of ``DetectorConfig``; ``freeze_batch_norm``, whether a batch norm keeps its statistics
    while the language model is trained (the authors' do not).
    """

    placeholder: ClassVar[str] = "<deepfake>"
    index: ClassVar[int] = -300
    needs_images: ClassVar[bool] = True

    def __init__(self, config: Mapping[str, Any], hidden_size: int) -> None:
        super().__init__(config, hidden_size)
        self.tower = M2F2Detector(DetectorConfig(**config["detector"]))
        self.mm_projector = nn.Sequential(
            ProjectorLinear(2, hidden_size), nn.GELU(), ProjectorLinear(hidden_size, hidden_size)
        )

    def forward(self, context: VisionContext) -> Tensor:
        """Returns the token ``[B, 1, D]``."""
        return self.read(context)[0]

    def read(self, context: VisionContext) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Returns the token, P(real) and P(fake) ``[B, 2]``, and the map ``[B, P]``; these two are never swapped."""
        output = self.detect(context)
        probabilities_B2 = output.logits.softmax(-1)
        shown_B2 = probabilities_B2.flip(-1) if SWAPPED in context.extras else probabilities_B2
        token_BD = self.mm_projector(shown_B2)
        return token_BD[:, None], {PROBABILITIES: probabilities_B2, MAP: output.scores}

    def detect(self, context: VisionContext) -> DetectorOutput:
        """Runs the detector on the images of a context."""
        pixels = context.extras.get(PIXELS, context.images)
        assert pixels is not None
        dtype = self.tower.clip_vision_alpha.dtype
        features = context.tower_outputs["clip"].to(dtype) if self.tower.config.fusion == "cosine" else None
        trained = any(parameter.requires_grad for parameter in self.tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            output: DetectorOutput = self.tower(pixels.to(dtype), features)
        return output

    def image_inputs(self, image: Image.Image | None, processor: Any, *, is_padded: bool) -> Mapping[str, Tensor]:
        """Returns the pixels of an image as the detector takes them, where the model pads its own."""
        if not is_padded:
            return {}
        size = processor.crop_size["height"]
        if image is None:
            return {PIXELS: torch.zeros(3, size, size)}
        return {PIXELS: processor.preprocess([to_rgb(image)], return_tensors="pt")["pixel_values"][0]}

    def freeze(self) -> None:
        """Takes the detector out of training."""
        self.tower.requires_grad_(False)

    def train(self, mode: bool = True) -> "DeepfakeToken":
        """Sets the mode; a frozen detector stays as it is used, its batch norms too."""
        super().train(mode)
        if self.config.get("freeze_batch_norm", True):
            self.tower.train(mode and any(parameter.requires_grad for parameter in self.tower.parameters()))
        return self
