"""Discrete-time Gaussian diffusion in pure functions: schedules, posteriors, sampling steps and training losses.

Data is noised in N small steps, q(x_t | x) = N(sqrt(abar_t) x, (1 - abar_t) I), and a network that predicts the noise
(or the data) turns every step back. A schedule may be *respaced*: fewer steps, each as long as several, so that
sampling is faster; the network still sees the original timesteps. Everything here indexes steps of the given tables,
t = 0 (almost clean) to N - 1 (almost pure noise). Tables are float64 on the CPU; entries are cast once, when used.

Letters: x clean latents (B, C, T, H, W), e standard normal noise, x_t noisy latents, beta_t variance added at step t,
abar_t product of (1 - beta) up to t, v variance output of the network in [-1, 1], B batch, T frames, N steps.
Papers: Ho et al. 2020, https://arxiv.org/abs/2006.11239 (DDPM); Nichol and Dhariwal 2021,
https://arxiv.org/abs/2102.09672 (IDDPM: cosine, learned variance, respacing); Song et al. 2020,
https://arxiv.org/abs/2010.02502 (DDIM).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from opensora import limits
from opensora.errors import OpenSoraError
from opensora.limits import parse_count

PredictionType = Literal["epsilon", "sample"]
"""What the first C channels of the network's output are: the noise e, or the clean latents x."""
VarianceType = Literal["learned_range", "fixed_small", "fixed_large"]
"""``learned_range``: C further channels v interpolate between the other two, which are the bounds of the true one."""
LossType = Literal["mse", "rescaled_mse", "kl", "rescaled_kl"]

# --- schedules --------------------------------------------------------------------------------------------------------


def linear_betas(num_steps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """Betas on a line, (N,) float64; ``start`` and ``end`` are meant for 1000 steps and scaled by 1000 / N.

    Raises:
        OpenSoraError: a scaled beta outside (0, 1), as with fewer than 21 steps of the default.
    """
    scale = 1000 / num_steps
    betas = torch.linspace(start * scale, end * scale, num_steps, dtype=torch.float64)
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise OpenSoraError(
            f"got a linear schedule of {num_steps} steps from {start} to {end}, whose betas run from {betas[0]:.3g} to "
            f"{betas[-1]:.3g}; expected all in (0, 1): take more steps or smaller betas"
        )
    return betas


def cosine_betas(num_steps: int, max_beta: float = 0.999) -> Tensor:
    """Betas for which abar falls as a squared cosine, (N,) float64 (Nichol and Dhariwal, equation 17)."""
    time = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    abar = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - abar[1:] / abar[:-1]).clamp(max=max_beta)


def respaced_timesteps(num_steps: int, spec: str | int | Sequence[int]) -> list[int]:
    """Choose the steps of a long schedule that a shorter one keeps.

    Args:
        num_steps: length of the long schedule.
        spec: ``"100"`` or 100: that many, spread evenly from first to last. ``"10,15,20"`` or a sequence: the schedule
            is cut into as many equal sections, and each keeps its count. ``"ddim50"``: every k-th step from 0, with
            the smallest k that gives exactly 50 (as in the DDIM paper). A count of 1 keeps a section's first step.

    Returns:
        Kept steps, ascending.

    Raises:
        OpenSoraError: not such a spec, or more steps asked for than there are.
    """
    if isinstance(spec, str) and spec.startswith("ddim"):
        return _strided_timesteps(num_steps, spec)
    counts = _section_counts(spec)
    size, longer = divmod(num_steps, len(counts))
    kept, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < longer)
        if count > length:
            raise OpenSoraError(
                f"got steps {spec!r}, which asks for {count} of a section of {length}; expected at most "
                f"{num_steps} steps in all, and of every section at most its length"
            )
        stride, position = (length - 1) / max(count - 1, 1), 0.0
        for _ in range(count):
            # Summed, not multiplied: the rounding error decides ties, and published results come from this sum.
            kept.append(start + round(position))
            position += stride
        start += length
    return kept


def _strided_timesteps(num_steps: int, spec: str) -> list[int]:
    lengths = {len(range(0, num_steps, k)): k for k in range(num_steps - 1, 0, -1)}
    count = spec.removeprefix("ddim")
    wanted = parse_count("the number of steps", count, limits.STEPS, least=0) if count.isdecimal() else None
    if wanted not in lengths:
        near = min(lengths, key=lambda n: abs(n - wanted)) if wanted is not None and lengths else 50
        raise OpenSoraError(
            f"got steps {spec!r}; expected 'ddimN' for an N that a whole stride through {num_steps} steps gives, such "
            f"as 'ddim{near}'"
        )
    return list(range(0, num_steps, lengths[wanted]))


def _section_counts(spec: str | int | Sequence[int]) -> list[int]:
    parts = spec.split(",") if isinstance(spec, str) else [spec] if isinstance(spec, int) else list(spec)
    texts = ["" if isinstance(part, bool) else str(part).strip() for part in parts]
    if not texts or not all(text.isdecimal() and text.strip("0") for text in texts):
        raise OpenSoraError(
            f"got steps {spec!r}; expected a number such as 100, or text such as 'ddim50' or '10,15,20'"
        )
    return [parse_count("the number of steps", text, limits.STEPS) for text in texts]


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianTables:
    """What a schedule's formulas need at every step, each (N,); made by :func:`make_tables`."""

    betas: Tensor
    alphas_cumprod: Tensor
    """abar_t."""
    alphas_cumprod_prev: Tensor
    """abar_{t-1}, 1 at t = 0."""
    alphas_cumprod_next: Tensor
    """abar_{t+1}, 0 at t = N - 1."""
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    """sqrt(1 / abar_t)."""
    sqrt_recipm1_alphas_cumprod: Tensor
    """sqrt(1 / abar_t - 1)."""
    posterior_variance: Tensor
    """Of q(x_{t-1} | x_t, x); 0 at t = 0."""
    posterior_log_variance_clipped: Tensor
    """Its logarithm, with the entry of t = 1 also at t = 0."""
    posterior_mean_coef1: Tensor
    """Weight of x in the mean of q(x_{t-1} | x_t, x)."""
    posterior_mean_coef2: Tensor
    """Weight of x_t in it."""
    timestep_map: Tensor
    """int64: the original timestep, which the network sees, of every step."""

    def __len__(self) -> int:
        return len(self.betas)

    def to(self, device: torch.device | str) -> "GaussianTables":
        """Cast to float32, on the CPU since accelerators may lack float64, and move: saves a copy per look-up."""
        tables = {field.name: getattr(self, field.name) for field in fields(self)}
        return GaussianTables(
            **{name: (t.float() if t.is_floating_point() else t).to(device) for name, t in tables.items()}
        )


def make_tables(
    betas: Tensor, timesteps: Sequence[int] | None = None, *, dtype: torch.dtype = torch.float64
) -> GaussianTables:
    """Compute the tables of a schedule, respaced to some of its steps if asked.

    Args:
        betas: of the full schedule, (N,) float64.
        timesteps: ascending steps to keep; the new betas are such that abar stays what it was there,
            1 - abar_t / abar_(kept before t) (Nichol and Dhariwal, section 4). ``None`` keeps all.
        dtype: precision of everything after the (respaced) betas. Open-Sora 1.0 used float64; 1.1 and later float32,
            which at t near 0 and N differs in the fourth digit.
    """
    if timesteps is None:
        timesteps = range(len(betas))
    else:
        kept = torch.cumprod(1 - betas, dim=0)[list(timesteps)]
        betas = 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
    betas = betas.to(dtype)
    alphas, one, zero = 1 - betas, betas.new_ones(1), betas.new_zeros(1)
    abar = torch.cumprod(alphas, dim=0)
    abar_prev = torch.cat([one, abar[:-1]])
    posterior_variance = betas * (1 - abar_prev) / (1 - abar)
    # Its first entry is 0: nothing is added at the last step of sampling, but the logarithm must exist.
    clipped = torch.cat([posterior_variance[1:2], posterior_variance[1:]]) if len(betas) > 1 else betas
    return GaussianTables(
        betas=betas,
        alphas_cumprod=abar,
        alphas_cumprod_prev=abar_prev,
        alphas_cumprod_next=torch.cat([abar[1:], zero]),
        sqrt_alphas_cumprod=abar.sqrt(),
        sqrt_one_minus_alphas_cumprod=(1 - abar).sqrt(),
        log_one_minus_alphas_cumprod=(1 - abar).log(),
        sqrt_recip_alphas_cumprod=(1 / abar).sqrt(),
        sqrt_recipm1_alphas_cumprod=(1 / abar - 1).sqrt(),
        posterior_variance=posterior_variance,
        posterior_log_variance_clipped=clipped.log(),
        posterior_mean_coef1=betas * abar_prev.sqrt() / (1 - abar),
        posterior_mean_coef2=(1 - abar_prev) * alphas.sqrt() / (1 - abar),
        timestep_map=torch.tensor(list(timesteps), dtype=torch.int64),
    )


def entries(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Look up ``table[t]``, shaped to multiply ``like``, in its dtype but at least float32.

    Args:
        table: (N,).
        t: steps, int64, (B,), or (B, T) for a step of its own for every frame.
        like: (B, C, T, H, W), or any (B, ...) when ``t`` is (B,); the result goes to its device.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if table.device != t.device:
        table = table.to(dtype).to(t.device)
    values = table[t].to(dtype).to(like.device)
    if t.ndim == 2:
        return values[:, None, :, None, None]
    return values.reshape(-1, *(1,) * (like.ndim - 1))


# --- the forward process ----------------------------------------------------------------------------------------------


class Normal(NamedTuple):
    """A diagonal normal distribution; all three broadcast to the shape of the latents."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


def frame_timesteps(t: Tensor, frame_mask: Tensor) -> Tensor:
    """Steps per frame, (B, T): ``t`` (B,) where ``frame_mask`` (B, T) is True, 0 (almost clean) where it is False."""
    return torch.where(frame_mask.bool(), t[:, None], 0)


def q_sample(tables: GaussianTables, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Noise clean latents: x_t = sqrt(abar_t) x + sqrt(1 - abar_t) e, DDPM equation 4; ``t`` as in :func:`entries`."""
    signal, sigma = (entries(s, t, clean) for s in (tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod))
    return signal * clean + sigma * noise


def q_distribution(tables: GaussianTables, clean: Tensor, t: Tensor) -> Normal:
    """q(x_t | x), of which :func:`q_sample` draws."""
    return Normal(
        entries(tables.sqrt_alphas_cumprod, t, clean) * clean,
        entries(1 - tables.alphas_cumprod, t, clean),
        entries(tables.log_one_minus_alphas_cumprod, t, clean),
    )


def q_posterior(tables: GaussianTables, clean: Tensor, noisy: Tensor, t: Tensor) -> Normal:
    """q(x_{t-1} | x_t, x), DDPM equations 6 and 7; the logarithm is the clipped one."""
    from_clean = entries(tables.posterior_mean_coef1, t, clean) * clean
    return Normal(
        from_clean + entries(tables.posterior_mean_coef2, t, noisy) * noisy,
        entries(tables.posterior_variance, t, noisy),
        entries(tables.posterior_log_variance_clipped, t, noisy),
    )


def predict_clean(tables: GaussianTables, noisy: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
    """Clean latents that ``epsilon`` turns into ``noisy``: x = sqrt(1 / abar) x_t - sqrt(1 / abar - 1) e."""
    scaled = entries(tables.sqrt_recip_alphas_cumprod, t, noisy) * noisy
    return scaled - entries(tables.sqrt_recipm1_alphas_cumprod, t, noisy) * epsilon


def predict_epsilon(tables: GaussianTables, noisy: Tensor, t: Tensor, clean: Tensor) -> Tensor:
    """Noise that leads from ``clean`` to ``noisy``; inverse of :func:`predict_clean`."""
    scaled = entries(tables.sqrt_recip_alphas_cumprod, t, noisy) * noisy
    return (scaled - clean) / entries(tables.sqrt_recipm1_alphas_cumprod, t, noisy)


# --- the reverse process ----------------------------------------------------------------------------------------------


class Reverse(NamedTuple):
    """The network's p(x_{t-1} | x_t) and the clean latents it amounts to."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    clean: Tensor


def p_distribution(
    tables: GaussianTables,
    prediction: Tensor,
    noisy: Tensor,
    t: Tensor,
    *,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "learned_range",
    clip: bool = False,
) -> Reverse:
    """Read a network's output as p(x_{t-1} | x_t).

    Args:
        tables: of the schedule.
        prediction: (B, 2C, T, H, W) with learned variance, v behind the prediction; else (B, C, T, H, W).
        noisy: x_t, (B, C, T, H, W).
        t: steps as in :func:`entries`.
        prediction_type: what the first C channels are.
        variance_type: where the variance comes from. Learned: log variance = f log beta_t + (1 - f) log posterior
            variance with f = (v + 1) / 2 (Nichol and Dhariwal, equation 15).
        clip: clamp the clean estimate to [-1, 1], for pixels.

    Raises:
        OpenSoraError: another number of channels.
    """
    output, variance_output = split_prediction(prediction, noisy.shape[1], variance_type)
    small = tables.posterior_log_variance_clipped
    if variance_output is not None:
        fraction = (variance_output + 1) / 2
        log_variance = fraction * entries(tables.betas.log(), t, noisy) + (1 - fraction) * entries(small, t, noisy)
        variance = log_variance.exp()
    elif variance_type == "fixed_small":
        variance, log_variance = entries(tables.posterior_variance, t, noisy), entries(small, t, noisy)
    else:
        # beta_0 would be far larger than the true variance there, and hurt the decoder's likelihood.
        large = torch.cat([small[:1].exp(), tables.betas[1:]])
        variance, log_variance = entries(large, t, noisy), entries(large.log(), t, noisy)
    clean = predict_clean(tables, noisy, t, output) if prediction_type == "epsilon" else output
    clean = clean.clamp(-1, 1) if clip else clean
    return Reverse(q_posterior(tables, clean, noisy, t).mean, variance, log_variance, clean)


def split_prediction(prediction: Tensor, channels: int, variance_type: VarianceType) -> tuple[Tensor, Tensor | None]:
    """Split a network's output (B, C or 2C, ...) into the prediction and the variance output v, if it learns one."""
    expected = 2 * channels if variance_type == "learned_range" else channels
    if prediction.shape[1] != expected:
        raise OpenSoraError(
            f"got a prediction of {prediction.shape[1]} channels for {channels} latent channels; with variance type "
            f"{variance_type!r} expected {expected}"
        )
    return prediction[:, :channels], prediction[:, channels:] if expected > channels else None


def ancestral_step(reverse: Reverse, t: Tensor, noise: Tensor) -> Tensor:
    """Draw x_{t-1} = mean + exp(log variance / 2) e, and the mean itself at t = 0 (DDPM algorithm 2)."""
    drawn = reverse.mean + (reverse.log_variance / 2).exp() * noise
    is_last = (t == 0).to(noise.device).reshape(-1, *(1,) * (noise.ndim - 1))
    return torch.where(is_last, reverse.mean, drawn)


def ddim_step(
    tables: GaussianTables, clean: Tensor, noisy: Tensor, t: Tensor, noise: Tensor | None = None, eta: float = 0.0
) -> Tensor:
    """Step to x_{t-1} with a chosen amount of fresh noise, DDIM equations 12 and 16.

    Args:
        tables: of the schedule.
        clean: estimate of the clean latents, (B, C, T, H, W).
        noisy: x_t, same shape.
        t: steps, (B,).
        noise: standard normal, same shape; not needed with ``eta`` 0.
        eta: 0 is deterministic, 1 adds as much noise as ancestral sampling with the posterior variance.
    """
    abar, abar_prev = tables.alphas_cumprod, tables.alphas_cumprod_prev
    sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
    direction = (1 - abar_prev - sigma.square()).clamp(min=0).sqrt()
    epsilon = predict_epsilon(tables, noisy, t, clean)
    mean = entries(abar_prev.sqrt(), t, noisy) * clean + entries(direction, t, noisy) * epsilon
    # sigma is 0 at t = 0, where abar_{t-1} = 1, so the last step adds nothing by itself.
    return mean if noise is None else mean + entries(sigma, t, noisy) * noise


def ddim_inverse_step(tables: GaussianTables, clean: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
    """The deterministic step the other way, from x_t to x_{t+1}: finds the noise that leads to a given clip."""
    epsilon = predict_epsilon(tables, noisy, t, clean)
    abar_next = tables.alphas_cumprod_next
    return entries(abar_next.sqrt(), t, noisy) * clean + entries((1 - abar_next).sqrt(), t, noisy) * epsilon
