"""The kinds of scenes, each in its own file."""

from mmfr_generation.synthetic.scenes import garden, landscape, people, room, shelf, still_life, street
from mmfr_generation.synthetic.scenes.base import Facts, Fault, SceneKind, Thing

SCENES: tuple[SceneKind, ...] = (
    still_life.KIND,
    landscape.KIND,
    street.KIND,
    shelf.KIND,
    garden.KIND,
    people.KIND,
    room.KIND,
)

__all__ = ["SCENES", "Facts", "Fault", "SceneKind", "Thing"]
