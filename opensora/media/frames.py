"""Chosen frames of a clip, and what a clip is: read by content, whatever the file is called.

A video is opened at the keyframe before the first frame that is wanted and decoded no further than the last. Which
frame that is follows from the times of all packets, which are read first without being decoded; files that carry no
usable times are decoded from their beginning and counted. Frames are numbered in the order in which they are seen.
Pictures are read by Pillow and are clips of one frame. What the file notes about rotation is applied.
"""

import contextlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from opensora.errors import OpenSoraError
from opensora.media.write import TRUE_SIZE_KEY

# Animations among these are not pictures; FFmpeg reads those of gif.
_PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# What the libraries raise for files that are broken or something else.
_BROKEN = (
    *(av.FFmpegError, Image.DecompressionBombError, struct.error),
    *(EOFError, ValueError, TypeError, LookupError, ArithmeticError, SyntaxError),
)
# A damaged header may ask for any amount of memory; this is 16 times 4k.
_MOST_PIXELS = 2**27


@dataclass(frozen=True)
class ClipFacts:
    """What a file holds.

    Attributes:
        num_frames: 1 for a picture.
        height, width: in pixels, as seen.
        fps: frames per second; None for a picture.
    """

    num_frames: int
    height: int
    width: int
    fps: float | None


def probe(path: str | Path, verify: Literal["count", "decode"] = "count") -> ClipFacts:
    """What a file holds, and that it is whole.

    Args:
        path: a video or a picture.
        verify: "count" reads the whole file, decodes its first frame and counts the others; "decode" decodes all.

    Raises:
        OpenSoraError: the reason why it cannot be used; the message does not name the file.
    """
    with _explained():
        if is_picture(path):
            image = read_picture(path)
            return ClipFacts(1, image.height, image.width, None)
        packets = _Packets.of(path)
        with _open(path) as container:
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            num_decoded, height, width = 0, 0, 0
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise OpenSoraError(f"damaged at frame {num_decoded}")
                if num_decoded == 0:
                    height, width, _ = _pixels(frame, container).shape
                num_decoded += 1
                if verify == "count":
                    break
        if num_decoded == 0:
            raise OpenSoraError("no frame can be decoded")
        if verify == "decode" and num_decoded < packets.count:
            raise OpenSoraError(f"{num_decoded} of {packets.count} frames can be decoded")
        num_frames = packets.count if verify == "count" else num_decoded
        if num_frames > 1 and not rate:
            raise OpenSoraError("no frame rate")
        return ClipFacts(num_frames, height, width, float(rate) if rate else None)


def is_picture(path: str | Path) -> bool:
    """Whether Pillow knows it as a picture that does not move.

    Raises:
        OpenSoraError: the file cannot be opened, or it moves and nothing here can read it.
    """
    with _explained(), contextlib.suppress(UnidentifiedImageError), Image.open(path, formats=_PICTURES) as image:
        if not getattr(image, "is_animated", False):
            return True
        if image.format != "GIF":
            raise OpenSoraError(f"an animated {str(image.format).lower()}; convert it to mp4")
    return False


def read_picture(path: str | Path) -> Image.Image:
    """The whole picture, RGB, the right way up.

    Raises:
        OpenSoraError: the reason why it cannot be read; the message does not name the file.
    """
    with _explained(), Image.open(path, formats=_PICTURES) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def read_frames(path: str | Path, indices: Sequence[int], num_frames: int) -> Iterator[np.ndarray]:
    """Some frames of a video, uint8 (H, W, 3) each, one after the other.

    Args:
        path: of the file.
        indices: which, ascending; the first is 0.
        num_frames: as many the file is said to have.

    Raises:
        OpenSoraError: the reason why one of them cannot be read; the message does not name the file.
    """
    with _explained():
        packets = _Packets.of(path)
        if packets.count < num_frames:
            raise OpenSoraError(f"{packets.count} of {num_frames} frames are there")
        times = [packets.times[index] for index in indices] if packets.times is not None else []
        done = 0
        for clock in range(2):  # most formats seek by the first, some by the second
            if done < len(times):
                for frame in _sought(path, times[done:], packets.keyframes, clock):
                    yield frame
                    done += 1
        if done < len(indices):
            yield from _counted(path, indices[done:])


@dataclass(frozen=True)
class _Packets:
    """The frames of a file before they are decoded.

    Attributes:
        count: how many.
        times: of all, in the order in which they are seen; None where the file does not tell.
        keyframes: (when it is seen, when it is decoded) of frames that need no other.
    """

    count: int
    times: list[int] | None
    keyframes: list[tuple[int, int]]

    @classmethod
    def of(cls, path: str | Path) -> "_Packets":
        with _open(path) as container:
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size]  # the last is empty
            promised = stream.frames
        whole = [packet for packet in packets if not packet.is_corrupt]
        if len(whole) < promised:
            raise OpenSoraError(f"truncated: {len(whole)} of {promised} frames are there")
        shown = [packet for packet in whole if not packet.is_discard]
        first = min((packet.pts for packet in shown if packet.is_keyframe and packet.pts is not None), default=None)
        if first is not None:  # what is seen before the first keyframe cannot be decoded
            shown = [packet for packet in shown if packet.pts is None or packet.pts >= first]
        times = [packet.pts for packet in shown if packet.pts is not None]
        known = len(times) == len(set(times)) == len(shown)
        keyframes = [(p.pts, p.dts) for p in shown if p.is_keyframe and p.pts is not None and p.dts is not None]
        return cls(len(shown), sorted(times) if known else None, keyframes)


def _sought(
    path: str | Path, times: Sequence[int], keyframes: Sequence[tuple[int, int]], clock: int
) -> Iterator[np.ndarray]:
    """The frames of these times, until one is not found; sought by when they are seen (clock 0) or decoded (1)."""
    before = [keyframe for keyframe in keyframes if keyframe[0] <= times[0]]
    if not before:
        return
    waiting = iter(times)
    wanted = next(waiting)
    with _open(path) as container:
        stream = container.streams.video[0]
        container.seek(max(before)[clock], stream=stream)
        for frame in container.decode(stream):
            if frame.pts is None or frame.pts > wanted or (frame.pts == wanted and frame.is_corrupt):
                return
            if frame.pts == wanted:
                yield _pixels(frame, container)
                wanted = next(waiting, None)
                if wanted is None:
                    return


def _counted(path: str | Path, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """The frames of these numbers, decoded from the beginning."""
    waiting = iter(indices)
    wanted, index = next(waiting), -1
    with _open(path) as container:
        for index, frame in enumerate(container.decode(container.streams.video[0])):
            if index == wanted:
                if frame.is_corrupt:
                    raise OpenSoraError(f"damaged at frame {index}")
                yield _pixels(frame, container)
                wanted = next(waiting, None)
                if wanted is None:
                    return
    raise OpenSoraError(f"truncated: ends after {index + 1} frames, frame {wanted} is wanted")


def _open(path: str | Path) -> Any:
    # Absolute, because FFmpeg takes "12:30.mp4" for an address; and what calls itself a clip may be a list of those.
    container = av.open(str(Path(path).absolute()), options={"protocol_whitelist": "file"})
    if not container.streams.video:
        container.close()
        raise OpenSoraError("no video in it")
    context = container.streams.video[0].codec_context
    if context is None:
        container.close()
        raise OpenSoraError("nobody knows how its video is coded")
    context.thread_count = 1  # clips are read side by side, one thread each
    context.options = {"max_pixels": str(_MOST_PIXELS)}
    return container


def _pixels(frame: Any, container: Any) -> np.ndarray:
    """(H, W, 3) uint8, the right way up."""
    pixels = frame.to_ndarray(format="rgb24")
    if true_size := container.metadata.get(TRUE_SIZE_KEY):
        height, width = (int(side) for side in true_size.split("x"))
        pixels = pixels[:height, :width]
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns what the libraries raise for a broken file into an `OpenSoraError` with the reason alone."""
    try:
        yield
    except OpenSoraError:
        raise
    except FileNotFoundError:
        raise OpenSoraError("the file does not exist") from None
    except (UnidentifiedImageError, av.InvalidDataError) as error:
        raise OpenSoraError("not a video or a picture, or damaged beyond reading") from error
    except OSError as error:
        raise OpenSoraError(_one_line(error.strerror or str(error))) from error
    except _BROKEN as error:
        raise OpenSoraError(f"damaged: {_one_line(str(error)) or type(error).__name__}") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())
