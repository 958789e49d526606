"""A process that knows torch, so that the one of the page need not: it answers questions, a line of JSON for each.

    {"sketch": {"request": {...}, "known_frames": false, "device": "", "max_memory_bytes": null}}
    {"fidelity": {"made": PATH, "reference": PATH}}

The answer is `{"answer": ...}`, or `{"error": LINE}` for what the user can mend. It ends when its input does.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.checkpoints.loading import choose_device
from opensora.errors import OpenSoraError
from opensora.evaluation.metrics.fidelity import frame_ssim
from opensora.evaluation.psnr import frame_psnr
from opensora.generation.request import ClipRequest
from opensora.generation.resolve import describe_size, resolve
from opensora.media.read import read_video
from opensora.models.guidance import resolve_cfg_channels
from opensora.planning.devices import this_machine
from opensora.planning.meta_pipeline import meta_pipeline
from opensora.planning.report import choices_in_words, plan_clip
from opensora.planning.stages import Clip
from opensora.planning.tracing import Tracer
from opensora.settings import from_dict

OWN = ("width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale")
"""Fields of a request whose value is the model's where none was asked for."""
NICE = 10
_FRAMES_AT_ONCE = 8


def sketch(request: dict[str, Any], known_frames: bool, device: str, max_memory_bytes: int | None) -> dict[str, Any]:
    """What is known of a clip before its model is loaded.

    Args:
        request: fields of a `ClipRequest`.
        known_frames: the clip is made from pictures or clips too.
        device: of the worker.
        max_memory_bytes: that it may take; None for what the device has.

    Returns:
        `own`: what fields come to; `channels`: number of latent channels, `cfg_channels`: those that the model guides
        by itself; `spans`: [first, end) in frames of every latent frame; `plan`: as `plan_clip` makes it, its choices
        in words.

    Raises:
        OpenSoraError: no clip can be that.
    """
    asked = from_dict(ClipRequest, {"prompt": "a clip", **request}, "the request")
    asked.check()
    tracer = Tracer()
    meta = meta_pipeline(tracer, asked.model_name)
    pipeline, codec = meta.pipeline, meta.pipeline.autoencoder
    if asked.sampler is not None:
        pipeline.use_sampler(asked.sampler)
    sampling = resolve(pipeline, asked)
    conditioned = known_frames and pipeline.transformer.reads_channels
    clip = Clip(sampling.size, guided=sampling.is_guided, conditioned=conditioned)
    torch_device = choose_device(device or None)
    memory_bytes = max_memory_bytes or _memory_bytes(torch_device)
    plan = plan_clip(tracer, meta, clip, device=torch_device.type, memory_bytes=memory_bytes)
    frames = sampling.num_frames
    own_channels = pipeline.config.cfg_channels
    return {
        "own": {name: getattr(sampling, name) for name in OWN},
        "channels": codec.latent_channels,
        "cfg_channels": list(resolve_cfg_channels(own_channels, codec.latent_channels)),
        "spans": [codec.frame_span(place, frames) for place in range(codec.latent_frames(frames))],
        "plan": _in_words({**plan, "clip": describe_size(sampling.size, sampling.nominal_size)}),
    }


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return this_machine().memory_bytes


def _in_words(plan: Any) -> Any:
    if isinstance(plan, list):
        return [_in_words(part) for part in plan]
    if not isinstance(plan, dict):
        return plan
    words = {name: choices_in_words(part).replace("`", "") for name, part in plan.items() if name == "choices"}
    return {name: words.get(name) if name in words else _in_words(part) for name, part in plan.items()}


def fidelity(made: str, reference: str) -> dict[str, float]:
    """PSNR in decibels and SSIM of a clip against another one, means over the frames that both have.

    Raises:
        OpenSoraError: their sizes differ, or one cannot be read.
    """
    clips = [read_video(Path(path))[0] for path in (made, reference)]
    sizes = [f"{clip.shape[2]}x{clip.shape[1]}" for clip in clips]
    if sizes[0] != sizes[1]:
        raise OpenSoraError(f"the clips are {sizes[0]} and {sizes[1]}; figures need clips of one size")
    num_frames = min(map(len, clips))
    psnr, ssim = [], []
    for first in range(0, num_frames, _FRAMES_AT_ONCE):
        ours, theirs = (_as_video(clip[first : first + _FRAMES_AT_ONCE][: num_frames - first]) for clip in clips)
        psnr += frame_psnr(ours, theirs)[0].tolist()
        ssim += frame_ssim(ours, theirs)[0].tolist()
    return {"psnr_db": sum(psnr) / num_frames, "ssim": sum(ssim) / num_frames}


def _as_video(frames: Any) -> Tensor:
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


QUESTIONS: dict[str, Callable[..., Any]] = {"sketch": sketch, "fidelity": fidelity}


def answer(question: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The answer to one question."""
    ((name, values),) = question.items()
    try:
        return {"answer": QUESTIONS[name](**values)}
    except OpenSoraError as error:
        return {"error": " ".join(str(error).split())}


@contextlib.contextmanager
def _answers_apart() -> Iterator[Any]:
    """Standard output for answers alone: what libraries print goes to standard error."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        yield answers


def main() -> None:
    """Answers until there are no more questions."""
    with contextlib.suppress(OSError):
        os.nice(NICE)
    with _answers_apart() as answers:
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
