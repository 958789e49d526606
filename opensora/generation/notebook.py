"""What a clip looks like in a notebook: it plays, and how it was made can be unfolded.

The video lies in the notebook itself, so a clip that is too large for one is shown as a picture, with a sentence.
"""

import base64
import html
import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from opensora.generation.record import Record
from opensora.media.write import write_video
from opensora.settings import as_json

MOST_VIDEO_BYTES = 16_000_000
"""Of the file; in a notebook it takes a third more."""
MOST_FRAME_BYTES = 2_000_000_000
"""Of the frames before they are encoded, which would take too long."""
PICTURE_PX = 512
"""Longest side of the picture in the place of a video."""
SMALLEST_PX = 256
"""Width that smaller clips are shown at."""


def clip_html(frames: np.ndarray, fps: float, record: Record | None) -> str:
    """A clip as HTML: a video, or a picture if it is one frame or too large, and its record.

    Args:
        frames, fps, record: as of a `Clip`.
    """
    num_frames, height, width, _ = frames.shape
    enlarged = f"width:{SMALLEST_PX}px;image-rendering:pixelated;" if width < SMALLEST_PX else ""
    style = f'style="{enlarged}max-width:100%"'
    if num_frames == 1:
        shown = f'<img {style} src="{_picture(frames[0])}">'
    elif (video := _video(frames, fps, record)) is not None:
        shown = f'<video {style} controls loop autoplay muted playsinline src="{video}"></video>'
    else:
        shown = f"""<img {style} src="{_picture(frames[num_frames // 2], PICTURE_PX)}"><div>
The middle one of {num_frames:,} frames of {height}x{width}: as a video they are too large for a notebook, which holds
{MOST_VIDEO_BYTES / 1e6:g} MB; <code>clip.save("clip.mp4")</code> writes them.</div>"""
    return f"<div>{shown}{_details(record)}</div>"


def _video(frames: np.ndarray, fps: float, record: Record | None) -> str | None:
    """The address of the clip as mp4, with its record; None if it is too large."""
    if frames.nbytes > MOST_FRAME_BYTES:
        return None
    metadata = None if record is None else record.as_metadata()
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder) / "clip.mp4", frames, fps, metadata)
        return _address("video/mp4", path.read_bytes()) if path.stat().st_size <= MOST_VIDEO_BYTES else None


def _picture(frame: np.ndarray, longest_px: int | None = None) -> str:
    """The address of a frame, made smaller if it is longer."""
    picture = Image.fromarray(frame)
    if longest_px is not None:
        picture.thumbnail((longest_px, longest_px))
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return _address("image/png", stream.getvalue())


def _address(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _details(record: Record | None) -> str:
    if record is None:
        return ""
    title = f"{record.prompt} ({record.model}, seed {record.seed})"
    text = as_json(record).decode(errors="replace")
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
