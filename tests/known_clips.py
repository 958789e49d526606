"""Clips of which it is known what a metric has to find: a texture that moves by a known way, and real ones made worse.

Strengths have units that can be checked: levels of 255, pixels, shares. A strength of nothing leaves a clip as it is.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.data.degradation import without_detail
from opensora.media.frames import ClipFile
from opensora.media.transforms import to_video


def texture(height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """A periodic picture (3, H, W) of smooth blotches some 8 px wide, about -0.7 to 0.7."""
    noise = torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))
    frequency_y, frequency_x = torch.fft.fftfreq(height), torch.fft.rfftfreq(width)
    smooth = torch.exp(-((frequency_y[:, None] ** 2 + frequency_x**2) / (2 * 0.08**2)))
    picture = torch.fft.irfft2(torch.fft.rfft2(noise) * smooth, (height, width))
    return (picture / picture.std() * 0.25).clamp(-0.9, 0.9)


def moved(picture: Tensor, x_px: float, y_px: float = 0.0) -> Tensor:
    """A periodic picture moved to the right and down, exactly, by any part of a pixel."""
    height, width = picture.shape[-2:]
    phase = torch.fft.fftfreq(height)[:, None] * y_px + torch.fft.rfftfreq(width) * x_px
    return torch.fft.irfft2(torch.fft.rfft2(picture) * torch.exp(-2j * torch.pi * phase), (height, width))


def pan(speed_px: float, num_frames: int = 9, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """A texture that moves to the right, (1, 3, T, H, W); it comes in again on the left."""
    picture = texture(height, width, seed)
    return torch.stack([moved(picture, t * speed_px) for t in range(num_frames)], dim=1)[None]


def real_clip(path: Path, first: int = 5, num_frames: int = 17, height: int = 144, width: int = 176) -> Tensor:
    """Frames of a file, (1, 3, T, H, W): made smaller until they just cover the size, and cropped to its centre."""
    frames = to_video(np.stack(list(ClipFile(path).frames(range(first, first + num_frames))))).transpose(0, 1)
    scale = max(height / frames.shape[2], width / frames.shape[3])
    size = [round(side * scale) for side in frames.shape[2:]]
    frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames[:, :, top : top + height, left : left + width].transpose(0, 1)[None]


def _in_time(video: Tensor, values: Tensor) -> Tensor:
    return values[: video.shape[2]].view(1, 1, -1, 1, 1)


def flicker(video: Tensor, levels: float) -> Tensor:
    """Every second frame is so much darker than the others."""
    return video + _in_time(video, torch.tensor([0.5, -0.5]).repeat(video.shape[2])) * levels / 127.5


def slow_flicker(video: Tensor, levels: float) -> Tensor:
    """Two frames out of four are so much darker than the others."""
    return video + _in_time(video, torch.tensor([0.5, 0.5, -0.5, -0.5]).repeat(video.shape[2])) * levels / 127.5


def noise(video: Tensor, levels: float) -> Tensor:
    """New noise of this deviation in every frame."""
    return video + torch.randn(video.shape, generator=torch.Generator().manual_seed(0)) * levels / 127.5


def boil(video: Tensor, levels: float) -> Tensor:
    """New blotches in every frame, some 5 px wide."""
    blotches = blur(torch.randn(video.shape, generator=torch.Generator().manual_seed(1)), 2.0)
    return video + blotches / blotches.std() * levels / 127.5


def blur(video: Tensor, deviation_px: float) -> Tensor:
    """Gaussian, within frames."""
    return _blur_rows(_blur_rows(video, deviation_px).transpose(3, 4), deviation_px).transpose(3, 4)


def motion_blur(video: Tensor, deviation_px: float) -> Tensor:
    """As if the camera had moved to the side while a frame was taken."""
    return _blur_rows(video, deviation_px)


def _blur_rows(video: Tensor, deviation_px: float) -> Tensor:
    if deviation_px == 0:
        return video
    radius = round(3 * deviation_px)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * deviation_px**2))
    rows = F.pad(video.flatten(0, 3)[:, None], (radius, radius), mode="replicate")
    return F.conv1d(rows, (kernel / kernel.sum())[None, None])[:, 0].unflatten(0, video.shape[:4])


def detail_lost(video: Tensor, ratio: float) -> Tensor:
    """Made so many times smaller, and as large again."""
    return without_detail(video, int(ratio))


def held(video: Tensor, frames: float) -> Tensor:
    """Each frame is shown so many times, and the others in between are not."""
    return video[:, :, torch.arange(video.shape[2]) // int(frames) * int(frames)]


def faster(video: Tensor, times: float) -> Tensor:
    """Every so manieth frame."""
    return video[:, :, :: int(times)]


def larger(video: Tensor, times: float) -> Tensor:
    """Every frame of so many times as many pixels each way."""
    return F.interpolate(video, scale_factor=(1, times, times), mode="trilinear")


def shake(video: Tensor, pixels: float) -> Tensor:
    """Frames are moved up and down by turns, by so much in all; what leaves comes in again."""
    return torch.stack([moved(video[:, :, t], 0.0, pixels / 2 * (-1) ** t) for t in range(video.shape[2])], dim=2)


def saturated(video: Tensor, times: float) -> Tensor:
    """Colours so many times as far from grey."""
    grey = video.mean(dim=1, keepdim=True)
    return grey + (video - grey) * times


def contrast(video: Tensor, times: float) -> Tensor:
    """Everything so many times as far from medium grey, as too much guidance does."""
    return video * times


def brighter(video: Tensor, levels: float) -> Tensor:
    """Everything brighter by so much."""
    return video + levels / 127.5


def coming(worse: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float], Tensor]:
    """The same, but little by little: nothing in the first frame, all of it in the last."""

    def spoil(video: Tensor, strength: float) -> Tensor:
        share = _in_time(video, torch.linspace(0, 1, video.shape[2]))
        return video * (1 - share) + worse(video, strength) * share

    return spoil


def melting(video: Tensor, pixels: float) -> Tensor:
    """Shapes bend, little by little, until places are displaced by this (deviation)."""
    height, width = video.shape[3:]
    bends = blur(torch.randn(1, 1, 2, height, width, generator=torch.Generator().manual_seed(2)), 8.0)[0, 0]
    bends = bends / bends.std() * pixels
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frames = []
    for t, frame in enumerate(video.unbind(dim=2)):
        share = t / (video.shape[2] - 1)
        grid = torch.stack([(x + share * bends[0]) / (width - 1), (y + share * bends[1]) / (height - 1)], dim=-1)
        frames.append(F.grid_sample(frame, grid[None] * 2 - 1, padding_mode="border", align_corners=True))
    return torch.stack(frames, dim=2)


@dataclass(frozen=True)
class Worse:
    """One way of making clips worse.

    Attributes:
        how: (video, strength) -> video, which may leave [-1, 1].
        unit: of the strength.
        strengths: from nothing upwards.
    """

    how: Callable[[Tensor, float], Tensor]
    unit: str
    strengths: tuple[float, ...]

    def clips(self, video: Tensor) -> list[Tensor]:
        """One for each strength."""
        return [self.how(video, strength).clamp(-1, 1) for strength in self.strengths]


WORSE = {
    "flicker": Worse(flicker, "levels", (0, 4, 8, 16, 32)),
    "slow flicker": Worse(slow_flicker, "levels", (0, 4, 8, 16, 32)),
    "noise": Worse(noise, "levels", (0, 4, 8, 16)),
    "boiling": Worse(boil, "levels", (0, 4, 8, 16)),
    "blur": Worse(blur, "px", (0, 0.5, 1, 2, 4)),
    "motion blur": Worse(motion_blur, "px", (0, 1, 2, 4)),
    "detail lost": Worse(detail_lost, "times", (1, 2, 4, 8)),
    "frames held": Worse(held, "frames", (1, 2, 4)),
    "faster": Worse(faster, "times", (1, 2, 3)),
    "larger": Worse(larger, "times", (1, 1.5, 2)),
    "shake": Worse(shake, "px", (0, 1, 2, 3)),
    "saturation": Worse(saturated, "times", (0, 0.5, 1, 1.5, 2, 3)),
    "contrast": Worse(contrast, "times", (1, 1.5, 2, 3)),
    "brighter": Worse(brighter, "levels", (0, 16, 32, 64)),
    "blur that comes": Worse(coming(blur), "px", (0, 1, 2, 4)),
    "noise that comes": Worse(coming(noise), "levels", (0, 8, 16, 32)),
    "melting": Worse(melting, "px", (0, 2, 4, 8)),
}


@dataclass(frozen=True)
class Move:
    """What a figure of real clips does while they are made worse.

    Attributes:
        figure: its name.
        worse: name in `WORSE`.
        way: it moves at every step of strength.
        not_of: beginnings of the names of clips that it is not true of, or on which there is nothing to measure.
    """

    figure: str
    worse: str
    way: Literal["rises", "falls"]
    not_of: tuple[str, ...] = ()

    def names(self, clips: Iterable[str]) -> list[str]:
        """Of these clips, those that it is true of."""
        return [name for name in clips if not name.startswith(self.not_of)]


# The camera of `carphone` shakes, so nothing in it is still; the noise of `bikes` hides that its sky is.
_SHAKES, _STILL_SKY, _HARDLY_MOVES = "carphone", "bikes", "city"

MOVES = (
    Move("flicker_levels", "flicker", "rises", (_SHAKES,)),
    Move("flicker_levels", "slow flicker", "rises", (_SHAKES,)),
    Move("flicker_levels", "noise", "rises", (_SHAKES, _STILL_SKY)),
    Move("warping_error_levels", "flicker", "rises"),
    Move("warping_error_levels", "noise", "rises"),
    Move("warping_error_levels", "boiling", "rises"),
    Move("most_hidden_share", "boiling", "rises"),
    Move("motion_px_per_frame", "larger", "rises"),
    Move("motion_px_per_frame", "shake", "rises"),
    Move("motion_px_per_frame", "frames held", "falls"),
    Move("frozen_share", "frames held", "rises"),
    Move("unevenness", "shake", "rises", (_HARDLY_MOVES,)),
    Move("drift", "blur that comes", "rises"),
    Move("drift", "noise that comes", "rises"),
    Move("drift", "melting", "rises"),
    Move("largest_step", "frames held", "rises"),
    Move("sharpness", "blur", "falls"),
    Move("sharpness", "motion blur", "falls"),
    Move("sharpness", "detail lost", "falls"),
    Move("noise_levels", "noise", "rises"),
    Move("saturation", "saturation", "rises"),
    Move("clipped_share", "contrast", "rises"),
    Move("clipped_share", "brighter", "rises"),
    Move("clipped_share", "noise", "rises"),
    *(Move("psnr_db", worse, "falls") for worse in ("blur", "noise", "contrast")),
    *(Move("ssim", worse, "falls") for worse in ("blur", "noise", "contrast")),
    *(Move("perceptual_distance", worse, "rises") for worse in ("blur", "noise", "contrast")),
)

# Figures that get better while clips get worse: what `blind_to` warns of.
DECEIVED = (
    Move("warping_error_levels", "blur", "falls"),
    Move("flicker_levels", "frames held", "falls", (_SHAKES,)),
    Move("sharpness", "noise", "rises"),
    Move("noise_levels", "blur", "falls"),
)
