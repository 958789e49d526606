"""Guidance, the samplers of Open-Sora 1.0 to 1.2 and the placing of conditioning frames as plain formulas in float64.

IDDPM with learned variance (Nichol and Dhariwal 2021) on respaced linear betas, and Euler steps of a rectified flow;
one clip (C, T, H, W) at a time. `network(x, timestep, frames)` returns the two branches, each (2 C, T, H, W). Nothing
of the package is used here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Network = Callable[[Tensor, float, list[bool] | None], tuple[Tensor, Tensor]]


def guided(cond: Tensor, uncond: Tensor, scale: float, channels: int) -> Tensor:
    """The first channels are guided, all others (the variances among them) stay conditional."""
    result = cond.clone()
    for c in range(channels):
        result[c] = uncond[c] + scale * (cond[c] - uncond[c])
    return result


# --- IDDPM ------------------------------------------------------------------------------------------------------------


@dataclass
class Tables:
    """What the formulas of one step need, step by step of the respaced schedule, float64."""

    timesteps: list[int]
    log_beta: Tensor
    log_posterior_variance: Tensor
    sqrt_abar: Tensor
    sqrt_one_minus_abar: Tensor
    sqrt_recip_abar: Tensor
    sqrt_recipm1_abar: Tensor
    coefficient_of_clean: Tensor
    coefficient_of_noisy: Tensor


def kept_steps(count: int, total: int = 1000) -> list[int]:
    """Evenly from first to last, by a running sum that is rounded."""
    kept, position = [], 0.0
    for _ in range(count):
        kept.append(round(position))
        position += (total - 1) / (count - 1)
    return kept


def iddpm_tables(count: int, *, float32: bool) -> Tables:
    """Of `count` steps. 1.0 computes in float64; 1.1 rounds the respaced betas to float32 and goes on in it."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar_of_all = torch.cumprod(1 - betas, dim=0)
    timesteps = kept_steps(count)
    respaced, before = [], 1.0
    for t in timesteps:
        abar_t = float(abar_of_all[t])
        respaced.append(1 - abar_t / before)
        before = abar_t
    beta = torch.tensor(respaced, dtype=torch.float64)
    beta = beta.float() if float32 else beta
    alpha = 1 - beta
    abar = torch.cumprod(alpha, dim=0)
    abar_before = torch.cat([torch.ones(1, dtype=beta.dtype), abar[:-1]])
    variance = beta * (1 - abar_before) / (1 - abar)
    tables = (
        torch.log(beta),
        torch.log(torch.cat([variance[1:2], variance[1:]])),  # the first is 0 and takes the second's place
        torch.sqrt(abar),
        torch.sqrt(1 - abar),
        torch.sqrt(1 / abar),
        torch.sqrt(1 / abar - 1),
        beta * torch.sqrt(abar_before) / (1 - abar),
        (1 - abar_before) * torch.sqrt(alpha) / (1 - abar),
    )
    return Tables(timesteps, *(table.double() for table in tables))


def iddpm(
    network: Network,
    clip: Tensor,
    draw: Callable[[], Tensor],
    *,
    num_steps: int,
    scale: float,
    channels: int,
    float32_tables: bool,
    mask: Sequence[float] | None = None,
) -> Tensor:
    """Ancestral sampling.

    Args:
        network: both branches.
        clip: noise; frames with a mask below 1 hold what is given.
        draw: standard normal noise like the clip. Asked once in every step that has conditioning frames, for them, then
            once for the step itself, except for the last.
        num_steps: of the respaced schedule.
        scale: of guidance.
        channels: guided ones.
        float32_tables: see `iddpm_tables`.
        mask: of every frame how much is made anew.
    """
    tables, half = iddpm_tables(num_steps, float32=float32_tables), clip.shape[0]
    x = clip
    begins = [] if mask is None else [int(torch.tensor(share) * num_steps) for share in mask]
    for t in reversed(range(num_steps)):
        frames = None
        if mask is not None:
            noise, x = draw(), x.clone()
            for frame, begin in enumerate(begins):
                if begin == t:
                    x[:, frame] = tables.sqrt_abar[t] * x[:, frame] + tables.sqrt_one_minus_abar[t] * noise[:, frame]
            frames = [begin > t for begin in begins]
        prediction = guided(*network(x, tables.timesteps[t], frames), scale, channels)
        eps, v = prediction[:half], prediction[half:]
        clean = tables.sqrt_recip_abar[t] * x - tables.sqrt_recipm1_abar[t] * eps
        stepped = tables.coefficient_of_clean[t] * clean + tables.coefficient_of_noisy[t] * x
        if t > 0:
            share = (v + 1) / 2
            log_variance = share * tables.log_beta[t] + (1 - share) * tables.log_posterior_variance[t]
            stepped = stepped + torch.exp(log_variance / 2) * draw()
        for frame, begin in enumerate(begins):
            if begin < t:
                stepped[:, frame] = x[:, frame]
        x = stepped
    return x


# --- rectified flow ---------------------------------------------------------------------------------------------------


def shifted_time(t: float, height: float, width: float, num_frames: int) -> float:
    """Time in [0, 1], moved towards noise for large and long videos; frames count as latents of whole chunks of 17."""
    latent_frames = 1 if num_frames == 1 else num_frames // 17 * 5
    ratio = math.sqrt(height * width / 512**2) * math.sqrt(latent_frames)
    return ratio * t / (1 + (ratio - 1) * t)


def rectified_flow(
    network: Network,
    clip: Tensor,
    draw: Callable[[], Tensor],
    *,
    timesteps: Sequence[float],
    scale: float,
    channels: int,
    mask: Sequence[float] | None = None,
) -> Tensor:
    """Euler steps; time 1000 is noise, and the network predicts clean minus noise.

    Args:
        network: both branches; of their channels the first half is velocity.
        clip: as for `iddpm`.
        draw: noise like the clip, asked once a step where frames are conditioned on.
        timesteps: those visited, descending from 1000; the last step goes to 0.
        scale: of guidance.
        channels: guided ones.
        mask: as for `iddpm`.
    """
    x = clip
    noised = [share == 1 for share in mask] if mask is not None else []
    for i, timestep in enumerate(timesteps):
        t, t_next = timestep / 1000, (timesteps[i + 1] / 1000 if i + 1 < len(timesteps) else 0.0)
        frames = None
        if mask is not None:
            noise, x = draw(), x.clone()
            # In float32, where 0.3 of the way and the step at 300 are the same.
            frames = [bool(torch.tensor(share) * 1000 >= torch.tensor(timestep)) for share in mask]
            for frame, is_generated in enumerate(frames):
                if is_generated and not noised[frame]:
                    x[:, frame] = (1 - t) * x[:, frame] + t * noise[:, frame]
            noised = frames
        velocity = guided(*network(x, timestep, frames), scale, channels)[: clip.shape[0]]
        stepped = x + velocity * (t - t_next)
        for frame, is_generated in enumerate(frames or []):
            if not is_generated:
                stepped[:, frame] = x[:, frame]
        x = stepped
    return x


# --- conditioning frames ----------------------------------------------------------------------------------------------


def place(
    clip: Tensor, references: Sequence[Tensor], strategy: str, loop: int = 0, align: int | None = None
) -> tuple[Tensor, list[float]]:
    """A mask strategy applied: the clip with references in it, and the mask of its frames.

    Entries `loop, reference, start in it, start in the clip, length, edit ratio`; what is left out is 0,0,0,0,1,0.
    """
    clip, mask = clip.clone(), [1.0] * clip.shape[1]
    for entry in strategy.split(";") if strategy else []:
        given = entry.split(",")
        values = given + ["0", "0", "0", "0", "1", "0"][len(given) :]
        of_loop, number, source, target, length = (int(value) for value in values[:5])
        if of_loop != loop:
            continue
        reference = references[number]
        source = source + reference.shape[1] if source < 0 else source
        target = target + clip.shape[1] if target < 0 else target
        if align is not None:
            source = nearest_start(source, align, reference.shape[1])
            target = nearest_start(target, align, clip.shape[1])
        length = min(length, clip.shape[1] - target, reference.shape[1] - source)
        for i in range(length):
            clip[:, target + i] = reference[:, source + i]
            mask[target + i] = float(values[5])
    return clip, mask


def nearest_start(start: int, align: int, num_frames: int) -> int:
    """The nearest multiple; halves go down, and nothing goes up past the last whole chunk."""
    chunk = start // align
    if start % align > align / 2 and chunk < num_frames // align - 1:
        chunk += 1
    return chunk * align
