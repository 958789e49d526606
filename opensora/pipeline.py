"""From a sentence to a video: the denoising loop, readable top to bottom in `OpenSoraPipeline.__call__`.

Text is encoded once and turned into every layer's keys and values once; noise is walked to latents by the scheduler,
each step on the conditional and the unconditional branch in one batch; the autoencoder turns latents into pixels.
Latents stay in float32 whatever precision the networks run in. What a model samples best with (guidance, steps, size,
frame rate) and how its prompts are spelled stand in the pipeline's own `model_index.json`, so a folder is complete in
itself; only the bundled toybox-iddpm uses toybox's autoencoder, and has none of its own until it is saved.

Letters: B videos, C latent channels, T' latent frames, (H', W') latent size, T frames, (H, W) pixels.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from opensora.conditioning import GivenFrames
from opensora.distributed.sampling import SamplingRanks, sampling_ranks
from opensora.errors import OpenSoraError
from opensora.geometry import SizeRule, VideoSize
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.clip_conditions import IMAGE_FPS, ClipConditions
from opensora.models.guidance import (
    NOT_GIVEN,
    CfgChannels,
    ChannelGuidance,
    NotGiven,
    default_guider,
    merge_cfg_channel_alias,
)
from opensora.models.portable_config import PortablePipelineMixin
from opensora.models.schedulers.base import check_scheduler
from opensora.models.text.cleaning import clean_text
from opensora.models.text.encoders import encode_prompts, null_prompts
from opensora.models.text.prompts import append_scores, pair_prompts
from opensora.models.transformer import TextContext
from opensora.staging import Stages

OutputType = Literal["pt", "np", "pil", "latent"]
_OUTPUT_TYPES = ("pt", "np", "pil", "latent")


@dataclass
class OpenSoraPipelineOutput(BaseOutput):
    """What a call returns.

    Attributes:
        frames: by `output_type`: "pt" (B, T, 3, H, W) float32 in [0, 1] on the CPU; "np" (B, T, H, W, 3), likewise;
            "pil" a list of B lists of T images; "latent" (B, C, T', H', W') normalised latents.
        settings: everything the run was resolved to, as plain JSON values; with the prompts and the model enough to
            make it again.
    """

    frames: Any
    settings: dict[str, Any] = field(default_factory=dict)


class OpenSoraPipeline(PortablePipelineMixin, DiffusionPipeline):
    """Text to video with a diffusion transformer of the Open-Sora family.

    Attributes:
        stages: keeps networks in memory only while they work (`load_pipeline(..., offload=True)`); None for always.
        sequential_guidance: the branches of guidance run one after the other instead of in one batch, which takes half
            the memory.
        ranks: how several processes share each clip (`parallelize`); None for one process.

    Args:
        transformer: predicts velocity or noise from latents, timestep and text, e.g. `STDiT3`.
        scheduler: `RectifiedFlowScheduler`, `IDDPMScheduler` or `DPMSolverScheduler`.
        autoencoder: a `VideoCodec`, pixels <-> normalised latents.
        text_encoder: `T5EncoderModel` of transformers.
        tokenizer: its tokenizer.
        guidance_scale: default strength of classifier-free guidance, 1 = none.
        num_inference_steps: default number of steps.
        cfg_channels: default for which latent channels are guided: the first k, a list of indices, or None for all.
            Left out: 3 for `IDDPMScheduler`, as its published samplers guide, and all for rectified flow. DPM-Solver++
            guides all by default, whatever stands here.
        height: default height in pixels.
        width: default width in pixels.
        num_frames: default number of frames.
        fps: default frames per second; part of what the transformer is conditioned on.
        max_frames: the largest number of frames it can make; None for no limit.
        frame_interval: files are written at `fps / frame_interval`: the frames the model makes are so far apart, though
            it is told `fps`.
        nominal_size: (height, width) that the transformer is told by default, where it is not the size that is made.
        image_fps: frames per second that the transformer is told for a single frame; None for `fps`.
        aspect_ratio_order: how aspect ratios of this model are written, "width:height" or "height:width".
        clip_frames: frames of the clip that durations count in ("2x", "4s", see `geometry.named_num_frames`); None
            where seconds are seconds.
        clip_s: how many seconds such a clip is said to last.
        clean_prompts: prompts are spelled as its captions were, see `models.text.cleaning`.
        scores: scores it knows, with the default of each (`aesthetic`, `flow`, `camera_motion`; None for none), see
            `models.text.prompts.append_scores`; None for a model that knows none.
        frame_alignment: latent frames to whose multiples mask strategies are aligned; None for no alignment.
        condition_frames: latent frames that a long video carries over from loop to loop.
        trained_on: what the transformer's latents were: `latent_space` (see `LatentSpace`) and `autoencoder`, a hash of
            its weights; None if nobody knows.

    Raises:
        OpenSoraError: two components are not of one model: transformer and autoencoder disagree on the number of latent
            channels or on the latent space, or scheduler and autoencoder on how many latent frames a video has.
    """

    model_cpu_offload_seq = "text_encoder->transformer->autoencoder"
    # Declared for readers and type checkers; both are diffusers'.
    config: Any
    progress_bar: Any

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        autoencoder: Any,
        text_encoder: Any,
        tokenizer: Any,
        guidance_scale: float = 7.0,
        num_inference_steps: int = 30,
        cfg_channels: int | Sequence[int] | str | NotGiven | None = NOT_GIVEN,  # diffusers fails on a Literal
        height: int = 240,
        width: int = 424,
        num_frames: int = 51,
        fps: int | float = 24,  # both, or diffusers warns of a whole number
        max_frames: int | None = None,
        frame_interval: int = 1,
        nominal_size: Sequence[int] | None = None,
        image_fps: int | float | None = IMAGE_FPS,
        aspect_ratio_order: str = "width:height",
        clip_frames: int | None = None,
        clip_s: int = 2,
        clean_prompts: bool = False,
        scores: dict[str, float | str | None] | None = None,
        frame_alignment: int | None = None,
        condition_frames: int = 2,
        trained_on: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if transformer.config.in_channels != autoencoder.latent_channels:
            raise OpenSoraError(
                f"the transformer works on {transformer.config.in_channels} latent channels, the autoencoder makes "
                f"{autoencoder.latent_channels}; they must come from one model"
            )
        check_scheduler(scheduler)
        _check_time_shift(scheduler, autoencoder)
        _check_trained_on(trained_on, autoencoder)
        if isinstance(cfg_channels, NotGiven):
            cfg_channels = scheduler.default_cfg_channels(autoencoder.latent_channels)
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            autoencoder=autoencoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            cfg_channels=cfg_channels,
            height=height,
            width=width,
            num_frames=num_frames,
            fps=fps,
            max_frames=max_frames,
            frame_interval=frame_interval,
            nominal_size=None if nominal_size is None else list(nominal_size),
            image_fps=image_fps,
            aspect_ratio_order=aspect_ratio_order,
            clip_frames=clip_frames,
            clip_s=clip_s,
            clean_prompts=clean_prompts,
            scores=scores,
            frame_alignment=frame_alignment,
            condition_frames=condition_frames,
            trained_on=trained_on,
        )
        self.stages: Stages | None = None
        self.sequential_guidance = False
        self.ranks: SamplingRanks | None = None
        self._current_timestep: Tensor | None = None

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        nominal_size: Sequence[int] | None = None,
        fps: float | None = None,
        scores: Mapping[str, float | str | None] | None = None,
        given: GivenFrames | None = None,
        num_inference_steps: int | str | None = None,
        guidance_scale: float | None = None,
        cfg_channels: CfgChannels | NotGiven = NOT_GIVEN,
        cfg_channel: CfgChannels | NotGiven = NOT_GIVEN,
        guider: Any = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pt",
        callback_on_step_end: Callable[..., Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Make one video per prompt, or several; what is left out comes from the model's own defaults.

        Args:
            prompt: a sentence or a list of them.
            negative_prompt: what to steer away from, one sentence for all prompts or one each; None for the
                transformer's learned null text.
            height: in pixels.
            width: in pixels.
            num_frames: of the video.
            nominal_size: (height, width) that the transformer is told; None for the default of the default size, and
                for the true one of any other.
            fps: frames per second.
            scores: `aesthetic`, `flow` and `camera_motion`, in place of the model's defaults.
            given: frames that are there already, see `conditioning.condition`.
            num_inference_steps: a number; for `IDDPMScheduler` also a respacing such as "ddim50".
            guidance_scale: strength of classifier-free guidance; 1 = none, which halves the work.
            cfg_channels: which latent channels are guided: the first k, a list of indices, None or "all".
            cfg_channel: an older name of `cfg_channels`.
            guider: a guider of `diffusers.guiders` in place of plain guidance; it brings its own scale.
            num_videos_per_prompt: the videos of one prompt come one after the other.
            generator: a list holds one per video, and each video is then the one it would be alone. A single one is
                used as it is for one video and seeds one per video for several. None draws the seeds at random.
            latents: the noise to start from, (B, C, T', H', W').
            output_type: see `OpenSoraPipelineOutput.frames`.
            callback_on_step_end: called after each step as (pipeline, step, timestep, {"latents": latents}); may
                return a dict with new "latents".
            return_dict: False returns `(frames,)`.

        Returns:
            `OpenSoraPipelineOutput`: the frames, and the settings they were made with.

        Raises:
            OpenSoraError: a value that is impossible for this model (a size is answered with the nearest valid one),
                or latents that are not finite.
        """
        if output_type not in _OUTPUT_TYPES:
            raise OpenSoraError(f"output_type is {output_type!r}; expected one of {', '.join(_OUTPUT_TYPES)}")
        channels = merge_cfg_channel_alias(cfg_channels, cfg_channel, default=self.default_cfg_channels)
        guidance = self._guidance(guider, guidance_scale, channels)
        prompts, negative_prompts = pair_prompts(prompt, negative_prompt, num_videos_per_prompt)
        size = self._size(num_frames, height, width)
        told = self._told(size, nominal_size, fps)
        generators = generators_per_video(generator, len(prompts))
        device = self._execution_device

        timesteps = self._timesteps(num_inference_steps, told, device)
        num_steps = len(timesteps)
        guided = [guidance.needs_uncond(step=i, num_inference_steps=num_steps, timestep=t) for i, t in timesteps]
        sample = self._initial_latents(latents, len(prompts), size, generators, device)
        sample, strength = _with_given_frames(sample, given)
        if self.ranks is not None:
            sample = self.ranks.follow_first(sample, generators)
        frame_mask = None
        spelled = self._spell(prompts, self._scores(scores))
        spelled_negative = None if negative_prompts is None else self._spell(negative_prompts, {})
        text = self._encode_text(spelled, spelled_negative, device)
        with self.resident("transformer"), self._hooks_left_clean(), self.progress_bar(total=num_steps) as progress:
            text_contexts = self._text_contexts(text, guided)
            for i, t in timesteps:
                self._current_timestep = t
                if strength is not None:
                    sample, frame_mask = self.scheduler.activate_frames(sample, t, strength, generator=generators)
                cond, uncond = self._predict(sample, t, text_contexts[guided[i]], frame_mask, told, i, num_steps)
                if guided[i] and self.ranks is not None and self.ranks.branches is not None:
                    cond, uncond = self.ranks.exchange(cond)  # what this rank has predicted is one of them
                prediction = guidance(cond, uncond, step=i, num_inference_steps=num_steps, timestep=t)
                sample = self.scheduler.step(
                    prediction, t, sample, frame_mask=frame_mask, generator=generators
                ).prev_sample
                if callback_on_step_end is not None:
                    sample = (callback_on_step_end(self, i, t, {"latents": sample}) or {}).get("latents", sample)
                progress.update()

        del text, text_contexts  # their memory is decoding's
        _check_finite(sample, f"after {num_steps} steps in {self.transformer.dtype}")
        with self.resident("autoencoder"):
            frames = sample if output_type == "latent" else self._decode(sample, size, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (frames,)
        settings = {
            **self.describe(),
            **asdict(size),
            "prompt": prompts,
            "negative_prompt": negative_prompts,
            "spelled_prompt": spelled,
            "clip_conditions": asdict(told),
            "frame_strength": None if strength is None else strength.tolist(),
            "seed": [generator.initial_seed() for generator in generators],
            "fps": self.config.fps if fps is None else fps,
            "num_inference_steps": num_inference_steps or self.config.num_inference_steps,
            **_describe_guidance(guidance),
        }
        return OpenSoraPipelineOutput(frames, settings)

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """As diffusers.

        Raises:
            OpenSoraError: the pipeline is offloaded, so its weights are not there.
        """
        if self.stages is not None:
            raise OpenSoraError("an offloaded pipeline cannot be saved; load it without offload")
        super().save_pretrained(save_directory, **options)

    def resident(self, name: str) -> contextlib.AbstractContextManager[None]:
        """The stage of one network ("text_encoder", "transformer", "autoencoder"): it is in memory within.

        Who uses a network of an offloaded pipeline outside of a call asks for its stage.
        """
        return contextlib.nullcontext() if self.stages is None else self.stages.resident(name)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return super().device if self.stages is None else self.stages.device

    @property
    def current_timestep(self) -> Tensor | None:
        """Where the denoising loop is, for caches that ask; None outside it."""
        return self._current_timestep

    @contextlib.contextmanager
    def _hooks_left_clean(self) -> Iterator[None]:
        """Clears what caches and offloading keep between steps, also after an error or Ctrl-C."""
        try:
            yield
        finally:
            self._current_timestep = None
            self.maybe_free_model_hooks()

    # --- before the loop ----------------------------------------------------------------------------------------------

    def size_rule(self) -> SizeRule:
        """Which sizes this model can make."""
        return self.autoencoder.size_rule(self.config.max_frames)

    def _size(self, num_frames: int | None, height: int | None, width: int | None) -> VideoSize:
        return VideoSize(
            self.config.num_frames if num_frames is None else num_frames,
            self.config.height if height is None else height,
            self.config.width if width is None else width,
        ).check(self.size_rule())

    def _told(self, size: VideoSize, nominal_size: Sequence[int] | None, fps: float | None) -> ClipConditions:
        """What the transformer and the time shift are told of the clip."""
        fps = self.config.fps if fps is None else fps
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not (math.isfinite(fps) and fps > 0):
            raise OpenSoraError(f"fps is {fps!r}; expected a positive number")
        if nominal_size is None and (size.height, size.width) == (self.config.height, self.config.width):
            nominal_size = self.config.nominal_size
        height, width = nominal_size or (size.height, size.width)
        return ClipConditions.of_clip(height, width, size.num_frames, fps, self.config.image_fps)

    def _scores(self, scores: Mapping[str, float | str | None] | None) -> dict[str, Any]:
        """The model's default scores, with the caller's in their place."""
        known = self.config.scores or {}
        for name in scores or {}:
            if name not in known:
                knows = f"it knows {', '.join(known)}" if known else "it knows none; leave them out"
                raise OpenSoraError(f"this model was not trained with the score {name!r}; {knows}")
        return {**known, **(scores or {})}

    def _spell(self, prompts: list[str], scores: Mapping[str, Any]) -> list[str]:
        """Prompts as the model's captions were: with scores at the end, cleaned."""
        spelled = [append_scores(prompt, **scores) for prompt in prompts]
        return [clean_text(prompt) for prompt in spelled] if self.config.clean_prompts else spelled

    def _guidance(self, guider: Any, guidance_scale: float | None, cfg_channels: CfgChannels) -> ChannelGuidance:
        if guider is not None and guidance_scale is not None:
            raise OpenSoraError(
                f"got guidance_scale={guidance_scale} and a {type(guider).__name__}, which has a scale of its own; "
                "give one of them"
            )
        if guider is None:
            guider = default_guider(self.config.guidance_scale if guidance_scale is None else guidance_scale)
        return ChannelGuidance(guider, cfg_channels, self.autoencoder.latent_channels)

    def _timesteps(
        self, num_inference_steps: int | str | None, told: ClipConditions, device: torch.device
    ) -> list[tuple[int, Tensor]]:
        """The numbered timesteps of the run."""
        # A time shift depends on the size of the video; schedulers without one do not ask for it.
        asked_for = inspect.signature(self.scheduler.set_timesteps).parameters
        sizes = {"height": told.height, "width": told.width, "num_frames": int(told.num_frames)}
        sizes = {name: value for name, value in sizes.items() if name in asked_for}
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        self.scheduler.set_timesteps(steps, device=device, **sizes)
        return list(enumerate(self.scheduler.timesteps))

    def _encode_text(
        self, prompts: list[str], negative_prompts: list[str] | None, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """States and mask of the prompts, and of the negative prompts, or None for the null text."""
        place = {
            "max_length": self.transformer.null_text.shape[0],
            "device": device,
            "dtype": self.transformer.dtype,
        }
        with self.resident("text_encoder"):
            states, mask = encode_prompts(self.tokenizer, self.text_encoder, prompts, **place)
            if negative_prompts is None:
                return states, mask, None, None
            return states, mask, *encode_prompts(self.tokenizer, self.text_encoder, negative_prompts, **place)

    def _text_contexts(
        self, text: tuple[Tensor, Tensor, Tensor | None, Tensor | None], guided: list[bool]
    ) -> dict[bool, list[TextContext]]:
        """Text keys and values of every layer, for steps without and with guidance; only what the run needs.

        One context for each pass of the transformer: text alone; text and null or negative text in one batch, one after
        the other, or one of them alone where another rank has the other.
        """
        states, mask, other_states, other_mask = text
        if other_states is None or other_mask is None:
            other_states, other_mask = null_prompts(self.transformer.null_text.to(states.device, states.dtype), mask)
        encode, contexts = self.transformer.encode_text, {}
        branches = [(states, mask), (other_states, other_mask)]
        if not all(guided):
            contexts[False] = [encode(states, mask)]
        if any(guided) and self.ranks is not None and self.ranks.branch is not None:
            contexts[True] = [encode(*branches[self.ranks.branch])]
        elif any(guided) and self.sequential_guidance:
            contexts[True] = [encode(*branch) for branch in branches]
        elif any(guided):
            contexts[True] = [encode(torch.cat([states, other_states]), torch.cat([mask, other_mask]))]
        return contexts

    def _predict(
        self,
        sample: Tensor,
        t: Tensor,
        text_contexts: list[TextContext],
        frame_mask: Tensor | None,
        told: ClipConditions,
        step: int,
        num_steps: int,
    ) -> tuple[Tensor, Tensor | None]:
        """What the network says with the text, and without it if this step is guided."""
        network, predictions = self.transformer, []
        for number, text_context in enumerate(text_contexts):
            branches = len(text_context.states) // len(sample)
            # What a cache keeps has the batch size of its branches, and is of one branch where they run by turns.
            name = f"{branches} branches, pass {number} of {len(text_contexts)}"
            with network.cache_context(name, step_index=step, num_inference_steps=num_steps):
                prediction = network(
                    self.scheduler.scale_model_input(sample, t).repeat(branches, 1, 1, 1, 1).to(network.dtype),
                    t.expand(branches * len(sample)),
                    text_context=text_context,
                    frame_mask=None if frame_mask is None else frame_mask.repeat(branches, 1),
                    clip_conditions=told,
                ).sample.float()
            predictions += prediction.split(len(sample))
        return predictions[0], predictions[1] if len(predictions) == 2 else None

    def _initial_latents(
        self,
        latents: Tensor | None,
        num_videos: int,
        size: VideoSize,
        generators: list[torch.Generator],
        device: torch.device,
    ) -> Tensor:
        latent_size = self.autoencoder.latent_size((size.num_frames, size.height, size.width))
        shape = (num_videos, self.autoencoder.latent_channels, *latent_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise OpenSoraError(
                f"latents have the shape {tuple(latents.shape)}; {num_videos} times {size} take {shape}"
            )
        _check_finite(latents, "before the first step")
        return latents.to(device, torch.float32) * self.scheduler.init_noise_sigma

    def parallelize(self, *, guidance: bool = False, sequence: int | None = None) -> None:
        """Share each clip among the ranks of torch.distributed, which is initialised.

        From then on all ranks call the pipeline alike, sample from the noise of rank 0, and all return the clip.

        Args:
            guidance: the two branches of guidance on two ranks, or two groups of them.
            sequence: ranks that share a clip's tokens; None for all there are, or half of them with `guidance`.

        Raises:
            OpenSoraError: the number of ranks is another, or a cache of the transformer does not allow it.
        """
        ranks = sampling_ranks(guidance=guidance, sequence=sequence)
        if ranks.sequence is None:
            self.transformer.disable_sequence_parallel()
        else:
            self.transformer.enable_sequence_parallel(ranks.sequence)
        self.ranks = ranks

    def use_sampler(self, name: str) -> None:
        """Sample otherwise: a network that predicts noise or clean latents can be sampled in three ways.

        See `default_cfg_channels` for what that changes.

        Args:
            name: "ancestral" (IDDPM), "ddim", or "dpm-solver++".

        Raises:
            OpenSoraError: an unknown name, or a model of rectified flow, which has one sampler only.
        """
        self.register_modules(scheduler=self.scheduler.with_sampler(name))

    @property
    def default_cfg_channels(self) -> CfgChannels:
        """Which channels are guided unless a call says otherwise: the model's, but all with DPM-Solver++."""
        return None if self.scheduler.guides_all_channels else self.config.cfg_channels

    # --- after the loop -----------------------------------------------------------------------------------------------

    def _decode(self, latents: Tensor, size: VideoSize, output_type: OutputType) -> Any:
        video = self.autoencoder.decode_latents(latents, size.num_frames).float()
        frames = video.div_(2).add_(0.5).clamp_(0, 1).permute(0, 2, 1, 3, 4).cpu()  # in place: videos are large
        if output_type == "pt":
            return frames
        pixels = frames.permute(0, 1, 3, 4, 2).contiguous().numpy()
        if output_type == "np":
            return pixels
        return [[PIL.Image.fromarray(frame) for frame in clip] for clip in (pixels * 255).round().astype(np.uint8)]

    def describe(self) -> dict[str, Any]:
        """The model's defaults and what it is made of, as plain JSON values.

        `latent_space` tells under `replaces` what the weights declared, where a user's override took its place.
        """
        names = ("num_frames", "height", "width", "fps", "num_inference_steps")
        guidance = self._guidance(None, None, self.default_cfg_channels)
        return {
            **{name: self.config[name] for name in names},
            **_describe_guidance(guidance),
            "dtype": str(self.transformer.dtype).removeprefix("torch."),
            "scheduler": _describe_object(self.scheduler),
            "latent_space": self.autoencoder.latent_space.to_dict(),
        }


def _check_time_shift(scheduler: Any, autoencoder: VideoCodec) -> None:
    """A time shift counts latent frames; it must count them as the autoencoder makes them."""
    if not getattr(scheduler, "use_timestep_transform", False):
        return
    for name in ("temporal_factor", "micro_frame_size"):
        ours, theirs = getattr(scheduler, name), getattr(autoencoder, name)
        if ours != theirs:
            raise OpenSoraError(
                f"the scheduler shifts its timesteps for {name}={ours}, but the autoencoder has {theirs}; "
                f"make the scheduler with {name}={theirs}"
            )


def _check_trained_on(trained_on: Mapping[str, Any] | None, autoencoder: Any) -> None:
    """A transformer works on the latents it was trained on, unless a user overrides what they stand for."""
    if trained_on and "latent_space" in trained_on and not autoencoder.latent_space.overridden:
        wanted = LatentSpace.from_dict(trained_on["latent_space"])
        wanted.check_same(autoencoder.latent_space, here="the transformer's training", there="the autoencoder")


def _with_given_frames(noise: Tensor, given: GivenFrames | None) -> tuple[Tensor, Tensor | None]:
    """Latents to start from, (B, C, T', H', W'), and how much of each frame is made anew, (B, T'); None for all."""
    if given is None:
        return noise, None
    if given.latents.shape[0] not in (1, len(noise)) or given.latents.shape[1:] != noise.shape[1:]:
        raise OpenSoraError(
            f"given frames have latents of shape {tuple(given.latents.shape)}, this run has {tuple(noise.shape)}; "
            "give frames for this size, and for every clip or for all at once"
        )
    strength = given.strength.to(noise.device, torch.float32).expand(len(noise), -1)
    # A frame of strength 1 is all noise: nothing is left of what was given.
    held = given.latents.to(noise).expand_as(noise)
    return torch.where(strength[:, None, :, None, None] < 1, held, noise), strength


def _describe_guidance(guidance: ChannelGuidance) -> dict[str, Any]:
    return {
        "cfg_channels": list(guidance.channels),
        "guidance_scale": getattr(guidance.guider, "guidance_scale", None),
        "guider": _describe_object(guidance.guider),
    }


def _describe_object(configured: Any) -> dict[str, Any]:
    """Class and configuration of a diffusers object, without the libraries' own notes and other classes' options."""
    known = inspect.signature(type(configured).__init__).parameters
    options = {name: value for name, value in dict(configured.config).items() if name in known}
    return {"class": type(configured).__name__, **options}


def generators_per_video(
    generator: torch.Generator | Sequence[torch.Generator] | None, num_videos: int
) -> list[torch.Generator]:
    """One source of noise per video, so that what a video looks like does not depend on its batch."""
    if isinstance(generator, Sequence):
        if len(generator) != num_videos:
            raise OpenSoraError(f"got {len(generator)} generators for {num_videos} videos; give one, or one each")
        return list(generator)
    if isinstance(generator, torch.Generator) and num_videos == 1:
        return [generator]
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**32, (num_videos,), generator=generator, device=device)
    return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]


def _check_finite(latents: Tensor, when: str) -> None:
    if not torch.isfinite(latents).all():
        raise OpenSoraError(
            f"the latents hold NaN or infinite values {when}; run in float32, or check the weights and the noise"
        )
