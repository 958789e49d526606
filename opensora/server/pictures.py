"""Pictures of a clip: what it looks like while it is made, its middle frame, a sheet of its frames, its latents."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from opensora.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from opensora.generation.progress import Progress
    from opensora.models.autoencoders.latent_rgb import LatentRgb

PREVIEWS_S = 0.5
"""Between two pictures of a clip that is being made."""
THUMBNAIL_PX = 320
SHEET_FRAMES, SHEET_COLUMNS, SHEET_PX = 16, 4, 160
CHANNEL_FRAMES, CHANNEL_PX = 6, 48
"""Frames of a strip of one latent channel, and its height."""


class Previews:
    """Writes a moving picture of the latents while a clip is made, now and then.

    Args:
        path: of the picture.
        colours: of these latents; None if nobody knows them.
        duration_s: that the clip plays.
    """

    def __init__(self, path: Path, colours: "LatentRgb | None", duration_s: float) -> None:
        self.path, self.colours, self.duration_s = path, colours, duration_s
        self.number, self._shown_at = 0, float("-inf")

    def show(self, progress: "Progress") -> int:
        """Writes one if it is time; returns how many there were."""
        is_early = time.monotonic() - self._shown_at < PREVIEWS_S
        if self.colours is None or progress.latents is None or is_early:
            return self.number
        first, *others = (_enlarged(frame) for frame in self.colours.pictures(progress.latents[0]))
        frame_ms = round(1000 * self.duration_s / (1 + len(others)))
        with replacing(self.path) as temporary:
            first.save(
                temporary,
                format="WEBP",
                save_all=True,
                append_images=others,
                duration=frame_ms,
                loop=0,
                quality=70,
            )
        self.number, self._shown_at = self.number + 1, time.monotonic()
        return self.number


def _enlarged(frame: np.ndarray) -> Image.Image:
    """As large as a thumbnail, smoothly."""
    picture = Image.fromarray(frame)
    factor = THUMBNAIL_PX / max(picture.size)
    return picture.resize(
        (max(1, round(picture.width * factor)), max(1, round(picture.height * factor))), Image.Resampling.BICUBIC
    )


def write_pictures(video: np.ndarray, thumbnail: Path, spritesheet: Path) -> None:
    """Writes the middle frame as WebP, and a sheet of frames, evenly spread and row by row, as JPEG.

    Args:
        video: uint8, (T, H, W, 3).
        thumbnail, spritesheet: where.
    """
    middle = Image.fromarray(video[len(video) // 2])
    middle.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    with replacing(thumbnail) as temporary:
        middle.save(temporary, format="WEBP")
    numbers = np.linspace(0, len(video) - 1, min(SHEET_FRAMES, len(video))).round().astype(int)
    frames = [Image.fromarray(video[number]) for number in numbers]
    for frame in frames:
        frame.thumbnail((SHEET_PX, SHEET_PX))
    width, height = frames[0].size
    rows = -(-len(frames) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (width * min(SHEET_COLUMNS, len(frames)), height * rows))
    for place, frame in enumerate(frames):
        sheet.paste(frame, (width * (place % SHEET_COLUMNS), height * (place // SHEET_COLUMNS)))
    with replacing(spritesheet) as temporary:
        sheet.save(temporary, format="JPEG", quality=85)


def write_channels(latents: "Tensor", path: Path) -> None:
    """Writes what each latent channel holds as WebP: a grey strip of frames for each, one below the other.

    Args:
        latents: (C, T, H, W).
        path: of the picture.
    """
    values = latents.float().cpu().numpy()
    numbers = np.unique(np.linspace(0, values.shape[1] - 1, CHANNEL_FRAMES).round().astype(int))
    strips = np.concatenate([values[:, number] for number in numbers], axis=2)  # (C, H, frames x W)
    # Extremes that a few cells have would leave the others grey.
    low, high = (np.quantile(strips, share, axis=(1, 2), keepdims=True) for share in (0.01, 0.99))
    grey = ((strips - low) / np.maximum(high - low, 1e-6)).clip(0, 1) * 255
    channels, height, width = grey.shape
    sheet = Image.fromarray(grey.round().astype(np.uint8).reshape(channels * height, width))
    sheet = sheet.resize((round(width * CHANNEL_PX / height), channels * CHANNEL_PX), Image.Resampling.NEAREST)
    with replacing(path) as temporary:
        sheet.save(temporary, format="WEBP", quality=80)
