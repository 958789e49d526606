"""A wrong scaling factor as a shift of time and of steps, proven with the noise processes themselves."""

import math

import pytest
import torch

from opensora.diffusion import flow, gaussian
from opensora.diffusion.process import GaussianProcess, RectifiedFlowProcess
from opensora.lab.latents.signal_to_noise import (
    ClipSize,
    equivalent_step,
    equivalent_time_shift,
    log_snr,
    schedule_shifts,
    training_schedules,
)

SIZE = ClipSize(17, 64, 64, 5)
LINEAR = GaussianProcess(gaussian.make_tables(gaussian.linear_betas(1000)))


@pytest.mark.parametrize("deviation", [0.18215 / 0.13025, 0.493, 3.0])
def test_scaled_latents_of_rectified_flow_are_right_latents_at_a_shifted_time(deviation):
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 9, 4, 1, 2, 2, generator=generator)
    times = torch.linspace(0.05, 0.95, 9)
    shifted = flow.time_shift(times, equivalent_time_shift(deviation))
    scaled = flow.interpolate(deviation * clean, noise, times)
    right = flow.interpolate(clean, noise, shifted)
    # The same picture but for one number, the noise's share in both.
    torch.testing.assert_close(scaled / times.reshape(-1, 1, 1, 1, 1), right / shifted.reshape(-1, 1, 1, 1, 1))


def test_the_times_that_are_trained_on_shift_as_a_whole():
    """Logit-normal times of scaled latents are those of right latents with another mean of the logit."""
    process, deviation = RectifiedFlowProcess(times="logit-normal", num_train_timesteps=1), 1.4
    drawn = process.draw_times(20_000, generator=torch.Generator().manual_seed(1))
    shifted = flow.time_shift(drawn, equivalent_time_shift(deviation))
    logits = torch.logit(shifted.double())
    assert float(logits.mean()) == pytest.approx(-math.log(deviation), abs=0.03)  # 1 / sqrt(20,000) is 0.007
    assert float(logits.std()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("deviation", [0.5, 0.9, 1.4])
@pytest.mark.parametrize("step", [100, 500, 800])
def test_scaled_latents_of_discrete_diffusion_are_right_latents_at_another_step(deviation, step):
    found = equivalent_step(LINEAR, step, deviation)
    curve = log_snr(LINEAR, torch.arange(1000)).tolist()
    below = int(found)
    interpolated = curve[below] + (found - below) * (curve[below + 1] - curve[below])
    assert interpolated == pytest.approx(curve[step] + 2 * math.log(deviation), abs=1e-4)
    assert (found > step) == (deviation < 1)


def test_right_latents_stay_where_they_are_and_the_ends_of_the_schedule_are_ends():
    assert equivalent_step(LINEAR, 300, 1.0) == pytest.approx(300)
    assert equivalent_step(LINEAR, 990, 0.5) is None and equivalent_step(LINEAR, 0, 2.0) is None


def test_every_schedule_is_off_by_the_same_and_says_it_in_its_own_words():
    deviation = 0.18215 / 0.13025
    shifts = {shift.schedule: shift for shift in schedule_shifts(deviation, training_schedules(), SIZE)}
    assert {round(shift.log_snr, 4) for shift in shifts.values()} == {0.6707}
    for name, shift in shifts.items():
        assert shift.found - shift.expected == pytest.approx(0.6707, abs=1e-4)
        assert (shift.time_shift is None) == (shift.steps is not None) == name.startswith("IDDPM")
    assert shifts["flow, uniform"].time_shift == pytest.approx(0.13025 / 0.18215)
    # t / (1 - t) of logit-normal times has the median 1, so that of a shift r is 1 / r ** 2 in signal to noise.
    ratio = flow.AreaShift().ratio(64, 64, 17, 5)
    assert shifts["flow, logit-normal, shift of 1.2"].expected == pytest.approx(-2 * math.log(ratio), abs=0.06)
    assert all(by < 0 for by in shifts["IDDPM, linear"].steps.values())
