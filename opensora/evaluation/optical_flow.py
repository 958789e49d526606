"""Where the places of a frame are in the next one: optical flow by dense inverse search (DIS; Kroeger et al., 2016).

OpenCV computes it on the CPU, on 8-bit luma. It is right to a tenth of a pixel or better where there is texture;
where there is none it goes on with what lies around, and in noise it finds motion that is none.

Letters: T frames, H, W pixels. A flow is (x, y) in pixels: to the right, down.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.evaluation.luma import luma_levels

LEAST_SIDE_PX = 16  # OpenCV reads beyond smaller pictures

# The search ends at half the resolution, or at all of it where frames are smaller than this.
_SMALL_PX = 128


@dataclass(frozen=True)
class OpticalFlow:
    """Motion between neighbouring frames of a clip.

    Attributes:
        forward: (T - 1, H, W, 2): how far each place of frame t has moved in frame t + 1.
        backward: (T - 1, H, W, 2): how far each place of frame t + 1 was from it in frame t.
    """

    forward: Tensor
    backward: Tensor

    @property
    def speed(self) -> Tensor:
        """(T - 1, H, W), px/frame."""
        return self.forward.norm(dim=-1)

    @functools.cached_property
    def visible(self) -> Tensor:
        """(T - 1, H, W), true for a place of frame t that is seen in frame t + 1 as well.

        There the way forward and the way back cancel: |f + b|^2 < 0.01 (|f|^2 + |b|^2) + 0.5, with b read where f leads
        (Sundaram et al., 2010), which is within the frame.
        """
        back = follow(self.backward.movedim(-1, 1), self.forward, "bilinear").movedim(1, -1)
        squares = self.forward.square().sum(dim=-1) + back.square().sum(dim=-1)
        apart = (self.forward + back).square().sum(dim=-1)
        return (apart < 0.01 * squares + 0.5) & _within(self.forward)


def optical_flow(clip: Tensor) -> OpticalFlow:
    """The flow of one clip, in both directions.

    The flow of the clip that was asked for last is kept: several metrics read the same one.

    Args:
        clip: (3, T, H, W) in [-1, 1], two frames or more.

    Raises:
        OpenSoraError: frames too small, or OpenCV is not installed.
    """
    height, width = clip.shape[2:]
    if min(height, width) < LEAST_SIDE_PX:
        raise OpenSoraError(
            f"optical flow needs frames of {LEAST_SIDE_PX}x{LEAST_SIDE_PX} or more, got {height}x{width}"
        )
    frames = luma_levels(clip[None].cpu())[0].round().to(torch.uint8).numpy()
    return _flow_of(frames.tobytes(), frames.shape)


def forget_flow() -> None:
    """Frees the flow that is kept."""
    _flow_of.cache_clear()


def follow(values: Tensor, flow: Tensor, mode: Literal["bilinear", "bicubic"]) -> Tensor:
    """What lies where the flow leads: values (N, C, H, W) and a flow (N, H, W, 2) -> (N, C, H, W).

    Beyond the frame its edge goes on. Pictures want `mode` "bicubic", which keeps their detail.
    """
    height, width = values.shape[2:]
    x, y = _targets(flow)
    grid = torch.stack([x / (width - 1), y / (height - 1)], dim=-1) * 2 - 1
    return F.grid_sample(values, grid, mode=mode, padding_mode="border", align_corners=True)


@functools.lru_cache(maxsize=1)
def _flow_of(pixels: bytes, shape: tuple[int, int, int]) -> OpticalFlow:
    """Of luma (T, H, W), uint8: bytes, since what is kept is found by content."""
    frames = np.frombuffer(pixels, np.uint8).reshape(shape)
    search = _search(small=min(shape[1:]) < _SMALL_PX)
    pairs = list(itertools.pairwise(frames))
    forward = np.stack([search.calc(one, two, None) for one, two in pairs])
    backward = np.stack([search.calc(two, one, None) for one, two in pairs])
    return OpticalFlow(torch.from_numpy(forward), torch.from_numpy(backward))


def _search(small: bool) -> Any:
    try:
        import cv2
    except ImportError as error:
        raise OpenSoraError(
            f"optical flow needs the package opencv-python-headless ({error}); install the extra `eval`"
        ) from error
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)  # type: ignore
    search.setFinestScale(0 if small else 1)
    return search


def _targets(flow: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and rows (N, H, W) that a flow leads to."""
    height, width = flow.shape[1:3]
    return flow[..., 0] + torch.arange(width), flow[..., 1] + torch.arange(height)[:, None]


def _within(flow: Tensor) -> Tensor:
    height, width = flow.shape[1:3]
    x, y = _targets(flow)
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
