"""The record of how a clip was made: kept inside the file and beside it, and enough to make the clip again."""

import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from opensora import __version__
from opensora.errors import OpenSoraError
from opensora.media.read import read_metadata
from opensora.settings import from_dict, to_dict

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(DType)

# Libraries whose version can change the numbers.
_LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Sampling:
    """Everything the sampler was asked for, with the model's defaults filled in."""

    num_frames: int
    height: int
    width: int
    fps: float
    num_inference_steps: int | str
    guidance_scale: float
    cfg_channels: int | list[int] | str | None


@dataclass(frozen=True)
class Record:
    """How one clip was made.

    Attributes:
        prompt: as given.
        negative_prompt: as given.
        seed: of this clip alone, whatever clips were made along with it.
        model: name of a bundled model, or of the model's folder alone: a record is passed on, and the path tells of
            the machine.
        model_hash: SHA-256 over the model's weights and configuration.
        sampling: the resolved settings.
        device: where it ran.
        dtype: the numbers the networks computed in.
        pipeline: what the pipeline says of itself: scheduler, guider, latent space.
        versions: of this package, Python, the libraries and the operating system.
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
    """Where a clip's record lies beside it: `clip.mp4` -> `clip.mp4.json`."""
    return path.with_name(path.name + ".json")


def check_same_model(record: Record, found: str) -> None:
    """Raises `OpenSoraError` if the model is not the one the clip was made with."""
    if record.model_hash != found:
        raise OpenSoraError(
            f"model {record.model} is not the one this clip was made with (hash {found[:12]}, was "
            f"{record.model_hash[:12]}); give the right one with --model, or generate anew from the prompt"
        )
