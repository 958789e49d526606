"""Writing videos, with what made them inside the file.

| format | what is written                                                    | notes inside                      |
|--------|--------------------------------------------------------------------|-----------------------------------|
| mp4    | H.264, 4:2:0, BT.709; plays everywhere                             | key `opensora` of the container   |
| mov    | the same                                                           | likewise                          |
| webm   | VP9, 4:2:0, BT.709; plays in browsers                              | likewise                          |
| mkv    | FFV1: exact pixels                                                 | likewise                          |
| gif    | one palette for all frames; frame times in hundredths of a second  | comment block, as JSON            |
| webp   | animated, lossy at high quality                                    | EXIF image description, as JSON   |
| png    | exact pixels: one frame as it is, several as one sheet, row by row | a text chunk each, as JSON        |
| frames | exact pixels: a folder of numbered png files, or `folder/%04d.png` | likewise, in every one            |

H.264 and VP9 with 4:2:0 colour hold no odd height or width. Such a video gets its last row or column doubled and its
true size noted in the container. Gif and webp keep one picture for a run of equal frames, png one for all of them:
number, size and rate of the frames are noted in the file (`CLIP_KEY`). So `read_video` returns the frames that were
given. Every file is written whole or not at all.
"""

import functools
import itertools
import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, PngImagePlugin

from opensora.errors import OpenSoraError
from opensora.files import check_writable, replacing, replacing_folder

FORMATS = ("mp4", "mov", "webm", "mkv", "gif", "webp", "png", "frames")
FRAME_NAME = "%05d.png"
_NUMBER = re.compile(r"%(0\d)?d")

METADATA_KEY = "opensora"
# Written whether or not the caller gives metadata: `read_video` needs them to return the frames that were given.
TRUE_SIZE_KEY = "opensora_size"
CLIP_KEY = "opensora_clip"
EXIF_IMAGE_DESCRIPTION = 0x010E

# Visually lossless for the small synthetic clips as well as for film. Without macroblock-tree rate control, whose
# assembly reads memory that nobody wrote: the same frames must make the same bytes.
_X264 = ("libx264", "yuv420p", {"crf": "16", "preset": "medium", "mbtree": "0"})
_VP9 = ("libvpx-vp9", "yuv420p", {"crf": "18", "b:v": "0", "deadline": "good", "cpu-used": "4"})
_FFV1 = ("ffv1", "bgr0", {"level": "3"})
_STREAMS = {"mp4": ("mp4", _X264), "mov": ("mov", _X264), "webm": ("webm", _VP9), "mkv": ("matroska", _FFV1)}
"""What FFmpeg calls the container, and the encoder, its pixels and its options."""

# Browsers show what is to be seen for less than these for a tenth of a second.
_SHORTEST_MS = {"gif": 20, "webp": 11}


def format_of(path: str | Path, format: str | None = None) -> str:
    """The file format: the one named, else the one of the file name's ending.

    Raises:
        OpenSoraError: neither names one of `FORMATS`, or they contradict each other.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if format is not None and format not in FORMATS:
        raise OpenSoraError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if is_numbered(path):
        suffix = "frames"
    if format == "frames" and suffix != "png":
        return format  # the name of a folder, whatever it ends in
    if format is not None and suffix in FORMATS and suffix != format:
        raise OpenSoraError(f"output {Path(path).name} ends in .{suffix} but the format asked for is {format}")
    if format is None and suffix not in FORMATS:
        endings = ", ".join(f".{name}" for name in FORMATS if name != "frames")
        raise OpenSoraError(f"output {Path(path).name!r} must end in one of {endings}")
    return format or suffix


def is_numbered(path: str | Path) -> bool:
    """Whether a path stands for many, as `frames/%04d.png` does."""
    return Path(path).suffix.lower() == ".png" and _NUMBER.search(Path(path).name) is not None


def frames_folder(path: Path) -> Path:
    """The folder of numbered frames: the path itself, or where `folder/%04d.png` lies."""
    return path.parent if is_numbered(path) else path


def frame_path(path: Path, number: int) -> Path:
    """Where a frame lies, counted from 0, of a folder or of `folder/%04d.png`."""
    pattern = path.name if is_numbered(path) else FRAME_NAME
    return frames_folder(path) / _NUMBER.sub(lambda found: found[0] % number, pattern)


def check_output(path: str | Path, format: str) -> None:
    """Proves, before the work starts, that a video can be written there.

    Raises:
        OpenSoraError: it cannot; numbered frames take a folder of their own, where no others can be mixed with them.
    """
    path = Path(path)
    if format != "frames":
        return check_writable(path)
    folder = frames_folder(path)
    if folder.is_dir() and any(folder.iterdir()) and not _holds_frames_of(path):
        raise OpenSoraError(
            f"output {folder} holds something; numbered frames need a folder of their own, name another"
        )
    if not folder.is_dir():
        check_writable(folder)
    return check_writable(folder / frame_path(path, 0).name)


def _holds_frames_of(path: Path) -> bool:
    """Whether what there is are numbered frames that were written as this path would have them, and nothing else."""
    files = sorted(frames_folder(path).iterdir())
    if files != sorted(frame_path(path, number) for number in range(len(files))):
        return False
    try:
        with Image.open(files[0]) as image:
            return "of" in json.loads(image.info[CLIP_KEY])
    except (OSError, KeyError, ValueError, TypeError):
        return False


def check_fps(fps: float, format: str, name: str = "fps") -> None:
    """Raises `OpenSoraError`, which calls it so, for frames per second that a file of that format cannot hold."""
    highest = 1000 // _SHORTEST_MS.get(format, 1)
    if not 0.01 <= fps <= highest:
        raise OpenSoraError(f"{name} is {fps:g}, expected a number from 0.01 to {highest} for {format}")


def timing_note(fps: float, format: str) -> str | None:
    """What is to be said of frame times that a format cannot hold exactly."""
    exact_ms = 1000 / fps
    if format != "gif" or (exact_ms / 10).is_integer():
        return None
    shorter = int(exact_ms // 10) * 10
    return (
        f"gif counts hundredths of a second: frames are shown for {shorter} or {shorter + 10} ms by turns, so that the "
        f"clip plays at {fps:g} frames per second"
    )


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
    check_output(path, kind)
    notes = {CLIP_KEY: {"size": frames.shape[:3], "fps": float(fps)}}
    notes |= {} if metadata is None else {METADATA_KEY: metadata}
    write = {"gif": _write_gif, "webp": _write_webp, "png": _write_png, "frames": _write_frames}.get(kind)
    write = write or functools.partial(_write_stream, kind=kind)
    try:
        if kind == "frames":
            with replacing_folder(frames_folder(path), overwrite=True) as folder:
                write(folder / path.name if is_numbered(path) else folder, frames, fps, notes)
        else:
            with replacing(path) as temporary:
                write(temporary, frames, fps, notes)
    except (OSError, av.FFmpegError) as error:
        raise OpenSoraError(f"output {path} cannot be written: {error}") from error
    return path


def _write_stream(path: Path, frames: np.ndarray, fps: float, notes: dict[str, Any], kind: str) -> None:
    num_frames, height, width, _ = frames.shape
    container_format, (encoder, pixels, quality) = _STREAMS[kind]
    subsampled = pixels == "yuv420p"
    if subsampled:
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1001)
    counted = kind in ("mp4", "mov")
    # The second keeps random numbers out of the header: the same frames must make the same bytes.
    options = {"movflags": "use_metadata_tags+faststart"} if counted else {"fflags": "+bitexact"}
    # An absolute path, because FFmpeg takes "12:30.mp4" for an address.
    with av.open(str(path.absolute()), "w", format=container_format, options=options) as container:
        if METADATA_KEY in notes:
            container.metadata[METADATA_KEY] = json.dumps(notes[METADATA_KEY])
        if frames.shape[1:3] != (height, width):
            container.metadata[TRUE_SIZE_KEY] = f"{height}x{width}"
        if not counted:  # the header does not say how many frames there are
            container.metadata[CLIP_KEY] = json.dumps(notes[CLIP_KEY])
        stream = container.add_stream(encoder, rate=rate, options=dict(quality))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixels
        if subsampled:
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = 1  # limited, as players expect
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(frames[index], format="rgb24")
            if subsampled:
                frame = frame.reformat(format=pixels, dst_colorspace="ITU709", dst_color_range="MPEG")
            else:
                frame = frame.reformat(format=pixels)
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_frames(path: Path, frames: np.ndarray, fps: float, notes: dict[str, Any]) -> None:
    """Each with the notes of a clip of one frame, how many belong together, and the metadata of the whole."""
    one = {"size": (1, *frames.shape[1:3]), "fps": float(fps), "of": len(frames)}
    for number, frame in enumerate(frames):
        _write_png(frame_path(path, number), frame[None], fps, {**notes, CLIP_KEY: one})


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
