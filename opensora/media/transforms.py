"""Images and videos brought to a model's size, as the published models' training data was.

An image goes through Pillow's bicubic filter, which averages over what it shrinks; a video is sampled bilinearly,
point by point, which is fast and what the models saw. The two also round a crop's offset differently: by half a pixel
at most, and kept. Videos are tensors whose last two dimensions are height and width; what stands before is free.
"""

import logging
import math
import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from opensora.errors import OpenSoraError
from opensora.media.pictures import upright_rgb

logger = logging.getLogger(__name__)


def to_video(frames: np.ndarray) -> torch.Tensor:
    """Frames as `read_video` returns them, uint8 (T, H, W, 3), as a video in [-1, 1], float32 (3, T, H, W).

    Raises:
        OpenSoraError: another type or shape.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4:
        raise OpenSoraError(
            f"got frames {frames.dtype} {frames.shape}; expected uint8 (frames, height, width, channels)"
        )
    return torch.tensor(frames).permute(3, 0, 1, 2).float().div(255).sub(0.5).div(0.5)


def to_pixels(frames: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1] as uint8, rounded; what is beyond is cut off."""
    return np.clip(frames * 255, 0, 255).round().astype(np.uint8)


def clips_of(frames: Any, height: int, width: int, *, pictures: bool = False) -> list[torch.Tensor]:
    """Clips or pictures as people hold them in memory, as videos in [-1, 1], float32 (3, T, height, width).

    They are resized and cropped to that size, a single picture as `fill_image` does it, a clip as `fill_video`. PIL
    images are taken as people see them, see `media.pictures`.

    Args:
        frames: one clip: PIL images, an array (T, H, W, 3), a tensor (T, 3, H, W), or a list of arrays (H, W, 3) or
            tensors (3, H, W); numbers are uint8, or floats in [0, 1]. Several: a list of these, or one axis more.
        height: in pixels.
        width: in pixels.
        pictures: they are not clips but pictures: PIL images, arrays (H, W, 3) or tensors (3, H, W).

    Raises:
        OpenSoraError: anything else.
    """
    axes = 3 if pictures else 4
    in_list = isinstance(frames, list | tuple) and (pictures or any(_num_axes(one) == 4 for one in frames))
    several = list(frames) if in_list or _num_axes(frames) == axes + 1 else [frames]
    arrays = [None if pictures and _num_axes(one) != 3 else _as_array(one) for one in several]
    if not arrays or any(array is None for array in arrays):
        kinds = "PIL images, arrays (H, W, 3) or tensors (3, H, W)"
        clips = "lists of PIL images, arrays (T, H, W, 3) or tensors (T, 3, H, W)"
        raise OpenSoraError(f"got {_described(frames)}; expected {kinds if pictures else clips}, one or one per prompt")
    return [_filled(array, height, width) for array in arrays if array is not None]


def _num_axes(frames: Any) -> int | None:
    """Of an array or a tensor, 3 of a picture, one more of a list of them; None for anything else."""
    if isinstance(frames, np.ndarray | torch.Tensor):
        return frames.ndim
    if isinstance(frames, Image.Image):
        return 3
    if isinstance(frames, list | tuple) and frames:
        inner = {_num_axes(one) for one in frames}
        axes = inner.pop()
        return axes + 1 if axes is not None and not inner else None
    return None


def _described(frames: Any) -> str:
    if isinstance(frames, list | tuple):
        return f"a list of {', '.join(sorted({_described(one) for one in frames})) or 'nothing'}"
    shape = getattr(frames, "shape", None)
    return type(frames).__name__ if shape is None else f"{type(frames).__name__} {tuple(shape)}"


def _as_array(frames: Any) -> np.ndarray | None:
    """Numbers (T, H, W, 3) of a picture or a clip; None if it is none."""
    if isinstance(frames, list | tuple):
        parts = [_as_array(frame) for frame in frames]
        found = [part for part in parts if part is not None]
        alike = len(found) == len(parts) and len({(part.shape, part.dtype) for part in found}) == 1
        return np.concatenate(found) if alike else None
    if isinstance(frames, Image.Image):
        picture, notes = upright_rgb(frames)
        for note in notes:
            logger.warning("picture: %s", note)
        frames = np.asarray(picture)
    elif isinstance(frames, torch.Tensor) and frames.ndim > 2:
        frames = frames.detach().cpu().movedim(-3, -1)
        frames = (frames.float() if frames.is_floating_point() else frames).numpy()
    if not isinstance(frames, np.ndarray) or frames.ndim not in (3, 4) or frames.shape[-1] != 3 or not frames.size:
        return None
    return frames if frames.ndim == 4 else frames[None]


def _filled(frames: np.ndarray, height: int, width: int) -> torch.Tensor:
    """One clip (T, H, W, 3), of its final size."""
    if frames.dtype != np.uint8:
        if not np.issubdtype(frames.dtype, np.floating) or not ((frames >= 0) & (frames <= 1)).all():
            raise OpenSoraError(
                f"got pictures of {frames.dtype} from {frames.min():g} to {frames.max():g}; expected uint8, or numbers "
                "from 0 (black) to 1 (white)"
            )
        if frames.shape[1:3] == (height, width) or len(frames) > 1:
            video = torch.tensor(frames).float().movedim(-1, 0) * 2 - 1
            return video if frames.shape[1:3] == (height, width) else fill_video(video, height, width)
        frames = to_pixels(frames)  # as Pillow takes them
    if len(frames) == 1:
        return to_video(np.asarray(fill_image(Image.fromarray(frames[0]), height, width))[None])
    return fill_video(to_video(frames), height, width)


def fill_image(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image resized (bicubic) until it covers height x width, and cropped to it around the centre."""
    _check_size(height, width)
    rows, columns = _covering_size(image.height, image.width, height, width)
    resized = image.resize((columns, rows), Image.Resampling.BICUBIC)
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    return resized.crop((left, top, left + width, top + height))


def square_image(image: Image.Image, side: int) -> Image.Image:
    """The largest square in the centre of an image, at side x side.

    An image twice as large or more is halved (each pixel the mean of four) as often as that holds; what is left to do
    is bicubic.
    """
    _check_size(side, side)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def fill_video(video: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The video resized (bilinear) until it covers height x width, and cropped to it around the centre.

    Args:
        video: float (..., H, W).
        height: in pixels.
        width: in pixels.

    Returns:
        float (..., height, width).
    """
    _check_size(height, width)
    rows, columns = _covering_size(video.shape[-2], video.shape[-1], height, width)
    resized = _as_images(video, lambda images: _bilinear(images, size=(rows, columns)))
    top, left = (rows - height) // 2, (columns - width) // 2
    return resized[..., top : top + height, left : left + width]


def square_video(video: torch.Tensor, side: int) -> torch.Tensor:
    """The largest square in the centre of a video (..., H, W), resized (bilinear) to (..., side, side)."""
    _check_size(side, side)
    shorter = min(video.shape[-2:])
    scale = side / shorter
    while math.floor(shorter * scale) < side:  # side / shorter * shorter may come out a rounding error below side
        scale = math.nextafter(scale, math.inf)
    resized = _as_images(video, lambda images: _bilinear(images, scale_factor=scale))
    top, left = (round((edge - side) / 2) for edge in resized.shape[-2:])
    return resized[..., top : top + side, left : left + side]


def random_window(length: int, num_frames: int, rng: random.Random) -> tuple[int, int]:
    """A window of `length` frames somewhere in a video, as (first, one past the last).

    As in the published models' training, the very last window is drawn only where no other fits; a shorter video is
    taken whole.

    Args:
        length: frames wanted, 1 or more.
        num_frames: frames there are, 1 or more.
        rng: where the draw comes from (one draw).

    Raises:
        OpenSoraError: a length or a number of frames below 1.
    """
    if length < 1 or num_frames < 1:
        raise OpenSoraError(f"got a window of {length} in {num_frames} frames; expected 1 or more of both")
    first = rng.randint(0, max(0, num_frames - length - 1))
    return first, min(first + length, num_frames)


def spread_frames(first: int, end: int, count: int) -> np.ndarray:
    """Indices, int (count,), of frames spread evenly over first .. end - 1, both of them taken; rounded down.

    Raises:
        OpenSoraError: an empty window, or fewer frames in it than wanted.
    """
    if count < 1 or end - first < count:
        raise OpenSoraError(
            f"cannot take {count} frames from {first} to {end - 1}; expected 1 to {max(end - first, 0)}"
        )
    return np.linspace(first, end - 1, count, dtype=int)


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise OpenSoraError(f"got a size of {height}x{width} (height x width); expected 1 pixel or more")


def _covering_size(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """The smallest size of the same shape that covers height x width: one side fits, the other is rounded."""
    vertical, horizontal = height / rows, width / columns
    if vertical > horizontal:
        return height, round(columns * vertical)
    return round(rows * horizontal), width


def _as_images(video: torch.Tensor, resize) -> torch.Tensor:
    """Applies a function of (N, 1, H, W) to (..., H, W)."""
    resized = resize(video.reshape(-1, 1, *video.shape[-2:]))
    return resized.reshape(*video.shape[:-2], *resized.shape[-2:])


def _bilinear(images: torch.Tensor, size: tuple[int, int] | None = None, scale_factor: float | None = None):
    return functional.interpolate(
        images, size=size, scale_factor=scale_factor, mode="bilinear", align_corners=False, antialias=False
    )
