"""Reading videos and what is written inside them. A broken file is one line naming it, never a shorter video."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from opensora.errors import OpenSoraError
from opensora.media.write import (
    CLIP_KEY,
    EXIF_IMAGE_DESCRIPTION,
    METADATA_KEY,
    TRUE_SIZE_KEY,
    frame_durations_ms,
    sheet_columns,
)

_IMAGE_SUFFIXES = {".gif", ".webp", ".png", ".jpg", ".jpeg", ".bmp"}

# What the libraries raise for a file that is not what it seems, or is too big to be opened safely.
_BROKEN = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    av.FFmpegError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
)


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """Reads a whole video, or an image as a video of one frame.

    Returns:
        frames, uint8 (T, H, W, 3), and frames per second (1 for an image).

    Raises:
        OpenSoraError: no such file, not a video, or a damaged or truncated one.
    """
    path = _existing(path)
    try:
        return _read_images(path) if path.suffix.lower() in _IMAGE_SUFFIXES else _read_stream(path)
    except _BROKEN as error:
        if isinstance(error, OpenSoraError):
            raise
        raise OpenSoraError(f"{path} is damaged or not a video: {_one_line(error)}") from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `write_video` was given as metadata; also reads a JSON sidecar.

    Raises:
        OpenSoraError: no such file, unreadable, or nothing of ours inside.
    """
    path = _existing(path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            metadata = json.loads(path.read_text(encoding="utf-8"))
        elif suffix in _IMAGE_SUFFIXES:
            with Image.open(path) as image:
                metadata = _notes(image).get(METADATA_KEY)
        else:
            with av.open(str(path.absolute())) as container:
                metadata = json.loads(container.metadata.get(METADATA_KEY, "null"))
    except json.JSONDecodeError as error:
        raise OpenSoraError(f"{path} holds metadata that is not JSON: {error.msg}") from None
    except _BROKEN as error:
        raise OpenSoraError(f"{path} cannot be read: {_one_line(error)}") from error
    if metadata is None:
        raise OpenSoraError(f"{path} does not say how it was made (written without metadata, or by another program)")
    if not isinstance(metadata, dict):
        raise OpenSoraError(f"{path} holds metadata that is not a JSON object")
    return metadata


def _read_stream(path: Path) -> tuple[np.ndarray, float]:
    # An absolute path, because FFmpeg takes "12:30.mp4" for an address.
    with av.open(str(path.absolute())) as container:
        if not container.streams.video:
            raise OpenSoraError(f"{path} holds no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        promised = stream.frames
        rate = stream.average_rate or stream.guessed_rate
        true_size = container.metadata.get(TRUE_SIZE_KEY)
    # A file cut short often decodes without complaint up to the cut.
    if not frames or len(frames) < promised:
        raise OpenSoraError(
            f"{path} is truncated: {len(frames)} of {promised or 'an unknown number of'} frames can be read"
        )
    video = np.stack(frames)
    if true_size is not None:
        height, width = (int(part) for part in true_size.split("x"))
        video = np.ascontiguousarray(video[:, :height, :width])
    return video, float(rate) if rate else 1.0


def _read_images(path: Path) -> tuple[np.ndarray, float]:
    with Image.open(path) as image:
        clip, image_format = _notes(image).get(CLIP_KEY), str(image.format)
        pages, durations_ms = [], []
        for page in ImageSequence.Iterator(image):
            pages.append(np.asarray(ImageOps.exif_transpose(page).convert("RGB")))  # photos say which way is up
            durations_ms.append(page.info.get("duration", 0) or 0)
    pictures = np.stack(pages)
    if clip is not None:
        (num_frames, height, width), fps = clip["size"], float(clip["fps"])
        if image_format == "PNG":
            return _cut_sheet(pictures[0], num_frames, height, width), fps
        wanted_ms = frame_durations_ms(num_frames, fps, image_format)
        if any(durations_ms) and sum(durations_ms) < sum(wanted_ms):
            raise OpenSoraError(f"{path} is truncated: {sum(durations_ms)} of {sum(wanted_ms)} ms can be read")
        return pictures[_picture_of_each_frame(durations_ms, wanted_ms)], fps
    if len(pages) == 1:
        return pictures, 1000 / durations_ms[0] if durations_ms[0] else 1.0
    # Another program's: as if the picture shown shortest were one frame, and the others runs of equal ones.
    shortest = max(min(durations_ms), 1)
    repeats = [max(1, round(duration / shortest)) for duration in durations_ms]
    total_ms = max(sum(durations_ms), 1)
    return np.repeat(pictures, repeats, axis=0), sum(repeats) * 1000 / total_ms


def _picture_of_each_frame(durations_ms: list[int], wanted_ms: list[int]) -> np.ndarray:
    """Which picture is on screen when each frame is due: one picture stands for a run of equal frames."""
    shown_from = np.cumsum([0, *durations_ms[:-1]])
    due = np.cumsum([0, *wanted_ms[:-1]])
    return np.searchsorted(shown_from, due, side="right") - 1


def _cut_sheet(sheet: np.ndarray, num_frames: int, height: int, width: int) -> np.ndarray:
    columns = sheet_columns(num_frames, height, width)
    cells = sheet.reshape(-1, height, columns, width, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(cells.reshape(-1, height, width, 3)[:num_frames])


def _notes(image: Image.Image) -> dict[str, Any]:
    """What `write_video` noted inside an image: the clip's measures and its metadata, by key."""
    if image.format == "PNG":
        return {key: json.loads(image.info[key]) for key in (CLIP_KEY, METADATA_KEY) if key in image.info}
    text = image.info.get("comment") if image.format == "GIF" else image.getexif().get(EXIF_IMAGE_DESCRIPTION)
    try:
        notes = json.loads(text or "null")
    except (ValueError, TypeError):  # any program may leave a comment
        return {}
    return notes if isinstance(notes, dict) else {}


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise OpenSoraError(f"{path} is a folder, expected a video file")
    if not path.exists():
        raise OpenSoraError(f"{path} does not exist")
    return path


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
