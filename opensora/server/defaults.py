"""What a request comes to with its model's own size and length, as far as that is known without the model."""

import functools
import re
from typing import Any

from opensora.checkpoints.catalogue import describe_model
from opensora.errors import OpenSoraError
from opensora.generation.request import ClipRequest


def asked_size(request: ClipRequest) -> tuple[int, int]:
    """Height and width of a request, or the model's own; 0 where nobody knows."""
    height, width = request.image_size or (request.height, request.width)
    return height or _number(request, "height"), width or _number(request, "width")


def asked_frames(request: ClipRequest) -> int:
    """Frames of each loop of a request, about, or the model's own; 0 where nobody knows."""
    asked = request.num_frames
    if not isinstance(asked, str):
        return _number(request, "num_frames") if asked is None else asked
    number, unit = float(re.sub(r"[^\d.]", "", asked) or 0), asked.strip()[-1:]
    per_unit = {"s": asked_fps(request), "x": _number(request, "num_frames")}.get(unit, 1)
    return round(number * per_unit)


def asked_fps(request: ClipRequest) -> float:
    """Frames per second of the file; 0 where nobody knows."""
    return request.save_fps or (request.fps or _number(request, "fps")) / (request.frame_interval or 1)


def model_defaults(model: str) -> dict[str, Any]:
    """Size, length and sampling of a model's own, by name; nothing of a folder."""
    return dict(_known_defaults(model))


def _number(request: ClipRequest, name: str) -> int:
    value = _known_defaults(request.model_name).get(name)
    return value if isinstance(value, int) else 0


@functools.cache
def _known_defaults(model: str) -> dict[str, Any]:
    try:
        return describe_model(model)["defaults"]
    except OpenSoraError:
        return {}
