"""Pictures of a clip: previews while it is made, its middle frame, a sheet of its frames, and its latent channels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.generation.progress import Progress
from opensora.models.autoencoders.latent_rgb import LatentRgb
from opensora.server import pictures
from opensora.server.pictures import (
    CHANNEL_FRAMES,
    CHANNEL_PX,
    SHEET_COLUMNS,
    SHEET_FRAMES,
    SHEET_PX,
    THUMBNAIL_PX,
    Previews,
    write_channels,
    write_pictures,
)

GREY = LatentRgb(((0.0,) * 36,) * 3, (0.5, 0.5, 0.5))
FIRST = LatentRgb(tuple((*([0.0] * 4), factor, *([0.0] * 31)) for factor in (1.0, 0.0, 0.0)), (0.0, 0.0, 0.0))
"""Red is the first channel."""


def progress(latents: torch.Tensor | None) -> Progress:
    return Progress("denoising", 1, 4, 0, 1, latents)


def clip_of(num_frames: int, height: int, width: int) -> np.ndarray:
    """Frame k has the colour (10 k, 0, 255)."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[..., 0] = (10 * np.arange(num_frames) % 256)[:, None, None]
    frames[..., 2] = 255
    return frames


def opened(path: Path) -> Image.Image:
    picture = Image.open(path)
    picture.load()
    return picture


# --- previews ---------------------------------------------------------------------------------------------------------


def test_a_preview_moves_as_long_as_the_clip(tmp_path: Path):
    previews = Previews(tmp_path / "preview.webp", FIRST, duration_s=2.0)
    latents = torch.zeros(1, 4, 5, 6, 8)
    latents[:, 0] = torch.linspace(0, 1, 5)[:, None, None]
    assert previews.show(progress(latents)) == 1
    picture = opened(tmp_path / "preview.webp")
    assert picture.format == "WEBP" and picture.size == (THUMBNAIL_PX, THUMBNAIL_PX * 6 // 8)
    assert (picture.n_frames, picture.info["loop"]) == (5, 0)
    reds, durations = [], []
    for number in range(5):
        picture.seek(number)
        picture.load()
        reds.append(int(np.asarray(picture.convert("RGB"))[100, 100, 0]))
        durations.append(picture.info["duration"])
    assert sum(durations) == 2000
    assert reds == sorted(reds) and reds[0] < 20 and reds[-1] > 235


def test_previews_come_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(pictures.time, "monotonic", lambda: clock[0])
    previews = Previews(tmp_path / "preview.webp", GREY, 1.0)
    latents = torch.zeros(1, 4, 2, 4, 4)
    numbers = []
    for seconds in (0.0, 0.1, 0.3, 0.2, 0.6):
        clock[0] += seconds
        numbers.append(previews.show(progress(latents)))
    assert numbers == [1, 1, 1, 2, 3]
    assert previews.show(progress(None)) == 3


@pytest.mark.parametrize(("colours", "latents"), [(None, torch.zeros(1, 4, 2, 4, 4)), (GREY, None)])
def test_what_nobody_knows_is_not_shown(tmp_path: Path, colours: LatentRgb | None, latents: torch.Tensor | None):
    assert Previews(tmp_path / "preview.webp", colours, 1.0).show(progress(latents)) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_preview_of_one_frame(tmp_path: Path):
    assert Previews(tmp_path / "preview.webp", GREY, 1.0).show(progress(torch.zeros(1, 4, 1, 9, 3))) == 1
    picture = opened(tmp_path / "preview.webp").convert("RGB")
    assert picture.size == (round(THUMBNAIL_PX / 3), THUMBNAIL_PX)
    assert np.abs(np.asarray(picture).astype(int) - 128).max() <= 4


# --- of the clip that was made ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "thumbnail", "cell"),
    [
        ((64, 64), (64, 64), (64, 64)),
        ((720, 1280), (320, 180), (160, 90)),
        ((1280, 720), (180, 320), (90, 160)),
        ((2, 2000), (320, 1), (160, 1)),
    ],
)
def test_pictures_are_small_and_never_enlarged(
    tmp_path: Path, size: tuple[int, int], thumbnail: tuple[int, int], cell: tuple[int, int]
):
    write_pictures(clip_of(4, *size), tmp_path / "thumbnail.webp", tmp_path / "sheet.jpg")
    small, sheet = opened(tmp_path / "thumbnail.webp"), opened(tmp_path / "sheet.jpg")
    assert (small.format, sheet.format) == ("WEBP", "JPEG")
    assert small.size == thumbnail and max(small.size) <= THUMBNAIL_PX
    assert sheet.size == (cell[0] * SHEET_COLUMNS, cell[1]) and max(cell) <= SHEET_PX
    assert {path.name for path in tmp_path.iterdir()} == {"thumbnail.webp", "sheet.jpg"}


def test_the_thumbnail_is_the_middle_frame(tmp_path: Path):
    write_pictures(clip_of(17, 64, 96), tmp_path / "thumbnail.webp", tmp_path / "sheet.jpg")
    pixel = np.asarray(opened(tmp_path / "thumbnail.webp").convert("RGB"))[30, 40]
    assert np.abs(pixel.astype(int) - (80, 0, 255)).max() <= 12


@pytest.mark.parametrize(
    ("num_frames", "grid", "shown"),
    [
        (1, (1, 1), [0]),
        (3, (1, 3), [0, 1, 2]),
        (6, (2, 4), [0, 1, 2, 3, 4, 5]),
        (16, (4, 4), list(range(16))),
        (25, (4, 4), [0, 2, 3, 5, 6, 8, 10, 11, 13, 14, 16, 18, 19, 21, 22, 24]),
    ],
)
def test_the_sheet_shows_frames_evenly_spread_row_by_row(
    tmp_path: Path, num_frames: int, grid: tuple[int, int], shown: list[int]
):
    write_pictures(clip_of(num_frames, 32, 48), tmp_path / "thumbnail.webp", tmp_path / "sheet.jpg")
    sheet = np.asarray(opened(tmp_path / "sheet.jpg"))
    assert sheet.shape == (32 * grid[0], 48 * grid[1], 3) and len(shown) <= SHEET_FRAMES
    for place, frame in enumerate(shown):
        pixel = sheet[32 * (place // grid[1]) + 16, 48 * (place % grid[1]) + 24]
        assert np.abs(pixel.astype(int) - (10 * frame % 256, 0, 255)).max() <= 6, (place, frame)


def test_channels_are_strips_of_frames_one_below_the_other(tmp_path: Path) -> None:
    latents = torch.zeros(3, 20, 4, 6)
    latents[0, :, :, :3] = 50.0  # whatever their range is, each channel goes from black to white
    latents[1, :, :, 3:] = -0.01
    write_channels(latents, tmp_path / "channels.webp")
    picture = Image.open(tmp_path / "channels.webp")
    assert picture.size == (CHANNEL_FRAMES * 6 * CHANNEL_PX // 4, 3 * CHANNEL_PX)
    grey = np.asarray(picture.convert("L")).reshape(3, CHANNEL_PX, CHANNEL_FRAMES, -1)
    left, right = grey[..., : grey.shape[-1] // 2], grey[..., grey.shape[-1] // 2 :]
    means = np.stack([left.mean(axis=(1, 2, 3)), right.mean(axis=(1, 2, 3))], axis=1)
    assert np.allclose(means[:2], [[255, 0], [255, 0]], atol=8)
    assert np.ptp(grey[2]) <= 2  # a channel that holds nothing
