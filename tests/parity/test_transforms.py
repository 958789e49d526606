"""Image and video preprocessing against the reference: pictures, sizes and seeds are read from the fixture."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.media import transforms


@pytest.fixture
def fixture(golden):
    return golden("image_video_transforms_v1_2")


def cases(fixture):
    """(number, picture uint8 (H, W, 3), height, width) of every case."""
    for name in fixture.under("in"):
        number, what = name.split(".")
        if what == "img":
            yield (number, fixture[f"in.{name}"].numpy(), *fixture[f"in.{number}.target"].tolist())


def clip(picture: np.ndarray) -> torch.Tensor:
    """The picture and its upside-down copy, as a video (2, 3, H, W) in [0, 1]."""
    frames = np.stack([picture, picture[::-1]])
    return (transforms.to_video(frames).transpose(0, 1) + 1) / 2


def close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    torch.testing.assert_close(ours, reference, atol=2e-6, rtol=1e-5)


def test_images(fixture):
    for number, picture, height, width in cases(fixture):
        image = Image.fromarray(picture)
        ours = np.asarray(transforms.fill_image(image, height, width))
        assert np.array_equal(ours, fixture[f"out.{number}.pil_resize_crop"].numpy())
        ours = np.asarray(transforms.square_image(image, min(height, width)))
        assert np.array_equal(ours, fixture[f"out.{number}.pil_center_crop"].numpy())


def test_videos(fixture):
    for number, picture, height, width in cases(fixture):
        close(transforms.fill_video(clip(picture), height, width), fixture[f"out.{number}.vid_resize_crop"])
        ours = transforms.square_video(clip(picture), min(height, width))
        close(ours, fixture[f"out.{number}.vid_ucf_center_crop"])


def test_windows(fixture):
    for length, num_frames, seed, first, end in fixture.meta["temporal_crop"]:
        assert transforms.random_window(length, num_frames, random.Random(seed)) == (first, end)


def test_spread_frames(fixture):
    for key, expected in fixture.meta["linspace"].items():
        assert transforms.spread_frames(*map(int, key.split(","))).tolist() == expected
