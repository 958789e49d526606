"""What the parts of training hand each other: clips as they come off the disk, and latents as networks take them.

A source is asked for the batch of a place in the run (`BatchKey`) and answers from nothing else, so that a resumed run
sees what an uninterrupted one would have seen. All clips of a batch have one size and one length.

Letters: B clips, C channels, T frames, H, W pixels, h, w latent cells, L text tokens, D width of the text.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from opensora.distributed.seeding import BatchKey
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.clip_conditions import IMAGE_FPS, ClipConditions
from opensora.models.text.conditioner import TextStates


@dataclass(frozen=True)
class BatchShape:
    """A size that batches of a run have, for plans made before the first clip is read.

    Attributes:
        label: name of the size in figures, such as "240p 51f".
        batch_size: B.
        num_frames: T, before encoding.
        height, width: in pixels; of the most common aspect ratio where there are several.
        share: of all batches, from 0 to 1.
    """

    label: str
    batch_size: int
    num_frames: int
    height: int
    width: int
    share: float


@dataclass(frozen=True)
class ClipBatch:
    """Clips of one size.

    Attributes:
        video: (B, 3, T, H, W) in [-1, 1].
        captions: B.
        conditions: what networks are told of the clips.
        label: see `BatchShape`.
        object_mask: (B, 1, T, H, W) in [0, 1], where an object is; None where nobody knows.
    """

    video: Tensor
    captions: list[str]
    conditions: ClipConditions
    label: str
    object_mask: Tensor | None = None

    @classmethod
    def meta(cls, shape: BatchShape, device: torch.device | str) -> "ClipBatch":
        """A batch of this size without content, for plans."""
        size = (shape.batch_size, 3, shape.num_frames, shape.height, shape.width)
        captions = [""] * shape.batch_size
        return cls(torch.zeros(size, device=device), captions, meta_conditions(shape, device), shape.label)

    def to(self, device: torch.device | str) -> "ClipBatch":
        """The same clips on another device."""
        mask = None if self.object_mask is None else self.object_mask.to(device)
        return replace(self, video=self.video.to(device), conditions=self.conditions.to(device), object_mask=mask)


@dataclass(frozen=True)
class LatentBatch:
    """Latents of one size, and what else a diffusion transformer reads.

    Attributes:
        latents: (B, C, T, h, w) clean, normalised, float32; T latent frames.
        captions: B.
        conditions: what networks are told of the clips.
        label: see `BatchShape`.
        text: of the captions where they were encoded beforehand; None elsewhere.
        object_mask: (B, 1, T, h, w), 1 where an object touches the cell; None where nobody knows.
        video: (B, 3, frames, H, W) in [-1, 1], what was encoded, on the autoencoder's device, where it was asked for.
    """

    latents: Tensor
    captions: list[str]
    conditions: ClipConditions
    label: str
    text: TextStates | None = None
    object_mask: Tensor | None = None
    video: Tensor | None = None

    @classmethod
    def meta(cls, shape: BatchShape, autoencoder: VideoCodec, device: torch.device | str) -> "LatentBatch":
        """The latents of `ClipBatch.meta`."""
        factor, frames = autoencoder.spatial_factor, autoencoder.latent_frames(shape.num_frames)
        cells = (frames, shape.height // factor, shape.width // factor)
        latents = torch.zeros(shape.batch_size, autoencoder.latent_channels, *cells, device=device)
        return cls(latents, [""] * shape.batch_size, meta_conditions(shape, device), shape.label)

    def to(self, device: torch.device | str) -> "LatentBatch":
        """The same latents on another device; text and video move when they are read."""
        mask = None if self.object_mask is None else self.object_mask.to(device)
        return replace(self, latents=self.latents.to(device), conditions=self.conditions.to(device), object_mask=mask)


def batch_conditions(fps: Sequence[float | None], *, num_frames: int, height: int, width: int) -> ClipConditions:
    """What networks are told of clips of one size, each at a rate of its own.

    Args:
        fps: B rates, see `told_fps`; None where it is not known, which is told like an image.
        num_frames: T, before encoding; a single frame is an image, whatever its rate.
        height, width: in pixels, before encoding.
    """
    rates = [IMAGE_FPS if num_frames == 1 or rate is None else float(rate) for rate in fps]
    size = len(rates)
    return ClipConditions(
        fps=torch.tensor(rates),
        height=torch.full((size,), float(height)),
        width=torch.full((size,), float(width)),
        num_frames=num_frames,
    )


def meta_conditions(shape: BatchShape, device: torch.device | str) -> ClipConditions:
    """What networks would be told of a batch of this size."""
    rates = [24.0] * shape.batch_size
    return batch_conditions(rates, num_frames=shape.num_frames, height=shape.height, width=shape.width).to(device)


class CaptionCheck(Protocol):
    """Who will read the captions of a source, and refuses beforehand what it cannot."""

    def check_words(self, captions: Iterable[str]) -> None:
        """Of a table whose captions will be encoded."""

    def use_cache(self, cache: Any) -> None:
        """Of a `data.cache.Cache` whose text states will be read; also that of no text, later."""


@dataclass(frozen=True)
class DataContext:
    """What a data configuration is opened for.

    Attributes:
        autoencoder: makes latents of the clips, on its own device and in its own precision; None for clips as video.
        sample_posterior: draw latents from its posterior; otherwise take the mean.
        keep_video: hand the clips on beside their latents, if they are at hand.
        frame_interval: of the model: it is told the rate of its clips times this, see `OpenSoraPipeline`.
        cache: folder of the run for what is made once; None where nothing is kept.
        captions: who reads them; None for nobody.
        split: of data that have clips which are never trained on.
    """

    autoencoder: VideoCodec | None = None
    sample_posterior: bool = True
    keep_video: bool = False
    frame_interval: int = 1
    cache: Path | None = None
    captions: CaptionCheck | None = None
    split: Literal["train", "held_out"] = "train"


class DataConfig(Protocol):
    """Where clips or latents come from, as settings describe it."""

    def shapes(self) -> list[BatchShape]:
        """Every size that batches may have; the shares sum to 1."""
        ...

    def defaults(self) -> dict[str, Any]:
        """How a model samples that was trained on these clips, as keywords of `OpenSoraPipeline`."""
        ...

    def open(self, context: DataContext) -> "Source":
        """The clips, as `ClipBatch` or, where the context has an autoencoder, as `LatentBatch`.

        Raises:
            OpenSoraError: there are none, or none that will do; says what to do.
        """
        ...


class Source(ABC):
    """Where batches come from."""

    @abstractmethod
    def batch(self, key: BatchKey) -> Any:
        """The batch of this place in the run."""

    @abstractmethod
    def shapes(self) -> list[BatchShape]:
        """Every size that batches may have; the shares sum to 1."""

    def prefetch(self, keys: Sequence[BatchKey]) -> None:  # noqa: B027
        """Batches that will be asked for next, in this order: reading them may begin."""

    def cancel_prefetch(self) -> None:  # noqa: B027
        """Nothing more will be asked for: what was prefetched need not be read."""

    def figures(self) -> dict[str, float]:
        """Counts worth logging, such as how many clips could not be read so far."""
        return {}
