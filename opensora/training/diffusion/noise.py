"""How latents are corrupted for training, and what the network's answer costs.

Two kinds: rectified flow (Liu et al., 2022), and discrete-time Gaussian diffusion with learned variances, IDDPM (Nichol
& Dhariwal, 2021). A diffusion draws times, corrupts, and turns a prediction into loss terms; it knows no network.

Given frames: rectified flow shows them clean, as Open-Sora 1.2 does; IDDPM shows them noised to its first step, which
is almost clean, as 1.1 does. Neither counts them in the loss.

Letters: B clips, C latent channels, T latent frames, h, w latent cells, N steps.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opensora.data.batch import LatentBatch
from opensora.diffusion import flow, gaussian
from opensora.diffusion.losses import mean_per_sample, speed_tables, training_losses, velocity_weights
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.schedulers.iddpm import IDDPMScheduler
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler


class Diffusion(ABC):
    """What both kinds do.

    Attributes:
        scheduler: samples from a model that was trained so.
    """

    scheduler: RectifiedFlowScheduler | IDDPMScheduler

    @abstractmethod
    def draw_times(self, batch: LatentBatch, generator: torch.Generator) -> Tensor:
        """A time for every clip, (B,) on the CPU, in the unit of `corrupt`."""

    @abstractmethod
    def timesteps(self, t: Tensor) -> Tensor:
        """Times as networks are told them: (B,) float32, 0 (clean) to 1000 (noise)."""

    @abstractmethod
    def corrupt(self, clean: Tensor, noise: Tensor, t: Tensor, frame_mask: Tensor | None) -> Tensor:
        """Noisy latents (B, C, T, h, w); given frames, where `frame_mask` (B, T) is False, stay clean or nearly so."""

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
        """Loss terms, each (B,), over the frames that are generated; see `training.task` for their names.

        Args:
            prediction: float32, (B, C or 2 C, T, h, w).
            clean, noisy, noise: (B, C, T, h, w).
            t: (B,).
            frame_mask: (B, T) bool.
            weights: of squared errors, (B, 1, T, h, w); None for 1 everywhere.
        """


@dataclass(frozen=True)
class Flow:
    """Rectified flow.

    Attributes:
        times: how times are drawn: "uniform", "discrete" (uniform among the whole timesteps) or "logit-normal".
        loc, scale: of the logit of logit-normal times; a `loc` above 0 trains more on noisy clips, where a motion's
            direction is decided.
        time_shift: shift times by size and length of the clips, in training and in sampling.
    """

    times: Literal["uniform", "discrete", "logit-normal"] = "logit-normal"
    loc: float = 0.0
    scale: float = 1.0
    time_shift: bool = False

    def build(self, autoencoder: VideoCodec, device: str) -> "FlowDiffusion":
        """The diffusion for clips that this autoencoder encodes: it decides how many latent frames the shift counts."""
        return FlowDiffusion(
            RectifiedFlowScheduler(
                use_discrete_timesteps=self.times == "discrete",
                use_timestep_transform=self.time_shift,
                temporal_factor=autoencoder.temporal_factor,
                micro_frame_size=autoencoder.micro_frame_size,
                sample_method="logit-normal" if self.times == "logit-normal" else "uniform",
                sample_loc=self.loc,
                sample_scale=self.scale,
            )
        )


class FlowDiffusion(Diffusion):
    """Rectified flow: the network predicts the velocity from noise to data. Times are timesteps, 0 to 1000."""

    def __init__(self, scheduler: RectifiedFlowScheduler) -> None:
        self.scheduler: RectifiedFlowScheduler = scheduler

    def draw_times(self, batch: LatentBatch, generator: torch.Generator) -> Tensor:
        return self.scheduler.draw_timesteps(
            len(batch.latents),
            height=float(batch.height[0]),
            width=float(batch.width[0]),
            num_frames=batch.num_frames,
            generator=generator,
        )

    def timesteps(self, t: Tensor) -> Tensor:
        return t

    def corrupt(self, clean: Tensor, noise: Tensor, t: Tensor, frame_mask: Tensor | None) -> Tensor:
        return flow.interpolate(clean, noise, t / self.scheduler.num_train_timesteps, frame_mask)

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
        error = (prediction[:, : clean.shape[1]] - flow.velocity_target(clean, noise)).square()
        if weights is None:
            return {"velocity": mean_per_sample(error, frame_mask)}
        return {
            "velocity": mean_per_sample(error * weights, frame_mask),
            "_mse": mean_per_sample(error, frame_mask),
        }


@dataclass(frozen=True)
class IDDPM:
    """Discrete-time Gaussian diffusion with learned variances.

    Attributes:
        prediction_type: what is predicted besides the variance: "epsilon" the noise, "sample" the clean latents.
        steps: how steps are drawn: "uniform", or "speed" for those of SpeeD, with its weights.
        velocity_weights: weigh squared errors as those of the velocity, see `losses.velocity_weights`.
        float32_tables: see `IDDPMScheduler`.
        sampler: how an exported pipeline samples.
    """

    prediction_type: gaussian.PredictionType = "epsilon"
    steps: Literal["uniform", "speed"] = "uniform"
    velocity_weights: bool = False
    float32_tables: bool = False
    sampler: Literal["ancestral", "ddim"] = "ancestral"

    def build(self, autoencoder: VideoCodec, device: str) -> "GaussianDiffusion":
        """The diffusion, with its tables on a device; it works alike for all autoencoders."""
        scheduler = IDDPMScheduler(
            prediction_type=self.prediction_type, sampler=self.sampler, float32_tables=self.float32_tables
        )
        return GaussianDiffusion(scheduler, self, device)


class GaussianDiffusion(Diffusion):
    """IDDPM: noise or clean latents, and the variance through the variational bound. Times are steps, 0 to N - 1.

    Args:
        scheduler: holds the schedule.
        config: what to train, and where.
        device: where latents will be.
    """

    def __init__(self, scheduler: IDDPMScheduler, config: IDDPM, device: str) -> None:
        self.scheduler: IDDPMScheduler = scheduler
        self.config = config
        tables = scheduler.train_tables
        speed = speed_tables(tables)
        self.probabilities, self.meaningful_steps = speed.probabilities, speed.meaningful_steps
        weights = torch.ones(len(tables))
        if config.velocity_weights:
            weights = weights * velocity_weights(tables, config.prediction_type).float()
        if config.steps == "speed":
            weights = weights * speed.weights.float()
        self.weighted = config.velocity_weights or config.steps == "speed"
        self.timestep_weights = weights.to(device)
        self.tables = tables.to(device)

    def draw_times(self, batch: LatentBatch, generator: torch.Generator) -> Tensor:
        size = len(batch.latents)
        if self.config.steps == "uniform":
            return torch.randint(len(self.tables), (size,), generator=generator)
        # SpeeD: half of the steps by their emphasis, the other half mirrored at the last meaningful one.
        half = torch.multinomial(self.probabilities, size // 2 + 1, replacement=True, generator=generator)
        mirrored = (self.meaningful_steps - half).abs().clamp(max=len(self.tables) - 1)
        return torch.cat([half, mirrored])[:size]

    def timesteps(self, t: Tensor) -> Tensor:
        return t.float()

    def corrupt(self, clean: Tensor, noise: Tensor, t: Tensor, frame_mask: Tensor | None) -> Tensor:
        steps = t if frame_mask is None else gaussian.frame_timesteps(t, frame_mask)
        return gaussian.q_sample(self.tables, clean, steps, noise)

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
        kind = self.config.prediction_type
        plain = training_losses(
            self.tables,
            prediction,
            clean=clean,
            noisy=noisy,
            noise=noise,
            t=t,
            prediction_type=kind,
            frame_mask=frame_mask,
        )
        assert plain.mse is not None and plain.vb is not None
        weighted = plain.mse
        if weights is not None:
            target = noise if kind == "epsilon" else clean
            weighted = mean_per_sample((prediction[:, : clean.shape[1]] - target).square() * weights, frame_mask)
        terms = {kind: weighted * self.timestep_weights[t], "vb": plain.vb}
        return terms if weights is None and not self.weighted else {**terms, "_mse": plain.mse}
