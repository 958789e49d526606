"""Clips as rows of a table, one or a million: what a manifest says of each."""

import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from opensora.contents import shown


@dataclass(frozen=True, slots=True)
class ClipRow:
    """One clip.

    Attributes:
        path: of the file, absolute or relative to the working directory.
        text: what it shows; "" where nobody said.
        num_frames: 1 for an image.
        height, width: in pixels, as it is seen (a rotation noted in the file is applied).
        fps: frames per second; None for an image that has none.
        aesthetic, flow, camera_motion, motion: scores, where the table has them; they are read and not written.
    """

    path: Path
    text: str
    num_frames: int
    height: int
    width: int
    fps: float | None
    aesthetic: float | None = None
    flow: float | None = None
    camera_motion: str | None = None
    motion: float | None = None

    @property
    def aspect_ratio(self) -> float:
        """Height / width."""
        return self.height / self.width

    @property
    def resolution(self) -> int:
        """Pixels of a frame."""
        return self.height * self.width


class ClipRows(Sequence[ClipRow]):
    """Clips by the million: kept column by column, about as large as their table, and made a `ClipRow` when asked for.

    Args:
        rows: to begin with.
    """

    def __init__(self, rows: Iterable[ClipRow] = ()) -> None:
        self._paths, self._texts, self._motions = Texts(), Texts(), Texts()
        self._sizes = array("q")  # num_frames, height, width of each
        self._numbers = array("d")  # fps, aesthetic, flow, motion of each; NaN where there is none
        for row in rows:
            self.append(row)

    def append(self, row: ClipRow) -> None:
        """Adds a clip."""
        self._paths.append(str(row.path))
        self._texts.append(row.text)
        self._motions.append(row.camera_motion or "")
        self._sizes.extend((row.num_frames, row.height, row.width))
        numbers = (row.fps, row.aesthetic, row.flow, row.motion)
        self._numbers.extend([math.nan if number is None else number for number in numbers])

    def sizes(self) -> np.ndarray:
        """(n, 3) number of frames, height and width, int64."""
        return np.array(self._sizes, np.int64).reshape(-1, 3)

    def paths(self) -> Iterator[str]:
        """Of all clips."""
        return iter(self._paths)

    def texts(self) -> Iterator[str]:
        """Of all clips."""
        return iter(self._texts)

    def repeated_paths(self) -> list[int]:
        """Numbers of the clips whose path an earlier one has."""
        hashes = np.fromiter(map(hash, self._paths), np.int64, len(self))
        repeated = np.full(len(self), True)
        repeated[np.unique(hashes, return_index=True)[1]] = False
        return np.flatnonzero(repeated).tolist()

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> ClipRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[ClipRow]: ...
    def __getitem__(self, index: int | slice) -> ClipRow | list[ClipRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        num_frames, height, width = self._sizes[3 * index : 3 * index + 3]
        numbers = self._numbers[4 * index : 4 * index + 4]
        fps, aesthetic, flow, motion = (None if number != number else number for number in numbers)
        camera_motion = self._motions[index] or None
        path, text = Path(self._paths[index]), self._texts[index]
        return ClipRow(path, text, num_frames, height, width, fps, aesthetic, flow, camera_motion, motion)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClipRows | list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType] - rows are added to it

    def __repr__(self) -> str:
        return f"ClipRows({self[:3]!r}{', ...' if len(self) > 3 else ''})"


class Texts:
    """Very many texts, one behind the other in UTF-8."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("Q", [0])

    def append(self, text: str) -> None:
        """Adds a text."""
        self._bytes += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def differences(before: Sequence[ClipRow], now: Sequence[ClipRow]) -> list[str]:
    """What of a table's rows has changed, clip by clip, whatever the folders are that the files are in."""
    told = [f"{len(now):,} clips (were {len(before):,})"] if len(before) != len(now) else []
    names = ({row.path.name for row in rows} for rows in (before, now))
    gone, new = (sorted(a - b) for a, b in itertools.permutations(names, 2))
    told += [f"{name} is new" for name in new] + [f"{name} is gone" for name in gone]
    if told:
        return told
    for old, row in zip(before, now, strict=True):
        if old.path.name != row.path.name:
            return ["the clips are in another order"]
        for name in ("text", "num_frames", "height", "width", "fps"):
            if (was := getattr(old, name)) != (is_now := getattr(row, name)):
                told.append(f"{name} of {row.path.name} is {shown(repr(is_now), 40)} (was {shown(repr(was), 40)})")
    return told
