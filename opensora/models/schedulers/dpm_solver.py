"""DPM-Solver++ for the networks of Open-Sora 1.0 and 1.1: the quality of a hundred IDDPM steps in about twenty.

A thin class over diffusers' ``DPMSolverMultistepScheduler``, whose formulas it uses as they are. Its own are the grid,
which lies between the steps the network was trained on, and frame conditioning. The diffusion is that of
:class:`~opensora.models.schedulers.iddpm.IDDPMScheduler`, so a model's sampler can be swapped::

    pipeline.use_sampler("dpm-solver++")

Time runs over the *training steps*, 0 (almost clean) to N - 1, fractions included; log alpha is linear between them.
Sampling visits (1 - i/n) of the way for i = 0..n-1, and the last step goes to training step 0, not to the clean
latents: the noise left there is that of the first training step (1 % in the linear schedule).

Frames may be conditioned on, in whole or in part. A *frame strength* in [0, 1] is the denoising strength of a frame:
1 generates it, 0 keeps it, and in between it stays clean until that fraction of the way is left, is
noised to it once, and is generated from there::

    for timestep in scheduler.timesteps:
        latents, frame_mask = scheduler.activate_frames(latents, timestep, frame_strength)
        prediction = network(latents, timestep, frame_mask=frame_mask)
        latents = scheduler.step(prediction, timestep, latents, frame_mask=frame_mask).prev_sample

Letters: B batch, C latent channels, T latent frames, N ``num_train_timesteps``, n steps, lambda log (alpha / sigma).
Paper: Lu et al. 2022, https://arxiv.org/abs/2211.01095 (DPM-Solver++, algorithm 2).
"""

import copy
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import (
    SchedulerMixin,  # noqa: F401  from_pretrained looks for it here
    SchedulerOutput,
)

from opensora.diffusion import gaussian
from opensora.errors import OpenSoraError
from opensora.models.schedulers.base import Scheduler, check_schedule
from opensora.models.schedulers.frames import Generators, check_frames, choose_frames, index_of, noise_like
from opensora.models.schedulers.iddpm import GAUSSIAN_SCHEDULERS, IDDPMScheduler

# Below, the cosine schedule leaves so little signal that one step from there loses all digits; the linear one ends
# before, at -5.06.
_MIN_LAMBDA = -5.1
# With fewer steps the last is too long to be extrapolated into.
_MIN_STEPS_TO_END_IN_SECOND_ORDER = 10


class DPMSolverScheduler(Scheduler):
    """Deterministic multistep sampling of a discrete diffusion; variances that the network learned are not used.

    Every step but the first looks back at the one before (second order); without that it would be DDIM.

    Args:
        num_train_timesteps: N, the number of steps the network was trained on.
        beta_schedule: ``"linear"`` or ``"cosine"``.
        beta_start: first beta of the linear schedule, for 1000 steps (scaled by 1000 / N).
        beta_end: last beta of it, likewise.
        prediction_type: the network's first C channels: ``"epsilon"`` the noise, ``"sample"`` the clean latents.
        variance_type: ``"learned_range"`` (the network has C variance channels behind them), ``"fixed_small"`` or
            ``"fixed_large"`` (it has not).
        lower_order_final: the last step is of first order whatever the number of steps, as in Open-Sora 1.3, and not
            only of fewer than 10.

    Raises:
        OpenSoraError: an unknown name or a number out of range.
    """

    _compatibles = GAUSSIAN_SCHEDULERS
    samplers = {"dpm-solver++": {}}
    # The reference's DPM solver knows no choice.
    guides_all_channels = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: Literal["linear", "cosine"] = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        prediction_type: gaussian.PredictionType = "epsilon",
        variance_type: gaussian.VarianceType = "learned_range",
        lower_order_final: bool = False,
    ) -> None:
        diffusion = IDDPMScheduler(
            num_train_timesteps, beta_schedule, beta_start, beta_end, prediction_type, variance_type
        )
        self.num_train_timesteps = num_train_timesteps
        self.variance_type: gaussian.VarianceType = variance_type
        self.lower_order_final = lower_order_final
        self.alphas_cumprod = diffusion.alphas_cumprod
        """abar of the training steps, (N,)."""
        abar = self.alphas_cumprod.numpy()
        self._log_alphas = np.log(abar) / 2
        self._start = int((self._log_alphas - np.log1p(-abar) / 2 >= _MIN_LAMBDA).sum()) - 1
        if self._start < 1:
            raise OpenSoraError(
                f"got a {beta_schedule} schedule of {num_train_timesteps} training steps, which is too short for this "
                "solver; expected at least 2 steps that leave some signal"
            )
        # Without a variance_type: it would cut the prediction to three channels. We cut it ourselves.
        self._solver = _Formulas(prediction_type=prediction_type)
        # As in every diffusers scheduler there is something to iterate before set_timesteps.
        self._schedule(self._even_grid(num_train_timesteps), device=None)
        self.num_inference_steps: int | None = None

    # --- the schedule -------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        timesteps: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """Lay out the steps of one run in ``timesteps``, (n,) float32 training steps, descending.

        The first is N - 1, or with the cosine schedule the last one that leaves some signal.

        Args:
            num_inference_steps: n >= 1.
            device: where ``timesteps`` goes; ``None`` is the CPU.
            timesteps: a schedule of one's own instead of a number of steps, descending from at most the default's first
                step to above 0.

        Raises:
            OpenSoraError: not a number of steps, fewer than one, or a schedule that does not descend or leaves its
                range.
        """
        if timesteps is not None:
            self._schedule(self._custom_grid(num_inference_steps, timesteps), device)
            return
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise OpenSoraError(
                f"got num_inference_steps={num_inference_steps!r}; this solver takes a whole number of at least 1"
            )
        self._schedule(self._even_grid(num_inference_steps), device)

    def _even_grid(self, num_steps: int) -> np.ndarray:
        return np.linspace(self._start, 0, num_steps + 1)

    def _custom_grid(self, num_inference_steps: int | None, timesteps: Sequence[float] | torch.Tensor) -> np.ndarray:
        values = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
        allowed = bool(((values > 0) & (values <= self._start)).all())
        check_schedule(
            "timesteps", values, num_inference_steps, expected=f"numbers in (0, {self._start}]", allowed=allowed
        )
        # What `timesteps` says of an even grid is rounded to float32; it stands for that grid, to the last digit.
        even = self._even_grid(len(values))
        rounded = torch.tensor(even[:-1], dtype=torch.float32)
        return even if torch.equal(values.float(), rounded) else np.append(values.numpy(), 0.0)

    def _schedule(self, grid: np.ndarray, device: torch.device | str | None) -> None:
        self.timesteps = torch.tensor(grid[:-1], dtype=torch.float32).to(device=device)
        self._values: list[float] = self.timesteps.tolist()
        log_alphas = self._log_alphas_at(grid)
        self.sigmas = torch.tensor(np.sqrt(np.expm1(-2 * log_alphas)), dtype=torch.float32)
        """sigma / alpha at the timesteps of the run and where it ends, (n + 1,)."""
        self._begin_run()
        self.num_inference_steps = len(self._values)
        self._before: tuple[int, torch.Tensor, torch.Tensor] | None = None
        """Of the step before: its index, the clean latents it estimated, and the frames it moved, (B, T)."""

    def _log_alphas_at(self, timesteps: np.ndarray) -> np.ndarray:
        return np.interp(timesteps, np.arange(self.num_train_timesteps), self._log_alphas)

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
        index, num_steps = index_of(timestep, self._values), len(self._values)
        noise = noise_like(sample, generator) if noise is None else noise
        # In float32, where 0.29 is 29 / 100 and not a hair less.
        strength = frame_strength.to(device=sample.device, dtype=torch.float32)
        active = strength >= (num_steps - index) / num_steps
        # At the first step, the frames of full strength are noise already.
        before = strength >= (1.0 if self._is_first(index) else (num_steps - index + 1) / num_steps)
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
        """Walk from ``timestep`` to the next one, or to training step 0 from the last.

        The step is of second order in frames that the step before moved too; a frame's first step is of first order.

        Args:
            model_output: guided output of the network, (B, 2C, T, H, W) with learned variance, else (B, C, T, H, W).
            timestep: an entry of ``timesteps``.
            sample: latents at ``timestep``, (B, C, T, H, W).
            frame_mask: (B, T) bool; frames where it is False are returned as they came.
            generator: not used, the solver draws nothing; here for the interface all schedulers share.
            noise: not used, likewise.
            return_dict: ``False`` returns a tuple of one.

        Returns:
            ``.prev_sample`` of the shape and dtype of ``sample``.

        Raises:
            OpenSoraError: ``timestep`` is not in the schedule, the wrong number of channels, or a mask of wrong shape.
        """
        index = index_of(timestep, self._values)
        output, _ = gaussian.split_prediction(model_output, sample.shape[1], self.variance_type)
        moves = torch.ones(sample.shape[0], sample.shape[2], dtype=torch.bool) if frame_mask is None else frame_mask
        check_frames("frame_mask", moves, sample)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        solver, noisy = self._solver.at(index, self.sigmas), sample.to(dtype)
        self._step_index = index + 1
        clean = solver.convert_model_output(output.to(dtype), sample=noisy)
        before, self._before = self._before, (index, clean, moves)
        if self._looks_back(index) and before is not None and before[0] == index - 1:
            # Where there is no step before, the present estimate in its place makes the second-order term vanish.
            earlier = choose_frames(before[2], before[1], clean)
            stepped = solver.multistep_dpm_solver_second_order_update([earlier, clean], sample=noisy)
        else:
            stepped = solver.dpm_solver_first_order_update(clean, sample=noisy)
        stepped = choose_frames(moves, stepped.to(sample.dtype), sample)
        return SchedulerOutput(prev_sample=stepped) if return_dict else (stepped,)

    def _looks_back(self, index: int) -> bool:
        num_steps = len(self._values)
        is_long = num_steps >= _MIN_STEPS_TO_END_IN_SECOND_ORDER and not self.lower_order_final
        return index + 1 < num_steps or is_long

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor | float
    ) -> torch.Tensor:
        """Noise clean latents to training steps, whole or between two.

        Args:
            original_samples: clean latents, (B, C, T, H, W).
            noise: standard normal, same shape.
            timesteps: in [0, N - 1], a number, (B,), or (B, T) for a time of its own for every frame.

        Returns:
            Shape and dtype of ``original_samples``.

        Raises:
            OpenSoraError: timesteps out of range.
        """
        times = torch.as_tensor(timesteps).detach().cpu().double()
        if not bool(((times >= 0) & (times <= len(self) - 1)).all()):
            raise OpenSoraError(f"got timesteps {times.tolist()}; expected numbers in [0, {len(self) - 1}]")
        times = times[:, None, :, None, None] if times.ndim == 2 else times.reshape(-1, 1, 1, 1, 1)
        log_alpha = torch.from_numpy(self._log_alphas_at(times.numpy()))
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        alpha, sigma = (level.float().to(original_samples.device) for level in (alpha, sigma))
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)


class _Formulas(DPMSolverMultistepScheduler):
    """diffusers' solver without its own schedule and memory: it steps wherever it is put."""

    def at(self, index: int, sigmas: torch.Tensor) -> "_Formulas":
        put = copy.copy(self)  # which other copies of the scheduler, in other threads, do not move
        put.sigmas, put._step_index = sigmas, index
        return put
