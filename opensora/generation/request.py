"""What a clip is to be: `ClipRequest`, plain data that goes to JSON and back, and what is wrong with one on its face.

A request says what a user wants in the user's words ("4s", "240p", a file to begin with); what it leaves out is as the
model likes it best. `resolve` completes it by the model's defaults, `inputs` reads its files, and the record of a clip
becomes a request again (`record.request_of`). Names of fields stand in backticks in errors, so that a front end may
show its own names for them.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from opensora import limits
from opensora.contents import parse_json, shown
from opensora.errors import OpenSoraError
from opensora.geometry import num_pixels, parse_aspect_ratio
from opensora.limits import check_count, parse_count
from opensora.media.write import check_fps
from opensora.models.autoencoders.latent_space import parse_override
from opensora.models.channel_scales import parse_channel_scales
from opensora.models.guiders import parse_guider
from opensora.models.schedulers import SAMPLERS
from opensora.models.text.condition_types import check_condition_type
from opensora.models.text.prompts import parse_mask_strategy, split_loops, split_references
from opensora.sampling.forecast_plan import FAST, ForecastPlan
from opensora.settings import from_dict, nearest_name, to_dict

DEFAULT_MODEL = "toybox"
DEFAULT_SEED = 42

StoredDType = Literal["float32", "bfloat16", "float16"]
"""Numbers that weights are written in."""
DType = Literal[StoredDType, "int8"]
"""What networks compute in."""
AskedDType = Literal[DType, "auto"]
DTYPES: tuple[str, ...] = get_args(AskedDType)
OF_THE_MODEL = ("model", "components", "adapters", "latent_space", "device", "dtype")
"""Fields that a model is loaded for."""
FILES = ("image", "last_image", "extend", "edit", "reference_path")
"""Fields that name files; the last one any number of them."""
_MOST_CHARACTERS = 1_000  # of a text that says numbers
_LIMITS = {
    "num_frames": limits.FRAMES,
    "height": limits.SIDE_PX,
    "width": limits.SIDE_PX,
    "image_size": limits.SIDE_PX,
    "nominal_size": limits.SIDE_PX,
    "frame_interval": limits.FRAMES,
    "align": limits.FRAMES,
    "loop": limits.LOOPS,
    "condition_frame_length": limits.FRAMES,
}


@dataclass(frozen=True)
class Adapter:
    """An adapter (LoRA) that is merged into the transformer.

    Attributes:
        path: folder or file.
        scale: how strongly it acts; None for 1, or as strongly as in the clip that is made again.
    """

    path: Path
    scale: float | None = None


@dataclass(frozen=True)
class ImageOrigin:
    """What drew the picture that a clip begins with, see `generation.first_images`.

    Attributes:
        model: name of the pipeline, or of its folder.
        sha256: over its files.
        pipeline: class of diffusers.
        height, width: of the picture, in pixels.
        options: that it was called with besides; what is left out was the pipeline's own.
    """

    model: str
    sha256: str
    pipeline: str
    height: int
    width: int
    options: dict[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class ClipRequest:
    """One clip, as it is asked for. None stands for the model's own default unless it says otherwise.

    Attributes:
        prompt: a sentence; one for each loop (`|0|a cat|2|a dog`); at its end there may be a JSON object with
            `reference_path` and `mask_strategy`, which take the place of the fields.
        negative_prompt: what to steer away from; None for nothing.
        seed: of the noise.
        refined_prompt: what a language model made of the prompt; then the clip shows this.
        model: name or folder; None for the one at hand, or `DEFAULT_MODEL`.
        components: parts that take the place of the model's own: transformer, autoencoder, text_encoder, tokenizer.
        adapters: merged into the transformer.
        device: where it is made; None for an accelerator if there is one.
        dtype: numbers the networks compute in; None for float32 on a CPU, else bfloat16. int8 is bfloat16 with weights
            in eight bits; "auto" the faster of float32 and bfloat16 on this machine.
        num_frames: of each loop: a number, or as its users say it ("4s", "2x").
        resolution: named number of pixels, such as "240p".
        aspect_ratio: "16:9", in the order in which the model's users write it.
        height: in pixels.
        width: in pixels.
        image_size: (height, width), rounded down to what the model can make.
        nominal_size: (height, width) that the network is told.
        fps: frames per second that the network is told.
        frame_interval: the file plays at `fps / frame_interval`,
        save_fps: or at this rate.
        num_inference_steps: a number, or a respacing ("ddim50").
        guidance_scale: 1 = none.
        image_guidance_scale: likewise, of the frames that the clip is conditioned on, for models that have one.
        cfg_channels: latent channels that are guided: the first k, indices (a list, or "0,2"), "all" or None for all;
            "default" for the model's own.
        channel_scales: in place of `guidance_scale` and `cfg_channels`, a scale for each latent channel: a list, or
            ranges ("0-2:7,3:1").
        equivalent_to: channels, likewise, that are guided instead, at the scale of equal strength, see
            `models.guidance_strength`; None for those of `cfg_channels`.
        guider: how the predictions with and without the text are combined, as `models.guiders` reads it; None for the
            model's own rule.
        sampler: as `OpenSoraPipeline.use_sampler` takes it.
        time_shift: of rectified flow, as `OpenSoraPipeline.use_time_shift` takes it.
        fast: how much of the network's work is left out and forecast instead: "quality", "balanced", "draft"; None for
            nothing, see `generation.fast`.
        calibration: file of `opensora calibrate` that says where; None for the model's own, if it has one that fits.
        forecast: the plan of that itself, in place of what `fast` would choose.
        latent_space: what latents stand for, in place of what the autoencoder declares: a scaling factor, or fields of
            its `latent_space` (an object, or its JSON), what they leave out staying as declared.
        scores: in place of the model's defaults, by name; None switches one off.
        image: the clip begins with this picture,
        image_origin: which was drawn so; None for a picture from elsewhere.
        last_image: it ends with this one.
        extend: it goes on where this video ends,
        backwards: or ends where it begins.
        edit: this video is denoised again after the prompt,
        strength: from 0 (kept) to 1 (everything).
        input_fps: at so many frames a second videos are taken by time; None for one by one, or for the new clip's rate
            where theirs varies.
        reference_path: pictures and videos that `mask_strategy` places.
        mask_strategy: "L,R,S,T,N,E;...", see `models.text.prompts.FramePlacement`.
        align: starts move to the nearest multiple of so many latent frames.
        cond_type: in place of both, how Open-Sora 1.3 and 2.0 call it, see `models.text.condition_types`.
        loop: number of clips that a long video is made of; None for one.
        condition_frame_length: latent frames carried over from loop to loop, or taken over from `extend`.
        condition_frame_edit: denoising strength of the frames carried over; None for 0.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int = DEFAULT_SEED
    refined_prompt: str | None = None

    model: str | None = None
    components: dict[str, Path] = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()
    device: str | None = None
    dtype: AskedDType | None = None

    num_frames: int | str | None = None
    resolution: str | None = None
    aspect_ratio: str | None = None
    height: int | None = None
    width: int | None = None
    image_size: tuple[int, int] | None = None
    nominal_size: tuple[int, int] | None = None
    fps: float | None = None
    frame_interval: int | None = None
    save_fps: float | None = None

    num_inference_steps: int | str | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    cfg_channels: int | list[int] | str | None = "default"
    channel_scales: list[float] | str | None = None
    equivalent_to: int | list[int] | str | None = None
    guider: str | None = None
    sampler: str | None = None
    time_shift: float | None = None
    fast: str | None = None
    calibration: Path | None = None
    forecast: ForecastPlan | None = None
    latent_space: float | str | dict[str, Any] | None = None
    scores: dict[str, float | str | None] = field(default_factory=dict)

    image: Path | None = None
    image_origin: ImageOrigin | None = None
    last_image: Path | None = None
    extend: Path | None = None
    backwards: bool = False
    edit: Path | None = None
    strength: float | None = None
    input_fps: float | None = None
    reference_path: tuple[Path, ...] = ()
    mask_strategy: str | None = None
    align: int | None = None
    cond_type: str | None = None

    loop: int | None = None
    condition_frame_length: int | None = None
    condition_frame_edit: float | None = None

    @property
    def shown(self) -> str:
        """The prompt that the clip is made from."""
        return self.prompt if self.refined_prompt is None else self.refined_prompt

    @property
    def num_loops(self) -> int:
        """As asked for, or 1."""
        return 1 if self.loop is None else self.loop

    @property
    def shows_frames(self) -> bool:
        """Whether it has frames that are kept, from the first loop on or from the second."""
        return bool(self.image or self.last_image or self.extend or self.reference_path) or self.num_loops > 1

    @property
    def takes_over_frames(self) -> bool:
        """Whether the clip goes on from frames of another, several of them."""
        return self.extend is not None or (self.cond_type or "").startswith("v2v")

    @property
    def model_name(self) -> str:
        """The model asked for, or the default."""
        return self.model or DEFAULT_MODEL

    def to_json(self) -> str:
        """The request as a JSON object."""
        return json.dumps(to_dict(self), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "ClipRequest":
        """The request of a JSON object; what is missing there takes its default.

        Raises:
            OpenSoraError: no JSON, an unknown field (names the nearest), or a value of the wrong type.
        """
        return from_dict(cls, parse_json(text, "the request"), where="the request")

    def with_files(self, place: Callable[[str, Path], Path]) -> "ClipRequest":
        """The same with its files elsewhere: `place` is told the field and the path, and says the path instead."""
        one = {name: getattr(self, name) for name in FILES if name != "reference_path"}
        placed = {name: place(name, path) for name, path in one.items() if path is not None}
        references = tuple(place("reference_path", path) for path in self.reference_path)
        return replace(self, **placed, reference_path=references)

    def separated(self) -> "ClipRequest":
        """The same with what the JSON object at the end of the prompt says in the fields, and a prompt without it.

        A negative prompt of nothing but blanks is none.

        Raises:
            OpenSoraError: a broken object, or nothing beside it.
        """
        text, named = split_references(self.prompt)
        if not text.strip():
            what = " but for the JSON object" if self.prompt.strip() else ""
            raise OpenSoraError(f"the prompt is empty{what}; say what the video should show")
        paths = split_paths(named.reference_path or "")
        return replace(
            self,
            prompt=text.strip(),
            negative_prompt=(self.negative_prompt or "").strip() or None,
            reference_path=paths or self.reference_path,
            mask_strategy=named.mask_strategy or self.mask_strategy,
        )

    def texts(self) -> list[str]:
        """The texts of the prompt for all loops.

        Raises:
            OpenSoraError: a text for a loop that is not made, or a mistake in `|0|...`.
        """
        texts, starts = split_loops(self.shown)
        if starts and starts[-1] >= self.num_loops:
            raise OpenSoraError(
                f"the prompt says what loop {starts[-1]} shows (0 is the first), but `loop` is {self.num_loops}"
            )
        if not all(texts):
            raise OpenSoraError(f"a text of the prompt {self.shown!r} is empty; say what that loop shows")
        return texts

    def check(self, file_format: str = "mp4") -> None:
        """Finds what no model can do, and wishes that contradict each other.

        Args:
            file_format: of the file that the clip will be written to.

        Raises:
            OpenSoraError: the first mistake.
        """
        check_dtype(self.dtype)
        _check_lengths(self)
        if not 0 <= self.seed < 2**63:
            raise OpenSoraError(f"`seed` is {self.seed}, expected a number from 0 to 2^63 - 1")
        _check_size(self, file_format)
        _check_sampling(self)
        _check_conditioning(self)
        _check_loops(self)
        _check_references(self)
        self.texts()


def _check_lengths(request: ClipRequest) -> None:
    """Refuses texts longer than any that is meant, before they are looked into, and numbers beyond their limit."""
    for name in ("prompt", "negative_prompt", "refined_prompt"):
        if len(getattr(request, name) or "") > limits.PROMPT_CHARACTERS:
            many, most = len(getattr(request, name)), limits.PROMPT_CHARACTERS
            raise OpenSoraError(f"`{name}` has {many:,} characters, expected at most {most:,}")
    in_words = ("num_frames", "num_inference_steps", "cfg_channels", "equivalent_to", "resolution", "aspect_ratio")
    for name in (*in_words, "mask_strategy"):
        value = getattr(request, name)
        if isinstance(value, str) and len(value) > _MOST_CHARACTERS:
            raise OpenSoraError(f"`{name}` is {shown(value)}, expected at most {_MOST_CHARACTERS} characters")
    for name, most in _LIMITS.items():
        value = getattr(request, name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and number > most:
                check_count(f"`{name}`", number, most)


def check_dtype(dtype: str | None) -> None:
    """Raises `OpenSoraError` for numbers that networks do not compute in."""
    if dtype is not None and dtype not in DTYPES:
        raise OpenSoraError(f"unknown dtype {dtype!r}{nearest_name(dtype, DTYPES)}")


def split_paths(text: str) -> tuple[Path, ...]:
    """`"a.png;b.mp4"` -> both."""
    return tuple(Path(path.strip()) for path in text.split(";") if path.strip())


def parse_steps(steps: int | str) -> int | str:
    """`"20"` -> 20, `"ddim50"` and `"10,15,20"` as they are.

    Raises:
        OpenSoraError: anything else.
    """
    if isinstance(steps, str) and re.fullmatch(r"ddim\d+|\d+(,\d+)+", steps):
        return steps
    if isinstance(steps, str) and not re.fullmatch(r"\d+", steps, re.ASCII):
        raise OpenSoraError(
            f"`num_inference_steps` is {steps!r}, expected a number of at least 1 (or a respacing: ddim50)"
        )
    if isinstance(steps, str):
        return parse_count("`num_inference_steps`", steps, limits.STEPS)
    return check_count("`num_inference_steps`", steps, limits.STEPS)


def parse_cfg_channels(
    channels: int | list[int] | str | None, name: str = "cfg_channels"
) -> int | list[int] | str | None:
    """`"3"` -> 3, `"0,2"` -> [0, 2], `"2,"` -> [2]; "all", None, and what is parsed already, as they are.

    Raises:
        OpenSoraError: anything else.
    """
    if channels is None or channels == "all":
        return channels
    text = channels if isinstance(channels, str | int) else f"{','.join(map(str, channels))},"
    parts = [part.strip() for part in str(text).split(",")]
    if len(parts) > 1 and not parts[-1]:
        parts.pop()
    if not all(re.fullmatch(r"-?\d+", part) for part in parts):
        scales = "; a scale for each is `channel_scales`" if ":" in str(text) else ""
        raise OpenSoraError(
            f"`{name}` is {channels!r}, expected a number such as 3, indices such as 0,2, or all{scales}"
        )
    numbers, are_indices = [int(part) for part in parts], "," in str(text)
    if min(numbers) < (0 if are_indices else 1):
        raise OpenSoraError(f"`{name}` is {channels!r}, expected at least one channel and no negative index")
    return numbers if are_indices else numbers[0]


def _check_size(request: ClipRequest, file_format: str) -> None:
    if request.image_size is not None:
        others = (request.height, request.width, request.resolution, request.aspect_ratio)
        if any(other is not None for other in others):
            raise OpenSoraError("`image_size` says the whole size; leave out `height`, `width` and the like")
        if min(request.image_size) < 1:
            raise OpenSoraError(f"`image_size` is {request.image_size[0]} {request.image_size[1]}, expected two sides")
    if request.resolution is not None:
        num_pixels(request.resolution)
    if request.aspect_ratio is not None:
        parse_aspect_ratio(request.aspect_ratio)
    frames = request.num_frames
    if isinstance(frames, str) and not re.fullmatch(r"[-+]?\d+(\.\d+)?[sx]?", frames.strip()):
        raise OpenSoraError(
            f"num_frames {frames!r} is neither a count such as 17, a duration such as 4s nor 2x (clips)"
        )
    if request.frame_interval is not None and request.frame_interval < 1:
        raise OpenSoraError(f"`frame_interval` is {request.frame_interval}, expected 1 or more")
    if request.fps is not None and not 0 < request.fps < math.inf:
        check_fps(request.fps, file_format, "`fps`")
    if request.save_fps is not None:
        check_fps(request.save_fps, file_format, "`save_fps`")


def _check_sampling(request: ClipRequest) -> None:
    check_guidance_scale(request.guidance_scale)
    check_guidance_scale(request.image_guidance_scale, "image_guidance_scale")
    if request.sampler is not None and request.sampler not in SAMPLERS:
        raise OpenSoraError(f"unknown sampler {request.sampler!r}{nearest_name(request.sampler, SAMPLERS)}")
    if request.guider is not None:
        parse_guider(request.guider)
        if request.image_guidance_scale is not None:
            raise OpenSoraError("`guider` knows text alone; leave out `image_guidance_scale`")
    if request.time_shift is not None and not 0 < request.time_shift < math.inf:
        raise OpenSoraError(f"`time_shift` is {request.time_shift:g}, expected a number above 0 (1 shifts nothing)")
    if request.fast is not None and request.fast not in FAST:
        raise OpenSoraError(f"unknown `fast` {request.fast!r}{nearest_name(request.fast, FAST)}")
    if request.calibration is not None and request.fast is None:
        raise OpenSoraError("`calibration` says what `fast` leaves out; give `fast`, or leave out `calibration`")
    if request.latent_space is not None:
        parse_override(request.latent_space)
    if request.num_inference_steps is not None:
        parse_steps(request.num_inference_steps)
    if request.cfg_channels != "default":
        parse_cfg_channels(request.cfg_channels)
    if request.equivalent_to is not None:
        parse_cfg_channels(request.equivalent_to, "equivalent_to")
    if request.channel_scales is not None:
        parse_channel_scales(request.channel_scales)
        _check_one_scale_each(request)


def _check_one_scale_each(request: ClipRequest) -> None:
    others = {
        "guidance_scale": request.guidance_scale is not None,
        "cfg_channels": request.cfg_channels != "default",
        "equivalent_to": request.equivalent_to is not None,
    }
    for name, is_given in others.items():
        if is_given:
            raise OpenSoraError(f"`channel_scales` says the scale of every channel; leave out `{name}`")


def check_guidance_scale(scale: float | None, name: str = "guidance_scale") -> None:
    """Raises `OpenSoraError` for a scale that no model can be guided by."""
    if scale is not None and not 0 <= scale < math.inf:
        raise OpenSoraError(f"`{name}` is {scale:g}, expected 0 or more")


def _check_conditioning(request: ClipRequest) -> None:
    if request.edit is not None and (request.image or request.last_image or request.extend):
        raise OpenSoraError("`edit` gives all frames; leave out `image`, `last_image` and `extend`")
    if request.edit is not None and request.strength is None:
        raise OpenSoraError(
            "`edit` needs `strength`, its denoising strength, from 0 (kept) to 1 (generated from noise)"
        )
    if request.edit is None and request.strength is not None:
        raise OpenSoraError("`strength` says how much of a clip is edited; give the clip as `edit`")
    _check_share("strength", request.strength)
    if request.input_fps is not None:
        if not (request.extend or request.edit or request.reference_path):
            raise OpenSoraError("`input_fps` says at which rate a video is taken; give one as `extend` or `edit`")
        check_fps(request.input_fps, "mp4", "`input_fps`")
    if request.backwards and request.extend is None:
        raise OpenSoraError("`backwards` says where a clip is extended; give the clip as `extend`")
    end, name = ("last", "last_image") if request.backwards else ("first", "image")
    if request.extend is not None and getattr(request, name) is not None:
        raise OpenSoraError(f"the {end} frames come from `extend` already; leave out `{name}`")


def _check_references(request: ClipRequest) -> None:
    paths, strategy = request.reference_path, request.mask_strategy or ""
    placements = parse_mask_strategy(strategy)
    if request.cond_type is not None:
        if placements or request.align is not None:
            raise OpenSoraError("`cond_type` says where frames go; leave out `mask_strategy` and `align`")
        check_condition_type(request.cond_type, len(paths))
        _check_one_way(request)
        return
    if not paths and not placements:
        if request.align is not None:
            raise OpenSoraError("`align` moves the frames of `reference_path`; give one, and `mask_strategy`")
        return
    if not placements:
        raise OpenSoraError('which frames of the reference go where? give `mask_strategy`, "0" to begin with it')
    if not paths:
        raise OpenSoraError("`mask_strategy` places frames of references; give them as `reference_path`")
    if request.align is not None and request.align < 1:
        raise OpenSoraError(f"`align` is {request.align}, expected 1 or more")
    for placement in placements:
        if placement.loop >= request.num_loops:
            raise OpenSoraError(
                f"the mask strategy {strategy!r} is for loop {placement.loop} too (0 is the first), "
                f"but `loop` is {request.num_loops}"
            )
        if not -len(paths) <= placement.reference < len(paths):
            raise OpenSoraError(
                f"the mask strategy {strategy!r} takes reference {placement.reference} (0 is the first), "
                f"but `reference_path` names {len(paths)}"
            )
    _check_one_way(request)


def _check_one_way(request: ClipRequest) -> None:
    if request.image or request.last_image or request.extend or request.edit:
        raise OpenSoraError(
            "frames are given in two ways: by `image`, `extend` or `edit`, and by references with a mask strategy; "
            "use one of them"
        )


def _check_loops(request: ClipRequest) -> None:
    if request.num_loops < 1:
        raise OpenSoraError(f"`loop` is {request.loop}, expected 1 or more")
    length = request.condition_frame_length
    if length is not None:
        if length < 1:
            raise OpenSoraError(f"`condition_frame_length` is {length}, expected 1 or more")
        if request.loop is None and not request.takes_over_frames:
            raise OpenSoraError("`condition_frame_length` is for `loop` and `extend`; give one of them")
    _check_share("condition_frame_edit", request.condition_frame_edit)
    if request.condition_frame_edit is not None and request.loop is None:
        raise OpenSoraError("`condition_frame_edit` is for long videos; give `loop`")
    if request.edit is not None and request.num_loops > 1:
        raise OpenSoraError("`edit` makes one clip as long as the one given; leave out `loop`")


def _check_share(name: str, share: float | None) -> None:
    if share is not None and not 0 <= share <= 1:
        raise OpenSoraError(f"`{name}` is {share:g}, expected 0 (nothing) to 1 (everything)")
