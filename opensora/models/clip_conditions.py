"""What a network is told of a clip besides its text: one object for every network, in training as in sampling.

A network reads what it was trained to be told and leaves the rest: Open-Sora 1.0 nothing, 1.1 all of it, 1.2 the size
and the frame rate. Numbers are plain or float32 tensors; the precision they are rounded to is the network's affair.

Letters: B clips.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from opensora.errors import OpenSoraError

IMAGE_FPS = 120.0
"""The networks of the family are told that an image is a video at this rate."""


@dataclass(frozen=True)
class ClipConditions:
    """Numbers for all clips alike, or tensors (B,) with one for each.

    Attributes:
        fps: frames per second, as the network was trained to be told (120 for images from 1.1 on).
        height: in pixels; the nominal one where the autoencoder can only make less of it.
        width: likewise.
        num_frames: frames of the video, before encoding.
        aspect_ratio: height / width, where that is told otherwise than by the two; None for their ratio.
    """

    fps: Tensor | float
    height: Tensor | float
    width: Tensor | float
    num_frames: Tensor | float
    aspect_ratio: Tensor | float | None = None

    @classmethod
    def of_clip(
        cls, height: float, width: float, num_frames: float, fps: float, image_fps: float | None = IMAGE_FPS
    ) -> "ClipConditions":
        """Those of one clip; a single frame is an image and has `image_fps`, unless that is None.

        Raises:
            OpenSoraError: a value that is not a positive number.
        """
        for name, value in {"height": height, "width": width, "num_frames": num_frames, "fps": fps}.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and math.isfinite(value) and value > 0):
                raise OpenSoraError(f"{name} is {value!r}; expected a positive number")
        rate = float(fps) if num_frames > 1 or image_fps is None else float(image_fps)
        return cls(fps=rate, height=float(height), width=float(width), num_frames=float(num_frames))

    def to(self, device: torch.device | str) -> "ClipConditions":
        """The same, with tensors on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return ClipConditions(
            **{name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}
        )

    def repeat(self, times: int) -> "ClipConditions":
        """All clips so often, one whole batch after the other."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        repeated = {
            name: value.repeat(times) if isinstance(value, Tensor) and value.numel() > 1 else value
            for name, value in values.items()
        }
        return ClipConditions(**repeated)
