"""Rectified flow: exact where theory says so, and sane at every size and length."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.diffusion import flow
from opensora.errors import OpenSoraError

RATIOS = st.floats(0.01, 100)


def latents(batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, batch, 4, 3, 2, 2, generator=generator, dtype=torch.float64)
    return clean, noise


# --- the path ---------------------------------------------------------------------------------------------------------


def test_path_runs_from_data_to_noise():
    clean, noise = latents()
    assert torch.equal(flow.interpolate(clean, noise, 0.0), clean)
    assert torch.equal(flow.interpolate(clean, noise, 1.0), noise)
    per_sample = flow.interpolate(clean, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(per_sample[0], clean[0]) and torch.equal(per_sample[1], noise[1])


def test_velocity_is_the_negative_slope_of_the_path():
    clean, noise = latents()
    slope = (flow.interpolate(clean, noise, 0.6) - flow.interpolate(clean, noise, 0.4)) / 0.2
    torch.testing.assert_close(flow.velocity_target(clean, noise), -slope)


def test_conditioning_frames_stay_clean():
    clean, noise = latents()
    frame_mask = torch.tensor([[True, False, True], [False, False, True]])
    noisy = flow.interpolate(clean, noise, torch.tensor([0.5, 0.7]), frame_mask)
    for row, frame in frame_mask.nonzero().tolist():
        assert not torch.equal(noisy[row, :, frame], clean[row, :, frame])
    for row, frame in (~frame_mask).nonzero().tolist():
        assert torch.equal(noisy[row, :, frame], clean[row, :, frame])


@given(times=st.lists(st.floats(0, 1), min_size=1, max_size=8, unique=True))
@settings(max_examples=30, deadline=None)
def test_euler_is_exact_on_the_true_velocity_whatever_the_steps(times):
    clean, noise = latents()
    grid = [1.0, *sorted(set(times) - {0.0, 1.0}, reverse=True), 0.0]
    sample, velocity = noise, flow.velocity_target(clean, noise)
    for t, t_next in itertools.pairwise(grid):
        sample = flow.euler_step(sample, velocity, t, t_next)
    torch.testing.assert_close(sample, clean)


def test_euler_converges_with_order_one_on_a_known_equation():
    """dx/dt = -v with v = x gives x(0) = e x(1); the error must halve when the steps double."""
    start = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for steps in (32, 64, 128, 256):
        x = start
        for i in range(steps):
            x = flow.euler_step(x, x, 1 - i / steps, 1 - (i + 1) / steps)
        errors.append(abs(x.item() - math.e))
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert orders == pytest.approx([1.0] * 3, abs=0.05)


# --- the time shift ---------------------------------------------------------------------------------------------------


@given(ratio=RATIOS)
@settings(deadline=None)
def test_shift_is_monotone_fixes_the_ends_and_is_undone_by_its_inverse(ratio):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = flow.time_shift(t, ratio)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted.diff() > 0).all()
    assert ((shifted >= t - 1e-12) if ratio >= 1 else (shifted <= t + 1e-12)).all()
    torch.testing.assert_close(flow.time_shift(shifted, 1 / ratio), t)


@given(first=RATIOS, second=RATIOS)
@settings(deadline=None)
def test_shifts_compose_by_multiplying_their_ratios(first, second):
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(flow.time_shift(flow.time_shift(t, first), second), flow.time_shift(t, first * second))


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, math.inf])
def test_impossible_shifts_are_refused(ratio):
    with pytest.raises(OpenSoraError, match="ratio"):
        flow.time_shift(torch.tensor(0.5), ratio)


def test_shift_ratio_grows_with_size_and_length():
    assert flow.time_shift_ratio(512, 512, 1) == 1
    assert flow.time_shift_ratio(1024, 1024, 1) == 2
    assert flow.time_shift_ratio(512, 512, 4, scale=3.0) == 6
    assert flow.time_shift_ratio(64, 64, 1, base_size=64) == 1
    with pytest.raises(OpenSoraError, match="height=0"):
        flow.time_shift_ratio(0, 64, 1)


@pytest.mark.parametrize(
    ("num_frames", "factor", "chunk", "expected"),
    [(1, 4, 17, 1), (2, 4, 17, 1), (16, 4, 17, 4), (17, 4, 17, 5), (18, 4, 17, 6), (51, 4, 17, 15), (408, 4, 17, 120),
     (17, 4, None, 5), (51, 4, None, 13), (24, 1, 17, 24), (24, 8, 16, 3)],
)  # fmt: skip
def test_latent_frames_follow_the_autoencoder(num_frames, factor, chunk, expected):
    assert flow.latent_frames(num_frames, factor, chunk) == expected


@pytest.mark.parametrize("num_frames", range(1, 20))
def test_no_length_makes_the_shift_break_down(num_frames):
    """Departure: the reference counts 0 latent frames for 2..16 frames (1.2) and 2..4 (1.3), and shifts to NaN."""
    t = torch.linspace(0, 1, 11)
    for frames in (flow.latent_frames(num_frames, 4, 17), flow.frames_after_first(num_frames, 4)):
        shifted = flow.time_shift(t, flow.time_shift_ratio(512, 512, frames))
        assert torch.isfinite(shifted).all() and (shifted.diff() > 0).all()


@pytest.mark.parametrize("count", [flow.latent_frames, flow.frames_after_first])
def test_impossible_frame_counts_are_refused(count):
    for num_frames, factor in [(0, 4), (17, 0)]:
        with pytest.raises(OpenSoraError, match="at least 1"):
            count(num_frames, factor)
    with pytest.raises(OpenSoraError, match="micro_frame_size"):
        flow.latent_frames(17, 4, 0)


# --- times to train on ------------------------------------------------------------------------------------------------


def test_uniform_and_discrete_times():
    generator = torch.Generator().manual_seed(0)
    t = flow.sample_uniform(20000, generator=generator)
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() < 1
    assert t.mean().item() == pytest.approx(0.5, abs=0.01) and t.var().item() == pytest.approx(1 / 12, abs=0.005)
    t = flow.sample_discrete(20000, 10, generator=generator)
    assert sorted({round(value, 6) for value in t.tolist()}) == pytest.approx([i / 10 for i in range(10)])


def test_logit_normal_times_have_a_normal_logit():
    t = flow.sample_logit_normal(20000, loc=0.5, scale=2.0, generator=torch.Generator().manual_seed(0))
    logit = torch.logit(t.double())
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1
    assert logit.mean().item() == pytest.approx(0.5, abs=0.05) and logit.std().item() == pytest.approx(2.0, abs=0.05)
    with pytest.raises(OpenSoraError, match="scale"):
        flow.sample_logit_normal(2, scale=0.0)


@pytest.mark.parametrize("draw", [flow.sample_uniform, flow.sample_discrete, flow.sample_logit_normal])
def test_times_repeat_with_the_generator(draw):
    first, second = (draw(5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (5,)
