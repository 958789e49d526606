"""The record of how a clip was made: kept inside the file and beside it, and enough to make the clip again.

A record is passed on, and tells nothing of the machine: files go by their name and SHA-256, never by their folder.
Fields that were added later have defaults, so that older records stay readable.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from opensora import __version__
from opensora.checkpoints.published import FORMER_BUNDLED
from opensora.errors import OpenSoraError
from opensora.generation.request import ClipRequest, DType, ImageOrigin
from opensora.geometry import VideoSize
from opensora.media.read import read_metadata
from opensora.media.write import frames_folder
from opensora.sampling.forecast_plan import ForecastPlan
from opensora.settings import from_dict, to_dict

# Libraries whose version can change the numbers.
_LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Sampling:
    """Everything the sampler was asked for, with the model's defaults filled in.

    Attributes:
        num_frames: of each loop.
        height: in pixels.
        width: in pixels.
        fps: frames per second that the network was told.
        num_inference_steps: a number, or a respacing.
        guidance_scale: 1 = none; None where each channel has its own.
        image_guidance_scale: likewise, of known frames; None for models without.
        cfg_channels: as the pipeline takes them.
        channel_scales: a scale for each latent channel, in place of both; None for one scale.
        nominal_size: (height, width) that the network was told; None for the size that was made.
        frame_interval: the file was written at `fps / frame_interval`,
        save_fps: or at this rate.
        guider: as `models.guiders` reads it; None for the model's own rule.
        sampler: as `use_sampler` takes it; None for the model's own.
        time_shift: as `use_time_shift` takes it; None for the model's own.
        fast: how much was forecast, as it was asked for; None for nothing, or for a plan of one's own.
        forecast: what was forecast in place of being computed; None for nothing.
        scores: that the prompt ended in, by name.
        num_loops: clips that the video was made of.
        condition_frames: latent frames carried from loop to loop, or taken over from a clip that is extended; None for
            the defaults of either.
        condition_strength: denoising strength of the frames carried over.
        input_fps: rate at which videos were taken by time; None for one by one, or where their rate varies for that of
            the file.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    num_inference_steps: int | str
    guidance_scale: float | None
    cfg_channels: int | list[int] | str | None
    nominal_size: tuple[int, int] | None = None
    frame_interval: int = 1
    save_fps: float | None = None
    sampler: str | None = None
    scores: dict[str, float | str | None] | None = None
    num_loops: int = 1
    condition_frames: int | None = None
    condition_strength: float = 0.0
    input_fps: float | None = None
    image_guidance_scale: float | None = None
    channel_scales: list[float] | None = None
    guider: str | None = None
    time_shift: float | None = None
    fast: str | None = None
    forecast: ForecastPlan | None = None

    @property
    def is_guided(self) -> bool:
        """Whether the text guides any channel."""
        scales = [self.guidance_scale] if self.channel_scales is None else self.channel_scales
        return any(scale != 1 for scale in scales)

    @property
    def guidance(self) -> dict[str, Any]:
        """How strongly which channels are guided by the text, in keywords of the pipeline."""
        if self.channel_scales is not None:
            return {"channel_scales": self.channel_scales}
        return {"guidance_scale": self.guidance_scale, "cfg_channels": self.cfg_channels}

    @property
    def size(self) -> VideoSize:
        """Of each loop."""
        return VideoSize(self.num_frames, self.height, self.width)

    @property
    def file_fps(self) -> float:
        """Frames per second of the file."""
        return self.save_fps or self.fps / self.frame_interval


@dataclass(frozen=True)
class InputFile:
    """A picture or video that frames were taken from: its name, and its content's SHA-256."""

    name: str
    sha256: str


@dataclass(frozen=True)
class NamedFrames:
    """Frame conditioning said in words, see `conditioning.condition`."""

    image: InputFile | None = None
    last_image: InputFile | None = None
    extend: InputFile | None = None
    backwards: bool = False
    edit: InputFile | None = None
    strength: float | None = None

    @property
    def files(self) -> tuple[InputFile, ...]:
        """All that frames were taken from."""
        return tuple(file for file in (self.image, self.last_image, self.extend, self.edit) if file)


@dataclass(frozen=True)
class PlacedReferences:
    """Frame conditioning by a mask strategy, see `conditioning.place_references`."""

    files: tuple[InputFile, ...]
    mask_strategy: str
    alignment: int | None = None


@dataclass(frozen=True)
class UsedAdapter:
    """An adapter that was merged into the transformer.

    Attributes:
        name: of its file or folder.
        sha256: of its file.
        scale: how strongly it acted, times the strength that its file states.
        notes: what its file leaves open, such as a strength that had to be guessed.
    """

    name: str
    sha256: str
    scale: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """How one clip was made.

    Attributes:
        prompt: as given, but for references named in it.
        negative_prompt: as given.
        seed: of this clip alone, whatever clips were made along with it.
        model: its name, or that of its folder.
        model_hash: SHA-256 over the model's weights and configuration.
        sampling: the resolved settings.
        device: where it ran.
        dtype: the numbers the networks computed in.
        pipeline: what the pipeline says of itself: scheduler, guider, latent space, and whose path it learnt, if any.
        versions: of this package, Python, the libraries and the operating system.
        refined_prompt: what a language model made of the prompt; then the clip shows this.
        spelled_prompt: what the text encoder was given, for each text of the prompt: cleaned, with scores.
        spelled_negative_prompt: likewise.
        notes: what was otherwise than the user might expect, in sentences.
        given: the frame conditioning (saved under this name).
        components: parts that took the place of the model's own, by the name of their file or folder.
        adapters: adapters that were merged into the transformer.
        image_origin: what drew the first picture; None for one from elsewhere.
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    model: str
    model_hash: str
    sampling: Sampling
    device: str
    dtype: DType
    pipeline: dict[str, Any]
    versions: dict[str, str]
    refined_prompt: str | None = None
    spelled_prompt: tuple[str, ...] = ()
    spelled_negative_prompt: str | None = None
    notes: tuple[str, ...] = ()
    given: NamedFrames | PlacedReferences | None = None
    components: dict[str, str] = field(default_factory=dict)
    adapters: tuple[UsedAdapter, ...] = ()
    image_origin: ImageOrigin | None = None

    def as_metadata(self) -> dict[str, Any]:
        """Plain data for `write_video` and the sidecar."""
        return to_dict(self)


def versions() -> dict[str, str]:
    """What is running."""
    found = {"opensora": __version__, "python": platform.python_version(), "system": platform.platform()}
    return found | {name: metadata.version(name) for name in _LIBRARIES}


def read_record(path: str | Path) -> Record:
    """The record inside a clip, or in a sidecar.

    Raises:
        OpenSoraError: no such file, or no record in it.
    """
    return from_dict(Record, read_metadata(path), where=str(path))


def changed_versions(record: Record) -> list[str]:
    """What is different now from when the clip was made, such as `torch 2.12.0 -> 2.13.0`."""
    now = versions()
    return [f"{name} {was} -> {now[name]}" for name, was in record.versions.items() if now.get(name, was) != was]


def sidecar_path(path: Path) -> Path:
    """Where a clip's record lies beside it: `clip.mp4` -> `clip.mp4.json`, `frames/%04d.png` -> `frames.json`."""
    path = frames_folder(path)
    return path.with_name(path.name + ".json")


def request_of(record: Record, files: Mapping[InputFile, Path]) -> ClipRequest:
    """The request that makes a clip again.

    What the record holds by content alone is left for the caller to name: adapters and replaced components. What has no
    effect beside the rest is not asked for, see `resolve.check_effects`.

    Args:
        record: of the clip.
        files: where the files are now that it was made from, see `inputs.find_files`.
    """
    sampling, given = record.sampling, record.given
    named = given if isinstance(given, NamedFrames) else NamedFrames()
    placed = given if isinstance(given, PlacedReferences) else None
    shows_frames = placed is not None or bool(named.image or named.last_image or named.extend) or sampling.num_loops > 1
    guidance = sampling.guidance
    if sampling.guidance_scale == 1:
        guidance["cfg_channels"] = "default"
    carries_over = sampling.num_loops > 1 or named.extend is not None

    def place(file: InputFile | None) -> Path | None:
        return None if file is None else files[file]

    return ClipRequest(
        prompt=record.prompt,
        negative_prompt=record.negative_prompt,
        seed=record.seed,
        refined_prompt=record.refined_prompt,
        model=record.model,
        device=record.device,
        dtype=record.dtype,
        num_frames=sampling.num_frames,
        height=sampling.height,
        width=sampling.width,
        nominal_size=sampling.nominal_size,
        fps=sampling.fps,
        frame_interval=sampling.frame_interval if sampling.save_fps is None else None,
        save_fps=sampling.save_fps,
        num_inference_steps=sampling.num_inference_steps,
        **guidance,
        image_guidance_scale=sampling.image_guidance_scale if shows_frames else None,
        guider=sampling.guider if sampling.is_guided else None,
        sampler=sampling.sampler,
        time_shift=sampling.time_shift,
        fast=sampling.fast,
        forecast=sampling.forecast,
        latent_space=_overriding_space(record),
        scores=sampling.scores or {},
        image=place(named.image),
        image_origin=record.image_origin,
        last_image=place(named.last_image),
        extend=place(named.extend),
        backwards=named.backwards,
        edit=place(named.edit),
        strength=named.strength,
        input_fps=sampling.input_fps,
        reference_path=tuple(files[file] for file in placed.files) if placed else (),
        mask_strategy=placed.mask_strategy if placed else None,
        align=placed.alignment if placed else None,
        loop=sampling.num_loops,
        condition_frame_length=sampling.condition_frames if carries_over else None,
        condition_frame_edit=sampling.condition_strength if sampling.num_loops > 1 else None,
    )


def _overriding_space(record: Record) -> dict[str, Any] | None:
    """What latents stood for in place of what the autoencoder declares; None where that held."""
    space = record.pipeline.get("latent_space")
    if not isinstance(space, dict) or space.get("replaces") is None:
        return None
    return {name: value for name, value in space.items() if name != "replaces"}


def check_same_model(record: Record, found: str) -> None:
    """Raises `OpenSoraError` if the model is not the one the clip was made with."""
    if record.model_hash != found:
        parts = "".join(f", its {name} was {file}" for name, file in record.components.items())
        former = FORMER_BUNDLED.get(record.model_hash)
        if former is not None:
            parts += f" (those of {former}, see docs/log.md)"
        raise OpenSoraError(
            f"model {record.model} is not the one this clip was made with (hash {found[:12]}, was "
            f"{record.model_hash[:12]}); give the right one with `model`{parts}, or generate anew from the prompt"
        )


def check_same_adapters(record: Record, given: Sequence[UsedAdapter]) -> None:
    """Raises `OpenSoraError` if adapters are not those that a clip was made with."""
    were = {used.sha256: used for used in record.adapters}
    for used in given:
        if used.sha256 not in were:
            made = ", ".join(f"{was.name} ({was.sha256[:12]})" for was in were.values()) or "none"
            raise OpenSoraError(f"adapter {used.name} ({used.sha256[:12]}) is not one this clip was made with: {made}")
        if used.scale != were[used.sha256].scale:
            raise OpenSoraError(
                f"adapter {used.name} acted at {were[used.sha256].scale:g} in this clip, not at {used.scale:g}; "
                "leave out the scale"
            )
    missing = [was for sha256, was in were.items() if sha256 not in {used.sha256 for used in given}]
    if missing:
        raise OpenSoraError(
            f"this clip was made with the adapter {missing[0].name} (hash {missing[0].sha256[:12]}); "
            "say where it is with `adapter`"
        )
