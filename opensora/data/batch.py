"""What the parts of training hand each other: clips as they come off the disk, and latents as networks take them.

A source is asked for the batch of a place in the run (`BatchKey`) and answers from nothing else, so that a resumed run
sees what an uninterrupted one would have seen. All clips of a batch have one size and one length.

Letters: B clips, C channels, T frames, H, W pixels, h, w latent cells, L text tokens, D width of the text.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opensora.distributed.seeding import BatchKey


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
        fps: (B,) frames a second, as networks are told.
        label: see `BatchShape`.
        object_mask: (B, 1, T, H, W) in [0, 1], where an object is; None where nobody knows.
    """

    video: Tensor
    captions: list[str]
    fps: Tensor
    label: str
    object_mask: Tensor | None = None


@dataclass(frozen=True)
class LatentBatch:
    """Latents of one size, and what else a diffusion transformer is told.

    Attributes:
        latents: (B, C, T, h, w) clean, normalised, float32; T latent frames.
        captions: B.
        fps: (B,) frames a second, as networks are told.
        height, width: (B,) pixels before encoding.
        num_frames: frames before encoding.
        label: see `BatchShape`.
        text_states, text_mask: (B, L, D) and (B, L) of the captions where they were encoded beforehand.
        object_mask: (B, 1, T, h, w), 1 where an object touches the cell; None where nobody knows.
    """

    latents: Tensor
    captions: list[str]
    fps: Tensor
    height: Tensor
    width: Tensor
    num_frames: int
    label: str
    text_states: Tensor | None = None
    text_mask: Tensor | None = None
    object_mask: Tensor | None = None


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
        """Nothing more will be asked for: what was announced need not be read."""

    def figures(self) -> dict[str, float]:
        """Counts worth logging, such as how many clips could not be read so far."""
        return {}
