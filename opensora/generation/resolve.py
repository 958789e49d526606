"""What a request comes to with a model's own defaults: how large, how long, how fast, and how it is sampled.

Names mean what they mean to the users of the model at hand: whether 9:16 is landscape or portrait, and how many frames
`4s` are. The published 1.1 and 1.2 models are told the size of their tables (240x426) though they make whole latent
cells (240x424); so are they here.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from opensora.errors import OpenSoraError
from opensora.generation.guidance import resolve_guidance
from opensora.generation.record import Sampling
from opensora.generation.request import ClipRequest, parse_steps
from opensora.geometry import (
    SizeRule,
    VideoSize,
    named_num_frames,
    parse_num_frames,
    resolve_image_size,
    table_size,
)
from opensora.models.text.prompts import SCORE_WORDS

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline


@dataclass(frozen=True)
class ClipSize:
    """Size and rate of a clip.

    Attributes:
        num_frames: of each loop.
        height: in pixels.
        width: in pixels.
        nominal_size: (height, width) that the network is told; None for a model that is told what it makes.
        fps: frames per second that the network is told.
        frame_interval: the file is written at `fps / frame_interval`,
        save_fps: or at this rate.
    """

    num_frames: int
    height: int
    width: int
    nominal_size: tuple[int, int] | None
    fps: float
    frame_interval: int
    save_fps: float | None


EditedFrames = Callable[[float], int]
"""Length of the clip that is edited, for a new one that plays at so many frames a second."""


def resolve_size(
    request: ClipRequest, config: Any, rule: SizeRule, edited_frames: EditedFrames | None = None
) -> ClipSize:
    """The size asked for, completed by the model's defaults.

    Args:
        request: checked already.
        config: of the pipeline.
        rule: what the model can make.
        edited_frames: length of the clip that is edited, if one is.

    Raises:
        OpenSoraError: what this model cannot make; names the nearest it can.
    """
    fps = float(config.fps if request.fps is None else request.fps)
    interval = config.frame_interval if request.frame_interval is None else request.frame_interval
    (height, width), nominal = _image_size(request, config, rule)
    edited = None if edited_frames is None else edited_frames(request.save_fps or fps / interval)
    num_frames = _num_frames(request, config, rule, fps / interval, edited)
    VideoSize(num_frames, height, width).check(rule)
    return ClipSize(num_frames, height, width, nominal, fps, interval, request.save_fps)


def _image_size(request: ClipRequest, config: Any, rule: SizeRule) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """The size made, and the size told."""
    default = (config.height, config.width)
    if request.image_size is not None:
        nominal, multiple = request.image_size, rule.spatial_multiple
        made = (max(nominal[0] // multiple, 1) * multiple, max(nominal[1] // multiple, 1) * multiple)
    else:
        order = config.aspect_ratio_order
        wishes = {"resolution": request.resolution, "aspect_ratio": request.aspect_ratio}
        made = resolve_image_size(default, height=request.height, width=request.width, order=order, rule=rule, **wishes)
        nominal = config.nominal_size if made == default else made
        if request.resolution is not None:
            nominal = table_size(default, request.resolution, request.aspect_ratio, order)
    if config.nominal_size is None:
        return made, None
    nominal = request.nominal_size or nominal
    return made, (nominal[0], nominal[1])


def _num_frames(request: ClipRequest, config: Any, rule: SizeRule, rate: float, edited_frames: int | None) -> int:
    if request.num_frames is not None:
        if config.clip_frames is not None:
            return named_num_frames(request.num_frames, config.clip_frames, config.clip_s)
        return parse_num_frames(request.num_frames, rate, rule)
    if edited_frames is None:
        return config.num_frames
    nearest = rule.nearest_frames(edited_frames)
    return nearest if nearest <= edited_frames else max(nearest - rule.frame_multiple, 1)


def resolve(pipe: "OpenSoraPipeline", request: ClipRequest, edited_frames: EditedFrames | None = None) -> Sampling:
    """What was asked for, completed by the model's own defaults.

    Args:
        pipe: with the sampler of the request.
        request: checked already.
        edited_frames: length of the clip that is edited, if one is.

    Raises:
        OpenSoraError: what this model cannot make; names the nearest it can.
    """
    config, steps = pipe.config, request.num_inference_steps
    return Sampling(
        **asdict(resolve_size(request, config, pipe.size_rule(), edited_frames)),
        num_inference_steps=config.num_inference_steps if steps is None else parse_steps(steps),
        **resolve_guidance(pipe, request),
        guider=request.guider,
        sampler=request.sampler,
        time_shift=request.time_shift,
        fast=request.fast,
        forecast=request.forecast,
        scores={**(config.scores or {}), **(pipe.rated_scores(request.scores, request.fps) or {})} or None,
        num_loops=request.num_loops,
        condition_frames=request.condition_frame_length,
        condition_strength=request.condition_frame_edit or 0.0,
        input_fps=request.input_fps,
    )


def check_effects(request: ClipRequest, sampling: Sampling, *, sequential_guidance: bool = False) -> None:
    """Finds wishes that would change nothing beside the others.

    Args:
        request: what was asked for.
        sampling: what it comes to.
        sequential_guidance: the branches of guidance are computed one after the other.

    Raises:
        OpenSoraError: the first such wish.
    """
    unguided = f"{_scale_of_one(request)}, which is no guidance"
    lasting = isinstance(request.num_frames, str) and request.num_frames.strip().endswith("s")
    without_effect = {
        "negative_prompt": (not sampling.is_guided and bool(request.negative_prompt), unguided),
        "cfg_channels": (not sampling.is_guided and request.cfg_channels != "default", unguided),
        "guider": (not sampling.is_guided and request.guider is not None, unguided),
        "equivalent_to": (not sampling.is_guided and request.equivalent_to is not None, unguided),
        "sequential_guidance": (not sampling.is_guided and sequential_guidance, unguided),
        "image_guidance_scale": (
            request.image_guidance_scale is not None and not request.shows_frames,
            "the clip is conditioned on no frames",
        ),
        "condition_frame_length": (
            request.condition_frame_length is not None and request.num_loops == 1 and not request.takes_over_frames,
            "nothing is carried over: `loop` is 1",
        ),
        "condition_frame_edit": (
            request.condition_frame_edit is not None and request.num_loops == 1,
            "nothing is carried over: `loop` is 1",
        ),
        "frame_interval": (
            request.frame_interval is not None and request.save_fps is not None and not lasting,
            "`save_fps` says how fast the file plays",
        ),
    }
    for name, (is_so, reason) in without_effect.items():
        if is_so:
            raise OpenSoraError(f"`{name}` has no effect: {reason}; leave one of them out")
    for name in request.scores:
        if all(SCORE_WORDS.get(name, name) in text for text in request.texts()):
            raise OpenSoraError(f"the prompt says its {SCORE_WORDS[name].rstrip(':.')} already; say it once")


def _scale_of_one(request: ClipRequest) -> str:
    """Where it is said that nothing is guided."""
    if request.channel_scales is not None:
        return "all `channel_scales` are 1"
    return f"`guidance_scale` is 1{'' if request.guidance_scale == 1 else ' in this model'}"


def total_frames(pipe: "OpenSoraPipeline", sampling: Sampling) -> int:
    """Frames of the whole video: those carried over from loop to loop are shown once.

    Raises:
        OpenSoraError: more frames carried over than a clip has to spare.
    """
    if sampling.num_loops == 1:
        return sampling.num_frames
    longest = pipe.autoencoder.latent_frames(sampling.num_frames)
    if longest < 2:
        raise OpenSoraError(
            "a clip of one latent frame has nothing to carry over to the next loop; give more `num_frames`, or leave "
            "out `loop`"
        )
    carried = pipe.config.condition_frames if sampling.condition_frames is None else sampling.condition_frames
    if not 0 < carried < longest:
        raise OpenSoraError(
            f"`condition_frame_length` is {carried}, expected 1 to {longest - 1} for clips of "
            f"{sampling.num_frames} frames ({longest} latent frames)"
        )
    repeated = pipe.autoencoder.frames_before(carried, sampling.num_frames)
    return sampling.num_frames + (sampling.num_loops - 1) * (sampling.num_frames - repeated)


def describe_size(size: VideoSize, nominal_size: tuple[int, int] | None) -> str:
    """`51 frames of 240x424 (height x width), landscape; the network is told 240x426`."""
    made = (size.height, size.width)
    shape = "square" if size.height == size.width else "landscape" if size.width > size.height else "portrait"
    nominal = "" if nominal_size in (None, made) else "; the network is told {}x{}".format(*nominal_size)
    return f"{size}, {shape}{nominal}"
