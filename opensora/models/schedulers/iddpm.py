"""The discrete-time sampler of Open-Sora 1.0 and 1.1, as a diffusers scheduler: ancestral (IDDPM) or DDIM steps.

A thin class over :mod:`opensora.diffusion.gaussian`. Sampling walks a respaced schedule from noise to data;
``timesteps`` holds the steps of the original schedule, which the network sees.

Frames may be conditioned on, in whole or in part. A *frame strength* in [0, 1] is the denoising strength of a frame:
1 generates it, 0 keeps it, and in between it stays clean until that fraction of the steps is left, is
noised to it once, and is generated from there::

    for timestep in scheduler.timesteps:
        latents, frame_mask = scheduler.activate_frames(latents, timestep, frame_strength)
        prediction = network(latents, timestep, frame_mask=frame_mask)
        latents = scheduler.step(prediction, timestep, latents, frame_mask=frame_mask).prev_sample

Letters: B batch, C latent channels, T latent frames, N ``num_train_timesteps``, n steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  from_pretrained looks for it here
from diffusers.utils.outputs import BaseOutput

from opensora.diffusion import gaussian
from opensora.diffusion.process import GaussianProcess
from opensora.errors import OpenSoraError
from opensora.models.schedulers.base import Scheduler, check_schedule
from opensora.models.schedulers.frames import Generators, check_frames, choose_frames, index_of, noise_like
from opensora.settings import expected_one_of

GAUSSIAN_SCHEDULERS = [f"{__package__}.iddpm.IDDPMScheduler", f"{__package__}.dpm_solver.DPMSolverScheduler"]
"""Those that sample the same models, so that each can be made of the other's configuration."""


@dataclass
class IDDPMSchedulerOutput(BaseOutput):
    """Result of one step."""

    prev_sample: torch.Tensor
    """Latents at the next, less noisy timestep, (B, C, T, H, W)."""
    pred_original_sample: torch.Tensor
    """Clean latents as estimated at this step, same shape."""


class IDDPMScheduler(Scheduler):
    """Respaced sampling of a discrete diffusion whose network may have learned its variance.

    Args:
        num_train_timesteps: N, the number of steps the network was trained on.
        beta_schedule: ``"linear"`` or ``"cosine"``.
        beta_start: first beta of the linear schedule, for 1000 steps (scaled by 1000 / N).
        beta_end: last beta of it, likewise.
        prediction_type: the network's first C channels: ``"epsilon"`` the noise, ``"sample"`` the clean latents.
        variance_type: ``"learned_range"`` (the network has C variance channels behind them), ``"fixed_small"`` or
            ``"fixed_large"`` (it has not).
        sampler: ``"ancestral"``, or ``"ddim"``, which does without the variance.
        ddim_eta: 0 makes DDIM deterministic; 1 adds as much noise as ancestral sampling.
        float32_tables: compute the tables in float32, as Open-Sora 1.1 and 1.2 did, instead of float64 as 1.0 did.

    Raises:
        OpenSoraError: an unknown name or a number out of range.
    """

    _compatibles = GAUSSIAN_SCHEDULERS
    samplers = {name: {"sampler": name} for name in ("ancestral", "ddim")}

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: Literal["linear", "cosine"] = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        prediction_type: gaussian.PredictionType = "epsilon",
        variance_type: gaussian.VarianceType = "learned_range",
        sampler: Literal["ancestral", "ddim"] = "ancestral",
        ddim_eta: float = 0.0,
        float32_tables: bool = False,
    ) -> None:
        if num_train_timesteps < 1:
            raise OpenSoraError(f"got num_train_timesteps={num_train_timesteps}; expected at least 1")
        _check_choice("beta_schedule", beta_schedule, ("linear", "cosine"))
        _check_choice("prediction_type", prediction_type, ("epsilon", "sample"))
        _check_choice("variance_type", variance_type, ("learned_range", "fixed_small", "fixed_large"))
        _check_choice("sampler", sampler, ("ancestral", "ddim"))
        if not 0 <= ddim_eta <= 1:
            raise OpenSoraError(f"got ddim_eta={ddim_eta}; expected a number from 0 (deterministic) to 1")
        self.num_train_timesteps = num_train_timesteps
        self.prediction_type: gaussian.PredictionType = prediction_type
        self.variance_type: gaussian.VarianceType = variance_type
        self.sampler = sampler
        self.ddim_eta = ddim_eta
        if beta_schedule == "linear":
            self._betas = gaussian.linear_betas(num_train_timesteps, beta_start, beta_end)
        else:
            self._betas = gaussian.cosine_betas(num_train_timesteps)
        self._dtype = torch.float32 if float32_tables else torch.float64
        self.train_tables = gaussian.make_tables(self._betas, dtype=self._dtype)
        """Tables of all N steps, for training and :meth:`add_noise`."""
        # As in every diffusers scheduler there is something to iterate before set_timesteps: every training step.
        self._schedule(range(num_train_timesteps), device=None)
        self.num_inference_steps: int | None = None

    def default_cfg_channels(self, latent_channels: int) -> int | None:
        """3, as the published samplers guide."""
        return min(3, latent_channels)

    def noise_process(self) -> GaussianProcess:
        """What such networks are trained with: steps are drawn alike, and have the same weight."""
        return GaussianProcess(self.train_tables, self.prediction_type, self.variance_type)

    # --- the schedule -------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | str | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        *,
        timesteps: Sequence[int] | torch.Tensor | None = None,
    ) -> None:
        """Choose the steps of one run and put them into ``timesteps``, (n,) int64, descending.

        Args:
            num_inference_steps: 100 or ``"100"``, ``"ddim50"``, ``"10,15,20"``; see
                :func:`opensora.diffusion.gaussian.respaced_timesteps`. ``None`` takes every training step.
            device: where ``timesteps`` goes; ``None`` is the CPU.
            timesteps: a schedule of one's own instead of a number of steps, descending whole numbers in [0, N).

        Raises:
            OpenSoraError: not a number of steps or spec of them, more than N, or a schedule that does not descend or
                leaves its range.
        """
        if timesteps is not None:
            values = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
            allowed = bool(((values >= 0) & (values < len(self)) & (values == values.round())).all())
            expected = f"whole numbers in [0, {len(self)})"
            check_schedule("timesteps", values, num_inference_steps, expected=expected, allowed=allowed)
            self._schedule(values.long().flip(0).tolist(), device)
            return
        everything = range(self.num_train_timesteps)
        spec = num_inference_steps
        kept = everything if spec is None else gaussian.respaced_timesteps(self.num_train_timesteps, spec)
        self._schedule(kept, device)

    def _schedule(self, kept: Sequence[int], device: torch.device | str | None) -> None:
        self.tables = gaussian.make_tables(self._betas, kept, dtype=self._dtype)
        """Tables of the steps of this run."""
        self.timesteps = self.tables.timestep_map.flip(0).to(device=device)
        self._values = [float(timestep) for timestep in reversed(kept)]
        self._begun: tuple[int, torch.Tensor] | None = None
        self.num_inference_steps = len(kept)
        self._begin_run()

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """abar of the training steps, (N,)."""
        return self.train_tables.alphas_cumprod

    def _index(self, timestep: torch.Tensor | float) -> int:
        """The row of ``tables`` that a timestep is, which is also how many steps come after it."""
        return len(self._values) - 1 - index_of(timestep, self._values)

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
        """Before the network is called: say which frames are generated at this step, and noise those that just begin.

        A frame of strength s begins with floor(s n) steps to go after this one. As in Open-Sora 1.1, a frame of
        strength 0 thus begins at the very last step and comes out almost, not exactly, as it was given; and in the
        step in which a frame begins the network still takes it for conditioning, though :meth:`step` moves it. Networks
        that predict clean latents, which the reference has none of, are spared both.

        Args:
            sample: latents, (B, C, T, H, W); conditioning frames are clean, frames of strength 1 are noise.
            timestep: an entry of ``timesteps``.
            frame_strength: (B, T) in [0, 1], the same throughout a run. To keep frames exactly, do without this
                method and give a bool mask to the network and to :meth:`step`.
            generator: source of ``noise``; a list holds one per sample.
            noise: standard normal noise like ``sample``. It is drawn at every step, needed or not, so that a run's
                random numbers do not depend on the strengths.

        Returns:
            The sample with the frames that begin at this step noised to ``timestep``, and ``frame_mask``, (B, T) bool,
            for the network and for :meth:`step` at the same timestep.

        Raises:
            OpenSoraError: ``timestep`` is not in the schedule, or ``frame_strength`` has the wrong shape.
        """
        check_frames("frame_strength", frame_strength, sample)
        index = self._index(timestep)
        noise = noise_like(sample, generator) if noise is None else noise
        # In float32, where 0.29 * 100 is 29 and not a hair less.
        begin = (frame_strength.to(device=sample.device, dtype=torch.float32) * len(self.tables)).to(torch.int64)
        begun, generated = begin == index, begin > index
        if self._is_first(len(self.tables) - 1 - index):
            # Frames whose turn would have been before the run began; those of full strength are noise already.
            late = generated & (begin < len(self.tables))
            begun, generated = begun | late, generated & ~late
        if self.prediction_type == "sample":
            # What a network says of frames that it takes for clean is learnt by nobody. As noise, which is all but gone
            # in the last step, it does no harm; as clean latents it would take their place.
            begun = begun & (frame_strength.to(begun.device) > 0)
            generated = generated | begun
        self._begun = (index, begun)
        noised = gaussian.q_sample(self.tables, sample, torch.tensor([index]), noise).to(sample.dtype)
        return choose_frames(begun, noised, sample), generated

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
    ) -> IDDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Walk from ``timestep`` to the next one, or to the clean latents from the last.

        Args:
            model_output: guided output of the network, (B, 2C, T, H, W) with learned variance, else (B, C, T, H, W).
            timestep: an entry of ``timesteps``.
            sample: latents at ``timestep``, (B, C, T, H, W).
            frame_mask: (B, T) bool; frames where it is False are returned as they came, unless
                :meth:`activate_frames` let them begin at this very step.
            generator: source of ``noise``; a list holds one per sample.
            noise: standard normal noise like ``sample``. Drawn only where it is used: not by the last step, nor by
                DDIM with ``ddim_eta`` 0.
            return_dict: ``False`` returns a tuple of the same two.

        Returns:
            ``.prev_sample`` and ``.pred_original_sample``, each of the shape and dtype of ``sample``.

        Raises:
            OpenSoraError: ``timestep`` is not in the schedule, the wrong number of channels, or a mask of wrong shape.
        """
        index = self._index(timestep)
        self._step_index = len(self._values) - index
        if noise is None and index > 0 and not (self.sampler == "ddim" and self.ddim_eta == 0):
            noise = noise_like(sample, generator)
        elif index == 0:
            noise = None
        t = torch.tensor([index])
        reverse = gaussian.p_distribution(
            self.tables,
            model_output,
            sample,
            t,
            prediction_type=self.prediction_type,
            variance_type=self.variance_type,
        )
        if self.sampler == "ddim":
            stepped = gaussian.ddim_step(self.tables, reverse.clean, sample, t, noise, self.ddim_eta)
        else:
            stepped = reverse.mean if noise is None else gaussian.ancestral_step(reverse, t, noise)
        stepped, clean = stepped.to(sample.dtype), reverse.clean.to(sample.dtype)
        begun, self._begun = self._begun, None
        if frame_mask is not None:
            check_frames("frame_mask", frame_mask, sample)
            moves = frame_mask.to(device=sample.device, dtype=torch.bool)
            if begun is not None and begun[0] == index:
                moves = moves | begun[1]
            stepped = choose_frames(moves, stepped, sample)
        return IDDPMSchedulerOutput(stepped, clean) if return_dict else (stepped, clean)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noise clean latents to steps of the training schedule.

        Args:
            original_samples: clean latents, (B, C, T, H, W).
            noise: standard normal, same shape.
            timesteps: int64 in [0, N), (B,), or (B, T) for a step of its own for every frame, or one number.

        Returns:
            Shape and dtype of ``original_samples``.

        Raises:
            OpenSoraError: timesteps that are not whole numbers in range.
        """
        timesteps = torch.as_tensor(timesteps)
        if timesteps.is_floating_point() or bool(((timesteps < 0) | (timesteps >= len(self))).any()):
            raise OpenSoraError(
                f"got timesteps {timesteps.tolist()} of {timesteps.dtype}; expected whole numbers in [0, {len(self)})"
            )
        timesteps = timesteps.reshape(1) if timesteps.ndim == 0 else timesteps
        noisy = gaussian.q_sample(self.train_tables, original_samples, timesteps.to(original_samples.device), noise)
        return noisy.to(original_samples.dtype)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OpenSoraError(f"got {name}={value!r}; {expected_one_of(value, choices)}")
