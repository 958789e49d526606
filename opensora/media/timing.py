"""When frames are on screen: a clip at another rate is made of those that are seen when each of its frames is due."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from opensora.contents import parse_json
from opensora.errors import OpenSoraError
from opensora.media.write import CLIP_KEY

# Rates that differ by less are the same: 29.97 and 30 are not worth a repeated frame every 33 seconds.
_SAME_RATE = 0.01
# Browsers play delays of so little as the longer one: many writers say 0 for "as fast as you can".
_SHORTEST_DELAY_MS, _PLAYED_AS_MS = 10, 100
_FASTEST = 120.0
MOST_FRAMES = 10_000_000
"""What a clip may come to, as a damaged time can be any number: four days at 30 a second."""
_MOST_OF_FEW, _MOST_OF_ONE = 100_000, 1000


def is_same_rate(fps: float, other_fps: float) -> bool:
    """Whether nobody sees a difference."""
    return abs(fps / other_fps - 1) <= _SAME_RATE


@dataclass(frozen=True, eq=False)
class Timeline:
    """When each of the frames that a file holds is on screen.

    Attributes:
        edges_s: (num_frames + 1,) seconds: frame k is seen from `edges_s[k]` to `edges_s[k + 1]`.
        fps: of a constant rate; where it varies, that of the frames that follow each other fast, so that a clip of this
            rate loses none of them; None where nothing says it.
        is_variable: the rate is not constant: a frame is off an even beat by more than half the time of a short one.
    """

    edges_s: np.ndarray
    fps: float | None
    is_variable: bool = False

    @property
    def num_frames(self) -> int:
        """That the file holds."""
        return len(self.edges_s) - 1

    @property
    def duration_s(self) -> float:
        """From the first frame to the end of the last."""
        return float(self.edges_s[-1])

    @classmethod
    def even(cls, num_frames: int, fps: float | None) -> "Timeline":
        """A constant rate."""
        return cls(np.arange(num_frames + 1) / (fps or 1.0), fps)

    @classmethod
    def of_video(cls, times_s: Sequence[float], last_s: float, rate: Fraction | None) -> "Timeline":
        """Of a file that notes when each frame begins to be seen.

        Args:
            times_s: ascending.
            last_s: how long the last is seen; 0 where nobody knows.
            rate: as the container states it.
        """
        times = np.asarray(times_s, float) - times_s[0]
        if len(times) == 1:
            return cls(np.array([0, last_s or 1.0]), float(rate) if rate else None)
        usual_s = float(np.median(np.diff(times)))
        # Many files get the last one wrong; only one that stays is meant.
        edges = np.append(times, times[-1] + (last_s if last_s > 1.5 * usual_s else usual_s))
        return cls._of_edges(edges, float(rate) if rate else None)

    @classmethod
    def of_animation(cls, delays_ms: Sequence[float], *, as_noted: bool = False) -> "Timeline":
        """Of delays, played as browsers do; `as_noted` plays them exactly as they stand."""
        played = [_PLAYED_AS_MS if d <= _SHORTEST_DELAY_MS and not as_noted else d for d in delays_ms]
        edges = np.cumsum([0, *played]) / 1000
        if len(played) == 1 or not edges[-1]:
            return cls.even(len(played), None)
        return cls._of_edges(edges, None)

    @classmethod
    def _of_edges(cls, edges: np.ndarray, stated: float | None) -> "Timeline":
        num_frames = len(edges) - 1
        fps = num_frames / float(edges[-1])
        fast_s, short_s = np.quantile(np.diff(edges), [0.1, 0.25], method="lower").tolist()
        is_variable = bool(np.abs(edges - np.arange(num_frames + 1) / fps).max() > short_s / 2)
        if is_variable:
            fps = min(round(1 / fast_s, 3), _FASTEST)
        elif stated is not None and is_same_rate(stated, fps):
            fps = stated  # exact, where measured times are rounded
        timeline = cls(edges, fps, is_variable)
        if timeline.count(None) > min(MOST_FRAMES, _MOST_OF_FEW + _MOST_OF_ONE * num_frames):
            raise OpenSoraError(f"damaged: it would last {timeline.duration_s:g} s")
        return timeline

    def plays_at(self, fps: float | None) -> bool:
        """Whether that is its constant rate, so that every frame is taken once; None is its own."""
        if self.is_variable:
            return False
        return fps is None or self.fps is None or is_same_rate(fps, self.fps)

    def count(self, fps: float | None) -> int:
        """Frames of a clip of that rate that lasts as long."""
        if self.plays_at(fps):
            return self.num_frames
        return max(1, round(self.duration_s * (fps or self.fps or 1.0)))

    def at(self, indices: Sequence[int], fps: float | None) -> list[int]:
        """The frames of this file that are seen in the middle of frames of a clip of that rate."""
        if self.plays_at(fps):
            return list(indices)
        return self.seen_at((np.asarray(indices, float) + 0.5) / (fps or self.fps or 1.0))

    def seen_at(self, times_s: np.ndarray) -> list[int]:
        """The frames that are on screen then; after the end, the last."""
        return np.minimum(np.searchsorted(self.edges_s[1:], times_s, side="right"), self.num_frames - 1).tolist()


@dataclass(frozen=True)
class WrittenClip:
    """The measures of a clip that `write_video` notes inside a file (`CLIP_KEY`)."""

    num_frames: int
    height: int
    width: int
    fps: float

    @classmethod
    def of(cls, notes: Mapping[str, Any]) -> "WrittenClip | None":
        """Of what is noted inside a file; None where it holds no measures.

        Raises:
            OpenSoraError: it cannot be so.
        """
        noted = notes.get(CLIP_KEY)
        if noted is None:
            return None
        try:
            noted = parse_json(noted, CLIP_KEY) if isinstance(noted, str) else noted
            num_frames, height, width = (int(number) for number in noted["size"])
            clip = cls(num_frames, height, width, float(noted["fps"]))
        except (OpenSoraError, TypeError, ValueError, KeyError, OverflowError):
            raise OpenSoraError(f"damaged: {CLIP_KEY} is no size and rate") from None
        if min(num_frames, height, width) < 1 or num_frames > MOST_FRAMES or not 0 < clip.fps <= 1e6:
            raise OpenSoraError(f"damaged: {CLIP_KEY} is no size and rate")
        return clip

    def check_lasts(self, timeline: Timeline) -> None:
        """Raises `OpenSoraError` for an animation that ends before it should."""
        missing_s = self.num_frames / self.fps - timeline.duration_s
        if timeline.num_frames > 1 and missing_s > max(0.5 / self.fps, 0.006):
            raise OpenSoraError(f"truncated: {timeline.duration_s:g} of {self.num_frames / self.fps:g} s are there")
