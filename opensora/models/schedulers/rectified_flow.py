"""The rectified-flow sampler of Open-Sora 1.2 and later: Euler steps from noise to data, as a diffusers scheduler.

A thin class over :mod:`opensora.diffusion.flow`. There, time runs over [0, 1]; here it is the timestep the networks
were trained on, 0..``num_train_timesteps``, with ``num_train_timesteps`` = pure noise. Sampling visits (1 - i/n) of the
way for i = 0..n-1, time-shifted if the model was trained so, and the last step goes to 0.

Frames may be conditioned on, in whole or in part. A *frame strength* in [0, 1] is the denoising strength of a frame:
1 generates it, 0 keeps it, and in between it stays clean until time falls to that fraction, is noised
to it once, and is generated from there::

    for timestep in scheduler.timesteps:
        latents, frame_mask = scheduler.activate_frames(latents, timestep, frame_strength)
        prediction = network(latents, timestep, frame_mask=frame_mask)
        latents = scheduler.step(prediction, timestep, latents, frame_mask=frame_mask).prev_sample

Letters: B batch, C latent channels, T latent frames, N ``num_train_timesteps``, n steps.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast, get_args

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import (
    SchedulerMixin,  # noqa: F401  from_pretrained looks for it here
    SchedulerOutput,
)

from opensora.diffusion import flow
from opensora.diffusion.process import RectifiedFlowProcess
from opensora.errors import OpenSoraError
from opensora.models.schedulers.base import Scheduler, check_schedule
from opensora.models.schedulers.frames import Generators, check_frames, choose_frames, index_of, noise_like


class RectifiedFlowScheduler(Scheduler):
    """Euler sampling of a rectified flow, with the training-time facts that sampling must agree with.

    Args:
        num_train_timesteps: N, the timestep of pure noise.
        use_discrete_timesteps: round timesteps to whole numbers before the shift.
        use_timestep_transform: shift times by size and length of the video; ``set_timesteps`` then needs both.
        transform: what the shift ratio follows, ``"area"`` (Open-Sora 1.2 and 1.3, :class:`flow.AreaShift`) or
            ``"tokens"`` (2.0, :class:`flow.TokenShift`), of which ``token_px`` is the side in pixels.
        transform_ratio: one ratio for all videos instead; ``None`` for none.
        transform_scale: factor on the shift ratio, in sampling and in training alike.
        transform_base_size: side in pixels of the square image that is not shifted.
        transform_frames: ``"latent"`` counts the autoencoder's latent frames (Open-Sora 1.2), ``"after_first"`` those
            after the first, and applies ``transform_scale`` to videos only (1.3).
        transform_bf16: see :class:`flow.AreaShift`.
        token_px: see ``transform``.
        training_token_px: that of training, where it was another; ``None`` for the same.
        temporal_factor: video frames to one latent frame of the autoencoder; 1 for one that works frame by frame.
        micro_frame_size: frames the autoencoder encodes at once; ``None`` for the whole video.
        sample_method: how training draws its times, ``"uniform"`` or ``"logit-normal"``.
        sample_loc: mean of the logit of the logit-normal times.
        sample_scale: standard deviation of the logit of the logit-normal times.
        velocity: what networks predict, ``"data - noise"``, or ``"noise - data"`` (Open-Sora 2.0).

    Raises:
        OpenSoraError: an unknown name or a number out of range.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        use_discrete_timesteps: bool = False,
        use_timestep_transform: bool = False,
        transform_scale: float = 1.0,
        transform_base_size: int = 512,
        transform_frames: Literal["latent", "after_first"] = "latent",
        transform_bf16: bool = False,
        transform: Literal["area", "tokens"] = "area",
        transform_ratio: float | None = None,
        token_px: int = 16,
        temporal_factor: int = 4,
        micro_frame_size: int | None = 17,
        sample_method: Literal["uniform", "logit-normal"] = "uniform",
        sample_loc: float = 0.0,
        sample_scale: float = 1.0,
        velocity: flow.Velocity = "data - noise",
        training_token_px: int | None = None,
    ) -> None:
        if num_train_timesteps < 1:
            raise OpenSoraError(f"got num_train_timesteps={num_train_timesteps}; expected at least 1")
        for name, value, allowed in (
            ("transform_frames", transform_frames, ("latent", "after_first")),
            ("transform", transform, ("area", "tokens")),
            ("sample_method", sample_method, ("uniform", "logit-normal")),
            ("velocity", velocity, get_args(flow.Velocity)),
        ):
            if value not in allowed:
                raise OpenSoraError(f"got {name}={value!r}; expected {' or '.join(map(repr, allowed))}")
        for name, side in (("token_px", token_px), ("training_token_px", training_token_px)):
            if side is not None and side < 1:
                raise OpenSoraError(f"got {name}={side}; expected at least 1")
        self.num_train_timesteps = num_train_timesteps
        self.use_discrete_timesteps = use_discrete_timesteps
        self.use_timestep_transform = use_timestep_transform
        self.temporal_factor = temporal_factor
        self.micro_frame_size = micro_frame_size
        self.velocity: flow.Velocity = velocity
        self.time_shift: flow.TimeShift
        if transform_ratio is not None:
            self.time_shift = flow.FixedShift(transform_ratio)
        elif transform == "tokens":
            self.time_shift = flow.TokenShift(token_px, temporal_factor, micro_frame_size)
        else:
            self.time_shift = flow.AreaShift(
                transform_scale,
                transform_base_size,
                transform_frames,
                temporal_factor,
                micro_frame_size,
                bf16=transform_bf16,
            )
        """How times are shifted under ``use_timestep_transform``, in sampling."""
        training_shift = self.time_shift
        if training_token_px is not None and isinstance(training_shift, flow.TokenShift):
            training_shift = replace(training_shift, token_px=training_token_px)
        self._process = RectifiedFlowProcess(
            num_train_timesteps,
            times="discrete" if use_discrete_timesteps else sample_method,
            loc=sample_loc,
            scale=sample_scale,
            time_shift=training_shift if use_timestep_transform else None,
            velocity=velocity,
        )
        # As in every diffusers scheduler there is something to iterate before set_timesteps: the training grid.
        self._schedule(torch.arange(num_train_timesteps, 0, -1, dtype=torch.float64), device=None)
        self.num_inference_steps: int | None = None

    def noise_process(self) -> RectifiedFlowProcess:
        """What such networks are trained with: times are drawn and shifted as the configuration says."""
        return self._process

    def with_time_shift(self, shift: float) -> "RectifiedFlowScheduler":
        """The same model sampled with one time shift for all sizes (:class:`opensora.diffusion.flow.FixedShift`)."""
        if not 0 < shift < float("inf"):
            raise OpenSoraError(f"got a time shift of {shift:g}; expected a number above 0 (1 shifts nothing)")
        options = {"use_timestep_transform": True, "transform": "area", "transform_ratio": float(shift)}
        return cast(RectifiedFlowScheduler, type(self).from_config(self.config, **options))

    # --- the schedule -------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        height: float | None = None,
        width: float | None = None,
        num_frames: int | None = None,
        num_latents: int | None = None,
    ) -> None:
        """Lay out the steps of one run in ``timesteps``, (n,) float32, descending from N.

        Args:
            num_inference_steps: n >= 1.
            device: where ``timesteps`` goes; ``None`` is the CPU.
            timesteps: a schedule of one's own instead of a number of steps, descending in (0, N]. It is taken as it
                is: neither rounded nor shifted.
            sigmas: the same in the units of ``sigmas``, noise levels in (0, 1].
            height: of the video in pixels; the sizes matter only under ``use_timestep_transform``.
            width: of the video in pixels.
            num_frames: of the video (not of the latent).
            num_latents: latent frames that the autoencoder makes of it; ``None`` for what the configuration tells of
                that.

        Raises:
            OpenSoraError: fewer than one step, more whole timesteps than there are, a schedule that does not descend or
                leaves its range, two of these three, or a missing or impossible size.
        """
        if timesteps is not None or sigmas is not None:
            self._schedule(self._custom_timesteps(num_inference_steps, timesteps, sigmas), device)
            return
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise OpenSoraError(
                f"got num_inference_steps={num_inference_steps!r}; expected a whole number of at least 1"
            )
        steps, grid = num_inference_steps, self.num_train_timesteps
        even = torch.tensor([(1.0 - i / steps) * grid for i in range(steps)], dtype=torch.float64)
        if self.use_discrete_timesteps:
            if steps > grid:
                raise OpenSoraError(f"got num_inference_steps={steps}; a discrete schedule has at most {grid}")
            even = even.round()
        t = even / grid
        if self.use_timestep_transform:
            t = self.time_shift(t, height, width, num_frames, num_latents)
        self._schedule(t * grid, device)

    def _custom_timesteps(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[float] | torch.Tensor | None,
        sigmas: Sequence[float] | torch.Tensor | None,
    ) -> torch.Tensor:
        if timesteps is not None and sigmas is not None:
            raise OpenSoraError("got timesteps and sigmas; give one of them")
        name, given, last = ("timesteps", timesteps, len(self)) if timesteps is not None else ("sigmas", sigmas, 1)
        values = torch.as_tensor(given, dtype=torch.float64, device="cpu")
        allowed = bool(((values > 0) & (values <= last)).all())
        check_schedule(name, values, num_inference_steps, expected=f"numbers in (0, {last}]", allowed=allowed)
        return values * (len(self) / last)

    def _schedule(self, timesteps: torch.Tensor, device: torch.device | str | None) -> None:
        """Cast the float64 table once; look-ups use the same float32 values the caller iterates over."""
        self.timesteps = timesteps.to(dtype=torch.float32).to(device=device)
        self._values: list[float] = timesteps.to(torch.float32).tolist()
        self.sigmas = torch.tensor([*self._values, 0.0], dtype=torch.float64) / self.num_train_timesteps
        """Noise levels of the run, (n + 1,) from 1 to 0; ``timesteps`` as parts of N."""
        self.num_inference_steps = len(self._values)
        self._begin_run()

    # --- one step -----------------------------------------------------------------------------------------------------

    def activate_frames(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        frame_strength: torch.Tensor,
        *,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Before the network is called: say which frames are generated at this step, and noise those that just began.

        Args:
            sample: latents, (B, C, T, H, W); conditioning frames are clean, frames of strength 1 are noise.
            timestep: an entry of ``timesteps``.
            frame_strength: (B, T) in [0, 1], the same throughout a run; see the module text. A bool mask is the special
                case of frames that are generated entirely or not at all.
            generator: source of ``noise``; a list holds one per sample.
            noise: standard normal noise like ``sample``. It is drawn at every step, needed or not, so that a run's
                random numbers do not depend on the strengths.

        Returns:
            The sample with the frames that begin at this step noised to ``timestep``, and ``frame_mask``, (B, T) bool,
            True for the frames that are being generated: input of the network and of :meth:`step`.

        Raises:
            OpenSoraError: ``timestep`` is not in the schedule, or ``frame_strength`` has the wrong shape.
        """
        check_frames("frame_strength", frame_strength, sample)
        index = index_of(timestep, self._values)
        noise = noise_like(sample, generator) if noise is None else noise
        strength = frame_strength.to(device=sample.device, dtype=torch.float32)
        reached = strength * self.num_train_timesteps
        active = reached >= self._values[index]
        # Nothing precedes the first step: the frames that count as noise already are those of full strength.
        before = strength == 1 if self._is_first(index) else reached >= self._values[index - 1]
        noised = self.add_noise(sample, noise, self._values[index])
        return choose_frames(active & ~before, noised, sample), active

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        *,
        frame_mask: torch.Tensor | None = None,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """Walk from ``timestep`` to the next one, or to 0 from the last.

        Args:
            model_output: guided prediction, (B, C, T, H, W); of (B, 2C, T, H, W) the first C channels are used.
            timestep: an entry of ``timesteps``.
            sample: latents at ``timestep``, (B, C, T, H, W).
            frame_mask: (B, T) bool; frames where it is False are returned as they came.
            generator: not used, Euler steps of a flow draw nothing; here for the interface all schedulers share.
            noise: not used, likewise.
            return_dict: ``False`` returns a tuple of one.

        Returns:
            ``.prev_sample`` of the shape and dtype of ``sample``.

        Raises:
            OpenSoraError: ``timestep`` is not in the schedule, the number of channels is neither C nor 2C, or a mask of
                wrong shape.
        """
        channels = sample.shape[1]
        if model_output.shape[1] not in (channels, 2 * channels):
            raise OpenSoraError(
                f"got a prediction of {model_output.shape[1]} channels for latents of {channels}; expected {channels}, "
                f"or {2 * channels} with variance channels"
            )
        index = index_of(timestep, self._values)
        t = self._values[index] / self.num_train_timesteps
        is_last = index + 1 == len(self._values)
        t_next = 0.0 if is_last else self._values[index + 1] / self.num_train_timesteps
        self._step_index = index + 1
        towards_data = flow.towards_data(model_output[:, :channels].to(sample.dtype), self.velocity)
        stepped = flow.euler_step(sample, towards_data, t, t_next)
        if frame_mask is not None:
            check_frames("frame_mask", frame_mask, sample)
            stepped = choose_frames(frame_mask, stepped, sample)
        return SchedulerOutput(prev_sample=stepped) if return_dict else (stepped,)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor | float
    ) -> torch.Tensor:
        """Noise clean latents, (B, C, T, H, W), to ``timesteps`` in [0, N], a number or (B,)."""
        return flow.interpolate(original_samples, noise, timesteps / self.num_train_timesteps)
