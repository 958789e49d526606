"""From a sentence to a video: the denoising loop, readable top to bottom in `OpenSoraPipeline.__call__`.

Text is encoded once and turned into every layer's keys and values once; noise is walked to latents by the scheduler,
each step on the conditional and the unconditional branch in one batch; the autoencoder turns latents into pixels.
Latents stay in float32 whatever precision the networks run in. What a model samples best with (guidance, steps, size,
frame rate) and how its prompts are spelled stand in the pipeline's own `model_index.json`, so a folder is complete in
itself; only the bundled models share parts with toybox, and have none of their own until they are saved.

Letters: B videos, C latent channels, T' latent frames, (H', W') latent size, T frames, (H, W) pixels.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import PIL.Image
import torch
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from opensora.conditioning.frames import FrameConditioning
from opensora.distributed.sampling import SamplingRanks, sampling_ranks
from opensora.errors import OpenSoraError
from opensora.geometry import SizeRule, VideoSize
from opensora.media.transforms import to_pixels
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.channel_scales import ChannelScales
from opensora.models.clip_conditions import IMAGE_FPS, ClipConditions
from opensora.models.guidance import (
    NOT_GIVEN,
    CfgChannels,
    NotGiven,
    merge_cfg_channel_alias,
)
from opensora.models.int8 import is_int8
from opensora.models.portable_pipeline import PortablePipelineMixin
from opensora.models.schedulers.base import check_scheduler
from opensora.models.text.conditioner import TextStates
from opensora.models.text.prompts import as_prompt_lists
from opensora.offloading import Offloader
from opensora.sampling.belonging import check_distilled_from, check_time_shift, check_trained_on, describe_object
from opensora.sampling.finite import check_finite
from opensora.sampling.forecast import forecasting_of
from opensora.sampling.forecast_plan import ForecastPlan
from opensora.sampling.frames import begin_with, condition_on_pictures, repeat_each
from opensora.sampling.generators import generators_per_video
from opensora.sampling.guiding import GuidingMixin, check_guidance_options
from opensora.sampling.habits import HabitsMixin
from opensora.sampling.prompting import PromptingMixin
from opensora.sampling.runs import CALLBACK_TENSORS, Run, RunsMixin
from opensora.settings import expected_one_of, to_dict

OutputType = Literal["pt", "np", "pil", "latent"]
_OUTPUT_TYPES = ("pt", "np", "pil", "latent")
_KNOWN_FRAMES = ("free", "noised", "pictures kept")


@dataclass
class OpenSoraPipelineOutput(BaseOutput):
    """What a call returns.

    Attributes:
        frames: by `output_type`: "pt" (B, T, 3, H, W) float32 in [0, 1] on the CPU; "np" (B, T, H, W, 3), likewise;
            "pil" a list of B lists of T images; "latent" (B, C, T', H', W') normalised latents.
        settings: everything the run was resolved to, as plain JSON values; with the prompts and the model enough to
            make it again.
        num_evaluations: videos that went through the transformer, each branch of guidance at each step counted by
            itself; of several ranks, those of this one.
        num_forecast: those that were forecast in place of it, counted likewise.
    """

    frames: Any
    settings: dict[str, Any] = field(default_factory=dict)
    num_evaluations: int = 0
    num_forecast: int = 0


class OpenSoraPipeline(
    RunsMixin,
    PromptingMixin,
    GuidingMixin,
    HabitsMixin,
    PortablePipelineMixin,
    CogVideoXLoraLoaderMixin,
    DiffusionPipeline,
):
    """Text to video with a diffusion transformer of the Open-Sora family.

    Attributes:
        offloader: keeps networks in memory only while they work (`load_pipeline(..., offload=True)`); None for always.
        sequential_guidance: the branches of guidance run one after the other instead of in one batch, which takes half
            the memory.
        ranks: how several processes share each clip (`parallelize`); None for one process.

    Args:
        transformer: predicts velocity or noise from latents, timestep and text, e.g. `STDiT3`.
        scheduler: `RectifiedFlowScheduler`, `IDDPMScheduler` or `DPMSolverScheduler`.
        autoencoder: a `VideoCodec`, pixels <-> normalised latents.
        text_encoder: `T5EncoderModel` of transformers.
        tokenizer: its tokenizer.
        text_encoder_2: a second one, of transformers that read text by two (`CLIPTextModel`); None for the others.
        tokenizer_2: its tokenizer.
        guidance_scale: default strength of classifier-free guidance, 1 = none.
        guidance_options: how it guides besides, keywords of `TextImageGuidance`; None for plain classifier-free
            guidance, or, with guidance distilled into the transformer, none.
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
        scores: scores it knows, with the default of each (`aesthetic`, `flow`, `camera_motion`, `motion`; None for
            none), see `models.text.prompts.append_scores`; with `fps` its prompts tell the frame rate. None for a model
            that knows none.
        scores_in_words: `aesthetic` and `flow` are told in words.
        frame_alignment: latent frames to whose multiples mask strategies are aligned; None for no alignment.
        condition_frames: latent frames that a long video carries over from loop to loop.
        known_frames: what becomes of frames that the transformer is shown beside the noise (strength 0): "free", they
            are generated as all others; "noised", they are put back before every step, noised to its time (SDEdit);
            "pictures kept", those with no known neighbour are put back after the last step.
        trained_on: what the transformer's latents were: `latent_space` (see `LatentSpace`) and `autoencoder`, a hash of
            its weights; None if nobody knows.
        distilled_from: whose path was learnt in `num_steps`, see `training.diffusion.few_steps`; None for nobody's.

    Raises:
        OpenSoraError: two components are not of one model: transformer and autoencoder disagree on the number of latent
            channels or on the latent space, or scheduler and autoencoder on how many latent frames a video has.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->autoencoder"
    _optional_components = ["text_encoder_2", "tokenizer_2"]
    _callback_tensor_inputs = list(CALLBACK_TENSORS)
    # CogVideoXLoraLoaderMixin is diffusers' loader of adapters for pipelines in which a transformer alone is adapted:
    # `load_lora_weights`, `set_adapters`, `fuse_lora`, `unload_lora_weights`, ...
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
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        guidance_scale: float = 7.0,
        guidance_options: dict[str, Any] | None = None,
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
        scores: dict[str, Any] | None = None,  # likewise, of a union within
        scores_in_words: bool = False,
        frame_alignment: int | None = None,
        condition_frames: int = 2,
        known_frames: str = "free",  # likewise, of a Literal
        trained_on: dict[str, Any] | None = None,
        distilled_from: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(autoencoder, VideoCodec):
            raise OpenSoraError(
                f"got {type(autoencoder).__name__} as the autoencoder; expected a VideoCodec, which knows its latent "
                "frames and their scale: put a 2D autoencoder into a VideoAutoencoder"
            )
        if transformer.config.in_channels != autoencoder.latent_channels:
            raise OpenSoraError(
                f"the transformer works on {transformer.config.in_channels} latent channels, the autoencoder makes "
                f"{autoencoder.latent_channels}; they must come from one model"
            )
        if guidance_options is not None:
            check_guidance_options(guidance_scale, guidance_options, transformer)
        if known_frames not in _KNOWN_FRAMES:
            raise OpenSoraError(f"known_frames is {known_frames!r}; {expected_one_of(known_frames, _KNOWN_FRAMES)}")
        if nominal_size is not None and (len(nominal_size) != 2 or min(nominal_size) < 1):
            raise OpenSoraError(f"nominal_size is {list(nominal_size)}; expected a height and a width in pixels")
        check_scheduler(scheduler)
        check_time_shift(scheduler, autoencoder)
        check_trained_on(trained_on, autoencoder)
        check_distilled_from(distilled_from)
        if isinstance(cfg_channels, NotGiven):
            cfg_channels = scheduler.default_cfg_channels(autoencoder.latent_channels)
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            autoencoder=autoencoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.register_to_config(
            guidance_scale=guidance_scale,
            guidance_options=guidance_options,
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
            scores_in_words=scores_in_words,
            frame_alignment=frame_alignment,
            condition_frames=condition_frames,
            known_frames=known_frames,
            trained_on=trained_on,
            distilled_from=distilled_from,
        )
        self.offloader: Offloader | None = None
        self.sequential_guidance = False
        self.ranks: SamplingRanks | None = None
        self._no_runs_yet()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        nominal_size: Sequence[int] | None = None,
        fps: float | None = None,
        scores: Mapping[str, float | str | None] | None = None,
        image: Any = None,
        last_image: Any = None,
        video: Any = None,
        strength: float | None = None,
        conditioning: FrameConditioning | None = None,
        num_inference_steps: int | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        cfg_channels: CfgChannels | NotGiven = NOT_GIVEN,
        cfg_channel: CfgChannels | NotGiven = NOT_GIVEN,
        channel_scales: ChannelScales | None = None,
        guider: Any = None,
        forecast: ForecastPlan | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | int | Sequence[torch.Generator | int] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: TextStates | Tensor | None = None,
        negative_prompt_embeds: TextStates | Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> Any:
        """Make one video per prompt, or several; what is left out comes from the model's own defaults.

        Several threads may call one pipeline: what belongs to a run is kept in the run. Where the networks themselves
        keep something between steps (caches, offloading, ranks), calls wait for each other.

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
            scores: `aesthetic`, `flow`, `camera_motion` and `motion`, in place of the model's defaults.
            image: the picture that the video begins with, resized and cropped to its size: a PIL image, an array
                (H, W, 3), a tensor (3, H, W), numbers in [0, 1] or uint8; a list or one axis more for one per prompt.
            last_image: the picture that it ends with, likewise.
            video: a clip to denoise again: a list of PIL images, an array (T, H, W, 3), a tensor (T, 3, H, W); a list
                of these or one axis more for one per prompt.
            strength: denoising strength of `video`, from 0 (kept) to 1 (generated from noise).
            conditioning: frames that are conditioned on in any other way, see `conditioning.frames.condition`, whose
                `alone` is `transformer.known_frames_alone`.
            num_inference_steps: a number; for `IDDPMScheduler` also a respacing such as "ddim50".
            timesteps: of the steps, in place of a number of them; see the scheduler's `set_timesteps`.
            sigmas: noise levels of the steps, likewise.
            guidance_scale: strength of classifier-free guidance; 1 = none, which halves the work.
            image_guidance_scale: how strongly known frames are followed by a model that reads them beside the noise,
                likewise.
            cfg_channels: which latent channels are guided: the first k, a list of indices, None or "all".
            cfg_channel: an older name of `cfg_channels`.
            channel_scales: in place of `guidance_scale` and `cfg_channels`, a scale for each latent channel (1 = none):
                a list, or ranges ("0-2:7,3:1"). A `guider` works at these in place of its own scale.
            guider: a guider of `diffusers.guiders` in place of plain guidance, or a `GuidanceRule`; it brings its own
                scale. A `GuidanceRule` guides all channels unless `cfg_channels` are given.
            forecast: which predictions are forecast from those before in place of being computed; None computes all.
            num_videos_per_prompt: the videos of one prompt come one after the other.
            generator: a list holds one per video, and each video is then the one it would be alone. A single one is
                used as it is for one video and seeds one per video for several. Seeds may stand for generators. None
                draws the seeds at random.
            latents: the noise to start from, (B, C, T', H', W').
            prompt_embeds: in place of `prompt`, what `encode_prompt` made of it, or text states (B, L, D).
            negative_prompt_embeds: likewise, in place of `negative_prompt`.
            prompt_attention_mask: (B, L), 1 for a token, of text states without one.
            negative_prompt_attention_mask: likewise.
            output_type: see `OpenSoraPipelineOutput.frames`.
            callback_on_step_end: called after each step as (pipeline, step, timestep, tensors); may return a dict with
                new "latents", "prompt_embeds" or "negative_prompt_embeds".
            callback_on_step_end_tensor_inputs: which tensors it is handed, of "latents", "noise_pred" (the guided
                prediction), "prompt_embeds" and "negative_prompt_embeds".
            return_dict: False returns `(frames,)`.

        Returns:
            `OpenSoraPipelineOutput`: the frames, and the settings they were made with.

        Raises:
            OpenSoraError: a value that is impossible for this model (a size is answered with the nearest valid one),
                or text states, latents or decoded frames that are not finite.
        """
        check_scheduler(self.scheduler)  # users put others in its place
        # Callbacks of `diffusers.callbacks` say themselves what they ask for.
        tensor_inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        _check_choices(output_type, tensor_inputs)
        channels = merge_cfg_channel_alias(cfg_channels, cfg_channel, default=NOT_GIVEN)
        rule = self.guidance_rule(guider, guidance_scale, image_guidance_scale, channels, channel_scales)
        prompts, negatives = as_prompt_lists(prompt, negative_prompt, num_videos_per_prompt)
        scores = self.rated_scores(scores, fps)
        size = self._size(num_frames, height, width)
        clip = self._clip_conditions(size, nominal_size, fps)
        with self._exclusive():
            device = self._execution_device
            scheduler = self._prepared_scheduler(num_inference_steps, timesteps, sigmas, clip, device)
            foreseen = forecasting_of(forecast, len(scheduler.timesteps), self.transformer)
            text, negative = self.encode_prompt(
                prompts,
                negatives,
                num_videos_per_prompt=num_videos_per_prompt,
                scores=scores,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                prompt_attention_mask=prompt_attention_mask,
                negative_prompt_attention_mask=negative_prompt_attention_mask,
            )
            generators = generators_per_video(generator, len(text))
            pictures = {"image": image, "last_image": last_image, "video": video, "strength": strength}
            num_prompts = len(text) // num_videos_per_prompt
            conditioning = self._frame_conditioning(conditioning, size, num_prompts, num_videos_per_prompt, **pictures)
            noise = self._initial_latents(latents, len(text), size, scheduler, generators, device)
            in_channels = self.transformer.reads_channels
            sample, frame_strength, known = begin_with(conditioning, noise, in_channels=in_channels)
            if self.ranks is not None:
                sample = self.ranks.follow_first(sample, generators)
            run = Run(self, scheduler, rule, clip, text, negative, sample, frame_strength, generators, known, foreseen)
            self._denoise(run, callback_on_step_end, tensor_inputs)
            sample, num_steps, counted = run.finish(), run.num_steps, run.counted
            del run, text, negative, foreseen  # their memory is decoding's
            check_finite(sample, f"the latents after {num_steps} steps in {self.transformer.dtype}")
            frames = sample if output_type == "latent" else self.decode(sample, size.num_frames, output_type)
            self.maybe_free_model_hooks()
        if not return_dict:
            return (frames,)
        spelled = None if prompts is None else self.spell(prompts, scores)
        per_video = {"prompt": prompts, "negative_prompt": negatives, "spelled_prompt": spelled}
        settings = {
            **self.describe(),
            **asdict(size),
            **{name: _repeated(texts, num_videos_per_prompt) for name, texts in per_video.items()},
            "clip_conditions": asdict(clip),
            "frame_strength": None if frame_strength is None else frame_strength.tolist(),
            "seed": [generator.initial_seed() for generator in generators],
            "fps": self.config.fps if fps is None else fps,
            "num_inference_steps": num_inference_steps or self.config.num_inference_steps,
            **rule.describe(),
        }
        if timesteps is not None or sigmas is not None:
            settings |= {"num_inference_steps": num_steps, "timesteps": scheduler.timesteps.tolist()}
        if forecast is not None:
            settings["forecast"] = to_dict(forecast)
        return OpenSoraPipelineOutput(frames, settings, *counted)

    def _denoise(self, run: "Run", callback: Callable[..., Any] | None, tensor_inputs: Sequence[str]) -> None:
        """Walks the latents of a run from noise to the clip."""
        scheduler, rule = run.scheduler, run.rule
        with self._running(run), self.on_device("transformer"), self.progress_bar(total=run.num_steps) as progress:
            for i, t in enumerate(scheduler.timesteps):
                if run.interrupted:
                    break
                run.timestep, step = t, run.guidance_step(i)
                frame_mask = run.begin_step(t)
                noisy, names = scheduler.scale_model_input(run.latents, t), rule.branches(step)
                run.guided = len(names) > 1
                predictions = run.predict(names, noisy, frame_mask, step=i)
                prediction = rule.combine(predictions, step)
                run.latents = scheduler.step(
                    prediction, t, run.latents, frame_mask=frame_mask, generator=run.generators
                ).prev_sample
                if callback is not None:
                    wanted = {name: run.tensors(prediction)[name] for name in tensor_inputs}
                    run.replace(callback(self, i, t, wanted) or {})
                progress.update()

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """As diffusers.

        Raises:
            OpenSoraError: the pipeline is offloaded, so its weights are not there.
        """
        if self.offloader is not None:
            raise OpenSoraError("an offloaded pipeline cannot be saved; load it without offload")
        super().save_pretrained(save_directory, **options)

    def on_device(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Where one network ("text_encoder", "transformer", "autoencoder") works: it is in memory within.

        Who uses a network of an offloaded pipeline outside of a call asks for it.
        """
        return contextlib.nullcontext() if self.offloader is None else self.offloader.on_device(name)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return super().device if self.offloader is None else self.offloader.device

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

    def check_defaults(self) -> None:
        """Raises `OpenSoraError` if a call that asks for nothing but a prompt would be refused."""
        self.schedule(None, self._size(None, None, None))
        self.guidance_rule()
        self.spell(["rain"])
        self.text_conditioner.blank_tokens(1, "cpu")

    def schedule(self, num_inference_steps: int | str | None, size: VideoSize) -> Any:
        """A scheduler with the steps of a call laid out."""
        clip = self._clip_conditions(size, None, None)
        return self._prepared_scheduler(num_inference_steps, None, None, clip, torch.device("cpu"))

    def _clip_conditions(
        self, size: VideoSize, nominal_size: Sequence[int] | None, fps: float | None
    ) -> ClipConditions:
        """What the transformer and the time shift are told of the clip."""
        if nominal_size is None and (size.height, size.width) == (self.config.height, self.config.width):
            nominal_size = self.config.nominal_size
        height, width = nominal_size or (size.height, size.width)
        rate = self.config.fps if fps is None else fps
        return ClipConditions.of_clip(height, width, size.num_frames, rate, self.config.image_fps)

    def _prepared_scheduler(
        self,
        num_inference_steps: int | str | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        clip: ClipConditions,
        device: torch.device,
    ) -> Any:
        """A scheduler for one run, its steps laid out."""
        scheduler = copy.deepcopy(self.scheduler)
        # A time shift depends on the size of the video; schedulers without one do not ask for it.
        asked_for = inspect.signature(scheduler.set_timesteps).parameters
        num_frames = int(clip.num_frames)
        num_latents = self.autoencoder.latent_frames(num_frames)
        sizes = {"height": clip.height, "width": clip.width, "num_frames": num_frames, "num_latents": num_latents}
        options: dict[str, Any] = {name: value for name, value in sizes.items() if name in asked_for}
        given = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
        if not given.keys() <= asked_for.keys():
            raise OpenSoraError(f"a {type(scheduler).__name__} takes no sigmas; give timesteps, or a number of steps")
        if not given and num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        scheduler.set_timesteps(num_inference_steps, device=device, **options, **given)
        return scheduler

    def _frame_conditioning(
        self, conditioning: FrameConditioning | None, size: VideoSize, num_prompts: int, copies: int, **pictures: Any
    ) -> FrameConditioning | None:
        """The frames to condition on, in whatever way they were handed over."""
        if all(given is None for given in pictures.values()):
            return conditioning
        if conditioning is not None:
            raise OpenSoraError(
                "frames are given in two ways: by image, last_image or video, and by conditioning; use one"
            )
        with self.on_device("autoencoder"):
            alone = self.transformer.known_frames_alone
            shown = condition_on_pictures(self.autoencoder, size, num_prompts, alone=alone, **pictures)
        return repeat_each(shown, copies)

    def _initial_latents(
        self,
        latents: Tensor | None,
        num_videos: int,
        size: VideoSize,
        scheduler: Any,
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
        check_finite(latents, "the latents before the first step")
        return latents.to(device, torch.float32) * scheduler.init_noise_sigma

    def parallelize(self, *, guidance: bool = False, sequence: int | None = None) -> None:
        """Share each clip among the ranks of torch.distributed, which is initialised.

        From then on all ranks call the pipeline alike, sample from the noise of rank 0, and all return the clip.

        Args:
            guidance: the branches of guidance on two ranks or on three, or on as many groups of them.
            sequence: ranks that share a clip's tokens; None for all there are, or with `guidance` for half of them, or
                a third where they are odd.

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

    def use_time_shift(self, shift: float) -> None:
        """Sample rectified flow with its times shifted, one shift for all sizes: `s t / (1 + (s - 1) t)`.

        Args:
            shift: s above 0: above 1 more of the steps are at noisier times; 1 spreads them evenly.

        Raises:
            OpenSoraError: another number, or a model that is none of rectified flow.
        """
        self.register_modules(scheduler=self.scheduler.with_time_shift(shift))

    # --- after the loop -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, latents: Tensor, num_frames: int, output_type: Literal["pt", "np", "pil"] = "pt") -> Any:
        """Frames of normalised latents, as a call returns them, see `OpenSoraPipelineOutput.frames`.

        Raises:
            OpenSoraError: latents of another number of frames, or frames that are not finite.
        """
        with self._exclusive(), self.on_device("autoencoder"):
            video = self.autoencoder.decode_latents(latents, num_frames).float()
        check_finite(video, "the decoded frames")
        frames = video.div_(2).add_(0.5).clamp_(0, 1).permute(0, 2, 1, 3, 4).cpu()  # in place: videos are large
        if output_type == "pt":
            return frames
        pixels = frames.permute(0, 1, 3, 4, 2).contiguous().numpy()
        if output_type == "np":
            return pixels
        return [[PIL.Image.fromarray(frame) for frame in clip] for clip in to_pixels(pixels)]

    def describe(self) -> dict[str, Any]:
        """The model's defaults and what it is made of, as plain JSON values.

        `latent_space` tells under `replaces` what the weights declared, where a user's override took its place;
        `tile_frames` is there where the autoencoder was set to work in other tiles than its own.
        """
        names = ("num_frames", "height", "width", "fps", "frame_interval", "num_inference_steps")
        rule = self.guidance_rule()
        tile_frames = getattr(self.autoencoder, "tile_sample_frames", None)
        own_tiles = tile_frames == self.autoencoder.config.get("tile_sample_frames")
        return {
            **{name: self.config[name] for name in names},
            **({} if own_tiles else {"tile_frames": tile_frames}),
            **rule.describe(),
            "dtype": "int8" if is_int8(self.transformer) else str(self.transformer.dtype).removeprefix("torch."),
            "scheduler": describe_object(self.scheduler),
            "latent_space": self.autoencoder.latent_space.to_dict(),
            **({"distilled_from": origin} if (origin := self.config.distilled_from) else {}),
        }


def _repeated(texts: Sequence[str] | None, times: int) -> list[str] | None:
    """One text per video, those of one prompt one after the other."""
    return None if texts is None else [text for text in texts for _ in range(times)]


def _check_choices(output_type: str, tensor_inputs: Sequence[str]) -> None:
    if output_type not in _OUTPUT_TYPES:
        raise OpenSoraError(f"output_type is {output_type!r}; {expected_one_of(output_type, _OUTPUT_TYPES)}")
    for name in tensor_inputs:
        if name not in CALLBACK_TENSORS:
            raise OpenSoraError(
                f"callback_on_step_end_tensor_inputs names {name!r}; expected some of {', '.join(CALLBACK_TENSORS)}"
            )
