"""How a clip is sampled: the options, what they come to with a model's defaults, and the sampling itself."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from opensora.cli.conditions import LoopOptions
from opensora.cli.options import option
from opensora.cli.record import Sampling
from opensora.cli.sizes import ClipSize
from opensora.errors import OpenSoraError
from opensora.models.schedulers import SAMPLERS
from opensora.settings import nearest_name

if TYPE_CHECKING:
    from opensora.conditioning import GivenFrames
    from opensora.pipeline import OpenSoraPipeline


@dataclass(frozen=True)
class SamplingOptions:
    """How noise becomes a clip."""

    num_inference_steps: Annotated[str | None, option("N", aliases=["--num-sampling-steps"])] = None
    """Sampling steps; for IDDPM models also a respacing such as ddim50."""
    guidance_scale: Annotated[float | None, option("S", aliases=["--cfg-scale"])] = None
    """How strongly the prompt is followed; 1 switches guidance off."""
    cfg_channels: Annotated[str | None, option("K|0,2|all", aliases=["--cfg-channel"])] = None
    """Latent channels that guidance touches: the first K, a list of indices ("2," for one), or all."""
    sampler: Annotated[str | None, option("|".join(SAMPLERS))] = None
    """For models that predict noise; dpm-solver++ guides all channels unless told otherwise."""

    def check(self) -> None:
        """Raises `OpenSoraError` for what no model can do."""
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < float("inf"):
            raise OpenSoraError(f"--guidance-scale is {self.guidance_scale:g}, expected 0 or more")
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise OpenSoraError(f"unknown sampler {self.sampler!r}{nearest_name(self.sampler, SAMPLERS)}")
        parse_steps(self.num_inference_steps)
        parse_cfg_channels(self.cfg_channels)


@dataclass(frozen=True)
class ScoreOptions:
    """What the captions that 1.2 was trained on ended in; "none" switches a default off."""

    aes: Annotated[str | None, option("SCORE")] = None
    """How beautiful, about 4 to 7."""
    flow: Annotated[str | None, option("SCORE")] = None
    """How much moves, 0 and up."""
    camera_motion: Annotated[str | None, option("WORDS")] = None
    """How the camera moves: "pan left", "zoom in", "static", ..."""

    def parse(self) -> dict[str, float | str | None]:
        """What was given, by the names that pipelines know.

        Raises:
            OpenSoraError: a score that is no number.
        """
        given = {"aesthetic": self.aes, "flow": self.flow, "camera_motion": self.camera_motion}
        return {
            name: None if text.strip().lower() == "none" else text if name == "camera_motion" else _score(name, text)
            for name, text in given.items()
            if text is not None
        }


def resolve_sampling(
    pipe: "OpenSoraPipeline", size: ClipSize, sampling: SamplingOptions, scores: ScoreOptions, loops: LoopOptions
) -> Sampling:
    """What was asked for, completed by the model's own defaults."""
    config = pipe.config
    default_channels: Any = pipe.default_cfg_channels
    steps, channels = parse_steps(sampling.num_inference_steps), parse_cfg_channels(sampling.cfg_channels)
    return Sampling(
        **asdict(size),
        num_inference_steps=config.num_inference_steps if steps is None else steps,
        guidance_scale=config.guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale,
        cfg_channels=default_channels if channels is None else channels,
        sampler=sampling.sampler,
        scores={**(config.scores or {}), **scores.parse()} or None,
        num_loops=loops.num_loops,
        condition_frames=loops.condition_frame_length,
        condition_strength=loops.condition_frame_edit or 0.0,
    )


def total_frames(pipe: "OpenSoraPipeline", sampling: Sampling) -> int:
    """Frames of the whole video: those carried over from loop to loop are shown once."""
    if sampling.num_loops == 1:
        return sampling.num_frames
    longest = pipe.autoencoder.latent_frames(sampling.num_frames)
    if longest < 2:
        raise OpenSoraError(
            "a clip of one latent frame has nothing to carry over to the next loop; give more --num-frames, or leave "
            "out --loop"
        )
    carried = pipe.config.condition_frames if sampling.condition_frames is None else sampling.condition_frames
    if not 0 < carried < longest:
        raise OpenSoraError(
            f"--condition-frame-length is {carried}, expected 1 to {longest - 1} for clips of "
            f"{sampling.num_frames} frames ({longest} latent frames)"
        )
    repeated = pipe.autoencoder.frames_before(carried, sampling.num_frames)
    return sampling.num_frames + (sampling.num_loops - 1) * (sampling.num_frames - repeated)


def sample(
    pipe: "OpenSoraPipeline",
    prompt: str,
    negative_prompt: str | None,
    seed: int,
    sampling: Sampling,
    given: "Sequence[GivenFrames | None]",
) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames, uint8 (T, H, W, 3), and the settings the pipeline reports.

    Every clip is alone in its batch, so that it does not depend on its neighbours.

    Args:
        pipe: makes the clip.
        prompt: for all loops, or with a text for each.
        negative_prompt: what to steer away from.
        seed: of the noise.
        sampling: everything else.
        given: frames that are given, for each loop.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from opensora.long_video import generate_loops

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task, which = progress.add_task("sampling", total=None), ""

        def loop_begins(loop: int) -> None:
            nonlocal which
            which = f" loop {loop + 1} of {sampling.num_loops}" if sampling.num_loops > 1 else ""

        def step_done(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            total = len(pipe.scheduler.timesteps)
            doing = "decoding" if step + 1 == total else "sampling"
            progress.update(task, completed=step + 1, total=total, description=doing + which)
            return values

        try:
            output = generate_loops(
                pipe,
                prompt,
                negative_prompt,
                num_loops=sampling.num_loops,
                size=sampling.size,
                condition_frames=sampling.condition_frames,
                condition_strength=sampling.condition_strength,
                given=lambda loop: given[loop],
                generator=torch.Generator("cpu").manual_seed(seed),
                on_loop=loop_begins,
                nominal_size=sampling.nominal_size,
                fps=sampling.fps,
                scores=sampling.scores,
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
                cfg_channels=sampling.cfg_channels,
                callback_on_step_end=step_done,
            )
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise OpenSoraError(
                f"out of memory for {sampling.num_frames} frames of {sampling.height}x{sampling.width}; "
                "choose fewer --num-frames, or a smaller --resolution or --height and --width"
            ) from error
    frames = output.frames[0].permute(0, 2, 3, 1).cpu().numpy()
    if not np.isfinite(frames).all():
        raise OpenSoraError("the decoded frames hold NaN or infinite values; try --dtype float32, or check the weights")
    return np.clip(frames * 255, 0, 255).round().astype(np.uint8), output.settings


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


def _score(name: str, text: str) -> float:
    option = "--aes" if name == "aesthetic" else f"--{name}"
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    if not abs(score) < float("inf"):
        raise OpenSoraError(f"{option} is {text!r}, expected a number such as 6.5, or none")
    return score


def _is_out_of_memory(error: Exception) -> bool:
    """Accelerators have an exception of their own; the CPU's allocator and some backends only say it."""
    import torch

    said = ("can't allocate memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in said)
