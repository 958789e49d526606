"""Training losses of discrete-time Gaussian diffusion: squared error, variational bound, and which steps to train on.

A network with learned variance is trained on both: the squared error teaches the prediction, the bound the variance.
The bound sees the prediction detached, or its noisy gradient would drown the squared error's (Nichol and Dhariwal 2021,
https://arxiv.org/abs/2102.09672, section 3.1). It is in bits per latent value.

Letters as in :mod:`opensora.diffusion.gaussian`: x clean latents (B, C, T, H, W), x_t noisy ones, e noise, t step (B,),
N steps.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opensora.diffusion import gaussian
from opensora.diffusion.gaussian import GaussianTables, LossType, PredictionType, Reverse, VarianceType
from opensora.errors import OpenSoraError

LN2 = math.log(2.0)


class DiffusionLosses(NamedTuple):
    """Losses of every sample, each (B,)."""

    loss: Tensor
    """What to minimise: the sum of the others, or the scaled bound alone."""
    mse: Tensor | None
    """Squared error with its timestep weight; ``None`` for the KL losses."""
    vb: Tensor | None
    """Variational bound as it enters the loss; ``None`` when a squared-error loss has a fixed variance."""


def training_losses(
    tables: GaussianTables,
    prediction: Tensor,
    *,
    clean: Tensor,
    noisy: Tensor,
    noise: Tensor,
    t: Tensor,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "learned_range",
    loss_type: LossType = "mse",
    frame_mask: Tensor | None = None,
    timestep_weights: Tensor | None = None,
) -> DiffusionLosses:
    """Losses of a batch whose network output is at hand::

        steps = t if frame_mask is None else gaussian.frame_timesteps(t, frame_mask)
        noisy = gaussian.q_sample(tables, clean, steps, noise)
        prediction = network(noisy, tables.timestep_map[t], ...)
        loss = training_losses(tables, prediction, clean=clean, noisy=noisy, noise=noise, t=t, ...).loss.mean()

    Args:
        tables: of the schedule the steps refer to.
        prediction: (B, 2C, T, H, W) with learned variance, else (B, C, T, H, W).
        clean: x, (B, C, T, H, W).
        noisy: x_t, same shape.
        noise: e, same shape.
        t: steps, (B,) int64 in [0, N).
        prediction_type: what the first C channels are compared with: ``noise`` or ``clean``.
        variance_type: see :func:`opensora.diffusion.gaussian.p_distribution`.
        loss_type: ``mse``: squared error, plus the bound where the variance is learned. ``rescaled_mse``: the bound
            times N / 1000, so that it weighs the same in a short schedule. ``kl``: the bound alone, prediction
            included. ``rescaled_kl``: times N, an estimate of the whole sum over steps.
        frame_mask: (B, T) bool; frames where it is False are left out of every mean.
        timestep_weights: (N,) factors on the squared error; the bound keeps weight 1.

    Raises:
        OpenSoraError: an unknown loss, wrong channels, or as many weights as there are not steps.
    """
    if loss_type not in ("mse", "rescaled_mse", "kl", "rescaled_kl"):
        raise OpenSoraError(f"got loss type {loss_type!r}; expected 'mse', 'rescaled_mse', 'kl' or 'rescaled_kl'")
    if timestep_weights is not None and timestep_weights.shape != (len(tables),):
        raise OpenSoraError(
            f"got timestep weights of shape {tuple(timestep_weights.shape)}; expected ({len(tables)},), one per step"
        )
    if frame_mask is not None:
        prediction, clean, noisy, noise = (zero_masked(x, frame_mask) for x in (prediction, clean, noisy, noise))
    output, variance_output = gaussian.split_prediction(prediction, clean.shape[1], variance_type)
    is_kl = loss_type in ("kl", "rescaled_kl")
    vb = None
    if is_kl or variance_output is not None:
        if variance_output is not None and not is_kl:
            prediction = torch.cat([output.detach(), variance_output], dim=1)
        reverse = gaussian.p_distribution(
            tables, prediction, noisy, t, prediction_type=prediction_type, variance_type=variance_type
        )
        vb = variational_bound(tables, reverse, clean=clean, noisy=noisy, t=t, frame_mask=frame_mask)
        vb = vb * {"rescaled_mse": len(tables) / 1000, "rescaled_kl": len(tables)}.get(loss_type, 1.0)
    if is_kl:
        assert vb is not None
        return DiffusionLosses(vb, None, vb)
    target = noise if prediction_type == "epsilon" else clean
    mse = mean_per_sample((target - output).square(), frame_mask)
    if timestep_weights is not None:
        mse = mse * timestep_weights.to(device=mse.device, dtype=mse.dtype)[t]
    return DiffusionLosses(mse if vb is None else mse + vb, mse, vb)


def variational_bound(
    tables: GaussianTables,
    reverse: Reverse,
    *,
    clean: Tensor,
    noisy: Tensor,
    t: Tensor,
    frame_mask: Tensor | None = None,
) -> Tensor:
    """One term of the variational bound, (B,) bits per value (DDPM, https://arxiv.org/abs/2006.11239, equation 5).

    KL(q(x_{t-1} | x_t, x) || p(x_{t-1} | x_t)), or at t = 0 the negative log-likelihood of x under p.
    """
    true = gaussian.q_posterior(tables, clean, noisy, t)
    kl = normal_kl(true.mean, true.log_variance, reverse.mean, reverse.log_variance)
    nll = -discretized_log_likelihood(clean, reverse.mean, reverse.log_variance / 2)
    kl, nll = mean_per_sample(kl, frame_mask), mean_per_sample(nll, frame_mask)
    return torch.where((t == 0).to(kl.device), nll, kl) / LN2


def known_frame_weights(known: Tensor, weight: float) -> Tensor:
    """Weights of squared errors where known frames count `weight`, and all frames together as many as there are.

    Open-Sora 1.3, whose known frames are generated as all others are (`ChannelConditioning`).

    Args:
        known: (B, T) bool, True where a frame is known.
        weight: of such a frame, 0 to 1.

    Returns:
        (B, 1, T, 1, 1) float32; of a clip whose frames are all known all weights are 1.
    """
    num_frames, num_known = known.shape[1], known.sum(dim=1, keepdim=True)
    others = (num_frames - num_known * weight) / (num_frames - num_known).clamp(min=1)
    weights = torch.where(known, weight, others)
    return torch.where(num_known < num_frames, weights, 1.0)[:, None, :, None, None]


def mean_per_sample(values: Tensor, frame_mask: Tensor | None = None) -> Tensor:
    """Mean of every sample, (B,), over all of it or over the frames, (B, C, T, H, W), where ``frame_mask`` is True.

    A sample without any such frame gives 0: it has nothing to learn from.
    """
    if frame_mask is None:
        return values.flatten(1).mean(dim=1)
    per_frame = zero_masked(values, frame_mask).mean(dim=(1, 3, 4))
    return per_frame.sum(dim=1) / frame_mask.to(device=values.device, dtype=torch.bool).sum(dim=1).clamp(min=1)


def zero_masked(values: Tensor, frame_mask: Tensor) -> Tensor:
    """``values``, (B, C, T, H, W), with zeros in the frames where ``frame_mask``, (B, T), is False.

    Chosen, not multiplied: 0 times NaN is NaN. For the same reason a loss masks its arguments and not only its result,
    or the gradient through what was computed of the NaN would be one too.
    """
    mask = frame_mask.to(device=values.device, dtype=torch.bool)
    return torch.where(mask[:, None, :, None, None], values, 0.0)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of two normals per value, in nats; the arguments broadcast."""
    ratio = (log_variance1 - log_variance2).exp()
    squared = (mean1 - mean2).square() * (-log_variance2).exp()
    return (log_variance2 - log_variance1 - 1 + ratio + squared) / 2


def discretized_log_likelihood(values: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-likelihood per value, in nats, of 256 levels in [-1, 1] under a normal (DDPM equation 13).

    A level's probability is the normal's over its bin; the outermost bins are open. The normal's cumulative
    distribution is the tanh approximation that the published models were trained with.
    """
    centred, inverse_std = values - mean, (-log_std).exp()
    upper = _normal_cdf((centred + 1 / 255) * inverse_std)
    lower = _normal_cdf((centred - 1 / 255) * inverse_std)
    bin_probability = torch.where(values < -0.999, upper, torch.where(values > 0.999, 1 - lower, upper - lower))
    return bin_probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def velocity_weights(tables: GaussianTables, prediction_type: PredictionType, *, most: float = 10.0) -> Tensor:
    """(N,) factors that make squared errors count as those of the velocity x - e do on a straight path, up to a bound.

    With a = sqrt(abar), s = sqrt(1 - abar), an error in x is (a + s) / s as large in the velocity, one in e (a + s) / a
    (compare Salimans and Ho 2022, https://arxiv.org/abs/2202.00512, section 4). Plain squared errors of the noise teach
    next to nothing about the clip where it is almost noise, and that is where layout and motion are decided.

    Args:
        tables: of the schedule to train on.
        prediction_type: ``epsilon`` or ``sample``.
        most: bound, because the factors grow without limit towards one end.
    """
    a, s = tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod
    factor = (a + s) / (a if prediction_type == "epsilon" else s)
    return factor.square().clamp(max=most)


# --- which steps to train on ------------------------------------------------------------------------------------------


class SpeedTables(NamedTuple):
    """Training emphasis of SpeeD (Wang et al. 2024, https://arxiv.org/abs/2405.17403), offered by Open-Sora 1.1."""

    meaningful_steps: int
    """Steps before the noise level hardly changes any more."""
    probabilities: Tensor
    """(N,), sum 1: how often to draw a step; five times as often where the noise level changes fast."""
    snr: Tensor
    """(N,) signal-to-noise ratio abar / (1 - abar)."""
    weights: Tensor
    """(N,) factors 1 / (1 + snr) on the squared error, for ``timestep_weights``."""


def speed_tables(
    tables: GaussianTables, *, flat: float = 5e-5, fast: float = 1e-4, sharpness: float = 1e6
) -> SpeedTables:
    """Tell meaningful steps from flat ones by the slope of sqrt(1 - abar_t).

    Args:
        tables: of the schedule to train on.
        flat: slope below which steps count as flat.
        fast: slope above which steps are drawn more often.
        sharpness: how abrupt the change is there.
    """
    (slope,) = torch.gradient(tables.sqrt_one_minus_alphas_cumprod)
    below = (slope < flat).nonzero()
    meaningful = int(below[0]) + 1 if len(below) else len(tables)
    emphasis = torch.tanh(sharpness * (slope - fast)) + 1.5
    snr = 1 / (1 - tables.alphas_cumprod) - 1
    return SpeedTables(meaningful, emphasis / emphasis.sum(), snr, 1 / (1 + snr))
