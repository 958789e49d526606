"""Scenes of procedural textures that move, of which it is known where every point goes from frame to frame.

A scene is a background and two blobs before it. Each layer drifts, sways, turns and grows at rates of its own, and
waves run through some of them, as through water or cloth. Times are numbers of frames at normal speed and need not be
whole nor in order, so whoever renders decides how time passes.

Letters: B scenes, T frames, H, W pixels, L layers from back to front. Lengths are in px at 64 x 64, from the centre of
the picture, x to the right and y downwards; scenes are drawn at 64 x 64.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE_PX = 64
CELL_PX = 8
"""Flows are told for cells of so many pixels a side."""

_TEXTURE_PX = 128
_LAYERS = 3
_STILL = 0.15  # share of layers that do not move
_LARGEST_DRIFT = 4.0  # px a frame


@dataclass(frozen=True)
class Scenes:
    """B scenes.

    Attributes:
        textures: (L, B, 4, 128, 128), colour in [-1, 1] and opacity in [0, 1]; mirrored beyond its edges.
        place: (L, B, 2), where a layer is at time 0, in px.
        drift: (L, B, 2), px a frame.
        sway: (L, B, 2), amplitude in px, and
        sway_rate, sway_phase: (L, B), radians a frame and radians.
        turn: (L, B), radians a frame.
        growth: (L, B), logarithm a frame.
        wave: (L, B, 2), amplitude in px of what runs through a layer,
        wave_number: (L, B, 2), radians per px, and
        wave_rate: (L, B), radians a frame.
    """

    textures: Tensor
    place: Tensor
    drift: Tensor
    sway: Tensor
    sway_rate: Tensor
    sway_phase: Tensor
    turn: Tensor
    growth: Tensor
    wave: Tensor
    wave_number: Tensor
    wave_rate: Tensor

    def render(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Draws the scenes and tells how what is seen moves.

        Args:
            times: (B, T), T >= 2.

        Returns:
            video: (B, 3, T, 64, 64) in [-1, 1].
            flow: (B, 2, T - 1, 8, 8), px by which what is in a cell moves to the next frame, x first.
        """
        batch, num_frames = times.shape
        points, cells = _grid(SIDE_PX, 1), _grid(SIDE_PX // CELL_PX, CELL_PX)
        video, flow = torch.zeros(batch, 3, num_frames, SIDE_PX, SIDE_PX), 0.0
        for layer in range(_LAYERS):
            spots = self._spots(layer, times, points) * (2 / _TEXTURE_PX)
            drawn = F.grid_sample(
                self.textures[layer], spots.flatten(1, 2), padding_mode="reflection", align_corners=False
            ).unflatten(2, (num_frames, SIDE_PX))
            colour, opacity = drawn[:, :3], drawn[:, 3:]
            video = torch.lerp(video, colour, opacity)
            cover = F.avg_pool3d(opacity, (1, CELL_PX, CELL_PX))[:, :, :-1]
            flow = torch.lerp(torch.zeros(()) + flow, self._flow(layer, times, cells), cover)
        return video, torch.as_tensor(flow)

    def _pose(self, layer: int, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where a layer is (B, T, 2), how far it is turned (B, T) and the logarithm of how much it has grown (B, T)."""
        swing = torch.sin(self.sway_rate[layer, :, None] * times + self.sway_phase[layer, :, None])
        place = self.place[layer, :, None] + self.drift[layer, :, None] * times[..., None]
        place = place + self.sway[layer, :, None] * swing[..., None]
        return place, self.turn[layer, :, None] * times, self.growth[layer, :, None] * times

    def _waves(self, layer: int, times: Tensor, points: Tensor) -> Tensor:
        """Displacement of points (H, W, 2): (B, T, H, W, 2)."""
        phase = torch.einsum("hwc,bc->bhw", points, self.wave_number[layer])[:, None]
        phase = phase + (self.wave_rate[layer, :, None] * times)[..., None, None]
        return self.wave[layer, :, None, None, None] * torch.sin(phase)[..., None]

    def _spots(self, layer: int, times: Tensor, points: Tensor) -> Tensor:
        """Which points of a layer's texture are seen at points (H, W, 2) of the picture: (B, T, H, W, 2) in px."""
        place, angle, growth = self._pose(layer, times)
        moved = points + self._waves(layer, times, points) - place[:, :, None, None]
        return _turned(moved, -angle) * torch.exp(-growth)[..., None, None, None]

    def _flow(self, layer: int, times: Tensor, points: Tensor) -> Tensor:
        """Where points (H, W, 2) of a layer go by the next frame: (B, 2, T - 1, H, W) in px; waves to first order."""
        place, angle, growth = self._pose(layer, times)
        waves = self._waves(layer, times, points)
        from_centre = points + waves[:, :-1] - place[:, :-1, None, None]
        grown = torch.exp(growth[:, 1:] - growth[:, :-1])[..., None, None, None]
        there = place[:, 1:, None, None] + _turned(from_centre, angle[:, 1:] - angle[:, :-1]) * grown
        return (there - waves[:, 1:] - points).permute(0, 4, 1, 2, 3)


def draw_scenes(num_scenes: int, generator: torch.Generator) -> Scenes:
    """Random scenes, of which some layers stand still, and some blobs are not there."""
    shape = (_LAYERS, num_scenes)

    def uniform(low: float, high: float, *more: int) -> Tensor:
        return torch.empty(*shape, *more).uniform_(low, high, generator=generator)

    def sometimes(share: float) -> Tensor:
        return (torch.rand(shape, generator=generator) < share).float()

    moves = 1 - sometimes(_STILL)
    heading = uniform(-math.pi, math.pi)
    speed = moves * _LARGEST_DRIFT * uniform(0, 1).square()
    swaying, waving = moves * sometimes(0.4), sometimes(0.3)
    place = uniform(-24, 24, 2)
    place[0] = uniform(-32, 32, 2)[0]
    return Scenes(
        textures=torch.stack([_textures(num_scenes, layer > 0, generator) for layer in range(_LAYERS)]),
        place=place,
        drift=speed[..., None] * torch.stack([heading.cos(), heading.sin()], dim=-1),
        sway=swaying[..., None] * uniform(-8, 8, 2),
        sway_rate=uniform(0.15, 0.8),
        sway_phase=uniform(-math.pi, math.pi),
        turn=moves * sometimes(0.5) * uniform(-0.12, 0.12),
        growth=moves * sometimes(0.4) * uniform(-0.04, 0.04),
        wave=waving[..., None] * uniform(-2.5, 2.5, 2),
        wave_number=uniform(-0.25, 0.25, 2),
        wave_rate=uniform(-0.8, 0.8),
    )


def _textures(num_scenes: int, blob: bool, generator: torch.Generator) -> Tensor:
    """(B, 4, 128, 128): noise of several scales in few or many colours; of a blob only the middle is there."""

    def uniform(low: float, high: float, *more: int) -> Tensor:
        return torch.empty(num_scenes, *more, 1, 1).uniform_(low, high, generator=generator)

    def noise(channels: int, slope: Tensor) -> Tensor:
        """Of about unit deviation; a steeper slope is coarser."""
        total = torch.zeros(num_scenes, channels, 2, 2)
        for octave in range(5):
            side = 4 * 2**octave
            total = F.interpolate(total, (side, side), mode="bicubic", align_corners=False)
            drawn = torch.randn(num_scenes, channels, side, side, generator=generator)
            total.addcmul_(drawn, torch.exp(-slope * octave))
        total = F.interpolate(total, (_TEXTURE_PX, _TEXTURE_PX), mode="bicubic", align_corners=False)
        return total / total.std(dim=(1, 2, 3), keepdim=True)

    slope = uniform(0.1, 1.2, 1)
    light, tint = noise(1, slope), noise(3, slope)
    pattern = torch.lerp(light.expand(-1, 3, -1, -1), tint, uniform(0, 0.7, 1))
    # A high gain gives flat regions with hard edges, as in drawings; a low one the noise itself, as in photographs.
    gain = torch.exp(uniform(-1, 2, 1))
    pattern = torch.tanh(gain * pattern) / torch.tanh(gain)
    base = uniform(-0.5, 0.5, 1) + uniform(-0.25, 0.25, 3)
    colour = (base + uniform(0.15, 0.6, 1) * pattern).clamp(-1, 1)
    if not blob:
        return torch.cat([colour, torch.ones_like(light)], dim=1)
    points = _grid(_TEXTURE_PX, 1)
    stretch = torch.exp(uniform(-0.4, 0.4, 1))
    distance = torch.hypot(points[..., 0] * stretch, points[..., 1] / stretch)
    outline = uniform(5, 18, 1) * (1 + 0.25 * noise(1, torch.full_like(slope, 1.5)))
    there = (uniform(0, 1, 1) < 0.6).float()
    opacity = there * torch.sigmoid((outline - distance) * uniform(0.5, 2, 1))
    # The texture is mirrored beyond its edges, where nothing of a blob may be.
    return torch.cat([colour, opacity * (distance < _TEXTURE_PX / 2 - 2)], dim=1)


def _grid(side: int, spacing: float) -> Tensor:
    """Places (side, side, 2) around the centre, x first."""
    line = (torch.arange(side) - (side - 1) / 2) * spacing
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)


def _turned(points: Tensor, angle: Tensor) -> Tensor:
    """Points (B, T, H, W, 2) turned by (B, T) around 0."""
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    x, y = points.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
