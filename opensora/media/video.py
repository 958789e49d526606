"""The frames of a video: when each is on screen, and those that are wanted, decoded as they are seen.

A video is opened at the keyframe before the first frame that is wanted and decoded no further than the last. Which
frame that is follows from the times of all packets, which are read first without being decoded; files that carry no
usable times are decoded from their beginning and counted. Frames are numbered in the order in which they are seen.

As they are seen means: turned and mirrored as the file notes it, pixels that are no squares made square, transparency
laid on white, 10 bits and more scaled to 8.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import numpy as np

from opensora.errors import OpenSoraError
from opensora.media.opening import MOST_PIXELS, open_video
from opensora.media.pictures import LAID_ON_WHITE, lay_on_background
from opensora.media.timing import Timeline, WrittenClip
from opensora.media.wholeness import check_whole
from opensora.media.write import TRUE_SIZE_KEY

# FFmpeg's own decoders of VP8 and VP9 leave the transparency out.
_DECODERS_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_HDR = {16: "PQ", 18: "HLG"}


@dataclass
class Video:
    """The frames of a file, looked into but not decoded.

    Attributes:
        path: of the file.
        timeline: when each is on screen.
        notes: what is done to them that a user may not expect; complete when all that are wanted are decoded.
    """

    path: Path
    timeline: Timeline
    notes: list[str] = field(default_factory=list)
    _ticks: list[int] | None = None
    _keyframes: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, path: str | Path, *, as_noted: bool = False) -> "Video":
        """Reads the packets.

        Args:
            path: of the file.
            as_noted: a gif's delays are meant as they stand, however short.

        Raises:
            OpenSoraError: no video in it, or cut short; the message does not name the file.
        """
        path = Path(path)
        with open_video(path) as (container, stream):
            packets = _packets(container, stream)
            promised, format_name, written = stream.frames, container.format.name, WrittenClip.of(notes_of(container))
            rate, time_base = stream.average_rate or stream.guessed_rate, stream.time_base
        whole = [packet for packet in packets if not packet.is_corrupt]
        if len(whole) < promised and (missing := _missing(path, format_name, promised)):
            raise OpenSoraError(f"truncated: {min(len(whole), promised - missing)} of {promised} frames are there")
        # Those that an edit list leaves out may still be what others are decoded from.
        keyframes = [(p.pts, p.pts if p.dts is None else p.dts) for p in whole if p.is_keyframe and p.pts is not None]
        first = min((pts for pts, _ in keyframes), default=None)
        shown = [packet for packet in whole if not packet.is_discard]
        if first is not None:  # what is seen before the first keyframe cannot be decoded
            shown = [packet for packet in shown if packet.pts is None or packet.pts >= first]
        if not shown:
            raise OpenSoraError("no frame can be decoded")
        if written is not None and len(shown) < written.num_frames:
            raise OpenSoraError(f"truncated: {len(shown)} of {written.num_frames} frames are there")
        check_whole(path)
        durations = {packet.pts: packet.duration for packet in shown if packet.pts is not None}
        if len(durations) < len(shown) or not time_base:
            return cls(path, Timeline.even(len(shown), float(rate) if rate else None), [], None, keyframes)
        ticks = sorted(durations)
        if written is not None and len(shown) == written.num_frames:
            timeline = Timeline.even(written.num_frames, written.fps)
        elif format_name == "gif":
            timeline = Timeline.of_animation([10 * durations[tick] for tick in ticks], as_noted=as_noted)
        else:
            times_s, last_s = [float(tick * time_base) for tick in ticks], float(durations[ticks[-1]] * time_base)
            timeline = Timeline.of_video(times_s, last_s, rate)
        return cls(path, timeline, [], ticks, keyframes)

    def decode(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames, uint8 (H, W, 3) each, one after the other.

        Args:
            indices: which, ascending; the first is 0.

        Raises:
            OpenSoraError: the reason why one of them cannot be decoded; the message does not name the file.
        """
        ticks = [self._ticks[index] for index in indices] if self._ticks is not None else []
        done = 0
        for clock in range(2):  # most formats seek by the first, some by the second
            if done < len(ticks):
                for frame in self._sought(ticks[done:], clock):
                    yield frame
                    done += 1
        if done < len(indices):
            yield from self._counted(indices[done:])

    def decode_all(self) -> Iterator[np.ndarray]:
        """Every frame there is, from the beginning.

        Raises:
            OpenSoraError: damaged, or fewer frames than promised.
        """
        num_decoded = 0
        with open_video(self.path) as (container, stream):
            for frame in _decoded(container, stream):
                if frame.is_corrupt:
                    raise OpenSoraError(f"damaged at frame {num_decoded}")
                yield self._pixels(frame, container, stream)
                num_decoded += 1
        if num_decoded < self.timeline.num_frames:
            raise OpenSoraError(f"{num_decoded} of {self.timeline.num_frames} frames can be decoded")

    def _sought(self, ticks: Sequence[int], clock: int) -> Iterator[np.ndarray]:
        """The frames of these times, until one is not found; sought by when they are seen (clock 0) or decoded (1)."""
        before = [keyframe for keyframe in self._keyframes if keyframe[0] <= ticks[0]]
        if not before:
            return
        waiting = iter(ticks)
        wanted = next(waiting)
        with open_video(self.path) as (container, stream):
            container.seek(max(before)[clock], stream=stream)
            for frame in _decoded(container, stream):
                if frame.pts is None or frame.pts > wanted or (frame.pts == wanted and frame.is_corrupt):
                    return
                if frame.pts == wanted:
                    yield self._pixels(frame, container, stream)
                    wanted = next(waiting, None)
                    if wanted is None:
                        return

    def _counted(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames of these numbers, decoded from the beginning."""
        waiting = iter(indices)
        wanted, index = next(waiting), -1
        with open_video(self.path) as (container, stream):
            for index, frame in enumerate(_decoded(container, stream)):
                if index == wanted:
                    if frame.is_corrupt:
                        raise OpenSoraError(f"damaged at frame {index}")
                    yield self._pixels(frame, container, stream)
                    wanted = next(waiting, None)
                    if wanted is None:
                        return
        raise OpenSoraError(f"truncated: ends after {index + 1} frames, frame {wanted} is wanted")

    def _pixels(self, frame: Any, container: Any, stream: Any) -> np.ndarray:
        """(H, W, 3) uint8, as it is seen."""
        has_alpha = frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)
        aspect = float(stream.sample_aspect_ratio or 0) or 1.0
        size = {}
        if aspect != 1:
            width = max(1, round(frame.width * aspect))
            if width * frame.height > MOST_PIXELS:
                raise OpenSoraError(f"damaged: its pixels are {aspect:g} times as wide as high")
            size = {"width": width, "height": frame.height, "interpolation": "BICUBIC"}
            self._note(f"its pixels are not square, and are made so: {frame.height}x{width} (height x width)")
        pixels = frame.to_ndarray(format="rgba" if has_alpha else "rgb24", **size)
        if has_alpha:
            pixels, is_clear = lay_on_background(pixels)
            if is_clear:
                self._note(LAID_ON_WHITE)
        if frame.color_trc in _HDR:
            self._note(f"it is HDR ({_HDR[frame.color_trc]}); its brightness is not mapped to that of a plain screen")
        if true_size := notes_of(container).get(TRUE_SIZE_KEY):
            height, width = (int(side) for side in true_size.split("x"))
            if not (0 < height <= pixels.shape[0] and 0 < width <= pixels.shape[1]):
                raise OpenSoraError(
                    f"damaged: {height}x{width} of {pixels.shape[0]}x{pixels.shape[1]} pixels are meant"
                )
            pixels = pixels[:height, :width]
        return np.ascontiguousarray(_turned(pixels, frame))

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


class _Packet(NamedTuple):
    """What is known of a frame before it is decoded; without its bytes, which may be more than fits memory."""

    pts: int | None
    dts: int | None
    duration: int
    is_keyframe: bool
    is_corrupt: bool
    is_discard: bool


def _packets(container: Any, stream: Any) -> list[_Packet]:
    return [
        _Packet(p.pts, p.dts, p.duration or 0, p.is_keyframe, p.is_corrupt, p.is_discard)
        for p in container.demux(stream)
        if p.size  # the last is empty
    ]


def notes_of(container: Any) -> dict[str, str]:
    """What a container says of itself; some write its keys in capitals."""
    return {key.lower(): value for key, value in container.metadata.items()}


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """All frames from here on."""
    decoder: Any = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and (name := _DECODERS_WITH_ALPHA.get(decoder.codec.name)):
        own, decoder = decoder, cast(Any, av.CodecContext.create(name, "r"))
        decoder.extradata, decoder.thread_count, decoder.options = own.extradata, 1, own.options
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def _turned(pixels: np.ndarray, frame: Any) -> np.ndarray:
    """Turned and mirrored by the matrix that a camera notes: x' = a x + c y, y' = b x + d y, to whole quarters."""
    matrix = next((side for side in frame.side_data if side.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) > abs(a):
        pixels = pixels.swapaxes(0, 1)
        a, d = c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _missing(path: Path, format_name: str, promised: int) -> int:
    """How many of the frames that a header promises are not in the file.

    A list of edits shows fewer than there are; the count of an avi includes pictures that stand still, and other counts
    are estimates. Then nothing is missing.
    """
    if "mp4" in format_name:
        with open_video(path, ignore_editlist="1") as (container, stream):
            there = sum(1 for packet in container.demux(stream) if packet.size and not packet.is_corrupt)
        return promised - there
    if format_name == "avi":
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8)[4:], "little")
        return promised if size + 8 > path.stat().st_size else 0
    return 0
