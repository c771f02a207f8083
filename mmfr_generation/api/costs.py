"""What annotation costs: image tokens by the tile rule, and prices. All numbers stand here, as data."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TileRule:
    """How a chat model counts an image's tokens.

    The image is scaled down into a square of ``fit`` pixels, then until its shorter side is ``short_side`` pixels;
    it costs ``base`` tokens and ``tile`` more for each square of ``tile_side`` pixels that it touches.
    """

    base: int = 85
    tile: int = 170
    fit: int = 2048
    short_side: int = 768
    tile_side: int = 512

    def tokens(self, width: int, height: int, detail: str = "auto") -> int:
        """Returns the tokens of an image of this size in pixels; ``auto`` detail is counted as ``high``."""
        if detail == "low":
            return self.base
        scale = min(1.0, self.fit / max(width, height), self.short_side / min(width, height))
        # An exact multiple of the tile's side must not be pushed into one more tile by rounding.
        across, down = (math.ceil(round(side * scale, 6) / self.tile_side) for side in (width, height))
        return self.base + self.tile * across * down


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens, without a discount."""

    input: float
    output: float


PRICES: dict[str, Price] = {
    "gpt-4o-2024-08-06": Price(2.50, 10.00),
    "gpt-4o": Price(2.50, 10.00),
    "gpt-4o-2024-11-20": Price(2.50, 10.00),
    "gpt-4o-2024-05-13": Price(5.00, 15.00),
    "gpt-4o-mini": Price(0.15, 0.60),
    "gpt-4.1": Price(2.00, 8.00),
}
TILE_RULES: dict[str, TileRule] = {"gpt-4o-mini": TileRule(base=2833, tile=5667)}
"""Rules that differ from ``TileRule()``, by model."""
BATCH_FACTOR = 0.5
"""A request in a batch costs this part of the price."""
CHARACTERS_PER_TOKEN = 4
"""Of English prose, roughly; the prompt's tokens are an estimate."""


def dollars(price: Price, input_tokens: int, output_tokens: int, *, batch: bool) -> float:
    """Returns what that many tokens cost in US dollars."""
    full = (price.input * input_tokens + price.output * output_tokens) / 1e6
    return full * BATCH_FACTOR if batch else full
