"""The state of a call of the pipeline, which belongs to the call: several threads may use one pipeline.

A `Run` holds what one call is doing. The pipeline finds the run of the present thread (or task) where diffusers' users
and caches ask for it: `num_timesteps`, `guidance_scale`, `current_timestep`, `interrupt`.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from opensora.denoiser import Denoiser
from opensora.errors import OpenSoraError
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.clip_conditions import ClipConditions
from opensora.models.guidance import GuidanceRule, GuidanceStep
from opensora.models.schedulers.frames import choose_frames
from opensora.models.text.conditioner import TextStates
from opensora.sampling.forecast import Forecast
from opensora.sampling.frames import renoise_known_frames

CALLBACK_TENSORS = ("latents", "noise_pred", "prompt_embeds", "negative_prompt_embeds")
"""What a callback at the end of a step may ask for."""


@dataclass(eq=False)
class Run:
    """The state of one call. Nothing of it lies on the pipeline, so that several threads may call that.

    Attributes:
        pipeline: that is called.
        scheduler: of this run alone, its steps laid out.
        rule: of guidance, likewise.
        clip: what the network is told of the clips.
        text, negative: one row per clip; None for the unconditional text.
        latents: (B, C, T', H', W'), where the run is.
        frame_strength: (B, T'), the denoising strength of each frame; None for 1.
        generators: one per clip.
        channels: known frames in channels beside the noise; None for none.
        forecast: what is forecast in place of being computed; None for nothing.
        clips_known: for each clip, whether several of these follow each other.
        denoiser: the network and the branches of guidance.
        timestep: of the present step.
        guided: whether that step has more branches than one.
        interrupted: no further step is made.
    """

    pipeline: Any
    scheduler: Any
    rule: GuidanceRule
    clip: ClipConditions
    text: TextStates
    negative: TextStates | None
    latents: Tensor
    frame_strength: Tensor | None
    generators: list[torch.Generator]
    channels: ChannelConditioning | None = None
    forecast: Forecast | None = None
    clips_known: tuple[bool, ...] = field(init=False)
    denoiser: Denoiser = field(init=False)
    timestep: Tensor | None = None
    guided: bool = False
    interrupted: bool = False

    def __post_init__(self) -> None:
        known = self.channels
        follow = torch.zeros(1, 1) if known is None else known.mask & ~known.single_frames
        self.clips_known = tuple(follow.any(dim=1).tolist())
        self._read_texts()

    def _read_texts(self) -> None:
        """Makes the denoiser of the present texts."""
        pipeline = self.pipeline
        self.denoiser = Denoiser(
            pipeline.transformer,
            pipeline.text_conditioner.branches(self.text, self.negative),
            self.clip,
            channels=self.channels,
            guidance_scale=self.guidance_scale if pipeline.transformer.reads_guidance else None,
            sequential=pipeline.sequential_guidance,
            ranks=pipeline.ranks,
        )
        if self.forecast is not None:
            self.forecast.forget()

    def guidance_step(self, index: int) -> GuidanceStep:
        """A step as the rule of guidance sees it."""
        timestep, conditioned = self.scheduler.timesteps[index], self.channels is not None
        return GuidanceStep(index, self.num_steps, timestep, conditioned, self.clips_known)

    def begin_step(self, timestep: Tensor) -> Tensor | None:
        """Puts conditioning frames where the step needs them; which frames are being generated, None for all."""
        frame_mask = None
        if self.frame_strength is not None:
            self.latents, frame_mask = self.scheduler.activate_frames(
                self.latents, timestep, self.frame_strength, generator=self.generators
            )
        if self.channels is not None and self.pipeline.config.known_frames == "noised":
            self.latents = renoise_known_frames(
                self.latents, self.channels, self.scheduler, timestep, generator=self.generators
            )
        return frame_mask

    def predict(self, names: Sequence[str], latents: Tensor, frame_mask: Tensor | None, step: int) -> dict[str, Tensor]:
        """The predictions of some branches, see `Denoiser.__call__`; some may be forecast."""
        assert self.timestep is not None
        where: dict[str, int] = {"step": step, "num_steps": self.num_steps}
        if self.forecast is None:
            return self.denoiser(names, latents, self.timestep, frame_mask, **where)
        return self.forecast(self.denoiser, names, latents, self.timestep, frame_mask, **where)

    def finish(self) -> Tensor:
        """The latents after the last step, with pictures put back if the model's are kept."""
        if self.channels is None or self.pipeline.config.known_frames != "pictures kept":
            return self.latents
        return choose_frames(self.channels.single_frames, self.channels.latents, self.latents)

    @property
    def counted(self) -> tuple[int, int]:
        """Evaluations that were made so far, and those that were forecast, on this rank."""
        return self.denoiser.num_evaluations, 0 if self.forecast is None else self.forecast.num_saved

    @property
    def guidance_scale(self) -> float | None:
        """Of the rule; None for rules without."""
        return self.rule.describe().get("guidance_scale")

    @property
    def num_steps(self) -> int:
        """Of the run."""
        return len(self.scheduler.timesteps)

    def tensors(self, prediction: Tensor) -> dict[str, Any]:
        """What a callback may see after a step that predicted this."""
        return {
            "latents": self.latents,
            "noise_pred": prediction,
            "prompt_embeds": self.text,
            "negative_prompt_embeds": self.negative,
        }

    def replace(self, changes: Mapping[str, Any]) -> None:
        """Takes over what a callback returned; a tensor takes the place of a text's states.

        Raises:
            OpenSoraError: another name, or tensors that are not for these clips.
        """
        for name, value in changes.items():
            if name not in CALLBACK_TENSORS:
                raise OpenSoraError(f"a callback returned {name!r}; expected some of {', '.join(CALLBACK_TENSORS)}")
            wanted = self.latents.shape if name == "latents" else self.latents.shape[:1]
            shape = value.states.shape if isinstance(value, TextStates) else getattr(value, "shape", None)
            if value is not None and (shape is None or shape[: len(wanted)] != wanted):
                found = type(value).__name__ if shape is None else tuple(shape)
                raise OpenSoraError(f"a callback returned {name} of {found}; this run's begin with {tuple(wanted)}")
        latents = changes.get("latents", self.latents).to(self.latents)
        if self.forecast is not None and latents is not self.latents:
            self.forecast.forget()
        self.latents = latents
        text = self._read(changes.get("prompt_embeds", self.text), self.text)
        negative = self._read(changes.get("negative_prompt_embeds", self.negative), self.negative)
        if text is not self.text or negative is not self.negative:
            assert text is not None
            self.text, self.negative = text, negative
            spent = self.denoiser.num_evaluations
            self._read_texts()
            self.denoiser.num_evaluations += spent

    def _read(self, given: TextStates | Tensor | None, present: TextStates | None) -> TextStates | None:
        """A text that a callback returned, as the network reads it."""
        if given is None or given is present:
            return given if isinstance(given, TextStates) else None
        if isinstance(given, Tensor):
            fits = present is not None and given.shape[:2] == present.states.shape[:2]
            given = replace(present, states=given) if fits and present is not None else TextStates(given)
        return given.to(self.latents.device, self.pipeline.transformer.dtype)


_RUN: ContextVar[Run | None] = ContextVar("opensora_run", default=None)
"""The call under way in this thread or task."""


class Turn:
    """A lock that a pipeline's copies do not share."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: Any) -> "Turn":
        return Turn()

    def __reduce__(self) -> tuple[type["Turn"], tuple[()]]:
        return Turn, ()


class RunsMixin:
    """What a pipeline knows of the calls that are under way."""

    networks: dict[str, Any]
    offloader: Any
    ranks: Any
    maybe_free_model_hooks: Any

    def _no_runs_yet(self) -> None:
        """Called once by the pipeline's constructor."""
        self._runs: list[Run] = []  # calls under way, of all threads
        self._turn = Turn()

    @property
    def guidance_scale(self) -> float | None:
        """Of the call under way in this thread; None outside of one, and for rules without."""
        run = self._current_run()
        return None if run is None else run.guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call under way in this thread has an unconditional branch at its present step."""
        run = self._current_run()
        return run is not None and run.guided

    @property
    def num_timesteps(self) -> int | None:
        """Steps of the call under way in this thread; None outside of one."""
        run = self._current_run()
        return None if run is None else run.num_steps

    @property
    def current_timestep(self) -> Tensor | None:
        """Where the denoising loop is, for caches that ask; None outside it."""
        run = self._current_run()
        return None if run is None else run.timestep

    @property
    def interrupt(self) -> bool:
        """Whether the call under way in this thread was asked to stop; it then decodes what it has."""
        run = self._current_run()
        return run is not None and run.interrupted

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        """In a callback this call is meant, from anywhere else every call under way."""
        run = self._current_run()
        for interrupted in list(self._runs) if run is None else [run]:
            interrupted.interrupted = value

    # --- runs ---------------------------------------------------------------------------------------------------------

    def _current_run(self) -> "Run | None":
        run = _RUN.get()
        return run if run is not None and run.pipeline is self else None

    @contextlib.contextmanager
    def _running(self, run: "Run") -> Iterator[None]:
        """Within it the run is this thread's; what caches and offloading keep between steps is cleared afterwards."""
        self._runs.append(run)
        token = _RUN.set(run)
        try:
            yield
        finally:
            _RUN.reset(token)
            self._runs.remove(run)
            self.maybe_free_model_hooks()

    def _exclusive(self) -> contextlib.AbstractContextManager[Any]:
        """Lets one call in at a time where networks keep something between steps: caches, offloading, ranks."""
        networks = [part for part in self.networks.values() if isinstance(part, nn.Module)]
        kept = self.offloader is not None or self.ranks is not None or any(map(_has_hooks, networks))
        return self._turn if kept else contextlib.nullcontext()


def _has_hooks(network: nn.Module) -> bool:
    """Whether diffusers or accelerate keep something at a network's modules."""

    def hooked(module: Any) -> bool:
        registry = getattr(module, "_diffusers_hook", None)
        return getattr(module, "_hf_hook", None) is not None or bool(registry is not None and registry.hooks)

    return any(map(hooked, network.modules()))
