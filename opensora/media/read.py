"""Whole videos and what is written inside them. A broken file is one line naming it, never a shorter video."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from opensora.contents import check_regular, parse_json, read_json
from opensora.errors import OpenSoraError
from opensora.media.animations import notes_in
from opensora.media.frames import ClipFile
from opensora.media.opening import open_picture, open_video
from opensora.media.timing import Timeline
from opensora.media.video import notes_of
from opensora.media.write import CLIP_KEY, METADATA_KEY, frame_path, is_numbered


def read_video(path: str | Path, fps: float | None = None) -> tuple[np.ndarray, float]:
    """Reads a whole video, or a picture as a video of one frame.

    Args:
        path: of the file, told by its content; of numbered frames that `write_video` wrote, the folder, or
            `folder/%04d.png`.
        fps: resample to this rate by time; None for its own. Where a file's rate varies, its own is that of the frames
            that follow each other fast.

    Returns:
        frames, uint8 (T, H, W, 3), and frames per second (1 for a picture that has none).

    Raises:
        OpenSoraError: no such file, not a video, or a damaged or truncated one.
    """
    given, path = Path(path), first_frame(Path(path))
    check_regular(path, "video")
    with _named(path):
        if path != given:
            return _read_numbered(path, fps)
        clip = ClipFile(path)
        numbers = range(clip.num_frames(fps))
        first = next(clip.frames([0], fps))
        frames = np.empty((len(numbers), *first.shape), np.uint8)
        for number, frame in enumerate(clip.frames(numbers, fps)):
            frames[number] = frame
    return frames, fps or clip.fps or 1.0


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `write_video` was given as metadata; also reads a JSON sidecar.

    Raises:
        OpenSoraError: no such file, unreadable, or nothing of ours inside.
    """
    path = first_frame(Path(path))
    check_regular(path, "clip")
    metadata = read_json(path) if path.suffix.lower() == ".json" else _metadata_inside(path)
    if metadata is None:
        raise OpenSoraError(f"{path} does not say how it was made (written without metadata, or by another program)")
    if not isinstance(metadata, dict):
        raise OpenSoraError(f"{path} holds metadata that is not a JSON object")
    return metadata


def first_frame(path: Path) -> Path:
    """The first of numbered frames where a path stands for all of them: a folder of such, or `folder/%04d.png`."""
    if path.is_dir():
        return next(iter(sorted(path.glob("*.png"))), path)
    return frame_path(path, 0) if is_numbered(path) and not path.exists() else path


def _read_numbered(first: Path, fps: float | None) -> tuple[np.ndarray, float]:
    """Numbered frames that `write_video` wrote."""
    with open_picture(first) as image:
        noted = {} if image is None else notes_in(image).get(CLIP_KEY, {})
    paths = sorted(first.parent.glob("*.png"))
    if len(paths) != noted.get("of", len(paths)):
        raise OpenSoraError(f"{first.parent} holds {len(paths)} of {noted['of']} frames")
    timeline = Timeline.even(len(paths), float(noted.get("fps", 1.0)))
    numbers = timeline.at(range(timeline.count(fps)), fps)
    return np.stack([next(ClipFile(paths[number]).frames([0])) for number in numbers]), fps or timeline.fps or 1.0


def _metadata_inside(path: Path) -> Any:
    with _named(path):
        with open_picture(path) as image:
            if image is not None:
                return notes_in(image).get(METADATA_KEY)
        with open_video(path) as (container, _):
            text = notes_of(container).get(METADATA_KEY, "null")
    return parse_json(text, f"the metadata of {path}")


@contextlib.contextmanager
def _named(path: str | Path):
    try:
        yield
    except OpenSoraError as error:
        raise OpenSoraError(f"{path} cannot be read: {error}") from error
    except MemoryError as error:
        raise OpenSoraError(f"{path} cannot be read: all its frames at once are more than fits into memory") from error
