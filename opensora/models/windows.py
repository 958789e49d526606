"""Attention within windows of rows and columns that last for the whole clip.

A frame of h x w patches is cut into windows from its upper left corner; windows do not overlap, and those at the right
and lower edge hold what is left. (The reference pads these with zeros and hides the padding from every query, which is
the same sum.) Patches are kept in the order of their windows, windows of one shape together, so that attention
within them is a matter of views; attention among all patches of a frame does not care about their order.

Letters: B samples, T frames, S patches of a frame, a, b rows and columns of a window, H heads, d features of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opensora.models.attention import RotaryEmbedding, SelfAttention


class Shape(NamedTuple):
    """Windows of one shape."""

    count: int
    rows: int
    columns: int


class PlacedWindows(NamedTuple):
    """Windows of one shape, with what their attention needs.

    Attributes:
        count: of windows; their tokens are neighbours, one window after the other.
        rope: rotary tables of the T * a * b places in a window, frames slowest.
    """

    count: int
    rope: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class WindowGrid:
    """The windows of a frame.

    Attributes:
        shapes: the largest first.
        order: (S,) numbers of the patches, row by row, in the order of their windows.
    """

    shapes: tuple[Shape, ...]
    order: Tensor

    @classmethod
    def cut(cls, h: int, w: int, rows: int, columns: int, device: torch.device) -> "WindowGrid":
        """Windows of `rows` x `columns` in a frame of h x w patches."""
        patches = torch.arange(h * w, device=device).view(h, w)
        parts: list[Tensor] = []  # (windows down, a, windows across, b)
        for band in patches.split([h - h % rows, h % rows]):
            for part in band.split([w - w % columns, w % columns], dim=1):
                if part.numel():
                    a, b = min(rows, part.shape[0]), min(columns, part.shape[1])
                    parts.append(part.unflatten(0, (-1, a)).unflatten(2, (-1, b)))
        parts.sort(key=lambda part: -part.shape[1] * part.shape[3])
        shapes = tuple(Shape(part.shape[0] * part.shape[2], part.shape[1], part.shape[3]) for part in parts)
        return cls(shapes, torch.cat([part.transpose(1, 2).flatten() for part in parts]))

    def shared_among(self, ranks: int) -> tuple[Tensor, list[tuple[Shape, ...]]]:
        """Whole windows for every rank, as even as they come: the next one goes where there are fewest patches.

        Returns:
            The patches that lie on the ranks, one rank after the other, as places in `order`; and the windows of each
            rank. Ranks that hold fewer patches than others have padding (S) at their end, in windows of one.
        """
        held: list[list[int]] = [[] for _ in range(ranks)]
        counts = [[0] * len(self.shapes) for _ in range(ranks)]
        begin = 0
        for kind, (count, rows, columns) in enumerate(self.shapes):
            for _ in range(count):
                rank = min(range(ranks), key=lambda rank: len(held[rank]))
                held[rank] += range(begin, begin + rows * columns)
                counts[rank][kind] += 1
                begin += rows * columns
        most = max(map(len, held))
        shapes: list[tuple[Shape, ...]] = []
        for mine, count in zip(held, counts, strict=True):
            windows = [shape._replace(count=number) for shape, number in zip(self.shapes, count, strict=True) if number]
            padding = [Shape(most - len(mine), 1, 1)] if len(mine) < most else []
            shapes.append((*windows, *padding))
        places = [[*mine, *[len(self.order)] * (most - len(mine))] for mine in held]
        return torch.tensor(places, device=self.order.device).flatten(), shapes


def place_windows(
    rope: RotaryEmbedding, shapes: Sequence[Shape], num_frames: int, scale: Tensor
) -> tuple[PlacedWindows, ...]:
    """What attention in windows of these shapes needs; positions begin anew in every window.

    Args:
        rope: of one axis.
        shapes: in the order in which the tokens lie.
        num_frames: T.
        scale: (1,), what rows and columns are divided by; frames are counted as they are.
    """

    def count(length: int) -> Tensor:
        return torch.arange(length, dtype=torch.float32, device=scale.device)

    return tuple(
        PlacedWindows(
            shape.count, rope.grid(count(num_frames), count(shape.rows) / scale, count(shape.columns) / scale)
        )
        for shape in shapes
    )


class WindowAttention(SelfAttention):
    """Multi-head attention among all tokens of a window, over all frames."""

    def forward(self, hidden_states: Tensor, dim: int = 1, rope: Sequence[PlacedWindows] = ()) -> Tensor:
        """Attend along the axis of frames and within windows of patches.

        Args:
            hidden_states: (B, T, S, D), patches in the order of their windows.
            dim: the axis of frames, 1.
            rope: the windows, of which every patch is in one.

        Returns:
            Same shape.
        """
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
        num_frames = qkv.shape[dim]
        sizes = [windows.count * len(windows.rope[0]) // num_frames for windows in rope]
        attended = []
        for windows, part in zip(rope, qkv.split(sizes, dim=dim + 1), strict=True):
            # (B, T, count, a * b, 3, H, d) -> (3, B, count, H, T, a * b, d), the last two axes but one are the tokens
            tokens = part.unflatten(2, (windows.count, -1)).permute(4, 0, 2, 5, 1, 3, 6).flatten(4, 5)
            batch = tokens.shape[1:3]
            result = self.attend_all(tokens.flatten(1, 2), windows.rope).unflatten(0, batch)
            result = result.unflatten(3, (num_frames, -1))  # (B, count, H, T, a * b, d)
            attended.append(result.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3))
        return self.proj(torch.cat(attended, dim=2))
