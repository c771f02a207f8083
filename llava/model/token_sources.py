"""What stands in a prompt beside the images: tokens of a detector, of a region, of anything that a system adds.

A source owns a placeholder, as ``<image>`` owns -200, and makes the embeddings that take its place. It is a child of
the model, built from ``config.token_source_configs``, so that it is saved, moved and sharded with it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from llava.model.components import component_class

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class VisionContext:
    """What a source may look at.

    Attributes:
        images: Shared pixels ``[B, 3, S, S]``; None where the towers ran earlier.
        tower_outputs: Features ``[B, P, C]`` of each branch before its projector, by the branch's name.
        extras: A system's further inputs, each ``[B, …]``.
    """

    images: Tensor | None
    tower_outputs: Mapping[str, Tensor]
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class TokenSource(nn.Module, ABC):
    """Makes the embeddings that take a placeholder's place.

    Args:
        config: Its own settings; ``type`` names the class.
        hidden_size: Width D of the language model.

    Attributes:
        placeholder: What stands for it in a prompt's text.
        index: Id that stands for it in a tokenised prompt; below 0, and no other placeholder's.
        num_tokens: Embeddings an image.
        needs_images: Whether it looks at the pixels, so that outputs of the towers from earlier are not enough.
    """

    placeholder: ClassVar[str]
    index: ClassVar[int]
    num_tokens: int = 1
    needs_images: ClassVar[bool] = False

    def __init__(self, config: Mapping[str, Any], hidden_size: int) -> None:
        super().__init__()
        self.config = dict(config)

    @abstractmethod
    def forward(self, context: VisionContext) -> Tensor:
        """Returns embeddings ``[B, num_tokens, D]``."""

    def read(self, context: VisionContext) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Returns the embeddings, and what reports may say of them, each ``[B, …]`` by its name; by default nothing."""
        return self(context), {}

    def image_inputs(self, image: "Image.Image | None", processor: Any, *, is_padded: bool) -> Mapping[str, Tensor]:
        """Returns further inputs that are made of an image, by name, for ``VisionContext.extras``; by default none.

        Args:
            image: The image; None for a prompt without one, whose inputs only have the right shapes.
            processor: The model's image processor.
            is_padded: Whether the shared pixels are those of the image padded to a square.
        """
        return {}

    def freeze(self) -> None:
        """Takes out of training what is published frozen; by default nothing."""


def build_token_sources(configs: Mapping[str, Mapping[str, Any]] | None, hidden_size: int) -> nn.ModuleDict:
    """Builds the sources of a config, with random weights.

    Raises:
        CheckpointError: A type is unknown.
    """
    found: dict[str, nn.Module] = {}
    for name, config in (configs or {}).items():
        found[name] = component_class("token source", {}, str(config.get("type")))(config, hidden_size)
    return nn.ModuleDict(found)
