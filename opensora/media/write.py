"""Writing videos: mp4, gif, webp or png, with what made them inside the file.

| format | what is written                                                    | notes inside                    |
|--------|--------------------------------------------------------------------|---------------------------------|
| mp4    | H.264, 4:2:0, BT.709; plays everywhere                             | key `opensora` of the container |
| gif    | one palette for all frames; frame times in hundredths of a second  | comment block, as JSON          |
| webp   | animated, lossy at high quality                                    | EXIF image description, as JSON |
| png    | exact pixels: one frame as it is, several as one sheet, row by row | a text chunk each, as JSON      |

H.264 with 4:2:0 colour cannot hold an odd height or width. Such a video gets its last row or column doubled and its
true size noted in the container. Gif and webp keep one picture for a run of equal frames, png one for all of them:
number, size and rate of the frames are noted in the file (`CLIP_KEY`). So `read_video` returns the frames that were
given. Every file is written whole or not at all.
"""

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, PngImagePlugin

from opensora.errors import OpenSoraError
from opensora.files import check_writable, replacing

FORMATS = ("mp4", "gif", "webp", "png")

METADATA_KEY = "opensora"
# Written whether or not the caller gives metadata: `read_video` needs them to return the frames that were given.
TRUE_SIZE_KEY = "opensora_size"
CLIP_KEY = "opensora_clip"
EXIF_IMAGE_DESCRIPTION = 0x010E

# Visually lossless for the small synthetic clips as well as for film. Without macroblock-tree rate control, whose
# assembly reads memory that nobody wrote: the same frames must make the same bytes.
_X264_QUALITY = {"crf": "16", "preset": "medium", "mbtree": "0"}


def format_of(path: str | Path, format: str | None = None) -> str:
    """The file format: the one named, else the one of the file name's ending.

    Raises:
        OpenSoraError: neither names one of `FORMATS`, or they contradict each other.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if format is not None and format not in FORMATS:
        raise OpenSoraError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if format is not None and suffix in FORMATS and suffix != format:
        raise OpenSoraError(f"output {Path(path).name} ends in .{suffix} but the format asked for is {format}")
    if format is None and suffix not in FORMATS:
        raise OpenSoraError(
            f"output {Path(path).name!r} must end in one of {', '.join('.' + name for name in FORMATS)}"
        )
    return format or suffix


def check_fps(fps: float, format: str, name: str = "fps") -> None:
    """Raises `OpenSoraError`, which calls it so, for frames per second that a file of that format cannot hold."""
    highest = 100 if format == "gif" else 1000  # a gif counts hundredths of a second
    if not 0.01 <= fps <= highest:
        raise OpenSoraError(f"{name} is {fps:g}, expected a number from 0.01 to {highest} for {format}")


def check_size(format: str, num_frames: int, height: int, width: int) -> None:
    """Raises `OpenSoraError` for a clip that `read_video` could not read back: a png sheet of too many pixels."""
    # Beyond twice its limit Pillow refuses to open an image.
    limit = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else math.inf
    columns = sheet_columns(num_frames, height, width)
    pixels = columns * width * math.ceil(num_frames / columns) * height
    if format == "png" and pixels > limit:
        raise OpenSoraError(
            f"a png sheet of {num_frames} frames of {height}x{width} has {pixels:,} pixels, expected at most "
            f"{limit:,}; write an mp4, or fewer or smaller frames"
        )


def as_frames(video: Any) -> np.ndarray:
    """uint8 (T, H, W, 3) from uint8 of that shape or from a float `video`.

    Args:
        video: numpy array or torch tensor; uint8 (T, H, W, 3), or float (3, T, H, W) in [-1, 1]; values
            beyond are clamped.

    Raises:
        OpenSoraError: another shape or type, no frames, or values that are not finite.
    """
    if hasattr(video, "detach"):
        video = video.detach().cpu()
        video = (video.float() if video.is_floating_point() else video).numpy()
    array = np.asarray(video)
    if array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3 and array.size:
        return np.ascontiguousarray(array)
    if np.issubdtype(array.dtype, np.floating) and array.ndim == 4 and array.shape[0] == 3 and array.size:
        if not np.isfinite(array).all():
            raise OpenSoraError("the video holds values that are not finite; the model or its settings are broken")
        scaled = np.clip(array.astype(np.float32) * 127.5 + 127.5, 0, 255).round().astype(np.uint8)
        return np.ascontiguousarray(scaled.transpose(1, 2, 3, 0))
    raise OpenSoraError(
        f"cannot write a video of shape {tuple(array.shape)} and type {array.dtype}; "
        "expected uint8 (T, H, W, 3) or float (3, T, H, W) in [-1, 1]"
    )


def write_video(
    path: str | Path, video: Any, fps: float, metadata: dict[str, Any] | None = None, *, format: str | None = None
) -> Path:
    """Writes a video and returns its path.

    Args:
        path: where; the ending names the format unless `format` does.
        video: uint8 (T, H, W, 3) or float (3, T, H, W) in [-1, 1]; array or tensor.
        fps: frames per second.
        metadata: anything JSON can hold, kept inside the file for `read_metadata`; None keeps nothing.
        format: one of `FORMATS`.

    Raises:
        OpenSoraError: unknown format, impossible video or fps, or a place that cannot be written.
    """
    path = Path(path)
    kind = format_of(path, format)
    frames = as_frames(video)
    check_fps(fps, kind)
    check_size(kind, *frames.shape[:3])
    check_writable(path)
    notes = {CLIP_KEY: {"size": frames.shape[:3], "fps": float(fps)}}
    notes |= {} if metadata is None else {METADATA_KEY: metadata}
    write = {"mp4": _write_mp4, "gif": _write_gif, "webp": _write_webp, "png": _write_png}[kind]
    try:
        with replacing(path) as temporary:
            write(temporary, frames, fps, notes)
    except (OSError, av.FFmpegError) as error:
        raise OpenSoraError(f"output {path} cannot be written: {error}") from error
    return path


def _write_mp4(path: Path, frames: np.ndarray, fps: float, notes: dict[str, Any]) -> None:
    num_frames, height, width, _ = frames.shape
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1001)
    options = {"movflags": "use_metadata_tags+faststart"}
    # An absolute path, because FFmpeg takes "12:30.mp4" for an address.
    with av.open(str(path.absolute()), "w", format="mp4", options=options) as container:
        if METADATA_KEY in notes:
            container.metadata[METADATA_KEY] = json.dumps(notes[METADATA_KEY])
        if padded.shape != frames.shape:
            container.metadata[TRUE_SIZE_KEY] = f"{height}x{width}"
        stream = container.add_stream("libx264", rate=rate, options=dict(_X264_QUALITY))
        stream.width, stream.height, stream.pix_fmt = padded.shape[2], padded.shape[1], "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited, as players expect
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(padded[index], format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_gif(path: Path, frames: np.ndarray, fps: float, notes: dict[str, Any]) -> None:
    # One palette for the whole clip, so that flat areas do not flicker. A few frames stand for all.
    sample = frames[np.linspace(0, len(frames) - 1, min(len(frames), 8)).round().astype(int)]
    palette = Image.fromarray(np.concatenate(list(sample), axis=0)).quantize(256, method=Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    images[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=frame_durations_ms(len(frames), fps, "GIF"),
        loop=0,
        comment=json.dumps(notes).encode(),
    )


def _write_webp(path: Path, frames: np.ndarray, fps: float, notes: dict[str, Any]) -> None:
    images = [Image.fromarray(frame) for frame in frames]
    exif = Image.Exif()
    exif[EXIF_IMAGE_DESCRIPTION] = json.dumps(notes)
    images[0].save(
        path,
        format="WEBP",
        save_all=True,
        append_images=images[1:],
        duration=frame_durations_ms(len(frames), fps, "WEBP"),
        loop=0,
        quality=92,
        method=4,
        exif=exif.tobytes(),
    )


def _write_png(path: Path, frames: np.ndarray, fps: float, notes: dict[str, Any]) -> None:
    chunks = PngImagePlugin.PngInfo()
    for key, note in notes.items():
        chunks.add_text(key, json.dumps(note))
    Image.fromarray(frame_sheet(frames)).save(path, format="PNG", pnginfo=chunks)


def sheet_columns(num_frames: int, height: int, width: int) -> int:
    """How many frames a sheet holds in a row so that it comes out about as wide as high, or a little wider."""
    return min(num_frames, max(1, math.ceil(math.sqrt(num_frames * height / width))))


def frame_sheet(frames: np.ndarray) -> np.ndarray:
    """All frames in one image, row by row; the rest of the last row is black.

    Args:
        frames: uint8 (T, H, W, 3).

    Returns:
        uint8 (rows * H, columns * W, 3).
    """
    num_frames, height, width, channels = frames.shape
    columns = sheet_columns(num_frames, height, width)
    rows = math.ceil(num_frames / columns)
    sheet = np.zeros((rows * columns, height, width, channels), np.uint8)
    sheet[:num_frames] = frames
    sheet = sheet.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return sheet.reshape(rows * height, columns * width, channels)


def frame_durations_ms(num_frames: int, fps: float, image_format: str) -> list[int]:
    """How long an animation shows each frame: whole steps of the format that do not drift.

    A gif of 8 fps alternates 120 and 130 ms, because it counts hundredths of a second; webp counts thousandths.
    """
    step_ms = 10 if image_format == "GIF" else 1
    ticks = [round(index * 1000 / fps / step_ms) for index in range(num_frames + 1)]
    return [max(1, after - before) * step_ms for before, after in itertools.pairwise(ticks)]
