"""What is trained, in the words of a recipe: rectified flow or IDDPM, each a scheduler and its noise process."""

from dataclasses import dataclass, replace
from typing import Literal

from opensora.diffusion import gaussian
from opensora.diffusion.flow import Velocity
from opensora.diffusion.losses import speed_tables, velocity_weights
from opensora.diffusion.process import NoiseProcess
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.schedulers.base import Scheduler
from opensora.models.schedulers.iddpm import IDDPMScheduler
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler


@dataclass(frozen=True)
class Flow:
    """Rectified flow.

    Attributes:
        times: how times are drawn: "uniform", "discrete" (uniform among the whole timesteps) or "logit-normal".
        loc, scale: of the logit of logit-normal times; a `loc` above 0 trains more on noisy clips, where a motion's
            direction is decided.
        time_shift: shift times by size and length of the clips, in training and in sampling.
        shift_frames: what of the length, see `transform_frames` of `RectifiedFlowScheduler`; None for latent frames.
        shift_token_px: the shift follows tokens of so many pixels a side (Open-Sora 2.0); None for the area.
        training_token_px: those of training, where they are others; None for the same.
        shift_ratio: one ratio of the shift for clips of every size, as for latents that are no unit normal: those of
            deviation d are to the network under it what unit ones are without, where the ratio is d. None for none.
        velocity: what is predicted, "noise - data" in Open-Sora 2.0; None for "data - noise".
        uniform_above, sigma_min: see `RectifiedFlowProcess`; of training alone. None for neither.
    """

    times: Literal["uniform", "discrete", "logit-normal"] = "logit-normal"
    loc: float = 0.0
    scale: float = 1.0
    time_shift: bool = False
    shift_frames: Literal["latent", "after_first"] | None = None
    shift_token_px: int | None = None
    training_token_px: int | None = None
    shift_ratio: float | None = None
    velocity: Velocity | None = None
    uniform_above: float | None = None
    sigma_min: float | None = None

    def build(self, autoencoder: VideoCodec) -> tuple[Scheduler, NoiseProcess]:
        """What samples the model, and what it is trained with, for clips that this autoencoder encodes.

        The autoencoder decides how many latent frames the time shift counts.
        """
        scheduler = RectifiedFlowScheduler(
            use_discrete_timesteps=self.times == "discrete",
            use_timestep_transform=self.time_shift,
            transform_ratio=self.shift_ratio,
            transform_frames=self.shift_frames or "latent",
            transform="area" if self.shift_token_px is None else "tokens",
            token_px=self.shift_token_px or 1,
            training_token_px=self.training_token_px,
            velocity=self.velocity or "data - noise",
            temporal_factor=autoencoder.temporal_factor,
            micro_frame_size=autoencoder.micro_frame_size,
            sample_method="logit-normal" if self.times == "logit-normal" else "uniform",
            sample_loc=self.loc,
            sample_scale=self.scale,
        )
        process = scheduler.noise_process()
        return scheduler, replace(process, uniform_above=self.uniform_above, sigma_min=self.sigma_min or 0.0)


@dataclass(frozen=True)
class IDDPM:
    """Discrete-time Gaussian diffusion with learned variances.

    Attributes:
        prediction_type: what is predicted besides the variance: "epsilon" the noise, "sample" the clean latents.
        steps: how steps are drawn: "uniform", or "speed" for those of SpeeD, with its weights.
        velocity_weights: weigh squared errors as those of the velocity, see `diffusion.losses.velocity_weights`.
        float32_tables: see `IDDPMScheduler`.
        sampler: how an exported pipeline samples.
    """

    prediction_type: gaussian.PredictionType = "epsilon"
    steps: Literal["uniform", "speed"] = "uniform"
    velocity_weights: bool = False
    float32_tables: bool = False
    sampler: Literal["ancestral", "ddim"] = "ancestral"

    def build(self, autoencoder: VideoCodec) -> tuple[Scheduler, NoiseProcess]:
        """What samples the model, and what it is trained with; both work alike for all autoencoders."""
        scheduler = IDDPMScheduler(
            prediction_type=self.prediction_type, sampler=self.sampler, float32_tables=self.float32_tables
        )
        # The emphasis on some steps is of training alone; sampling knows nothing of it.
        process, tables = scheduler.noise_process(), scheduler.train_tables
        if self.steps == "speed":
            speed = speed_tables(tables)
            process = replace(process, emphasis=speed, timestep_weights=speed.weights.float())
        if self.velocity_weights:
            weights = velocity_weights(tables, self.prediction_type).float()
            others = process.timestep_weights
            process = replace(process, timestep_weights=weights if others is None else weights * others)
        return scheduler, process
