"""Small clips made frame by frame: any codec, times, shape and tags."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

import av
import numpy as np

HEIGHT, WIDTH = 48, 64


def numbered(num_frames: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 (T, H, W, 3): frame k is grey of level 4 k, with a bright upper left corner that says which way is up."""
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = (np.arange(num_frames) * 4).clip(0, 200).astype(np.uint8)[:, None, None, None]
    frames[:, : height // 3, : width // 3] = 250
    return frames


def number_of(frame: np.ndarray) -> int:
    """Which frame of `numbered` it is, by its middle and lower half."""
    height, width = frame.shape[:2]
    return round(float(np.median(frame[height // 2 :, width // 2 :])) / 4)


def encode(
    path: Path,
    frames: np.ndarray,
    times_ms: Sequence[int] | None = None,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: int = 10,
    aspect: Fraction | None = None,
    color_trc: int | None = None,
    format: str | None = None,
    time_base: Fraction = Fraction(1, 1000),
    container: Mapping[str, str] = MappingProxyType({}),
    **options: str,
) -> Path:
    """Writes frames (T, H, W, 3 or 4), shown from these times on."""
    layout = "rgba" if frames.shape[-1] == 4 else "rgb48le" if frames.dtype == np.uint16 else "rgb24"
    options = {"g": "10", "crf": "4"} | options if codec == "libx264" else options
    with av.open(str(path), "w", format=format, options=dict(container)) as output:
        stream = output.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.time_base = time_base
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if color_trc is not None:
            stream.codec_context.color_trc = color_trc
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format=layout)
            frame.pts = index * 1000 // fps if times_ms is None else times_ms[index]
            frame.time_base = Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path
