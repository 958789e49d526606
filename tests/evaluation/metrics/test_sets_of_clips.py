"""What goes wrong in time sets clips apart in motion features, the more the worse; features of frames hardly see it.

Clips are held against the same clips made worse: of the toy world, and windows of 16 frames of real ones, none of which
the network was trained on. `-m slow -s` prints the table of docs/metrics.md.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from known_clips import held
from torch import Tensor

from opensora.evaluation.features import frame_features
from opensora.evaluation.metrics.distances import frechet_distance, kernel_distance
from opensora.evaluation.motion_encoder import motion_features
from opensora.media.read import read_video
from opensora.toybox.specs import FULL_WORLD, sample_specs
from opensora.toybox.world import render

WINDOW, SIDE_PX = 16, 96

Features = Callable[[Tensor], Tensor]
Degradation = Callable[[Tensor, float, torch.Generator], Tensor]


@pytest.fixture(scope="module")
def windows(real_clips: list[Path]) -> list[Tensor]:
    """Of each real clip its windows (N, 3, 16, H, W) in [-1, 1], the shorter side 96 px."""
    found = []
    for path in real_clips:
        if "distorted" in path.name:  # the same scene as another one
            continue
        frames = torch.from_numpy(read_video(path)[0]).permute(0, 3, 1, 2)
        scale = SIDE_PX / min(frames.shape[2:])
        size = [round(side * scale) for side in frames.shape[2:]]
        parts = [F.interpolate(part.float(), size, mode="bilinear", antialias=True) for part in frames.split(32)]
        video = (torch.cat(parts) / 127.5 - 1).transpose(0, 1)
        found.append(torch.stack(video.split(WINDOW, dim=1)[: video.shape[1] // WINDOW]))
    return found


def shuffled(video: Tensor, places: float, generator: torch.Generator) -> Tensor:
    """Frames moved by up to so many places."""
    moved = torch.arange(video.shape[2]) + places * torch.rand(len(video), video.shape[2], generator=generator)
    return video.gather(2, moved.argsort(dim=1)[:, None, :, None, None].expand_as(video))


def repeated(video: Tensor, times: float, generator: torch.Generator) -> Tensor:
    """The frame rate divided."""
    return held(video, times)


def paused(video: Tensor, frames: float, generator: torch.Generator) -> Tensor:
    """The fourth frame stands for so many more."""
    place = torch.arange(video.shape[2])
    return video[:, :, torch.where((place > 3) & (place <= 3 + frames), 3, place)]


def jittered(video: Tensor, px: float, generator: torch.Generator) -> Tensor:
    """Every frame shifted by a random distance of so many pixels' deviation."""
    height, width = video.shape[-2:]
    shift = px * torch.randn(len(video) * video.shape[2], 1, 1, 2, generator=generator)
    identity = F.affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False)
    grid = identity + shift * 2 / torch.tensor([width, height])
    frames = video.transpose(1, 2).flatten(0, 1)
    moved = F.grid_sample(frames, grid, padding_mode="reflection", align_corners=False)
    return moved.unflatten(0, (len(video), -1)).transpose(1, 2)


def flickering(video: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Every frame brighter or darker."""
    light = deviation * torch.randn(len(video), 1, video.shape[2], 1, 1, generator=generator)
    return (video + light).clamp(-1, 1)


def pooled_frame_features(video: Tensor) -> Tensor:
    return frame_features(video).mean(dim=1)


def rows(windows: list[Tensor], degrade: Degradation, strength: float, features: Features) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.cat([features(degrade(video, strength, generator)) for video in windows])


DEGRADATIONS = {
    "frames shuffled by up to 2, 4, 8, 16 places": (shuffled, (2, 4, 8, 16)),
    "every frame 2, 4, 8 times": (repeated, (2, 4, 8)),
    "a pause of 3, 6, 9 frames": (paused, (3, 6, 9)),
    "jitter of 0.5, 1, 2 px": (jittered, (0.5, 1, 2)),
    "flicker of 0.05, 0.1, 0.2": (flickering, (0.05, 0.1, 0.2)),
}


@pytest.fixture(scope="module")
def toy_clips() -> list[Tensor]:
    return [render(sample_specs(16, 0, FULL_WORLD, "held_out"), 16)[0]]


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_the_worse_toy_clips_are_in_time_the_farther(toy_clips: list[Tensor], name: str) -> None:
    degrade, strengths = DEGRADATIONS[name]
    clean = motion_features(toy_clips[0])
    worse = [rows(toy_clips, degrade, strength, motion_features) for strength in strengths[:3]]
    for distance in (frechet_distance, kernel_distance):
        values = [distance(clean, some) for some in worse]
        assert values == sorted(values)


@pytest.fixture(scope="module")
def clean_rows(windows: list[Tensor]) -> dict[Features, Tensor]:
    return {
        features: torch.cat([features(video) for video in windows])
        for features in (motion_features, pooled_frame_features)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", DEGRADATIONS)
def test_the_worse_real_clips_are_in_time_the_farther(
    windows: list[Tensor], clean_rows: dict[Features, Tensor], name: str
) -> None:
    degrade, strengths = DEGRADATIONS[name]

    def distances(features: Features, strength: float) -> tuple[float, float]:
        """Frechet, in shares of the features' own spread, and kernel."""
        clean, worse = clean_rows[features], rows(windows, degrade, strength, features)
        spread = float(clean.double().T.cov().trace())
        return frechet_distance(clean, worse) / spread, kernel_distance(clean, worse)

    seen = [distances(motion_features, strength) for strength in strengths]
    in_frames = distances(pooled_frame_features, strengths[-1])
    columns = [" ".join(f"{value:.3f}" for value in column) for column in zip(*seen, strict=True)]
    print(f"\n| {name} |", " | ".join([*columns, *(f"{value:.4f}" for value in in_frames)]), "|")
    for column in zip(*seen, strict=True):
        assert list(column) == sorted(column)
    assert seen[-1][0] > 0.1
    assert seen[-1][0] > 3 * in_frames[0]
    if degrade is shuffled:
        assert in_frames[0] < 1e-6, "the mean over frames does not know their order"
