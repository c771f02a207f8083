"""Forensic statistics of an image: residuals, their correlations, and spectra. Nothing here is learnt.

Everything is computed in float32, of tiles and of the whole image; the tower's images are crops. Suffixes: B images,
C planes, H rows and W columns of pixels, T tiles, S side of a tile, F features.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)
_QUANTISATION = 1 / 12
"""Variance of rounding to whole levels; energy below it is meaningless."""
_STEPS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Levels at which the distribution of a residual is read."""
_LAGS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (2, 2), (0, 3), (3, 0), (0, 4), (4, 0), (0, 8), (8, 0))
_PERIODS = (2, 3, 4, 8)
_QUANTILES = (0.02, 0.1, 0.5, 0.9, 0.98)
_SPECTRUM_CELLS = (16, 8)
_RING_WIDTH = 0.05
"""Of the sampling rate; the innermost ring is left out."""
_LEVELS = 256
_PLANES = 3


def planes(levels_B3HW: Tensor) -> Tensor:
    """Returns luminance, red minus green and blue minus green ``[B, 3, H, W]`` of colours in levels 0 to 255."""
    red, green, blue = levels_B3HW.unbind(1)
    luma = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
    return torch.stack((luma, red - green, blue - green), 1)


def second_differences(planes_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how far each pixel is from the mean of its neighbours, across and down, at the image's size."""
    padded = F.pad(planes_BCHW, (1, 1, 1, 1), mode="replicate")
    middle = padded[..., 1:-1, 1:-1]
    across = middle - (padded[..., 1:-1, 2:] + padded[..., 1:-1, :-2]) / 2
    down = middle - (padded[..., 2:, 1:-1] + padded[..., :-2, 1:-1]) / 2
    return across, down


class Measured(NamedTuple):
    """The measures of B images, in float32.

    Attributes:
        tiles: Spectra and statistics of each tile ``[B, T, F]``.
        image: Statistics of the whole image ``[B, F]``.
    """

    tiles: Tensor
    image: Tensor


class Residuals(NamedTuple):
    """An image's planes and their residuals, at its size; C = 6: three planes, then red, green and blue.

    Attributes:
        colour: Planes ``[B, 3, H, W]``.
        across: Second differences along rows ``[B, C, H, W]``.
        down: Second differences along columns.
        both: Their mean.
        strength: Absolute value of ``both`` in the three planes.
    """

    colour: Tensor
    across: Tensor
    down: Tensor
    both: Tensor
    strength: Tensor

    @classmethod
    def of(cls, levels_B3HW: Tensor) -> "Residuals":
        """Computes them from colours in levels 0 to 255."""
        colour = planes(levels_B3HW)
        across, down = second_differences(torch.cat((colour, levels_B3HW), 1))
        both = (across + down) / 2
        return cls(colour, across, down, both, both[:, :_PLANES].abs())


def tiles(maps_BCHW: Tensor, side: int) -> Tensor:
    """Cuts maps into tiles ``[B, T, C, S, S]``."""
    cut_BCRQSS = maps_BCHW.unfold(2, side, side).unfold(3, side, side)
    return cut_BCRQSS.flatten(2, 3).transpose(1, 2)


def log_power(maps: Tensor) -> Tensor:
    """Returns the log power spectrum of maps ``[..., H, W]``, rows of both signs, columns to half the sampling rate."""
    rows, columns = (
        torch.hann_window(n, periodic=False, device=maps.device, dtype=maps.dtype) for n in maps.shape[-2:]
    )
    window = rows[:, None] * columns
    spectrum = torch.fft.rfft2((maps - maps.mean((-2, -1), keepdim=True)) * window)
    # Divided by the window's energy, so that white noise has its variance as power at any tile size.
    power = (spectrum.real.square() + spectrum.imag.square()) / window.square().sum()
    return (power + _QUANTISATION).log()


def tile_spectra(planes_BCHW: Tensor, side: int) -> Tensor:
    """Returns the spectra of each tile of each plane ``[B, T, F]``."""
    return log_power(tiles(planes_BCHW, side)).flatten(2)


def residual_moments(levels_B3HW: Tensor, residuals: Residuals, cell: int) -> Tensor:
    """Returns means of residuals, their powers, products and distribution in cells ``[B, M, R, Q]``."""
    red, green, blue = residuals.both[:, _PLANES:].unbind(1)
    maps = (
        residuals.across[:, :_PLANES].abs(),
        residuals.down[:, :_PLANES].abs(),
        residuals.strength,
        residuals.both.square(),
        residuals.strength.square().square(),
        torch.stack((red * green, green * blue, red * blue), 1),
        levels_B3HW,
        *((residuals.strength < step).float() for step in _STEPS),
    )
    return torch.cat([F.avg_pool2d(part, cell) for part in maps], 1)


def moment_statistics(moments_BMN: Tensor) -> Tensor:
    """Returns energies, kurtosis, correlation of colours and the distribution of residuals ``[B, N, F]``."""
    moments = moments_BMN.transpose(1, 2)
    sizes = (3 * _PLANES, 2 * _PLANES, _PLANES, _PLANES, _PLANES, _PLANES * len(_STEPS))
    strength, energy, fourth, crossed, levels, shares = moments.split(sizes, -1)
    energy = energy + _QUANTISATION
    red, green, blue = energy[..., _PLANES:].unbind(-1)
    colours = torch.stack((red * green, green * blue, red * blue), -1).sqrt()
    return torch.cat(
        (
            (strength + 0.1).log(),
            energy.log(),
            ((fourth + _QUANTISATION) / energy[..., :_PLANES].square()).log(),
            crossed / colours,
            levels / _LEVELS,
            shares,
        ),
        -1,
    )


def tile_statistics(moments_BMRQ: Tensor) -> Tensor:
    """Returns the statistics of each tile ``[B, T, F]``."""
    return moment_statistics(moments_BMRQ.flatten(2))


def image_statistics(levels_B3HW: Tensor, residuals: Residuals, moments_BMRQ: Tensor) -> Tensor:
    """Returns what only the whole image shows ``[B, F]``: fine spectra, correlations, grids, histogram."""
    strength = residuals.strength
    spectra = log_power(torch.cat((residuals.colour, strength[:, :1]), 1))
    across = F.avg_pool2d(F.pad(spectra, (3, 3, 0, 0), mode="reflect"), (1, 7), 1)
    # A generator's grid is a peak over its surroundings: subtract a 7 x 7 mean, taken along each axis in turn.
    peaks = spectra - F.avg_pool2d(F.pad(across, (0, 0, 3, 3), mode="reflect"), (7, 1), 1)
    pooled = F.adaptive_avg_pool2d(spectra, _SPECTRUM_CELLS), F.adaptive_max_pool2d(peaks, _SPECTRUM_CELLS)
    cells = F.avg_pool2d(residuals.both[:, :_PLANES].square(), 8).sqrt().flatten(2).sort(-1).values
    spots = [round(q * (cells.shape[-1] - 1)) for q in _QUANTILES]
    whole = moments_BMRQ.mean((2, 3), keepdim=True)
    return torch.cat(
        (
            *(part.flatten(1) for part in pooled),
            _ring_statistics(spectra, peaks),
            moment_statistics(whole.flatten(2)).flatten(1),
            _lags(residuals.both[:, :_PLANES]),
            *((_phase_spread(strength, period) + 0.01).log() for period in _PERIODS),
            (cells[..., spots] + 0.1).log().flatten(1),
            _histogram_statistics(levels_B3HW),
        ),
        1,
    )


def _ring_statistics(spectra_BCHW: Tensor, peaks_BCHW: Tensor) -> Tensor:
    """Returns mean power, spread and highest peak of each ring of the spectrum ``[B, F]``, whatever its direction."""
    rows, columns = spectra_BCHW.shape[-2:]
    dtype, device = spectra_BCHW.dtype, spectra_BCHW.device
    down = torch.fft.fftfreq(rows, dtype=dtype, device=device).abs()[:, None]
    across = torch.linspace(0, 0.5, columns, dtype=dtype, device=device)
    ring = ((down.square() + across.square()).sqrt() / _RING_WIDTH).long()
    rings = []
    for number in range(1, int(ring.max()) + 1):
        inside = ring == number
        power, peak = spectra_BCHW[..., inside], peaks_BCHW[..., inside]
        rings += [power.mean(-1), peak.std(-1, correction=0), peak.amax(-1)]
    return torch.cat(rings, -1)


def _lags(residual_BCHW: Tensor) -> Tensor:
    """Returns the correlation of a residual with itself moved ``[B, C * lags]``."""
    # The autocorrelation is the inverse transform of the power spectrum (Wiener-Khinchin), here circular.
    spectrum = torch.fft.rfft2(residual_BCHW)
    power = spectrum.real.square() + spectrum.imag.square()
    moved = torch.fft.irfft2(power, s=residual_BCHW.shape[-2:])
    at_lags = torch.stack([moved[..., dy, dx] for dy, dx in _LAGS], -1)
    scale = moved[..., :1, 0] + _QUANTISATION * residual_BCHW[0, 0].numel()
    return (at_lags / scale).flatten(1)


def _phase_spread(strength_BCHW: Tensor, period: int) -> Tensor:
    """Returns how much the mean strength differs between the phases of a grid ``[B, C]``."""
    rows, columns = (n // period * period for n in strength_BCHW.shape[-2:])
    cells = strength_BCHW[..., :rows, :columns].unflatten(3, (-1, period)).unflatten(2, (-1, period))
    phases = cells.mean((2, 4)).flatten(2)
    return phases.std(-1, correction=0) / (phases.mean(-1) + 0.1)


def _histogram_statistics(levels_B3HW: Tensor) -> Tensor:
    """Returns how many levels each colour uses, how rough its histogram is, and the histogram's own spectrum."""
    index = levels_B3HW.round().long().clamp(0, _LEVELS - 1).flatten(2)
    counts = levels_B3HW.new_zeros(*index.shape[:2], _LEVELS)
    counts.scatter_add_(2, index, torch.ones_like(index, dtype=counts.dtype))
    share = counts / index.shape[-1]
    used = (counts > 0).float().mean(-1)
    rough = share.diff(dim=-1).abs().sum(-1)
    spectrum = torch.fft.rfft(share - share.mean(-1, keepdim=True)).abs()
    return torch.cat(
        (used * 4 - 2, (rough + 0.01).log(), (F.adaptive_avg_pool1d(spectrum, 32) + 1e-3).log().flatten(1)), 1
    )


def measure(levels_B3HW: Tensor, side: int) -> Measured:
    """Measures images.

    Args:
        levels_B3HW: Colours 0 to 255, float32; H and W are multiples of ``side``.
        side: Side S of the tiles.
    """
    residuals = Residuals.of(levels_B3HW)
    moments = residual_moments(levels_B3HW, residuals, side)
    spectra = tile_spectra(torch.cat((residuals.colour, residuals.strength[:, :1]), 1), side)
    return Measured(
        torch.cat((spectra, tile_statistics(moments)), -1), image_statistics(levels_B3HW, residuals, moments)
    )
