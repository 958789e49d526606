"""Clips made worse before they are encoded, so that a model learns the way from a bad clip to a good one.

Open-Sora 1.3 trains so: what is noised are latents of the worse clip, what is learnt leads to those of the good one.
Every clip is drawn for by itself: it may lose detail in space, detail in time, and have noise mixed into its pixels.

Letters: B clips, T frames, H, W pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.errors import OpenSoraError


@dataclass(frozen=True)
class Degradation:
    """How often clips are made worse, and how much.

    Attributes:
        spatial: share of the clips whose frames are made smaller, by one of `spatial_ratios`, and large again.
        spatial_ratios: each as often as it is listed.
        temporal: share of the clips of which fewer frames are kept, by one of `temporal_ratios`, and the others drawn
            between them.
        temporal_ratios: each as often as it is listed.
        noise: share of the clips with noise in their pixels,
        most_noise: of which it makes up to so large a part.

    Raises:
        OpenSoraError: a share that is none, or ratios below 2.
    """

    spatial: float = 0.2
    spatial_ratios: tuple[int, ...] = (2, 4, 4, 8, 8, 8, 8)
    temporal: float = 0.2
    temporal_ratios: tuple[int, ...] = (2, 4, 8)
    noise: float = 0.5
    most_noise: float = 0.4

    def __post_init__(self) -> None:
        for name in ("spatial", "temporal", "noise", "most_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise OpenSoraError(f"{name} is {getattr(self, name)}, expected a share from 0 to 1")
        for name in ("spatial_ratios", "temporal_ratios"):
            if not getattr(self, name) or min(getattr(self, name)) < 2:
                raise OpenSoraError(f"{name} is {list(getattr(self, name))}, expected ratios of 2 or more")


def degrade(video: Tensor, how: Degradation, generator: torch.Generator) -> Tensor:
    """Clips (B, 3, T, H, W) in [-1, 1], some of them made worse.

    Args:
        video: on any device; not changed.
        how: shares and ratios.
        generator: of the CPU; draws as many numbers whatever the shares are.
    """
    worse = []
    for clip in video.split(1):
        chance, choice = torch.rand(3, generator=generator), torch.rand(3, generator=generator)
        noise = torch.randn(clip.shape, generator=generator)
        if chance[0] < how.spatial:
            clip = without_detail(clip, _chosen(how.spatial_ratios, choice[0]))
        if chance[1] < how.temporal:
            clip = without_frames(clip, _chosen(how.temporal_ratios, choice[1]))
        if chance[2] < how.noise:
            clip = mix_noise(clip, noise, how.most_noise * float(choice[2]))
        worse.append(clip)
    return torch.cat(worse)


def without_detail(video: Tensor, ratio: int) -> Tensor:
    """Frames (B, 3, T, H, W) `ratio` times smaller, or of one pixel, and as large as before."""
    frames = video.transpose(1, 2).flatten(0, 1)
    height, width = frames.shape[2:]
    small = F.interpolate(frames, scale_factor=1 / min(ratio, height, width), mode="bilinear")
    large = F.interpolate(small, size=(height, width), mode="bilinear")
    return large.unflatten(0, (len(video), -1)).transpose(1, 2)


def without_frames(video: Tensor, ratio: int) -> Tensor:
    """Clips (B, 3, T, H, W) of `ratio` times fewer frames, or of one, and of as many as before between those."""
    size = video.shape[2:]
    few = F.interpolate(video, scale_factor=(1 / min(ratio, size[0]), 1, 1), mode="trilinear")
    return F.interpolate(few, size=size, mode="trilinear")


def mix_noise(video: Tensor, noise: Tensor, share: float | Tensor) -> Tensor:
    """Pixels of which noise makes up a share, from 0 to 1."""
    return (1 - share) * video + share * noise.to(video)


def _chosen(ratios: tuple[int, ...], chance: Tensor) -> int:
    return ratios[min(int(float(chance) * len(ratios)), len(ratios) - 1)]
