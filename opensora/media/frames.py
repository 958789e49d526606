"""What a clip is, and chosen frames of it: the one reader of pictures and videos, by content, whatever they are called.

`ClipFile` looks into a file without decoding it; generating, training and scans read frames through it alone. A picture
is a clip of one frame. A clip can be read at another rate than its own: then its frames are those that are seen when
they are due, so that what takes two seconds still does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from opensora.errors import OpenSoraError
from opensora.media.animations import Pictures, notes_in
from opensora.media.opening import open_picture, open_video
from opensora.media.timing import Timeline, WrittenClip
from opensora.media.video import Video


@dataclass(frozen=True)
class ClipFacts:
    """What a file holds.

    Attributes:
        num_frames: at `fps`; 1 for a picture.
        height, width: in pixels, as seen.
        fps: frames per second; None for a picture. Where the rate varies, that of the frames that follow each other
            fast.
        is_variable: the rate varies.
        notes: what is done to its frames that a user may not expect.
    """

    num_frames: int
    height: int
    width: int
    fps: float | None
    is_variable: bool = False
    notes: tuple[str, ...] = ()

    @property
    def timeline(self) -> Timeline:
        """As if all its frames were seen equally long."""
        return replace(Timeline.even(self.num_frames, self.fps), is_variable=self.is_variable)


class ClipFile:
    """A picture or a video, looked into but not decoded.

    Attributes:
        path: of the file.
        is_picture: a picture that does not move, and no video of one frame.
        timeline: when its frames are on screen, numbered in the order in which they are seen.
        fps: frames per second of its own; None for a picture of another program. Where the rate varies, that of the
            frames that follow each other fast.

    Raises:
        OpenSoraError: the reason why it cannot be read; the message does not name the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open_picture(path) as image:
            written = None if image is None else WrittenClip.of(notes_in(image))
            moves = image is not None and image.format == "GIF" and getattr(image, "is_animated", False)
            source = None if image is None or moves else Pictures.of(self.path, image, written)
        self._source: Pictures | Video = source or Video.of(self.path, as_noted=written is not None)
        self.timeline = self._source.timeline
        if written is not None:
            written.check_lasts(self.timeline)
            self.timeline = Timeline.even(written.num_frames, written.fps)
        self.fps = self.timeline.fps
        self.is_picture = source is not None and self.timeline.num_frames == 1

    @property
    def notes(self) -> list[str]:
        """What is done to its frames that a user may not expect; complete once those that are wanted are read."""
        return self._source.notes

    def num_frames(self, fps: float | None = None) -> int:
        """Frames of a clip of that rate that lasts as long; None is its own rate."""
        return self.timeline.count(fps)

    def frames(self, indices: Sequence[int], fps: float | None = None) -> Iterator[np.ndarray]:
        """Some frames, uint8 (H, W, 3) each, one after the other, decoded as they are asked for.

        Args:
            indices: which of a clip of that rate, ascending; the first is 0.
            fps: the rate; None for its own.

        Raises:
            OpenSoraError: the reason why one of them cannot be read; the message does not name the file.
        """
        seen = self.timeline.at(indices, fps)
        if self.timeline is not self._source.timeline:  # equal frames are written as one picture
            seen = self._source.timeline.seen_at((np.asarray(seen, float) + 0.5) / (self.fps or 1.0))
        decoded = zip(stored := list(dict.fromkeys(seen)), self._source.decode(stored), strict=True)
        last, frame, shape = -1, np.empty(0), ()
        for index in seen:
            if index != last:
                last, frame = next(decoded)
                shape = shape or frame.shape
            if frame.shape != shape:
                raise OpenSoraError(f"changes its size from {_size(shape)} to {_size(frame.shape)} at frame {index}")
            yield frame

    def decode_all(self) -> Iterator[np.ndarray]:
        """Every frame that the file stores, to see whether it is whole."""
        return self._source.decode_all()


def probe(path: str | Path, verify: Literal["count", "decode"] = "count") -> ClipFacts:
    """What a file holds, and that it is whole.

    Args:
        path: a video or a picture.
        verify: "count" reads the whole file, decodes its first frame and counts the others; "decode" decodes all.

    Raises:
        OpenSoraError: the reason why it cannot be used; the message does not name the file.
    """
    clip = ClipFile(path)
    height, width = next(clip.frames([0])).shape[:2]
    if verify == "decode":
        for frame in clip.decode_all():
            frame[0, 0, 0]
    if clip.is_picture:
        return ClipFacts(1, height, width, None, notes=tuple(clip.notes))
    if clip.num_frames() > 1 and not clip.fps:
        raise OpenSoraError("no frame rate")
    return ClipFacts(clip.num_frames(), height, width, clip.fps, clip.timeline.is_variable, tuple(clip.notes))


def stored_size(path: str | Path) -> tuple[int, int]:
    """Height and width in pixels that a file says it has, known before anything of that size is in memory.

    Raises:
        OpenSoraError: the file cannot be opened; the message does not name it.
    """
    with open_picture(path) as image:
        if image is not None:
            return image.height, image.width
    with open_video(path) as (_, stream):
        return stream.codec_context.height, stream.codec_context.width


def is_picture(path: str | Path) -> bool:
    """Whether it is a picture that does not move.

    Raises:
        OpenSoraError: the file cannot be read.
    """
    return ClipFile(path).is_picture


def read_picture(path: str | Path) -> Image.Image:
    """The whole picture, RGB, the right way up; of a clip, its first frame.

    Raises:
        OpenSoraError: the reason why it cannot be read; the message does not name the file.
    """
    return Image.fromarray(next(ClipFile(path).frames([0])))


def read_frames(
    path: str | Path, indices: Sequence[int], num_frames: int, fps: float | None = None
) -> Iterator[np.ndarray]:
    """Some frames of a video, uint8 (H, W, 3) each, one after the other.

    Args:
        path: of the file.
        indices: which, ascending; the first is 0.
        num_frames: as many the file is said to have,
        fps: at this rate; None for its own.

    Raises:
        OpenSoraError: the reason why one of them cannot be read; the message does not name the file.
    """
    clip = ClipFile(path)
    check_length(clip.timeline, num_frames, fps)
    yield from clip.frames(indices, fps)


def check_length(timeline: Timeline, num_frames: int, fps: float | None = None) -> None:
    """Raises `OpenSoraError` for a clip shorter than somebody said, at this rate or its own."""
    there, plays_so = timeline.count(fps), timeline.plays_at(fps)
    # Tables round their rates, and count what is stored: a frame in a hundred may be missing at its end.
    if there + (0 if plays_so else 1 + num_frames // 100) < num_frames:
        at_rate = "" if plays_so or fps is None else f" at {fps:g} fps (it plays at {timeline.fps or 0:g})"
        raise OpenSoraError(f"truncated: {there} of {num_frames} frames are there{at_rate}")


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]}"
