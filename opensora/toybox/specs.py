"""Which clips of the toy world there are: the words that each is made of, and the dice that choose them.

Nothing here draws, so nothing here needs torch: `world` turns a `ClipSpec` into frames, `captions` into text.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from opensora.errors import OpenSoraError

SHAPES = ("ball", "square", "triangle", "ring", "cross", "star")
COLOURS = {
    "red": (225, 30, 35),
    "green": (25, 185, 55),
    "blue": (30, 80, 235),
    "yellow": (250, 225, 40),
    "orange": (250, 135, 20),
    "purple": (140, 50, 190),
    "white": (250, 250, 250),
    "pink": (250, 140, 200),
}
SIZES = {"small": 12.0, "large": 17.5}  # radius
MOTIONS = ("still", "left", "right", "up", "down", "bounce", "orbit", "spin", "grow", "shrink")
SPEEDS = ("slow", "fast")
BACKGROUNDS = ("white", "grey", "wood", "day", "sunset", "night", "grass", "sand", "water")
CAMERAS = ("fixed", "pan left", "pan right", "zoom in", "zoom out")
ATTRIBUTES = {
    "background": BACKGROUNDS,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "motion": MOTIONS,
    "shape": SHAPES,
}
"""What a judge reads off a clip: attribute -> its possible labels, in the order of the judge's logits."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One moving object.

    Attributes:
        shape, colour, size, motion, speed: words of `SHAPES`, `COLOURS`, `SIZES`, `MOTIONS`, `SPEEDS`.
        x, y: where the path's centre lies, each in [-1, 1] of the room in which the object stays fully visible.
        phase: where an orbit begins, in turns.
    """

    shape: str
    colour: str
    size: str
    motion: str
    speed: str
    x: float = 0.0
    y: float = 0.0
    phase: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ClipSpec(Thing):
    """Everything there is to know about one clip: its main object, where it is, and who watches."""

    background: str
    camera: str = "fixed"
    second: Thing | None = None

    def labels(self) -> dict[str, int]:
        """Attribute -> index of this clip's label in `ATTRIBUTES`."""
        return {name: labels.index(getattr(self, name)) for name, labels in ATTRIBUTES.items()}


@dataclass(frozen=True)
class World:
    """Which clips may occur.

    Attributes:
        shapes, colours, sizes, motions, speeds, backgrounds: the words drawn from.
        second: share of clips with a second object.
        camera: share of clips in which the camera pans or zooms.
    """

    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    sizes: tuple[str, ...] = tuple(SIZES)
    motions: tuple[str, ...] = MOTIONS
    speeds: tuple[str, ...] = SPEEDS
    backgrounds: tuple[str, ...] = BACKGROUNDS
    second: float = 0.0
    camera: float = 0.0


FULL_WORLD = World(second=0.2, camera=0.2)
EASY_WORLD = World(shapes=("ball", "square", "triangle", "ring", "cross"))
"""The world of the shipped models: shapes that stay clear at 64 x 64."""


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    """Whether no model may train on this triple.

    About 15 % of all triples, spread like a Latin square: every pair of two attributes keeps at least 60 % of its
    triples for training, so a held-out clip is a new composition of parts that are all well known.
    """
    place = 11 * SHAPES.index(shape) + 3 * tuple(COLOURS).index(colour) + 7 * MOTIONS.index(motion)
    return place % 20 < 3


def iterate_specs(
    seed: int, world: World = EASY_WORLD, split: Literal["train", "held_out", "all"] = "train"
) -> Iterator[ClipSpec]:
    """An endless stream of clips, the same for the same arguments on every machine."""
    if split not in ("train", "held_out", "all"):
        raise OpenSoraError(f'split {split!r} is unknown; choose "train", "held_out" or "all"')
    triples = [
        (shape, colour, motion)
        for shape in world.shapes
        for colour in world.colours
        for motion in world.motions
        if split == "all" or is_held_out(shape, colour, motion) == (split == "held_out")
    ]
    if not triples:
        raise OpenSoraError(f"no (shape, colour, motion) of this world belongs to split {split!r}; widen the world")
    rng = random.Random(f"toybox/{split}/{seed}")
    while True:
        background = rng.choice(world.backgrounds)
        second = draw_thing(rng, world, rng.choice(triples)) if rng.random() < world.second else None
        camera = rng.choice(CAMERAS[1:]) if second is None and rng.random() < world.camera else "fixed"
        thing = draw_thing(rng, world, rng.choice(triples))
        yield ClipSpec(**vars(thing), background=background, camera=camera, second=second)


def sample_specs(
    n: int, seed: int, world: World = EASY_WORLD, split: Literal["train", "held_out", "all"] = "train"
) -> list[ClipSpec]:
    """The first `n` clips of `iterate_specs(seed, world, split)`."""
    specs = iterate_specs(seed, world, split)
    return [next(specs) for _ in range(n)]


def draw_thing(rng: random.Random, world: World, triple: tuple[str, str, str]) -> Thing:
    """An object with the given shape, colour and motion; everything else at random."""
    shape, colour, motion = triple
    size, speed = rng.choice(world.sizes), rng.choice(world.speeds)
    x, y, phase = rng.uniform(-1, 1), rng.uniform(-1, 1), rng.randrange(4) / 4
    return Thing(shape=shape, colour=colour, size=size, motion=motion, speed=speed, x=x, y=y, phase=phase)
