"""Local manipulations of photographs, each with a mask of what it changed.

Images are display values in [0, 1], shape (3, H, W), float32; regions are bool, shape (H, W).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage, sparse
from scipy.sparse.linalg import splu

from mmfr_generation.synthetic.decoder import decode
from mmfr_generation.synthetic.generators import Role
from mmfr_generation.synthetic.numerics import Array, Generator, field, luma, resize

LEAST_AREA = 0.004
"""Least share of the image that a manipulation must change visibly."""
_VISIBLE = 3
"""Least difference in grey levels that counts for that."""
_TRIES = 8
_RING = 4
_OFFSETS = 80

Apply = Callable[[Array, Array, Array, float, Generator], Array]
"""Takes image, another photograph's crop of the same shape, region, strength and random numbers; returns the image."""


@dataclass(frozen=True)
class Manipulation:
    """One kind of local manipulation.

    Attributes:
        name: Its name, and its evaluation set's folder.
        mechanism: What it does to the pixels; kinds that share it are alike.
        role: Whether training has it.
        attribute: The forgery attribute that it belongs to.
        sentence: Pattern of what is wrong, with ``{where}`` and, if it has a strength, ``{grade}``.
        apply: Changes the region.
        graded: Whether it has a strength; the others are always whole.
    """

    name: str
    mechanism: str
    role: Role
    attribute: str
    sentence: str
    apply: Apply
    graded: bool = False

    @property
    def description(self) -> str:
        """One sentence for the card."""
        return (self.apply.__doc__ or "").strip()


@dataclass(frozen=True)
class Manipulated:
    """What a manipulation made.

    Attributes:
        image: The image.
        mask: The pixels that differ from before, gaps of a few pixels closed.
        kind: What was done.
    """

    image: Array
    mask: Array
    kind: Manipulation


def manipulate(image: Array, other: Array, kind: Manipulation, strength: float, rng: Generator) -> Manipulated:
    """Manipulates one region of an image.

    A region where the change would hardly be seen, such as a copy of sky on sky, is drawn again. Where none is found
    the region is recoloured, which always shows, and the result says so.

    Args:
        image: The image.
        other: A crop of another photograph, of the same shape.
        kind: What is done.
        strength: In (0, 1].
        rng: Chooses the region, and all else.
    """
    for attempt in range(_TRIES + 1):
        done = kind if attempt < _TRIES else MANIPULATIONS["recoloured_part"]
        region = draw_region(image.shape[1], image.shape[2], rng)
        changed = np.clip(done.apply(image, other, region, strength, rng), 0, 1).astype(np.float32)
        change = np.abs(_levels(changed) - _levels(image)).max(axis=0)
        if (change >= _VISIBLE).mean() >= LEAST_AREA:
            break
    mask = ndimage.binary_closing(np.pad(change > 0, 2), iterations=2)[2:-2, 2:-2] | (change > 0)
    return Manipulated(changed, mask, done)


def _levels(image: Array) -> Array:
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.int16)


def draw_region(height: int, width: int, rng: Generator) -> Array:
    """Draws a blob with a wavy outline, its middle well inside the image."""
    radii = rng.uniform(0.11, 0.24, 2)
    centre = rng.uniform(0.3, 0.7, 2)
    outline = 0.25 * field(rng, height, width, "cloud").astype(np.float64)
    rows = ((np.arange(height) + 0.5) / height - centre[0])[:, None] / radii[0]
    cols = ((np.arange(width) + 0.5) / width - centre[1])[None, :] / radii[1]
    inside: Array = rows**2 + cols**2 + outline < 1
    core = rows**2 + cols**2 < 0.2
    return inside | core


def _soft(region: Array, sigma: float) -> Array:
    """Opacity of a feathered region, 1 in its middle and 0 outside it."""
    shrunk = ndimage.distance_transform_edt(region)
    return np.clip(shrunk / (2.5 * sigma), 0, 1).astype(np.float32)


def _ring(region: Array) -> Array:
    return ndimage.binary_dilation(region, iterations=_RING) & ~region


# --- kinds


def splice_hard(image: Array, other: Array, region: Array, strength: float, rng: Generator) -> Array:
    """Puts a part of another photograph in, with a hard edge."""
    return np.where(region, other, image)


def splice_blended(image: Array, other: Array, region: Array, strength: float, rng: Generator) -> Array:
    """Puts a part of another photograph in, with a feathered edge and colours drawn near to those around."""
    around, own = _means(image, _ring(region)), _means(other, region)
    matched = other + np.float32(rng.uniform(0.3, 0.8)) * (around - own)
    return image + _soft(region, rng.uniform(1, 3)) * (matched - image)


def copy_move(image: Array, other: Array, region: Array, strength: float, rng: Generator) -> Array:
    """Copies a part of the image to another place, turned and scaled."""
    _, height, width = image.shape
    angle, scale = rng.uniform(-np.pi, np.pi), rng.uniform(0.75, 1.35)
    rows, cols = region.nonzero()
    target = np.array([rows.mean(), cols.mean()])
    source = np.array([rng.uniform(0.2, 0.8) * height, rng.uniform(0.2, 0.8) * width])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    offset = source - turn @ target
    moved = np.stack([ndimage.affine_transform(plane, turn, offset, order=1, mode="mirror") for plane in image])
    return image + _soft(region, rng.uniform(0.4, 1.2)) * (moved - image)


def removal_diffusion(image: Array, other: Array, region: Array, strength: float, rng: Generator) -> Array:
    """Removes what was there: the hole is filled smoothly from its border."""
    return membrane(image, region)


def removal_exemplar(image: Array, other: Array, region: Array, strength: float, rng: Generator) -> Array:
    """Removes what was there: the hole is filled with the part of the image whose surroundings fit best."""
    shifted = _best_shift(image, region, rng)
    return np.where(region, shifted + membrane(image - shifted, region), image)


def local_decoder(image: Array, other: Array, region: Array, strength: float, rng: Generator) -> Array:
    """Makes a part again with a small neural decoder."""
    opacity = np.float32(0.5 + 0.5 * strength) * _soft(region, rng.uniform(0.5, 2))
    return image + opacity * (decode(image) - image)


def upscaled_part(image: Array, other: Array, region: Array, strength: float, rng: Generator) -> Array:
    """Replaces a part by its enlargement from a smaller version."""
    factor = 1.7 + 1.6 * strength
    _, height, width = image.shape
    small = resize(image, max(4, round(height / factor)), max(4, round(width / factor)), Image.Resampling.BICUBIC)
    large = resize(small, height, width, Image.Resampling.BICUBIC)
    return image + _soft(region, rng.uniform(0.5, 2)) * (large - image)


def recoloured_part(image: Array, other: Array, region: Array, strength: float, rng: Generator) -> Array:
    """Gives a part other colours: its colour differences are turned, and one hue is added."""
    grey = luma(image)
    turned = np.roll(image - grey, int(rng.integers(1, 3)), axis=0)
    hue = rng.uniform(-1, 1, 3)
    hue -= hue.mean()
    hue *= (0.06 + 0.1 * strength) / max(np.abs(hue).max(), 1e-6)
    coloured = grey + turned + hue.astype(np.float32)[:, None, None]
    return image + _soft(region, rng.uniform(0.5, 2)) * (coloured - image)


# --- filling


def _means(image: Array, region: Array) -> Array:
    return image[:, region].mean(axis=1)[:, None, None] if region.any() else np.zeros((3, 1, 1), np.float32)


def membrane(planes: Array, region: Array) -> Array:
    """Fills a region with the harmonic function of its border: Laplace's equation on the pixel grid.

    Pixels of the image's own border inside the region have fewer neighbours.
    """
    rows, cols = region.nonzero()
    number = np.full(region.shape, -1)
    number[rows, cols] = np.arange(len(rows))
    degree = np.zeros(len(rows))
    known = np.zeros((len(rows), len(planes)))
    pairs: list[tuple[Array, Array]] = []
    for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        y, x = rows + dy, cols + dx
        inside = (y >= 0) & (y < region.shape[0]) & (x >= 0) & (x < region.shape[1])
        own, y, x = np.arange(len(rows))[inside], y[inside], x[inside]
        degree[own] += 1
        free = number[y, x] >= 0
        pairs.append((own[free], number[y[free], x[free]]))
        known[own[~free]] += planes[:, y[~free], x[~free]].T
    first, second = (np.concatenate([pair[k] for pair in pairs]) for k in (0, 1))
    links = sparse.coo_matrix((np.ones(len(first)), (first, second)), shape=(len(rows), len(rows)))
    filled = planes.copy()
    filled[:, rows, cols] = splu(sparse.csc_matrix(sparse.diags(degree) - links)).solve(known).T.astype(np.float32)
    return filled


def _best_shift(image: Array, region: Array, rng: Generator) -> Array:
    """Returns the image shifted such that what surrounds the region fits what is there best."""
    ring = _ring(region)
    rows, cols = (ring | region).nonzero()
    (y0, y1), (x0, x1) = (rows.min(), rows.max()), (cols.min(), cols.max())
    _, height, width = image.shape
    best, least = (0, 0), np.inf
    for _ in range(_OFFSETS):
        dy, dx = int(rng.integers(-y0, height - y1)), int(rng.integers(-x0, width - x1))
        if abs(dy) + abs(dx) < _RING or (region & np.roll(region, (-dy, -dx), (0, 1))).mean() > 0.5 * region.mean():
            continue
        ring_rows, ring_cols = ring.nonzero()
        difference = image[:, ring_rows + dy, ring_cols + dx] - image[:, ring_rows, ring_cols]
        misfit = float((difference**2).mean())
        if misfit < least:
            best, least = (dy, dx), misfit
    return np.roll(image, (-best[0], -best[1]), (1, 2))


_EDGES, _TEXTURE, _SENSE = "Irregular Image Edges", "Anomalous Image Texture", "Semantic Irrationality"
_LIGHT, _QUALITY = "Inconsistent Lighting and Shadows", "Low Image Quality"
_ALL = (
    Manipulation(
        "splice_hard",
        "splice",
        "seen",
        _EDGES,
        "[A part of another photograph with a hard border|A pasted part with a hard border] stands {where}.",
        splice_hard,
    ),
    Manipulation(
        "splice_blended",
        "splice",
        "seen",
        _SENSE,
        "[A part of another photograph is blended in|Something from another photograph stands] {where}.",
        splice_blended,
    ),
    Manipulation(
        "copy_move",
        "copy",
        "seen",
        _SENSE,
        "[A copy of another part of the image stands|A part of the image occurs a second time] {where}.",
        copy_move,
    ),
    Manipulation(
        "removal_diffusion",
        "removal",
        "seen",
        _TEXTURE,
        "[A hole {where} is filled without any texture|Something was removed {where}, and the hole is smooth].",
        removal_diffusion,
    ),
    Manipulation(
        "local_decoder",
        "learnt decoder",
        "seen",
        _TEXTURE,
        "[A part made by a decoder lies|The detail melts into coarse patches] {where}, with {grade} loss.",
        local_decoder,
        graded=True,
    ),
    Manipulation(
        "upscaled_part",
        "super-resolution",
        "seen",
        _QUALITY,
        "[A part that was enlarged lies|The detail of one part is lost by enlarging] {where}, with {grade} loss.",
        upscaled_part,
        graded=True,
    ),
    Manipulation(
        "recoloured_part",
        "recolouring",
        "seen",
        _LIGHT,
        "[A part in wrong colours lies|The colours of one part were changed] {where}, a {grade} change.",
        recoloured_part,
        graded=True,
    ),
    Manipulation(
        "removal_exemplar",
        "removal",
        "unseen-known-mechanism",
        _SENSE,
        "[A hole {where} is filled with texture from elsewhere|Something {where} was covered with other texture].",
        removal_exemplar,
    ),
)
MANIPULATIONS: dict[str, Manipulation] = {kind.name: kind for kind in _ALL}
"""Every kind by its name."""
