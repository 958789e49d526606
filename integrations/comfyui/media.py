"""Pictures and videos of ComfyUI as files, which requests name."""

import hashlib
import io as streams
from pathlib import Path
from typing import TYPE_CHECKING

import folder_paths
import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from comfy_api.latest import Input


def pixels(images: "Input.Image") -> np.ndarray:
    """Frames (T, H, W, C) of [0, 1] as uint8 (T, H, W, 3): those of a picture that was loaded are its own again."""
    return (images[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy()


def picture_bytes(image: "Input.Image") -> bytes:
    """One picture as PNG.

    Raises:
        ValueError: several of them.
    """
    if len(image) != 1:
        raise ValueError(f"got {len(image)} pictures, expected one; give several frames as a video")
    stream = streams.BytesIO()
    Image.fromarray(pixels(image)[0]).save(stream, format="PNG")
    return stream.getvalue()


def picture_file(image: "Input.Image") -> Path:
    """One picture as a PNG in ComfyUI's folder of temporary files, under a name that tells its content."""
    data = picture_bytes(image)
    path = _temporary(data, ".png")
    path.write_bytes(data)
    return path


def video_file(video: "Input.Video") -> Path:
    """The file of a video; of one that has none, or of which a part is meant, a lossless copy."""
    source = video.get_stream_source()
    if isinstance(source, str) and not any(video.get_active_trim_window()):
        return Path(source)
    from opensora.media.write import write_video

    components = video.get_components()
    frames = pixels(components.images)
    path = _temporary(frames.tobytes(), ".mkv")
    write_video(path, frames, float(components.frame_rate))
    return path


def temporary_folder() -> Path:
    """Where ComfyUI keeps files until it is started again."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _temporary(data: bytes, ending: str) -> Path:
    return temporary_folder() / f"opensora-{hashlib.sha256(data).hexdigest()[:16]}{ending}"
