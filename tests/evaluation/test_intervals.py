"""Bootstrap intervals cover what they promise to cover, and pairs are compared as pairs."""

import math

import numpy as np
import pytest

from opensora.evaluation.intervals import difference_interval, mean_interval, unpaired_difference_interval


def coverage(groups: int, clips: int, repeats: int = 300) -> float:
    """Share of experiments whose interval holds the true mean, 5; clips of a group share half of the spread."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(repeats):
        values = 5 + rng.normal(size=(groups, 1)) + rng.normal(size=(groups, clips))
        names = np.repeat(np.arange(groups), clips)
        found = mean_interval(values.flatten().tolist(), names.tolist(), draws=400)
        held += found.low <= 5 <= found.high
    return held / repeats


def test_an_interval_holds_the_truth_in_nineteen_of_twenty_experiments() -> None:
    assert 0.90 <= coverage(groups=50, clips=1) <= 0.98


def test_clips_of_one_prompt_count_as_what_they_are() -> None:
    assert 0.90 <= coverage(groups=50, clips=4) <= 0.98


def test_an_interval_is_of_the_width_that_theory_gives() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = mean_interval(values.tolist())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(400), rel=0.1)
    assert found.value == pytest.approx(values.mean())


def test_shared_noise_makes_a_small_difference_seen() -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(size=60)
    one, other = (noise + 0.1 + 0.05 * rng.normal(size=60)).tolist(), noise.tolist()
    assert difference_interval(one, other).excludes_zero
    assert not unpaired_difference_interval(one, other).excludes_zero
    assert difference_interval(one, other).value == pytest.approx(0.1, abs=0.03)


def test_equal_numbers_have_no_spread_and_their_own_mean() -> None:
    found = mean_interval([0.1] * 7)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1)) and found.low <= found.value <= found.high
    assert not difference_interval([0.1] * 7, [0.1] * 7).excludes_zero


def test_what_could_not_be_measured_does_not_count() -> None:
    assert mean_interval([1.0, math.nan, 3.0]).value == 2 and mean_interval([1.0, math.nan, 3.0]).num_clips == 2
    assert difference_interval([1.0, math.nan, 3.0], [0.0, 0.0, math.nan]).num_clips == 1
    assert math.isnan(mean_interval([math.nan]).value) and not mean_interval([]).excludes_zero


def test_the_clips_of_a_single_prompt_are_drawn_themselves() -> None:
    found = mean_interval([1.0, 2.0, 3.0, 4.0], ["the same"] * 4)
    assert found.low < found.value < found.high
