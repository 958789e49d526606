"""What a model makes of a request that leaves size or length out, as far as that is known without the model."""

import functools
import re

from opensora.checkpoints.catalogue import describe_model
from opensora.errors import OpenSoraError
from opensora.generation.request import ClipRequest


def clip_size(request: ClipRequest) -> tuple[int, int]:
    """Width and height as asked for, or the model's own; 0 where nobody knows."""
    height, width = request.image_size or (request.height, request.width)
    return width or _default(request, "width"), height or _default(request, "height")


def duration_s(request: ClipRequest) -> float:
    """Seconds as asked for, or the model's own; 0 where nobody knows."""
    if isinstance(request.num_frames, str) and re.fullmatch(r"\d+(\.\d+)?s", request.num_frames):
        return float(request.num_frames[:-1])
    frames = request.num_frames if isinstance(request.num_frames, int) else _default(request, "num_frames")
    fps = request.save_fps or (request.fps or _default(request, "fps")) / (request.frame_interval or 1)
    return frames / fps if fps > 0 else 0.0


def _default(request: ClipRequest, name: str) -> int:
    value = model_defaults(request.model_name).get(name)
    return value if isinstance(value, int) else 0


@functools.cache
def model_defaults(model: str) -> dict[str, object]:
    """Size, length and sampling of a model's own, by name; nothing of a folder."""
    try:
        return describe_model(model)["defaults"]
    except OpenSoraError:  # the folder of a model
        return {}
