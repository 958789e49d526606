"""What every scheduler of this package does alike: conditioning frames, noise, and timesteps it does not know.

Letters: B batch, C latent channels, T latent frames.
"""

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from opensora.errors import OpenSoraError

Generators = torch.Generator | list[torch.Generator] | None


def check_frames(name: str, frames: Tensor, sample: Tensor) -> None:
    """Refuses a mask or strength that is not (B, T) for a sample (B, C, T, H, W)."""
    if frames.shape != (sample.shape[0], sample.shape[2]):
        raise OpenSoraError(
            f"got a {name} of shape {tuple(frames.shape)} for latents of {tuple(sample.shape)}; "
            f"expected (batch, frames) = {(sample.shape[0], sample.shape[2])}"
        )


def choose_frames(chosen: Tensor, sample: Tensor, other: Tensor) -> Tensor:
    """`sample` in frames where `chosen`, (B, T), is True, `other` elsewhere; both (B, C, T, H, W)."""
    return torch.where(chosen.to(device=sample.device, dtype=torch.bool)[:, None, :, None, None], sample, other)


def noise_like(sample: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise; a list holds one generator per sample."""
    return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)


def index_of(timestep: Tensor | float, timesteps: Sequence[float]) -> int:
    """Which step of a run `timestep` is; `timesteps` are the numbers that the caller iterates over."""
    if isinstance(timestep, Tensor) and timestep.numel() != 1:
        raise OpenSoraError(f"got {timestep.numel()} timesteps; a step moves the whole batch at one timestep")
    value = float(timestep)
    if value not in timesteps:
        near = min(timesteps, key=lambda known: abs(known - value))
        raise OpenSoraError(
            f"got timestep {value:g}, which is not in this schedule of {len(timesteps)} (nearest: {near:g}); "
            "iterate over scheduler.timesteps, and call set_timesteps before"
        )
    return timesteps.index(value)
