"""Videos and latents worked on in overlapping tiles, whose borders are blended linearly.

A tile knows nothing of the others, so the result is close to the whole one and not the same; what published models
compute in tiles is computed in the same ones here, in the same order. A quarter of a tile overlaps with the next.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.models.autoencoders.joint import JointCodec

OVERLAP = 4
"""A tile of n cells begins n - n / `OVERLAP` cells after the one before."""


def in_space(compute: Callable[[Tensor], Tensor], clip: Tensor, tile: int, made: int) -> Tensor:
    """`compute` of tiles of height and width, (B, C, T, H, W) -> (B, C', T', H', W').

    Args:
        compute: takes and returns such a tensor.
        clip: what is cut into tiles.
        tile: edge of a tile.
        made: edge of what becomes of it.
    """
    blended, height, width = made // OVERLAP, clip.shape[3], clip.shape[4]
    step, kept = tile - tile // OVERLAP, made - blended
    rows: list[list[Tensor]] = []
    for top in range(0, height, step):
        row: list[Tensor] = []
        for column, left in enumerate(range(0, width, step)):
            part = compute(clip[..., top : top + tile, left : left + tile])
            if rows:
                _blend(rows[-1][column], part, blended, dim=3)
            if row:
                _blend(row[-1], part, blended, dim=4)
            row.append(part)
        rows.append(row)
    return torch.cat([torch.cat([part[..., :kept, :kept] for part in row], dim=4) for row in rows], dim=3)


def in_time(
    compute: Callable[[Tensor], Tensor], clip: Tensor, tile: int, made: int, *, lead: int = 0, shortest: int = 1
) -> Tensor:
    """`compute` of tiles of frames, (B, C, T, H, W) -> (B, C', T', H', W').

    Args:
        compute: takes and returns such a tensor.
        clip: what is cut into tiles.
        tile: frames of a tile.
        made: frames of what becomes of it.
        lead: frames that every tile has besides, in front, and that as many of what is made stand for: where the first
            frame of a clip has a latent frame of its own. Those of all tiles but the first are dropped.
        shortest: a last tile of fewer frames is left out; they are in the one before as well.
    """
    blended, num_frames = made // OVERLAP, clip.shape[2]
    starts = list(range(0, num_frames - lead, tile - tile // OVERLAP))
    if len(starts) > 1 and num_frames - lead - starts[-1] < shortest:
        starts.pop()
    parts: list[Tensor] = []
    for start in starts:
        part = compute(clip[:, :, start : start + tile + lead])
        if parts:
            part = part[:, :, lead:]
            _blend(parts[-1], part, blended, dim=2)
            parts[-1] = parts[-1][:, :, : made - blended + (lead if len(parts) == 1 else 0)]
        parts.append(part)
    return torch.cat(parts, dim=2)


@dataclass(frozen=True)
class Tile:
    """How large a tile is.

    Attributes:
        size: edge in pixels or latent cells; None for whole frames.
        frames: video or latent frames; None for whole clips.
    """

    size: int | None
    frames: int | None


def in_tiles(
    compute: Callable[[Tensor], Tensor], clip: Tensor, tile: Tile, made: Tile, *, lead: int = 0, shortest: int = 1
) -> Tensor:
    """`compute` of what is no larger than a tile whole, of the rest in tiles of space within tiles of time.

    Args:
        compute: takes and returns a tensor (B, C, T, H, W).
        clip: what is cut into tiles.
        tile: of the clip.
        made: what becomes of it.
        lead: see `in_time`.
        shortest: see `in_time`.
    """

    def whole_frames(part: Tensor) -> Tensor:
        if tile.size is None or made.size is None or max(part.shape[3:]) <= tile.size:
            return compute(part)
        return in_space(compute, part, tile.size, made.size)

    if tile.frames is None or made.frames is None or clip.shape[2] <= tile.frames:
        return whole_frames(clip)
    return in_time(whole_frames, clip, tile.frames, made.frames, lead=lead, shortest=shortest)


class TiledCodec(JointCodec):
    """Base of a codec that works on what is larger than a tile in overlapping tiles.

    Its `__init__` calls `_set_tiles` when its factors are set; `tile_sample_size` and `tile_sample_frames`, edge in
    pixels and frames of a tile or None, are among its keywords.
    """

    tile_sample_size: int | None
    tile_sample_frames: int | None

    @property
    def use_tiling(self) -> bool:
        """Whether clips larger than a tile are worked on in overlapping tiles."""
        return self.tile_sample_size is not None or self.tile_sample_frames is not None

    def enable_tiling(self, tile_sample_size: int | None = None, tile_sample_frames: int | None = None) -> None:
        """Clips larger than a tile are worked on in overlapping tiles, as the published models do.

        Args:
            tile_sample_size: see the class; None for that of its configuration.
            tile_sample_frames: likewise.

        Raises:
            OpenSoraError: for sizes that are no such multiples.
        """
        config: Mapping[str, Any] = self.config
        self._set_tiles(
            tile_sample_size or config["tile_sample_size"], tile_sample_frames or config["tile_sample_frames"]
        )

    @property
    def fewest_tile_frames(self) -> int:
        """The least that `tile_sample_frames` can be."""
        return OVERLAP * self.temporal_factor

    def disable_tiling(self) -> None:
        """Every clip is worked on whole."""
        self._set_tiles(None, None)

    def _set_tiles(self, size: int | None, frames: int | None) -> None:
        for name, value, factor, unit in (
            ("tile_sample_size", size, self.spatial_factor, "px"),
            ("tile_sample_frames", frames, self.temporal_factor, "frames"),
        ):
            if value is not None and (value < 1 or value % (OVERLAP * factor)):
                raise OpenSoraError(f"{name} is {value}, expected a multiple of {OVERLAP * factor} {unit}")
        self.tile_sample_size, self.tile_sample_frames = size, frames

    @property
    def _sample_tile(self) -> Tile:
        return Tile(self.tile_sample_size, self.tile_sample_frames)

    @property
    def _latent_tile(self) -> Tile:
        size, frames = self.tile_sample_size, self.tile_sample_frames
        return Tile(size and size // self.spatial_factor, frames and frames // self.temporal_factor)


def _blend(before: Tensor, after: Tensor, extent: int, dim: int) -> None:
    """Fades the end of `before` into the beginning of `after`, which is changed."""
    extent = min(extent, before.shape[dim], after.shape[dim])
    if extent == 0:
        return
    end, beginning = before.narrow(dim, before.shape[dim] - extent, extent), after.narrow(dim, 0, extent)
    weights = torch.arange(extent, device=after.device, dtype=after.dtype) / extent
    weights = weights.view([-1 if axis == dim else 1 for axis in range(after.ndim)])
    beginning.copy_(end * (1 - weights) + beginning * weights)
