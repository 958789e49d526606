"""Clips as autoencoders are trained on them: whole latent cells, cropped, and cut to many lengths."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opensora.data.batch import BatchShape, ClipBatch, Source
from opensora.data.encoding import whole_cells
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError


@dataclass(frozen=True)
class Cut:
    """What of a source's clips is trained on. A batch has one length and one size.

    Attributes:
        image_share: share of batches that keep the first frame of each clip only.
        random_lengths: cut the others to a length drawn uniformly from 1 to all of their frames.
        crop: edge in pixels of a square cut out at random, the same place in all frames of a clip; None for the whole
            picture, and no more than there is.
    """

    image_share: float = 0.0
    random_lengths: bool = False
    crop: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.image_share <= 1:
            raise OpenSoraError(f"cut.image_share is {self.image_share}; give a share from 0 to 1")
        if self.crop is not None and self.crop < 1:
            raise OpenSoraError(f"cut.crop is {self.crop}; give pixels, or none for whole pictures")

    def num_frames(self, available: int, generator: torch.Generator) -> int:
        """Frames that a batch keeps of `available`."""
        if float(torch.rand((), generator=generator)) < self.image_share:
            return 1
        return int(torch.randint(1, available + 1, (), generator=generator)) if self.random_lengths else available

    def lengths(self, available: int) -> dict[int, float]:
        """Lengths and their shares of all batches; random ones stand for those up to them, a quarter of all each."""
        shares = {1: self.image_share} if self.image_share else {}
        longest = sorted({-(-available * k // 4) for k in range(1, 5)}) if self.random_lengths else [available]
        for length in longest:
            shares[length] = shares.get(length, 0.0) + (1 - self.image_share) / len(longest)
        return {length: share for length, share in shares.items() if share}


class CutClips(Source):
    """Batches of another source, cut.

    Args:
        source: gives `ClipBatch`es.
        cut: what to keep of them.
        spatial_factor: pixels of a latent cell; rows and columns that fill none are left out.
    """

    def __init__(self, source: Source, cut: Cut, spatial_factor: int) -> None:
        self.source, self.cut, self.spatial_factor = source, cut, spatial_factor

    def batch(self, key: BatchKey) -> ClipBatch:
        clips: ClipBatch = self.source.batch(key)
        num_frames = self.cut.num_frames(clips.video.shape[2], key.generator("length"))
        tensors = [clips.video] if clips.object_mask is None else [clips.video, clips.object_mask]
        tensors = [whole_cells(tensor[:, :, :num_frames], self.spatial_factor) for tensor in tensors]
        if self.cut.crop is not None:
            tensors = crop_at_random(tensors, self.cut.crop, self.spatial_factor, key.generator("crop"))
        mask = tensors[1] if len(tensors) == 2 else None
        return replace(clips, video=tensors[0], object_mask=mask)

    def shapes(self) -> list[BatchShape]:
        shapes = []
        for shape in self.source.shapes():
            edge = self.cut.crop or max(shape.height, shape.width)
            height, width = (self.whole(min(edge, side)) for side in (shape.height, shape.width))
            for num_frames, share in self.cut.lengths(shape.num_frames).items():
                label = f"{shape.label} cut to {num_frames}f" if num_frames != shape.num_frames else shape.label
                shapes.append(BatchShape(label, shape.batch_size, num_frames, height, width, shape.share * share))
        return shapes

    def whole(self, side: int) -> int:
        """Pixels of `side` that fill latent cells."""
        return side - side % self.spatial_factor

    def prefetch(self, keys: Sequence[BatchKey]) -> None:
        self.source.prefetch(keys)

    def cancel_prefetch(self) -> None:
        self.source.cancel_prefetch()

    def figures(self) -> dict[str, float]:
        return self.source.figures()


def crop_at_random(tensors: list[Tensor], edge: int, multiple: int, generator: torch.Generator) -> list[Tensor]:
    """The same square of `edge` pixels, or less where there is less, out of tensors (B, C, T, H, W), clip by clip."""
    batch, height, width = tensors[0].shape[0], *tensors[0].shape[-2:]
    rows, columns = (min(side, edge - edge % multiple) for side in (height, width))
    places = [
        [int(torch.randint(free + 1, (), generator=generator)) for free in (height - rows, width - columns)]
        for _ in range(batch)
    ]
    cropped = []
    for tensor in tensors:
        clips = zip(tensor, places, strict=True)
        cropped.append(torch.stack([clip[..., y : y + rows, x : x + columns] for clip, (y, x) in clips]))
    return cropped


def random_frames(video: Tensor, count: int, key: BatchKey) -> tuple[Tensor, Tensor]:
    """Numbers of clips (B, 1) and of `count` frames of each, or of all there are, (B, F), without repetition."""
    scores = torch.rand(video.shape[0], video.shape[2], generator=key.generator("frames"))
    frames = scores.argsort(dim=1)[:, :count].to(video.device)
    return torch.arange(len(video), device=video.device)[:, None], frames


def pick_frames(x: Tensor, rows: Tensor, frames: Tensor) -> Tensor:
    """Frames (B, F) of a clip (B, C, T, H, W), each clip its own; (B, C, F, H, W)."""
    return x.transpose(1, 2)[rows, frames].transpose(1, 2)
