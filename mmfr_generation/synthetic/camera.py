"""The camera that makes a rendered scene a photograph, and the development that clean renders get.

Chain of a photograph: lens (blur, colour fringe, falling-off corners), colour filter array, shot and read noise,
12-bit quantisation, demosaicing, colour matrix, tone curve. Both classes end in the same JPEG step, see ``files``.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mmfr_generation.synthetic.numerics import Array, Generator, luma, normals, pad_edge, power, soften


@dataclass(frozen=True)
class Camera:
    """The settings of one exposure.

    Attributes:
        exposure: Gain on the scene's light.
        blur: Weight of the lens's blur kernel, 0 to 0.2.
        fringe: Lateral colour of the lens: how far red and blue are stretched, as a fraction of the radius.
        vignette: Loss of light from the middle to the corners, 0 to 0.3; the mean brightness stays.
        read_noise: Standard deviation of the noise in the dark; full scale is 1.
        shot_noise: Noise variance per unit of light.
        phase: Row and column offset of the colour filter array.
        directional: Interpolate green along edges and the other colours through their difference to it, rather
            than each colour by itself.
        saturation: Colour matrix: 1 keeps colours.
        contrast: Steepness of the tone curve, 0 to 0.5.
    """

    exposure: float
    blur: float
    fringe: float
    vignette: float
    read_noise: float
    shot_noise: float
    phase: tuple[int, int]
    directional: bool
    saturation: float
    contrast: float

    @staticmethod
    def draw(rng: Generator) -> "Camera":
        """Draws settings; the noise runs from that of bright daylight to that of a dim room."""
        gain = 2.0 ** rng.uniform(-1, 2)
        return Camera(
            exposure=rng.uniform(0.8, 1.35),
            blur=rng.uniform(0.05, 0.18),
            fringe=rng.uniform(-0.004, 0.004),
            vignette=rng.uniform(0.0, 0.3),
            read_noise=0.0014 * gain,
            shot_noise=0.00009 * gain * gain,
            phase=(int(rng.integers(2)), int(rng.integers(2))),
            directional=rng.random() < 0.75,
            saturation=rng.uniform(0.9, 1.25),
            contrast=rng.uniform(0.0, 0.4),
        )


def photograph(linear_CHW: Array, camera: Camera, rng: Generator) -> Array:
    """Takes a scene's image.

    Args:
        linear_CHW: The scene in linear light, shape (3, H, W).
        camera: The settings.
        rng: Draws the noise.

    Returns:
        Display values in [0, 1], shape (3, H, W), float32.
    """
    light_CHW = _lens(linear_CHW, camera)
    mosaic = sum(light_CHW[c] * mask for c, mask in enumerate(_filters(camera.phase, *light_CHW.shape[1:])))
    deviation = np.sqrt(camera.read_noise**2 + camera.shot_noise * np.maximum(mosaic, 0))
    noisy = mosaic + deviation * normals(rng, *mosaic.shape)
    raw = np.round(np.clip(noisy, -0.05, 1) * 4095) / np.float32(4095)
    return _develop(_demosaic(raw, camera), camera)


def render_clean(linear_CHW: Array, camera: Camera, rng: Generator, *, noise: bool) -> Array:
    """Develops a scene that no lens and no sensor has seen.

    Args:
        linear_CHW: The scene in linear light, shape (3, H, W).
        camera: Its exposure, sharpness, colours, tone and noise level are used.
        rng: Draws the noise.
        noise: Add noise as strong as the camera's would be, but in each colour by itself.

    Returns:
        Display values in [0, 1], shape (3, H, W), float32.
    """
    light_CHW = soften(linear_CHW * np.float32(camera.exposure), camera.blur)
    if noise:
        deviation = np.sqrt(camera.read_noise**2 + camera.shot_noise * np.maximum(light_CHW, 0))
        light_CHW = light_CHW + deviation * soften(normals(rng, *light_CHW.shape), 0.08)
    return _develop(light_CHW, camera)


def _lens(linear_CHW: Array, camera: Camera) -> Array:
    out = soften(linear_CHW, camera.blur)
    across, down = _radius(out.shape[1])
    falloff = camera.exposure * (1 - np.float32(camera.vignette) * ((across**2 + down**2) / 2 - np.float32(1 / 3)))
    for plane, sign in ((out[0], 1), (out[2], -1)):
        padded = pad_edge(plane)
        dx, dy = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2, (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
        plane += np.float32(sign * camera.fringe * out.shape[1] / 2) * (across * dx + down * dy)
    return out * falloff


def _demosaic(raw: Array, camera: Camera) -> Array:
    """Fills in the colours that the filter array left out; the mirrored border lets the filters reach past the edge."""
    raw = np.pad(raw, 2, mode="reflect")
    red, green, blue = _filters(camera.phase, *raw.shape)
    padded = pad_edge(raw)
    left, right, up, down = padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]
    if camera.directional:
        along_row = np.abs(left - right) < np.abs(up - down)
        missing = np.float32(0.5) * np.where(along_row, left + right, up + down)
        full = raw * green + missing * (1 - green)
        planes = [full + _spread((raw - full) * red), full, full + _spread((raw - full) * blue)]
    else:
        full = raw * green + np.float32(0.25) * (left + right + up + down) * (1 - green)
        planes = [_spread(raw * red), full, _spread(raw * blue)]
    return np.stack(planes)[:, 2:-2, 2:-2]


def _spread(sparse: Array) -> Array:
    """Interpolates a plane that has one value in each 2x2 cell bilinearly."""
    return 4 * soften(sparse, 0.25)


def _develop(light_CHW: Array, camera: Camera) -> Array:
    """Applies colour matrix and tone curve."""
    grey = luma(light_CHW)
    coloured = grey + np.float32(camera.saturation) * (light_CHW - grey)
    curve = _tone_curve(round(camera.contrast * 64))
    position = np.clip(coloured, 0, 1) * (len(curve) - 2)
    index = position.astype(np.int32)
    share = position - index.astype(np.float32)
    low = curve[index]
    return low + share * (curve[index + 1] - low)


@lru_cache(maxsize=64)
def _tone_curve(contrast_64: int) -> Array:
    """Tabulates display gamma followed by an S-curve, steeper towards the dark where gamma is."""
    x = np.linspace(0, 1, 4097)
    display = np.where(x < 0.0031308, 12.92 * x, 1.055 * power(np.maximum(x, 0.0031308), 1 / 2.4) - 0.055)
    curve = display + contrast_64 / 64 * (display * display * (3 - 2 * display) - display)
    return np.append(curve, curve[-1]).astype(np.float32)


@lru_cache(maxsize=16)
def _filters(phase: tuple[int, int], height: int, width: int) -> tuple[Array, Array, Array]:
    """Returns the 0/1 masks of red, green and blue sites."""
    rows = (np.arange(height)[:, None] + phase[0]) % 2
    cols = (np.arange(width)[None, :] + phase[1]) % 2
    red, blue = (rows == 0) & (cols == 0), (rows == 1) & (cols == 1)
    return red.astype(np.float32), (~(red | blue)).astype(np.float32), blue.astype(np.float32)


@lru_cache(maxsize=8)
def _radius(size: int) -> tuple[Array, Array]:
    """Returns the position of columns (1, W) and rows (H, 1) relative to the middle, -1 to 1."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    return axis[None, :], axis[:, None]
