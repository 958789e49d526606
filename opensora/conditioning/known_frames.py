"""Which frames of a training clip are shown beside the noise (`ChannelConditioning`), and which conditions are dropped.

The names are those of Open-Sora 1.3 and 2.0, whose draws are repeated number by number: `i2v_*` shows one latent frame
at the place that the name tells (`i2v_loop` the first and the last), `v2v_head` and `v2v_tail` one half of the clip,
`other` any number of frames at one end, `none` nothing; of `*_noisy` the pixels of a beginning have noise in them, as
frames have that a model made itself (1.3). `v2v_head_32` and the like, which 2.0 knows as `v2v_head` (32)
and `v2v_head_easy` (64), show that many frames of video, and nothing of shorter clips. Single frames are always
generated.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from opensora.errors import OpenSoraError

Drop = Literal["text", "frames", "both"]
"""What a clip with known frames is trained without, so that guidance can ask for the difference."""

NOISE_SHARES = (0.1, 0.3)
"""Between what a clip draws the part that noise has in pixels which are shown with noise."""

LatentsOf = Callable[[int], int]
"""Frames of video -> latent frames of the shortest clip that has as many."""


@dataclass(frozen=True)
class KnownEnds:
    """The known frames of a clip: so many latent frames at its beginning, and so many at its end.

    Attributes:
        noisy: they are shown with noise in their pixels.
    """

    head: int = 0
    tail: int = 0
    noisy: bool = False


_Kind = Callable[[int, random.Random, LatentsOf], KnownEnds]


def _one_end(num_frames: int, rng: random.Random) -> KnownEnds:
    at_head, count = rng.random() < 0.5, rng.randint(1, max(1, num_frames - 2))
    return KnownEnds(head=count) if at_head else KnownEnds(tail=num_frames - count)


def _head(video_frames: int) -> _Kind:
    return lambda num_frames, rng, latents_of: KnownEnds(head=_less(latents_of(video_frames), num_frames))


def _tail(video_frames: int) -> _Kind:
    return lambda num_frames, rng, latents_of: KnownEnds(tail=_less(latents_of(video_frames), num_frames))


def _noisy(kind: str) -> _Kind:
    def draw(num_frames: int, rng: random.Random, latents_of: LatentsOf) -> KnownEnds:
        ends = _KINDS[kind](num_frames, rng, latents_of)
        return replace(ends, noisy=ends.head > 0)

    return draw


def _less(count: int, num_frames: int) -> int:
    return count if count < num_frames else 0


_KINDS: dict[str, _Kind] = {
    "none": lambda num_frames, rng, latents_of: KnownEnds(),
    "i2v_head": lambda num_frames, rng, latents_of: KnownEnds(head=1),
    "i2v_tail": lambda num_frames, rng, latents_of: KnownEnds(tail=1),
    "i2v_loop": lambda num_frames, rng, latents_of: KnownEnds(head=1, tail=1),
    "v2v_head": lambda num_frames, rng, latents_of: KnownEnds(head=num_frames // 2),
    "v2v_tail": lambda num_frames, rng, latents_of: KnownEnds(tail=num_frames - num_frames // 2),
    "other": lambda num_frames, rng, latents_of: _one_end(num_frames, rng),
    "v2v_head_noisy": _noisy("v2v_head"),
    "other_noisy": _noisy("other"),
    "v2v_head_32": _head(32),
    "v2v_tail_32": _tail(32),
    "v2v_head_64": _head(64),
    "v2v_tail_64": _tail(64),
}


def draw_known_ends(
    weights: Mapping[str, float], batch_size: int, num_frames: int, rng: random.Random, latents_of: LatentsOf
) -> list[KnownEnds]:
    """Known frames of a batch; every clip has its own.

    Args:
        weights: see `draw_kinds`.
        batch_size: B.
        num_frames: T, latent frames.
        rng: draws kinds, then numbers of frames.
        latents_of: what the autoencoder makes of frames.

    Raises:
        OpenSoraError: see `check_weights`.
    """
    if num_frames == 1:
        return [KnownEnds()] * batch_size
    return [_KINDS[kind](num_frames, rng, latents_of) for kind in draw_kinds(weights, batch_size, rng)]


def known_mask(ends: Sequence[KnownEnds], num_frames: int) -> Tensor:
    """(B, T) bool, True = known."""
    known = torch.zeros(len(ends), num_frames, dtype=torch.bool)
    for mask, one in zip(known, ends, strict=True):
        mask[: one.head] = True
        mask[num_frames - one.tail :] = True
    return known


def draw_kinds(weights: Mapping[str, float], count: int, rng: random.Random) -> list[str]:
    """So many kinds.

    Args:
        weights: kind -> how often it is drawn, in proportion to the others; empty for `none` alone.
        count: of kinds.
        rng: draws one number for each.

    Raises:
        OpenSoraError: see `check_weights`.
    """
    check_weights(weights)
    return rng.choices(list(weights), list(weights.values()), k=count) if weights else ["none"] * count


def draw_drops(shares: Mapping[Drop, float], known: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which clips are trained without what; of clips without known frames none are.

    Args:
        shares: what is dropped -> share of the clips.
        known: (B, T) bool, True = known.
        generator: draws one number for every clip.

    Returns:
        Where the text is dropped, and where known frames are, (B,) bool each.
    """
    chance, passed = torch.rand(len(known), generator=generator), 0.0
    text, frames = torch.zeros(len(known), dtype=torch.bool), torch.zeros(len(known), dtype=torch.bool)
    for name, share in shares.items():
        drawn = (chance >= passed) & (chance < passed + share) & known.any(dim=1)
        text |= drawn & (name != "frames")
        frames |= drawn & (name != "text")
        passed += share
    return text, frames


def takes_pixels(weights: Mapping[str, float]) -> bool:
    """Whether any of the kinds that are drawn changes what is shown before it is encoded."""
    return any(weight and kind.endswith("_noisy") for kind, weight in weights.items())


def without_noise(weights: Mapping[str, float]) -> dict[str, float]:
    """The same with kinds that are shown with noise as they are without, for latents that were made beforehand."""
    clean: dict[str, float] = {}
    for kind, weight in weights.items():
        name = kind.removesuffix("_noisy")
        clean[name] = clean.get(name, 0.0) + weight
    return clean


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises `OpenSoraError` for an unknown kind, a negative weight or weights that are all 0."""
    for name, weight in weights.items():
        if name not in _KINDS:
            raise OpenSoraError(f"unknown kind of known frames {name!r}; known are {', '.join(_KINDS)}")
        if weight < 0:
            raise OpenSoraError(f"known frames {name} have the weight {weight}; expected 0 or more")
    if weights and not sum(weights.values()):
        raise OpenSoraError("all known frames have the weight 0; give one of them more, or none at all")


def check_drops(shares: Mapping[Drop, float]) -> None:
    """Raises `OpenSoraError` for an unknown name, a negative share or shares that sum to more than 1."""
    for name, share in shares.items():
        if name not in get_args(Drop):
            raise OpenSoraError(f"unknown condition to drop {name!r}; known are {', '.join(get_args(Drop))}")
        if share < 0:
            raise OpenSoraError(f"{name} is dropped with a share of {share}; expected 0 or more")
    if sum(shares.values()) > 1 + 1e-6:
        raise OpenSoraError(f"the shares of dropped conditions sum to {sum(shares.values()):g}; expected 1 or less")
