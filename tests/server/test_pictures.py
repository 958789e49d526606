"""Pictures that a worker writes beside a clip."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from opensora.server.pictures import CHANNEL_FRAMES, CHANNEL_PX, write_channels


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
