"""A model's guided way from noise to data, learnt to be gone in few steps and without guidance (distillation).

From one noise a frozen teacher walks to the clip in n Euler steps, guided as it is sampled. Its path is cut into N
pieces of as many steps, at the timesteps that a pipeline of N steps visits, the time shift of the clip's size included.
What the student learns at the beginning of a piece is the mean velocity through it, so one Euler step of its own leads
where n / N guided steps of the teacher led: sampling then takes N evaluations in all.

A piece is a straight line, and such a line is what rectified flow trains on: continued to t = 0 and to t = 1 it ends in
"clean latents" and "noise" whose mixture is the path and whose difference is the velocity. So all that a step of
training does with clips it does with pieces; only where they come from differs.

Letters: B clips, C latent channels, T latent frames, h, w latent cells, n teacher's steps, N student's.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.checkpoints.published import BUNDLED, published_name
from opensora.checkpoints.source import ModelSource
from opensora.containers.runs import MODEL
from opensora.denoiser import Denoiser
from opensora.diffusion import flow
from opensora.diffusion.process import RectifiedFlowProcess
from opensora.errors import OpenSoraError
from opensora.models.guidance import GuidanceRule, GuidanceStep, resolve_cfg_channels
from opensora.models.schedulers.base import Scheduler, process_of
from opensora.models.text.conditioner import TextStates
from opensora.sampling.guiding import own_rule
from opensora.training.diffusion.batch import DiffusionBatch
from opensora.training.parts import META, Origin, build_part
from opensora.weights import fingerprint


@dataclass(frozen=True)
class FewSteps:
    """How a teacher's path is learnt in few steps.

    Attributes:
        num_steps: N, evaluations of the student in all.
        teacher_steps: n, Euler steps of the teacher from noise to data, a multiple of N.
        guidance_scale: of the teacher, on the channels that it is guided on; None for its default.
    """

    num_steps: int = 4
    teacher_steps: int = 20
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise OpenSoraError(f"objective.few_steps.num_steps is {self.num_steps}; give 1 or more")
        if self.teacher_steps < 1 or self.teacher_steps % self.num_steps:
            nearest = max(1, round(self.teacher_steps / self.num_steps)) * self.num_steps
            raise OpenSoraError(
                f"objective.few_steps.teacher_steps is {self.teacher_steps}, which {self.num_steps} steps of the "
                f"student do not divide; give a multiple, such as {nearest}"
            )


class GuidedTeacher:
    """A model of rectified flow that walks from noise to data as it is sampled.

    Args:
        origin: a model's name, or a pipeline's folder.
        settings: how far apart the student's steps are, and how strongly the teacher is guided.
        scheduler: of the student; its timesteps are walked.
        student: the transformer that learns.
        device: where it goes.
        dtype: precision of its weights, in which it computes.

    Attributes:
        networks: what is frozen: its transformer.

    Raises:
        OpenSoraError: a model of another noise process, of other latents or texts than the student's, or one whose
            guidance is not that of branches.
    """

    def __init__(
        self,
        origin: Origin,
        settings: FewSteps,
        scheduler: Scheduler,
        student: Any,
        *,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        self.origin, self.settings, self.student_scheduler = origin, settings, scheduler
        source = ModelSource.find(origin, on_disk=device != META)
        if "scheduler" not in source.parts:
            raise OpenSoraError(f"objective.teacher {origin} names no scheduler; a teacher is a whole model")
        self.scheduler = source.parts["scheduler"].load_settings()
        if not isinstance(process_of(self.scheduler), RectifiedFlowProcess):
            raise OpenSoraError(
                f"objective.teacher {origin} was trained with IDDPM; a teacher is a model of rectified flow"
            )
        self.transformer = build_part(origin, "transformer", device, dtype)
        self.networks = nn.ModuleDict({"transformer": self.transformer})
        if self.transformer.reads_guidance:
            raise OpenSoraError(
                f"objective.teacher {origin} is told the scale of its guidance, which was distilled into it; "
                "objective.few_steps takes a teacher that is guided by its branches"
            )
        for name, what in (("in_channels", "latent channels"), ("caption_channels", "channels of text")):
            own, other = self.transformer.config.get(name), student.config.get(name)
            if own != other:
                raise OpenSoraError(
                    f"objective.teacher {origin} reads {own} {what}, the transformer to be trained {other}; name a "
                    "teacher of the same latents and the same text"
                )
        defaults, scale = source.defaults, settings.guidance_scale
        if scale is None and "guidance_scale" not in defaults:
            raise OpenSoraError(
                f"objective.teacher {origin} does not say how strongly it is guided; give "
                "objective.few_steps.guidance_scale"
            )
        self.guidance_scale: float = defaults["guidance_scale"] if scale is None else scale
        self.guidance_options: Mapping[str, Any] = defaults.get("guidance_options") or {}
        self.latent_channels: int = student.config.in_channels
        channels = defaults.get("cfg_channels", self.scheduler.default_cfg_channels(self.latent_channels))
        self.cfg_channels = list(resolve_cfg_channels(channels, self.latent_channels))
        self.rule()  # refuses a scale that is none

    def rule(self) -> GuidanceRule:
        """What guides one walk."""
        own = own_rule(self.transformer, self.guidance_scale, self.guidance_options)
        return self.transformer.guidance_rule(own, self.cfg_channels, self.latent_channels)

    def describe(self) -> dict[str, Any]:
        """What a pipeline says of the one it was distilled from, as plain JSON values."""
        on_meta = next(self.transformer.parameters()).is_meta
        return {
            "teacher": name_of(self.origin),
            "fingerprint": None if on_meta else fingerprint(self.transformer.state_dict()),
            "teacher_steps": self.settings.teacher_steps,
            "guidance_scale": self.guidance_scale,
            "cfg_channels": self.cfg_channels,
            "num_steps": self.settings.num_steps,
        }

    def defaults(self) -> dict[str, Any]:
        """How the student is sampled, as keywords of `OpenSoraPipeline`."""
        return {
            "num_inference_steps": self.settings.num_steps,
            "guidance_scale": 1.0,
            "guidance_options": None,
            "distilled_from": self.describe(),
        }

    @property
    def every(self) -> int:
        """Steps of the teacher to one of the student, n / N."""
        return self.settings.teacher_steps // self.settings.num_steps

    def timesteps(self, **size: float) -> list[float]:
        """Of the teacher's steps, n of them, of which the student's are every n / N-th.

        Args:
            **size: of the clips, see `RectifiedFlowScheduler.set_timesteps`.
        """
        scheduler: Any = copy.deepcopy(self.student_scheduler)
        scheduler.set_timesteps(self.settings.teacher_steps, **size)
        return scheduler.timesteps.tolist()

    @torch.no_grad()
    def walk(self, batch: DiffusionBatch, null: TextStates | None, timesteps: list[float]) -> list[Tensor]:
        """The path of a batch's noise: where it begins, and where each piece of it ends, N + 1 latents (B, C, T, h, w).

        Args:
            batch: with the text of all captions; conditioning frames are clean from the beginning on.
            null: what stands for no text, one row, of networks that read an encoded one.
            timesteps: of all steps.
        """
        assert isinstance(batch.text, TextStates)
        steps = len(timesteps)
        scheduler, rule = copy.deepcopy(self.scheduler), self.rule()
        scheduler.set_timesteps(timesteps=timesteps)
        text, channels, mask = batch.text, batch.channels, batch.frame_mask
        negative = None
        if null is not None:
            length = max(text.states.shape[1], null.states.shape[1])
            text, negative = text.padded(length), null.padded(length).repeat_each(len(text))
        conditioner = self.transformer.text_conditioner({}, self.transformer)
        denoiser = Denoiser(
            self.transformer, conditioner.branches(text, negative), batch.clips.conditions, channels=channels
        )
        clips_known = (False,)
        if channels is not None and not channels.mask.is_meta:
            clips_known = tuple((channels.mask & ~channels.single_frames).any(dim=1).tolist())
        latents = batch.noise
        if mask is not None:
            latents = torch.where(mask[:, None, :, None, None], latents, batch.clips.latents)
        path = [latents]
        for index, timestep in enumerate(timesteps):
            step = GuidanceStep(index, steps, timestep, channels is not None, clips_known)
            told = torch.tensor(timestep, device=latents.device)
            predictions = denoiser(rule.branches(step), latents, told, mask, step=index, num_steps=steps)
            prediction = rule.combine(predictions, step)
            latents = scheduler.step(prediction, timestep, latents, frame_mask=mask).prev_sample
            if (index + 1) % self.every == 0:
                path.append(latents)
        return path


def pieces(
    batch: DiffusionBatch, path: list[Tensor], timesteps: list[float], process: RectifiedFlowProcess
) -> DiffusionBatch:
    """The straight pieces of a path as a batch of rectified flow: N times as many clips, piece after piece.

    Args:
        batch: whose noise the path begins at.
        path: N + 1 latents (B, C, T, h, w).
        timesteps: where the pieces begin, N of them; the last one ends at 0.
        process: that they are learnt by.
    """
    size, last = len(batch.noise), process.num_train_timesteps
    begun = torch.tensor(timesteps).repeat_interleave(size).to(batch.noise.device)
    ended = torch.tensor([*timesteps[1:], 0.0]).repeat_interleave(size).to(batch.noise.device)
    start, end = torch.cat(path[:-1]), torch.cat(path[1:])
    velocity = (end - start) / ((begun - ended) / last)[:, None, None, None, None]
    clean, noise = flow.ends_of_line(start, velocity, begun / last, sigma_min=process.sigma_min)
    learnt = batch.repeated(len(path) - 1)
    # Where objects are in the clips says nothing of where the teacher draws them.
    return replace(learnt, clips=replace(learnt.clips, latents=clean, object_mask=None), noise=noise, t=begun)


def name_of(origin: Origin) -> str:
    """A model's name, or that of its folder; of a run's model, the name of the run."""
    known = str(origin) if str(origin) in BUNDLED else published_name(str(origin))
    path = Path(origin)
    return known or (path.parent.name if path.name == MODEL else path.name)
