"""Rectified flow in pure functions: a straight line from data to noise, and the velocity that walks it back.

The convention is Open-Sora's: t = 0 is data and t = 1 pure noise, x_t = (1 - t) x + t e, and the network predicts the
velocity *towards the data*, v = x - e, so a step from t down to s adds (t - s) v; that of 2.0 predicts its negative
(:data:`Velocity`). Larger and longer videos stay recognisable under more noise; the time shift spends more of the steps
(and of training) near t = 1 for them.

Letters: x clean latents, e standard normal noise, t time in [0, 1], v velocity, r shift ratio, B batch, T frames.
Papers: Liu et al. 2022, https://arxiv.org/abs/2209.03003 (flow); Esser et al. 2024, https://arxiv.org/abs/2403.03206
(logit-normal times, section 3.1; resolution-dependent shift, equation 23).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opensora.errors import OpenSoraError

# --- the path and its velocity ----------------------------------------------------------------------------------------


def interpolate(
    clean: Tensor, noise: Tensor, t: Tensor | float, frame_mask: Tensor | None = None, *, sigma_min: float = 0.0
) -> Tensor:
    """Noisy latents x_t = (1 - t) x + t e, or with a rest of noise s at t = 0, (1 - t) x + (t + (1 - t) s) e.

    Args:
        clean: x, (B, C, T, H, W).
        noise: e, same shape.
        t: in [0, 1], a number or (B,).
        frame_mask: (B, T) bool; frames where it is False are conditioned on, that is, returned clean.
        sigma_min: s.

    Returns:
        Shape and dtype of ``clean``.
    """
    t = _per_sample(t, clean)
    noisy = (1 - t) * clean + (t + (1 - t) * sigma_min) * noise
    return noisy if frame_mask is None else torch.where(_per_frame(frame_mask, clean), noisy, clean)


Velocity = Literal["data - noise", "noise - data"]
"""Which of the two velocities a network predicts: the first until Open-Sora 1.3, the second in 2.0 and FLUX."""


def velocity_target(clean: Tensor, noise: Tensor, *, sigma_min: float = 0.0) -> Tensor:
    """The velocity towards the data, v = x - (1 - s) e: the negative of dx_t/dt, constant along the path."""
    return clean - (1 - sigma_min) * noise


def towards_data(prediction: Tensor, velocity: Velocity) -> Tensor:
    """The velocity towards the data that a network predicts which was trained on this one."""
    return prediction if velocity == "data - noise" else -prediction


def ends_of_line(
    sample: Tensor, velocity: Tensor, t: Tensor | float, *, sigma_min: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Clean latents x and noise e of the line that is at x_t at time ``t`` and has this velocity towards the data.

    ``interpolate`` mixes them to x_t again, and their ``velocity_target`` is v: e = x_t - (1 - t) v, x = v + (1 - s) e.

    Args:
        sample: x_t, (B, C, T, H, W).
        velocity: v, same shape.
        t: in [0, 1], a number or (B,).
        sigma_min: s.
    """
    noise = sample - (1 - _per_sample(t, sample)) * velocity
    return velocity + (1 - sigma_min) * noise, noise


def euler_step(sample: Tensor, velocity: Tensor, t: Tensor | float, t_next: Tensor | float) -> Tensor:
    """Walk from time ``t`` to the earlier time ``t_next`` along the velocity: x_s = x_t + (t - s) v.

    Args:
        sample: x_t, (B, C, T, H, W).
        velocity: v, same shape.
        t: in [0, 1], a number or (B,).
        t_next: s <= t, likewise; 0 at the last step.
    """
    return sample + (_per_sample(t, sample) - _per_sample(t_next, sample)) * velocity


# --- the time shift ---------------------------------------------------------------------------------------------------


def time_shift(t: Tensor, ratio: float) -> Tensor:
    """Move times towards noise (r > 1) or data (r < 1): t' = r t / (1 + (r - 1) t), Esser et al. equation 23.

    0 and 1 stay where they are, exactly; the shift by 1/r undoes the shift by r.

    Args:
        t: any shape, in [0, 1].
        ratio: r > 0.

    Raises:
        OpenSoraError: r is not a positive finite number.
    """
    if not (ratio > 0 and math.isfinite(ratio)):
        raise OpenSoraError(f"got a time shift ratio of {ratio}; expected a positive finite number")
    # The denominator is written as a sum of two non-negative terms, so that t = 1 gives r / r = 1 without rounding.
    return ratio * t / (ratio * t + (1 - t))


def time_shift_ratio(
    height: float, width: float, shift_frames: int, *, scale: float = 1.0, base_size: int = 512
) -> float:
    """Shift ratio r = scale * sqrt(height * width) / base_size * sqrt(shift_frames), 1 for one 512x512 image.

    Args:
        height: of the video, pixels.
        width: of the video, pixels.
        shift_frames: frame count of the latent as :func:`latent_frames` (Open-Sora 1.2) or
            :func:`frames_after_first` (1.3) gives it.
        scale: a further factor of the user's choice.
        base_size: side in pixels of the square image that is not shifted.

    Raises:
        OpenSoraError: a size, frame count, scale or base that is not positive.
    """
    given = {"height": height, "width": width, "frames": shift_frames, "scale": scale, "base_size": base_size}
    for name, value in given.items():
        if not (value > 0 and math.isfinite(value)):
            raise OpenSoraError(f"got {name}={value} for the time shift; expected a positive number")
    return scale * math.sqrt(height * width) / base_size * math.sqrt(shift_frames)


TOKEN_LINE = ((256.0, 1.0), (4096.0, 3.0))
"""Two points (tokens of a frame, shift ratio) of FLUX and Open-Sora 2.0."""


def token_shift_ratio(
    tokens: float, num_latents: int, *, line: tuple[tuple[float, float], tuple[float, float]] = TOKEN_LINE
) -> float:
    """Shift ratio r of Open-Sora 2.0: linear in the tokens of a frame, times sqrt(num_latents).

    Args:
        tokens: of one latent frame.
        num_latents: latent frames of the video.
        line: two points (tokens, r) of one latent frame.
    """
    (first, low), (second, high) = line
    return (low + (high - low) * (tokens - first) / (second - first)) * math.sqrt(num_latents)


class TimeShift(ABC):
    """The shift of a model by size and length of the video, for sampling and for training alike."""

    @abstractmethod
    def ratio(self, height: float, width: float, num_frames: int, num_latents: int | None = None) -> float:
        """Shift ratio of a video.

        Args:
            height: in pixels.
            width: in pixels.
            num_frames: of the video, before encoding.
            num_latents: latent frames that the autoencoder makes of it; ``None`` for what the shift knows of that.
        """

    def __call__(
        self,
        t: Tensor,
        height: float | None,
        width: float | None,
        num_frames: int | None,
        num_latents: int | None = None,
    ) -> Tensor:
        """Times in [0, 1], any shape, shifted for a video of this size.

        Raises:
            OpenSoraError: a missing or impossible size.
        """
        if height is None or width is None or num_frames is None:
            raise OpenSoraError(
                f"got height={height}, width={width}, num_frames={num_frames}; this model's timesteps are shifted by "
                "the size of the video, which needs all three, in pixels and video frames"
            )
        return time_shift(t, self.ratio(height, width, num_frames, num_latents))


@dataclass(frozen=True)
class AreaShift(TimeShift):
    """Open-Sora 1.2 and 1.3: by the side of a square of the same area, and by the root of the length.

    Attributes:
        scale: a further factor on the ratio.
        base_size: side in pixels of the square image that is not shifted.
        frames: "latent" counts the autoencoder's latent frames (Open-Sora 1.2), "after_first" those after the first,
            and applies ``scale`` to videos only (1.3).
        temporal_factor: video frames to one latent frame of the autoencoder.
        micro_frame_size: frames the autoencoder encodes at once; ``None`` for the whole video.
        bf16: the ratio is rounded to bfloat16 in every step of its computation, as the scripts of 1.3 do; for
            comparisons with them.
    """

    scale: float = 1.0
    base_size: int = 512
    frames: Literal["latent", "after_first"] = "latent"
    temporal_factor: int = 4
    micro_frame_size: int | None = 17
    bf16: bool = False

    def ratio(self, height: float, width: float, num_frames: int, num_latents: int | None = None) -> float:
        """See :meth:`TimeShift.ratio`."""
        scale = self.scale
        if self.frames == "latent":
            frames = num_latents or latent_frames(num_frames, self.temporal_factor, self.micro_frame_size)
        else:
            frames = frames_after_first(num_frames, self.temporal_factor)
            scale = scale if num_frames > 1 else 1.0
        exact = time_shift_ratio(height, width, frames, scale=scale, base_size=self.base_size)
        if not self.bf16:
            return exact
        height_, width_, frames_ = torch.tensor([height, width, frames], dtype=torch.bfloat16)
        return float((height_ * width_ / self.base_size**2).sqrt() * frames_.sqrt() * scale)


@dataclass(frozen=True)
class TokenShift(TimeShift):
    """Open-Sora 2.0: by the tokens of a frame, see :func:`token_shift_ratio`.

    Attributes:
        token_px: side in pixels of the square that a token stands for.
        temporal_factor: video frames to one latent frame of the autoencoder.
        micro_frame_size: frames the autoencoder encodes at once; ``None`` for the whole video.
    """

    token_px: int = 16
    temporal_factor: int = 4
    micro_frame_size: int | None = None

    def ratio(self, height: float, width: float, num_frames: int, num_latents: int | None = None) -> float:
        """See :meth:`TimeShift.ratio`."""
        frames = num_latents or latent_frames(num_frames, self.temporal_factor, self.micro_frame_size)
        tokens = math.ceil(height / self.token_px) * math.ceil(width / self.token_px)
        return token_shift_ratio(tokens, frames)


@dataclass(frozen=True)
class FixedShift(TimeShift):
    """The same for all videos.

    Attributes:
        value: r.
    """

    value: float

    def ratio(self, height: float, width: float, num_frames: int, num_latents: int | None = None) -> float:
        """See :meth:`TimeShift.ratio`."""
        return self.value


def latent_frames(num_frames: int, temporal_factor: int, micro_frame_size: int | None = None) -> int:
    """Frames of the latent of a chunked causal autoencoder, the count that the shift of Open-Sora 1.2 is made for.

    Every chunk of ``micro_frame_size`` frames is padded to a multiple of ``temporal_factor`` by itself: 17 frames at
    factor 4 become 5. One frame becomes one latent frame.

    Args:
        num_frames: of the video, >= 1.
        temporal_factor: video frames to one latent frame, >= 1.
        micro_frame_size: frames to a chunk; ``None`` encodes the video in one piece.
    """
    _check_frames(num_frames, temporal_factor)
    if micro_frame_size is None:
        return -(-num_frames // temporal_factor)
    if micro_frame_size < 1:
        raise OpenSoraError(f"got micro_frame_size={micro_frame_size}; expected at least 1 frame, or None")
    whole_chunks, rest = divmod(num_frames, micro_frame_size)
    return whole_chunks * -(-micro_frame_size // temporal_factor) + -(-rest // temporal_factor)


def frames_after_first(num_frames: int, temporal_factor: int) -> int:
    """Latent frames without the first, at least 1: the count that the shift of Open-Sora 1.3 is made for."""
    _check_frames(num_frames, temporal_factor)
    return max(1, (num_frames - 1) // temporal_factor)


# --- times to train on ------------------------------------------------------------------------------------------------


def sample_uniform(
    batch_size: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Uniform times in [0, 1), (B,) float32."""
    return torch.rand(batch_size, generator=generator, device=device)


def sample_discrete(
    batch_size: int,
    num_train_timesteps: int = 1000,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform times among 0, 1/N, .. (N-1)/N, (B,) float32."""
    steps = torch.randint(num_train_timesteps, (batch_size,), generator=generator, device=device)
    return steps.float() / num_train_timesteps


def sample_logit_normal(
    batch_size: int,
    *,
    loc: float = 0.0,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Times t = sigmoid(loc + scale * n) with n standard normal, (B,) float32: most of them near the middle."""
    if not scale > 0:
        raise OpenSoraError(f"got scale={scale} for the logit-normal times; expected a positive number")
    return torch.sigmoid(loc + scale * torch.randn(batch_size, generator=generator, device=device))


def redraw_above(t: Tensor, threshold: float, uniform: Tensor) -> Tensor:
    """Times above a threshold drawn anew, uniformly from there to 1.

    Args:
        t: in [0, 1], any shape.
        threshold: in [0, 1].
        uniform: numbers in [0, 1) that they are drawn by, of the same shape.
    """
    return torch.where(t > threshold, threshold + (1 - threshold) * uniform, t)


# --- shapes -----------------------------------------------------------------------------------------------------------


def _per_sample(t: Tensor | float, like: Tensor) -> Tensor:
    """(B,) or a number -> (B or 1, 1, 1, ...) of the dtype and device of ``like``."""
    # Cast before the move: not every device has float64.
    t = torch.as_tensor(t).to(like.dtype).to(like.device)
    return t.reshape(-1, *(1,) * (like.ndim - 1))


def _per_frame(frame_mask: Tensor, like: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, 1, 1) bool on the device of ``like``."""
    return frame_mask.to(device=like.device, dtype=torch.bool)[:, None, :, None, None]


def _check_frames(num_frames: int, temporal_factor: int) -> None:
    if num_frames < 1 or temporal_factor < 1:
        raise OpenSoraError(f"got {num_frames} frames and a temporal factor of {temporal_factor}; both are at least 1")
