"""Preprocessing: every size is met, the middle stays in the middle, and windows lie inside their video."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opensora.errors import OpenSoraError
from opensora.media import transforms

SIDES = st.integers(1, 40)


@given(SIDES, SIDES, SIDES, SIDES)
def test_every_size_is_met(rows, columns, height, width):
    image = Image.new("RGB", (columns, rows), (200, 30, 90))
    video = torch.full((2, 3, rows, columns), 0.25)
    side = min(height, width)
    assert transforms.fill_image(image, height, width).size == (width, height)
    assert transforms.square_image(image, side).size == (side, side)
    for resized, size in [
        (transforms.fill_video(video, height, width), (height, width)),
        (transforms.square_video(video, side), (side, side)),
    ]:
        assert resized.shape == (2, 3, *size)
        torch.testing.assert_close(resized, torch.full_like(resized, 0.25))


def test_nothing_to_do_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), dtype=np.uint8)
    video = transforms.to_video(pixels)
    assert torch.equal(transforms.fill_video(video, 12, 12), video)
    assert torch.equal(transforms.square_video(video, 12), video)
    image = Image.fromarray(pixels[0])
    assert np.array_equal(np.asarray(transforms.fill_image(image, 12, 12)), pixels[0])
    assert np.array_equal(np.asarray(transforms.square_image(image, 12)), pixels[0])


def test_a_crop_is_around_the_centre():
    video = torch.zeros(1, 8, 24)
    video[..., 8:16] = 1
    assert transforms.fill_video(video, 8, 8).eq(1).all()
    assert transforms.square_video(video, 8).eq(1).all()


def test_layout_does_not_matter():
    video = torch.rand(3, 5, 20, 14, generator=torch.Generator().manual_seed(0))
    ours = transforms.fill_video(video, 9, 9)
    assert torch.equal(transforms.fill_video(video.transpose(0, 1), 9, 9).transpose(0, 1), ours)


def test_pixels_range():
    frames = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1).repeat(3, axis=-1)
    video = transforms.to_video(frames)
    assert video.shape == (3, 2, 1, 1) and video.dtype == torch.float32
    assert video[:, 0].eq(-1).all() and video[:, 1].eq(1).all()


@pytest.mark.parametrize("frames", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8)])
def test_other_frames_are_refused(frames):
    with pytest.raises(OpenSoraError, match="expected uint8"):
        transforms.to_video(frames)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))
def test_windows_lie_inside(length, num_frames, seed):
    first, end = transforms.random_window(length, num_frames, random.Random(seed))
    assert 0 <= first < end <= num_frames
    assert end - first == min(length, num_frames)


@given(st.integers(0, 20), st.integers(1, 60), st.integers(1, 60))
def test_spread_frames_rise_from_end_to_end(first, length, count):
    if count > length:
        with pytest.raises(OpenSoraError, match="cannot take"):
            transforms.spread_frames(first, first + length, count)
        return
    indices = transforms.spread_frames(first, first + length, count)
    assert indices[0] == first and (count == 1 or indices[-1] == first + length - 1)
    assert (np.diff(indices) >= 1).all()


def test_impossible_sizes():
    image, video = Image.new("RGB", (4, 4)), torch.zeros(3, 4, 4)
    calls = [
        lambda: transforms.fill_image(image, 0, 4),
        lambda: transforms.square_image(image, 0),
        lambda: transforms.fill_video(video, 4, -1),
        lambda: transforms.square_video(video, 0),
        lambda: transforms.random_window(0, 4, random.Random(0)),
        lambda: transforms.spread_frames(4, 4, 1),
    ]
    for call in calls:
        with pytest.raises(OpenSoraError, match=r"^[^\n]*$"):
            call()
