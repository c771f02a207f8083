"""What every scene says about itself, and how a fault is asked of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mmfr_generation.synthetic.canvas import Canvas, Light
from mmfr_generation.synthetic.numerics import Generator


@dataclass(frozen=True)
class Fault:
    """A high-level fault that a scene is to be drawn with.

    Attributes:
        kind: Its name, see ``faults.FAULTS``.
        seed: Decides which thing is hit, and how.
    """

    kind: str
    seed: int


def hits(fault: Fault | None, kind: str, index: int, count: int) -> bool:
    """Tells whether the fault is of this kind and strikes the ``index``-th of ``count`` things."""
    return fault is not None and fault.kind == kind and fault.seed % count == index


@dataclass(frozen=True)
class Thing:
    """Things of one sort in a scene, as a caption counts them."""

    count: int
    colour: str
    noun: str


@dataclass(frozen=True)
class Facts:
    """What is true of a drawn scene, for captions and reasons.

    Attributes:
        kind: The scene's kind.
        things: The main things, with number and colour.
        place: Where they are, beginning with a preposition.
        texture: The surface whose texture is best seen, a singular noun phrase.
        edges: Whose outlines are best seen, a plural noun phrase.
        sense: A true sentence about why the content makes sense.
        text: The word written in the scene; empty if there is none.
        carrier: What the word is written on, a noun phrase; empty if there is none.
    """

    kind: str
    things: tuple[Thing, ...]
    place: str
    texture: str
    edges: str
    sense: str
    text: str = ""
    carrier: str = ""


SHADOW = "one shadow falls to the {side} although the light comes from the {side} too"
"""What is wrong with a reversed shadow; ``{side}`` is the light's side."""

Draw = Callable[[Canvas, Generator, Light, Fault | None], Facts]


@dataclass(frozen=True)
class SceneKind:
    """One kind of scene: its name, how it is drawn, and the faults it can show with a clause about each."""

    name: str
    draw: Draw
    faults: Mapping[str, str]
