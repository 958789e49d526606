"""Which frames a training clip is conditioned on: what teaches a model to continue, connect and fill.

A *strategy* says how a clip's mask is drawn; `ratios` say how often each is chosen. The names are Open-Sora 1.2's,
whose draws are repeated number by number. Of 1.1's names (`mask_quarter_head`, ...) the prefix is dropped.

`image_*` gives one latent frame, `quarter_*` one to a quarter of them, at the place that the rest of the name tells;
`random` gives each frame with one chance for the clip, `interpolate` every second one; `head` and `tail`, which are our
own, give any number of them. `identity`, and whatever the ratios leave over, gives none.
"""

import random
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from opensora.errors import OpenSoraError


def draw_frame_masks(
    ratios: Mapping[str, float], batch_size: int, num_frames: int, rng: random.Random, generator: torch.Generator
) -> Tensor:
    """Masks of a batch, (B, T) bool, True = generated.

    Args:
        ratios: strategy -> share of the clips, in the order in which chance runs through them.
        batch_size: B.
        num_frames: T, latent frames; a clip of one is always generated.
        rng: draws strategies and places.
        generator: draws the frames of `random`.

    Raises:
        OpenSoraError: see `check_ratios`.
    """
    check_ratios(ratios)
    masks = torch.ones(batch_size, num_frames, dtype=torch.bool)
    for mask in masks:
        strategy = _choose(ratios, rng)
        if num_frames > 1:
            _STRATEGIES[strategy](mask, rng, generator)
    return masks


def check_ratios(ratios: Mapping[str, float]) -> None:
    """Raises `OpenSoraError` for an unknown strategy, a negative ratio or ratios that sum to more than 1."""
    for name, ratio in ratios.items():
        if name not in _STRATEGIES:
            raise OpenSoraError(f"unknown frame mask {name!r}; known are {', '.join(_STRATEGIES)}")
        if ratio < 0:
            raise OpenSoraError(f"frame mask {name} has the ratio {ratio}; expected 0 or more")
    if sum(ratios.values()) > 1 + 1e-6:
        raise OpenSoraError(f"the ratios of the frame masks sum to {sum(ratios.values()):g}; expected 1 or less")


def _choose(ratios: Mapping[str, float], rng: random.Random) -> str:
    chance, passed = rng.random(), 0.0
    for name, ratio in ratios.items():
        passed += ratio
        if chance < passed:
            return name
    return "identity"


_Strategy = Callable[[Tensor, random.Random, torch.Generator], None]


def _quarter(mask: Tensor, rng: random.Random) -> int:
    return rng.randint(1, max(1, len(mask) // 4))


def _at_random(mask: Tensor, size: int, rng: random.Random) -> None:
    start = rng.randint(0, len(mask) - size)
    mask[start : start + size] = False


def _at_ends(mask: Tensor, head: int, tail: int) -> None:
    mask[:head] = False
    mask[len(mask) - tail :] = False


def _quarter_head_tail(mask: Tensor, rng: random.Random, _: torch.Generator) -> None:
    size = _quarter(mask, rng)
    _at_ends(mask, size, size)


def _random(mask: Tensor, rng: random.Random, generator: torch.Generator) -> None:
    share = rng.uniform(0.1, 0.9)
    mask.copy_(torch.rand(len(mask), generator=generator) > share)
    if not mask.any():  # a clip of which nothing is generated teaches nothing
        mask[-1] = True


def _interpolate(mask: Tensor, rng: random.Random, _: torch.Generator) -> None:
    mask[rng.randint(0, 1) :: 2] = False


_STRATEGIES: dict[str, _Strategy] = {
    "identity": lambda mask, rng, generator: None,
    "quarter_random": lambda mask, rng, generator: _at_random(mask, _quarter(mask, rng), rng),
    "quarter_head": lambda mask, rng, generator: _at_ends(mask, _quarter(mask, rng), 0),
    "quarter_tail": lambda mask, rng, generator: _at_ends(mask, 0, _quarter(mask, rng)),
    "quarter_head_tail": _quarter_head_tail,
    "image_random": lambda mask, rng, generator: _at_random(mask, 1, rng),
    "image_head": lambda mask, rng, generator: _at_ends(mask, 1, 0),
    "image_tail": lambda mask, rng, generator: _at_ends(mask, 0, 1),
    "image_head_tail": lambda mask, rng, generator: _at_ends(mask, 1, 1),
    "random": _random,
    "interpolate": _interpolate,
    "head": lambda mask, rng, generator: _at_ends(mask, rng.randint(1, len(mask) - 1), 0),
    "tail": lambda mask, rng, generator: _at_ends(mask, 0, rng.randint(1, len(mask) - 1)),
}
