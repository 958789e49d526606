"""Reading videos and what is written inside them. A broken file is one line naming it, never a shorter video."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from opensora.errors import OpenSoraError
from opensora.media.write import EXIF_IMAGE_DESCRIPTION, METADATA_KEY, SHEET_KEY, TRUE_SIZE_KEY, sheet_columns

_IMAGE_SUFFIXES = {".gif", ".webp", ".png", ".jpg", ".jpeg", ".bmp"}


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
    except (UnidentifiedImageError, OSError, EOFError, ValueError, av.FFmpegError) as error:
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
            text = path.read_text(encoding="utf-8")
        elif suffix in _IMAGE_SUFFIXES:
            text = _image_metadata(path)
        else:
            with av.open(str(path)) as container:
                text = container.metadata.get(METADATA_KEY)
    except (UnidentifiedImageError, OSError, EOFError, ValueError, av.FFmpegError) as error:
        raise OpenSoraError(f"{path} cannot be read: {_one_line(error)}") from error
    if text is None:
        raise OpenSoraError(f"{path} does not say how it was made (written without metadata, or by another program)")
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError as error:
        raise OpenSoraError(f"{path} holds metadata that is not JSON: {error.msg}") from None
    if not isinstance(metadata, dict):
        raise OpenSoraError(f"{path} holds metadata that is not a JSON object")
    return metadata


def _read_stream(path: Path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
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
        sheet = image.info.get(SHEET_KEY)
        frames, durations_ms = [], []
        for page in ImageSequence.Iterator(image):
            frames.append(np.asarray(page.convert("RGB")))
            durations_ms.append(page.info.get("duration", 0) or 0)
    if sheet is not None:
        layout = json.loads(sheet)
        return _cut_sheet(frames[0], *layout["size"]), float(layout["fps"])
    if len(frames) == 1:
        return np.stack(frames), 1000 / durations_ms[0] if durations_ms[0] else 1.0
    # These formats keep one picture for a run of equal frames and show it longer.
    shortest = max(min(durations_ms), 1)
    repeats = [max(1, round(duration / shortest)) for duration in durations_ms]
    total_ms = max(sum(durations_ms), 1)
    return np.repeat(np.stack(frames), repeats, axis=0), sum(repeats) * 1000 / total_ms


def _cut_sheet(sheet: np.ndarray, num_frames: int, height: int, width: int) -> np.ndarray:
    columns = sheet_columns(num_frames, height, width)
    cells = sheet.reshape(-1, height, columns, width, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(cells.reshape(-1, height, width, 3)[:num_frames])


def _image_metadata(path: Path) -> str | None:
    with Image.open(path) as image:
        if image.format == "GIF":
            text = image.info.get("comment")
            # Any program may leave a comment; ours is a JSON object.
            text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
            return text if text and text.lstrip().startswith("{") else None
        if image.format == "PNG":
            return image.info.get(METADATA_KEY)
        return image.getexif().get(EXIF_IMAGE_DESCRIPTION)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise OpenSoraError(f"{path} is a folder, expected a video file")
    if not path.exists():
        raise OpenSoraError(f"{path} does not exist")
    return path


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
