"""Noise processes: how clean latents are corrupted for training, and what a network's answer costs.

Two kinds: rectified flow (Liu et al., 2022), and discrete-time Gaussian diffusion with learned variances, IDDPM (Nichol
and Dhariwal, 2021). A process draws times, corrupts, and turns a prediction into loss terms; it knows no network.

Conditioning frames: rectified flow shows them clean, as Open-Sora 1.2 does; IDDPM shows them noised to its first step,
which is almost clean, as 1.1 does. Neither counts them in the loss, whatever they hold.

Letters: B clips, C latent channels, T latent frames, h, w latent cells, N steps.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from opensora.diffusion import flow, gaussian
from opensora.diffusion.losses import SpeedTables, mean_per_sample, training_losses, zero_masked
from opensora.errors import OpenSoraError


class NoiseProcess(ABC):
    """What both kinds do. Times `t` are those that networks are told, in a type that suits the mathematics."""

    @abstractmethod
    def draw_times(
        self,
        num: int,
        *,
        height: float | None = None,
        width: float | None = None,
        num_frames: int | None = None,
        num_latents: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Times to train on, (num,) on the CPU, for clips of one size.

        Args:
            num: of clips.
            height, width: in pixels.
            num_frames: of the video, before encoding.
            num_latents: latent frames that the autoencoder makes of it; None for what the process knows of that.
            generator: source of the random numbers.

        Raises:
            OpenSoraError: times are shifted by the size, and it is missing or impossible.
        """

    @abstractmethod
    def fixed_timesteps(self, n: int) -> Tensor:
        """n times from clean to noise, evenly spaced, (n,) on the CPU.

        Raises:
            OpenSoraError: fewer than two.
        """

    def timesteps(self, t: Tensor) -> Tensor:
        """Times as networks are told them: float32, 0 (clean) to N (noise)."""
        return t.float()

    @abstractmethod
    def corrupt(self, clean: Tensor, noise: Tensor, t: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Noisy latents.

        Args:
            clean, noise: (B, C, T, h, w).
            t: (B,).
            frame_mask: (B, T) bool; frames where it is False are conditioning frames, and stay clean or nearly so.
        """

    @abstractmethod
    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the clean latents and of the noise in noisy ones, float32, each (B,)."""

    @abstractmethod
    def losses(
        self,
        prediction: Tensor,
        *,
        clean: Tensor,
        noisy: Tensor,
        noise: Tensor,
        t: Tensor,
        frame_mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss terms by name, each (B,), over the frames that are generated.

        What is minimised is their sum; names that begin with "_" are not part of it, but figures to watch.

        Args:
            prediction: float32, (B, C or 2 C, T, h, w).
            clean, noisy, noise: (B, C, T, h, w).
            t: (B,).
            frame_mask: (B, T) bool; where it is False nothing counts, not even a NaN, in the loss or its gradient.
            weights: of squared errors, (B, 1, T, h, w); None for 1 everywhere.
        """

    def to(self, device: torch.device | str) -> Self:
        """The process with what it holds on the device where latents will be."""
        return self


@dataclass(frozen=True)
class RectifiedFlowProcess(NoiseProcess):
    """Rectified flow: the network predicts the velocity between noise and data. Times are numbers from 0 to N.

    Attributes:
        num_train_timesteps: N.
        times: how they are drawn: "uniform", "discrete" (uniform among the whole numbers) or "logit-normal".
        loc, scale: of the logit of logit-normal times.
        time_shift: by size and length of the clips; None for none.
        velocity: which of the two is predicted.
        sigma_min: noise that is left where time is 0 (Open-Sora 2.0 trains with 1e-5).
        uniform_above: times of videos above this part of the way, after the shift, are drawn anew, uniformly from there
            to noise (Open-Sora 1.3); None for no such part.
    """

    num_train_timesteps: int = 1000
    times: Literal["uniform", "discrete", "logit-normal"] = "uniform"
    loc: float = 0.0
    scale: float = 1.0
    time_shift: flow.TimeShift | None = None
    velocity: flow.Velocity = "data - noise"
    sigma_min: float = 0.0
    uniform_above: float | None = None

    def draw_times(
        self,
        num: int,
        *,
        height: float | None = None,
        width: float | None = None,
        num_frames: int | None = None,
        num_latents: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        if self.times == "discrete":
            t = flow.sample_discrete(num, self.num_train_timesteps, generator=generator)
        elif self.times == "uniform":
            t = flow.sample_uniform(num, generator=generator)
        else:
            t = flow.sample_logit_normal(num, loc=self.loc, scale=self.scale, generator=generator)
        if self.time_shift is not None:
            t = self.time_shift(t, height, width, num_frames, num_latents)
        if self.uniform_above is not None and num_frames != 1:
            t = flow.redraw_above(t, self.uniform_above, flow.sample_uniform(num, generator=generator))
        return t * self.num_train_timesteps

    def fixed_timesteps(self, n: int) -> Tensor:
        return _evenly_spaced(self.num_train_timesteps, n)

    def corrupt(self, clean: Tensor, noise: Tensor, t: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        return flow.interpolate(clean, noise, t / self.num_train_timesteps, frame_mask, sigma_min=self.sigma_min)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = (t / self.num_train_timesteps).float()
        return 1 - t, t + (1 - t) * self.sigma_min

    def losses(
        self,
        prediction: Tensor,
        *,
        clean: Tensor,
        noisy: Tensor,
        noise: Tensor,
        t: Tensor,
        frame_mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        target = flow.velocity_target(clean, noise, sigma_min=self.sigma_min)
        error = _squared_error(flow.towards_data(prediction, self.velocity), target, frame_mask)
        plain = mean_per_sample(error, frame_mask)
        if weights is None:
            return {"velocity": plain}
        return {"velocity": mean_per_sample(error * weights, frame_mask), "_mse": plain}


@dataclass(frozen=True)
class GaussianProcess(NoiseProcess):
    """IDDPM: noise or clean latents, and the variance through the variational bound. Times are int64 steps, 0 to N - 1.

    Attributes:
        tables: of the schedule.
        prediction_type: what is predicted besides the variance: "epsilon" the noise, "sample" the clean latents.
        variance_type: whether the variance is predicted; see `gaussian.VarianceType`.
        timestep_weights: (N,) factors on the squared error; None for 1 everywhere.
        emphasis: how often steps are drawn; None for all alike.
    """

    tables: gaussian.GaussianTables
    prediction_type: gaussian.PredictionType = "epsilon"
    variance_type: gaussian.VarianceType = "learned_range"
    timestep_weights: Tensor | None = None
    emphasis: SpeedTables | None = None

    def to(self, device: torch.device | str) -> Self:
        weights = self.timestep_weights
        return replace(
            self, tables=self.tables.to(device), timestep_weights=None if weights is None else weights.to(device)
        )

    def draw_times(
        self,
        num: int,
        *,
        height: float | None = None,
        width: float | None = None,
        num_frames: int | None = None,
        num_latents: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        num_steps = len(self.tables)
        if self.emphasis is None:
            return torch.randint(num_steps, (num,), generator=generator)
        # SpeeD: half of the steps by their emphasis, the other half mirrored at the last meaningful one.
        half = torch.multinomial(self.emphasis.probabilities, num // 2 + 1, replacement=True, generator=generator)
        mirrored = (self.emphasis.meaningful_steps - half).abs().clamp(max=num_steps - 1)
        return torch.cat([half, mirrored])[:num]

    def fixed_timesteps(self, n: int) -> Tensor:
        return _evenly_spaced(len(self.tables) - 1, n).round().long()

    def corrupt(self, clean: Tensor, noise: Tensor, t: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        steps = t if frame_mask is None else gaussian.frame_timesteps(t, frame_mask)
        return gaussian.q_sample(self.tables, clean, steps, noise)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.tables.alphas_cumprod[t]
        return kept.sqrt().float(), (1 - kept).sqrt().float()

    def losses(
        self,
        prediction: Tensor,
        *,
        clean: Tensor,
        noisy: Tensor,
        noise: Tensor,
        t: Tensor,
        frame_mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        plain = training_losses(
            self.tables,
            prediction,
            clean=clean,
            noisy=noisy,
            noise=noise,
            t=t,
            prediction_type=self.prediction_type,
            variance_type=self.variance_type,
            frame_mask=frame_mask,
        )
        assert plain.mse is not None
        mse = plain.mse
        if weights is not None:
            target = noise if self.prediction_type == "epsilon" else clean
            mse = mean_per_sample(_squared_error(prediction, target, frame_mask) * weights, frame_mask)
        if self.timestep_weights is not None:
            mse = mse * self.timestep_weights[t]
        terms = {self.prediction_type: mse}
        if plain.vb is not None:
            terms["vb"] = plain.vb
        return terms if mse is plain.mse else {**terms, "_mse": plain.mse}


def _squared_error(prediction: Tensor, target: Tensor, frame_mask: Tensor | None) -> Tensor:
    """Of the first C channels, (B, C, T, h, w); zero in frames that do not count, before anything is squared."""
    error = prediction[:, : target.shape[1]] - target
    return (error if frame_mask is None else zero_masked(error, frame_mask)).square()


def _evenly_spaced(last: int, n: int) -> Tensor:
    if n < 2:
        raise OpenSoraError(f"{n} timesteps asked for; give 2 or more")
    return torch.linspace(0, last, n, dtype=torch.float64)
