"""`opensora generate`: a prompt becomes a video file.

Mistakes that can be seen without the model (prompt, output, options) are found before it is loaded, those that need
the model (sizes, channels) before sampling starts.
"""

import dataclasses
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from opensora.cli.devices import choose_device
from opensora.cli.jobs import Job, plan, read_prompts
from opensora.cli.record import (
    DTYPES,
    Record,
    Sampling,
    changed_versions,
    check_same_model,
    read_record,
    sidecar_path,
    versions,
)
from opensora.errors import OpenSoraError
from opensora.files import check_writable
from opensora.geometry import VideoSize, num_pixels, parse_aspect_ratio, parse_num_frames, resolve_image_size
from opensora.media.write import FORMATS, check_fps, check_size, format_of, write_video
from opensora.settings import nearest_name, save_settings

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline

DEFAULT_MODEL = "toybox"
DEFAULT_SEED = 42
DEFAULT_FOLDER = Path("outputs")
TOYBOX_MODELS = ("toybox", "toybox-iddpm")

# What --from does not take from the record.
_FREE_WITH_FROM = ("from_", "model", "output", "format", "device", "dtype", "no_metadata")


def _option(metavar: str, default: str = "the model's", **more: Any) -> Any:
    """How an option looks on the help page; every default is None there, so it is told in words."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "", **more)


@dataclass(frozen=True)
class Generate:
    """Turn a prompt into a video.

    The clip's path is printed on stdout, everything else on stderr.
    """

    prompt: Annotated[Positional[str | None], _option("PROMPT", "")] = None
    """What to show."""
    model: Annotated[str | None, _option("NAME|PATH", DEFAULT_MODEL)] = None
    """Bundled model (toybox, toybox-iddpm) or a model's folder."""
    negative_prompt: Annotated[str | None, _option("TEXT", "none")] = None
    """What to steer away from."""
    num_frames: Annotated[str | None, _option("N|4s")] = None
    """Frames, or seconds (the nearest number of frames the model can make)."""
    resolution: Annotated[str | None, _option("NAME", "")] = None
    """Named number of pixels: 144p, 240p, 256, 360p, 480p, 512, 720p, ..."""
    aspect_ratio: Annotated[str | None, _option("W:H")] = None
    """Width to height: 16:9 lies, 9:16 stands."""
    height: Annotated[int | None, _option("PX")] = None
    """Height in pixels."""
    width: Annotated[int | None, _option("PX")] = None
    """Width in pixels."""
    fps: Annotated[float | None, _option("F")] = None
    """Frames per second, of the motion and of the file."""
    num_inference_steps: Annotated[str | None, _option("N")] = None
    """Sampling steps; for IDDPM models also a respacing such as ddim50."""
    guidance_scale: Annotated[float | None, _option("S")] = None
    """How strongly the prompt is followed; 1 switches guidance off."""
    cfg_channels: Annotated[str | None, _option("K|0,2|all", aliases=["--cfg-channel"])] = None
    """Latent channels that guidance touches: the first K, a list of indices ("2," for one), or all."""
    seed: Annotated[int | None, _option("N", str(DEFAULT_SEED))] = None
    """Clip number k of a run (counted over all prompts, from 0) has the seed N + k; each can be made again alone."""
    num_videos: Annotated[int | None, _option("N", "1")] = None
    """Clips per prompt."""
    prompt_path: Annotated[Path | None, _option("FILE", "")] = None
    """Text file with one prompt a line, in place of PROMPT."""
    output: Annotated[Path | None, _option("PATH", f"{DEFAULT_FOLDER}/")] = None
    """File (several clips: numbered), or a folder if the name has no ending."""
    format: Annotated[str | None, _option("|".join(FORMATS), "by the output's ending, else mp4")] = None
    """File format; png is one sheet of all frames."""
    device: Annotated[str | None, _option("NAME", "an accelerator if there is one, else cpu")] = None
    """cpu, cuda, cuda:1, mps."""
    dtype: Annotated[str | None, _option("NAME", "float32 on the cpu, else bfloat16")] = None
    """Numbers the networks compute in: float32, bfloat16, float16."""
    no_metadata: Annotated[bool, arg(help_behavior_hint="")] = False
    """Keep no record of how the clip was made, neither inside the file nor beside it."""
    from_: Annotated[Path | None, _option("FILE", "", name="from")] = None
    """Make the clip again that this file (or its .json) tells of: the same frames, bit for bit, on the same machine."""

    def run(self) -> None:
        """Makes the clips."""
        record = self._record()
        self._check()
        jobs = self._jobs(record)
        model = self.model or (record.model if record else DEFAULT_MODEL)
        negative_prompt = record.negative_prompt if record else self.negative_prompt
        texts = [job.prompt for job in jobs] + ([negative_prompt] if negative_prompt else [])
        if model in TOYBOX_MODELS:
            _check_toybox_words(model, texts)
        kind = format_of(jobs[0].path, self.format)  # all have the same ending
        fps = record.sampling.fps if record else self.fps
        if fps is not None:
            check_fps(fps, kind)
        for job in jobs:
            check_writable(job.path)
            check_writable(sidecar_path(job.path))

        pipe, model_hash = self._load(model, record)
        _check_words(pipe, texts)
        sampling = record.sampling if record else self._sampling(pipe)
        size = VideoSize(sampling.num_frames, sampling.height, sampling.width).check(pipe.size_rule())
        check_fps(sampling.fps, kind)
        check_size(kind, size.num_frames, size.height, size.width)

        sampling_s = 0.0
        for job in jobs:
            before = time.perf_counter()
            frames, settings = _sample(pipe, job, negative_prompt, sampling)
            sampling_s += time.perf_counter() - before
            made = None
            if not self.no_metadata:
                made = Record(
                    prompt=job.prompt,
                    negative_prompt=negative_prompt,
                    seed=job.seed,
                    model=model if model in TOYBOX_MODELS else Path(model).expanduser().resolve().name,
                    model_hash=model_hash,
                    sampling=sampling,
                    device=str(pipe.device),
                    dtype=settings["dtype"],
                    pipeline={name: settings.get(name) for name in ("scheduler", "guider", "latent_space")},
                    versions=versions(),
                )
            write_video(job.path, frames, sampling.fps, made.as_metadata() if made else None, format=kind)
            if made:
                save_settings(made, sidecar_path(job.path))
            else:  # one that is there tells of the clip that was there
                sidecar_path(job.path).unlink(missing_ok=True)
            print(job.path, flush=True)
        clips = "" if len(jobs) == 1 else f"{len(jobs)} times "
        _say(
            f"{clips}{size}, {sampling.fps:g} fps, {sampling.num_inference_steps} steps: {_process_seconds():.1f} s "
            f"from start to end, {sampling_s:.1f} s of it sampling and decoding; peak memory {_peak_memory(pipe)}"
        )

    def _record(self) -> Record | None:
        if self.from_ is None:
            return None
        for field in dataclasses.fields(self):
            if field.name not in _FREE_WITH_FROM and getattr(self, field.name) is not None:
                given = "a prompt" if field.name == "prompt" else f"--{field.name.replace('_', '-')}"
                raise OpenSoraError(f"--from makes the same clip again, so it cannot be combined with {given}")
        return read_record(self.from_)

    def _check(self) -> None:
        """What can be said of the options without knowing the model."""
        for name, value, known in (("format", self.format, FORMATS), ("dtype", self.dtype, DTYPES)):
            if value is not None and value not in known:
                raise OpenSoraError(f"unknown {name} {value!r}{nearest_name(value, known)}")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < float("inf"):
            raise OpenSoraError(f"--guidance-scale is {self.guidance_scale:g}, expected 0 or more")
        if self.resolution is not None:
            num_pixels(self.resolution)
        if self.aspect_ratio is not None:
            parse_aspect_ratio(self.aspect_ratio)
        parse_steps(self.num_inference_steps)
        parse_cfg_channels(self.cfg_channels)

    def _jobs(self, record: Record | None) -> list[Job]:
        output = self.output or DEFAULT_FOLDER
        if record and self.from_:
            clip = self.from_.with_suffix("") if self.from_.suffix.lower() == ".json" else self.from_
            suffix = clip.suffix.lower()
            suffix = suffix if suffix.removeprefix(".") in FORMATS else ".mp4"
            return plan([record.prompt], 1, record.seed, output, self.format, suffix)
        prompts = read_prompts(self.prompt, self.prompt_path)
        num_videos = 1 if self.num_videos is None else self.num_videos
        return plan(prompts, num_videos, DEFAULT_SEED if self.seed is None else self.seed, output, self.format, ".mp4")

    def _load(self, model: str, record: Record | None) -> "tuple[OpenSoraPipeline, str]":
        import torch
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        from opensora.checkpoints.loading import load_pipeline
        from opensora.checkpoints.sources import model_hash

        diffusers_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
        device = choose_device(self.device or (record.device if record else None))
        try:
            found = model_hash(model)
        except OpenSoraError as error:
            if record is None or self.model is not None:
                raise
            raise OpenSoraError(f"{error}; --model says where the model is that made this clip") from error
        if record:
            check_same_model(record, found)
            if changed := changed_versions(record):
                _say(f"note: {', '.join(changed)} since this clip was made; its frames may come out slightly different")
        dtype = self.dtype or (record.dtype if record else None)
        pipe = load_pipeline(model, device=device, dtype=getattr(torch, dtype) if dtype else None)
        pipe.set_progress_bar_config(disable=True)
        return pipe, found

    def _sampling(self, pipe: "OpenSoraPipeline") -> Sampling:
        """What was asked for, completed by the model's own defaults."""
        config, rule = dict(pipe.config), pipe.size_rule()
        fps = config["fps"] if self.fps is None else self.fps
        height, width = resolve_image_size(
            (config["height"], config["width"]),
            height=self.height,
            width=self.width,
            resolution=self.resolution,
            aspect_ratio=self.aspect_ratio,
            rule=rule,
        )
        steps, channels = parse_steps(self.num_inference_steps), parse_cfg_channels(self.cfg_channels)
        return Sampling(
            num_frames=config["num_frames"]
            if self.num_frames is None
            else parse_num_frames(self.num_frames, fps, rule),
            height=height,
            width=width,
            fps=fps,
            num_inference_steps=config["num_inference_steps"] if steps is None else steps,
            guidance_scale=config["guidance_scale"] if self.guidance_scale is None else self.guidance_scale,
            cfg_channels=config["cfg_channels"] if channels is None else channels,
        )


def parse_steps(text: str | None) -> int | str | None:
    """`"20"` -> 20, `"ddim50"` and `"10,15,20"` as they are, None -> None.

    Raises:
        OpenSoraError: anything else.
    """
    if text is None:
        return None
    if re.fullmatch(r"ddim\d+|\d+(,\d+)+", text):
        return text
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise OpenSoraError(
            f"--num-inference-steps is {text!r}, expected a number of at least 1 (or a respacing: ddim50)"
        )
    return int(text)


def parse_cfg_channels(text: str | None) -> int | list[int] | str | None:
    """`"3"` -> 3, `"0,2"` -> [0, 2], `"2,"` -> [2], `"all"` -> "all", None -> None.

    Raises:
        OpenSoraError: anything else.
    """
    if text is None or text == "all":
        return text
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1 and not parts[-1]:
        parts.pop()
    if not all(re.fullmatch(r"-?\d+", part) for part in parts):
        raise OpenSoraError(f"--cfg-channels is {text!r}, expected a number such as 3, indices such as 0,2, or all")
    numbers = [int(part) for part in parts]
    if min(numbers) < (0 if "," in text else 1):
        raise OpenSoraError(f"--cfg-channels is {text!r}, expected at least one channel and no negative index")
    return numbers if "," in text else numbers[0]


def _check_toybox_words(model: str, texts: list[str]) -> None:
    """What `_check_words` would find, before the model is loaded, and the shapes it was never shown."""
    from opensora.toybox.captions import describe_vocabulary, unknown_words, words_of

    unknown = list(dict.fromkeys(word for text in texts for word in unknown_words(text)))
    if unknown:
        raise OpenSoraError(f"{model} does not know: {', '.join(unknown)}. It knows {describe_vocabulary()}")
    for text in texts:
        if not words_of(text):
            raise OpenSoraError(f"the prompt {text!r} holds no word. {model} knows {describe_vocabulary()}")


def _check_words(pipe: "OpenSoraPipeline", texts: list[str]) -> None:
    """All prompts, before the first of them is sampled."""
    from opensora.models.text.encoders import check_words
    from opensora.toybox.captions import VOCABULARY, describe_vocabulary

    try:
        check_words(pipe.tokenizer, texts)
    except OpenSoraError as error:
        if set(VOCABULARY) <= pipe.tokenizer.get_vocab().keys():
            raise OpenSoraError(f"{error}. It knows {describe_vocabulary()}") from None
        raise


def _sample(
    pipe: "OpenSoraPipeline", job: Job, negative_prompt: str | None, sampling: Sampling
) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames, uint8 (T, H, W, 3), and the settings the pipeline reports.

    Every clip is alone in its batch, so that it does not depend on its neighbours.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("sampling", total=None)

        def step_done(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            total = len(pipe.scheduler.timesteps)
            text = "decoding" if step + 1 == total else "sampling"
            progress.update(task, completed=step + 1, total=total, description=text)
            return values

        try:
            output: Any = pipe(
                job.prompt,
                negative_prompt,
                **dataclasses.asdict(sampling),
                generator=torch.Generator("cpu").manual_seed(job.seed),
                output_type="np",
                callback_on_step_end=step_done,
            )
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise OpenSoraError(
                f"out of memory for {sampling.num_frames} frames of {sampling.height}x{sampling.width}; "
                "choose fewer --num-frames, or a smaller --resolution or --height and --width"
            ) from error
    frames = np.asarray(output.frames[0])
    if not np.isfinite(frames).all():
        raise OpenSoraError("the decoded frames hold NaN or infinite values; try --dtype float32, or check the weights")
    return np.clip(frames * 255, 0, 255).round().astype(np.uint8), output.settings


def _is_out_of_memory(error: Exception) -> bool:
    """Accelerators have an exception of their own; the CPU's allocator and some backends only say it."""
    import torch

    said = ("can't allocate memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in said)


def _process_seconds() -> float:
    """Since the process started, imports included."""
    import psutil

    return time.time() - psutil.Process().create_time()


def _peak_memory(pipe: "OpenSoraPipeline") -> str:
    import torch

    if pipe.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(pipe.device) / 2**30:.2f} GB on the device"
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return f"{peak / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GB"
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return f"{getattr(memory, 'peak_wset', memory.rss) / 2**30:.2f} GB"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
