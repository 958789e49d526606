"""Speeds that are known are found, in pixels a frame and a second; and whether they are even."""

import math

import pytest
import torch
from known_clips import held, noise, pan, shake, texture
from torch import Tensor

from opensora.evaluation.metrics.motion import Motion


def found(video: Tensor, fps: float = 24.0) -> dict[str, float]:
    return {name: float(figure) for name, figure in Motion().measure(video, fps).items()}


def test_a_still_clip_is_frozen_and_has_no_evenness():
    figures = found(pan(0.0))
    assert math.isnan(figures.pop("unevenness"))
    assert figures == {
        "motion_px_per_frame": 0.0,
        "motion_px_per_s": 0.0,
        "fastest_px_per_frame": 0.0,
        "frozen_share": 1.0,
    }


def test_a_pan_of_three_pixels_a_frame():
    figures = found(pan(3.0))
    assert figures["motion_px_per_frame"] == pytest.approx(3.0, abs=0.2)
    assert figures["motion_px_per_s"] == pytest.approx(24 * figures["motion_px_per_frame"])
    assert figures["unevenness"] < 0.1 and figures["frozen_share"] == 0.0


def test_twice_the_speed_is_twice_the_motion_and_the_rate_counts_for_seconds():
    slow, fast = found(pan(1.5)), found(pan(3.0))
    assert fast["motion_px_per_frame"] == pytest.approx(2 * slow["motion_px_per_frame"], rel=0.1)
    assert found(pan(1.5), fps=48.0)["motion_px_per_s"] == pytest.approx(2 * slow["motion_px_per_s"])


def test_frames_shown_twice_are_frozen_every_second_step():
    figures = found(held(pan(1.5), 2))
    assert figures["frozen_share"] == 0.5
    assert figures["unevenness"] == pytest.approx(2.0, abs=0.1)


def test_shaking_is_uneven_and_more_speed_makes_a_steady_motion_steadier():
    shaken = found(shake(pan(0.0), 3.0))
    assert shaken["motion_px_per_frame"] == pytest.approx(3.0, abs=0.3)
    assert shaken["unevenness"] > 1.8
    assert 1.8 > found(shake(pan(3.0), 3.0))["unevenness"] > 0.8


def test_something_small_is_seen_by_the_fastest_places_and_followed_on_its_way():
    square = texture(24, 24, seed=3) * 1.3
    frames = []
    for t in range(9):
        frame = texture(96, 96).clone()
        frame[:, 36:60, 10 + 5 * t : 34 + 5 * t] = square
        frames.append(frame)
    figures = found(torch.stack(frames, dim=1)[None])
    assert figures["fastest_px_per_frame"] == pytest.approx(5.0, abs=0.8)
    assert figures["motion_px_per_frame"] < 0.8
    assert figures["unevenness"] < 0.1  # read at one place, it starts and stops as the square passes


def test_two_frames_have_a_speed_and_no_evenness():
    figures = found(pan(2.0, num_frames=2))
    assert figures["motion_px_per_frame"] == pytest.approx(2.0, abs=0.2)
    assert math.isnan(figures["unevenness"])


def test_noise_on_a_pan_hides_little_of_its_speed():
    assert found(noise(pan(3.0), 4.0))["motion_px_per_frame"] == pytest.approx(3.0, abs=0.3)
