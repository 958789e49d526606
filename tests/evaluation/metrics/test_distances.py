"""Distances of sets: known answers, no bias where none is promised, intervals that hold the truth."""

import math

import pytest
import torch
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.evaluation.metrics.distances import diversity, estimate, frechet_distance, kernel_distance


def exact_gaussian(mean: Tensor, root: Tensor, num_clips: int, seed: int) -> Tensor:
    """Features whose sample mean and covariance, rootᵀ root, are exactly the given ones."""
    draws = torch.randn(num_clips, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    white = torch.linalg.qr(draws - draws.mean(dim=0)).Q * math.sqrt(num_clips - 1)
    return mean + white @ root


def features(num_clips: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(num_clips, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_is_that_of_the_gaussians_in_closed_form() -> None:
    # Covariances that commute: the root of their product is the product of their roots.
    rotation = torch.linalg.qr(features(3, 3)).Q
    deviations = torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.1, 0.5]], dtype=torch.float64)
    means = features(2, 3, seed=1)
    a, b = (exact_gaussian(means[i], torch.diag(deviations[i]) @ rotation.T, 50 + i, seed=i) for i in (0, 1))
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("num_clips", [10, 100], ids=["fewer clips than features", "more"])
def test_frechet_distance_is_what_the_root_of_the_matrix_gives(num_clips: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = features(num_clips, 24) @ features(24, 24, seed=2), features(num_clips + 1, 24, seed=1) + 0.3
    root = torch.from_numpy(linalg.sqrtm((a.T.cov() @ b.T.cov()).numpy()).real.copy())
    shift = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    expected = float(shift + (a.T.cov() + b.T.cov() - 2 * root).trace())
    # scipy takes the root of a singular matrix where there are few clips, which is good to the root of its rounding.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5 if num_clips == 10 else 1e-9)


@pytest.mark.parametrize("num_clips", [8, 80])
def test_frechet_distance_of_the_same_set_of_a_shifted_and_of_a_scaled_one(num_clips: int) -> None:
    a = features(num_clips, 16)
    spread = float(a.T.cov().trace())
    assert frechet_distance(a, a[torch.randperm(num_clips)]) < 1e-12 * spread
    assert frechet_distance(a, a + 0.5) == pytest.approx(16 * 0.25)
    scaled = frechet_distance(a, 3 * a)
    assert scaled == pytest.approx(4 * spread + 4 * float(a.mean(dim=0).square().sum()))
    assert frechet_distance(3 * a, a) == pytest.approx(scaled)


def test_frechet_distance_of_small_sets_is_too_large_by_a_constant_over_their_number() -> None:
    excess = [
        sum(frechet_distance(features(n, 4, seed), features(n, 4, 1000 + seed)) for seed in range(100)) / 100
        for n in (50, 100)
    ]
    assert excess[0] / excess[1] == pytest.approx(2, rel=0.15)


def moments_distance(shift: float) -> float:
    """Of N(0, 1) and N(shift, 1) with the kernel (xy + 1)³: squared differences of moments, weighted 3, 3, 1."""
    return 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift) ** 2


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kernel_distance_of_tiny_sets_is_right_on_average(shift: float) -> None:
    values = torch.tensor(
        [kernel_distance(features(5, 1, seed), features(7, 1, 10_000 + seed) + shift) for seed in range(2000)]
    )
    error = values.std() / math.sqrt(len(values))
    assert abs(float(values.mean()) - moments_distance(shift)) < 3.5 * error
    assert values.min() < 0
    if shift:
        assert values.mean() > 10 * error


def test_kernel_distance_of_large_sets_is_the_distance_of_moments() -> None:
    a, b = features(3000, 1), features(3000, 1, seed=1) + 1
    assert kernel_distance(a, b) == pytest.approx(moments_distance(1.0), rel=0.15)


def test_a_kernel_of_products_cannot_tell_features_from_their_negatives() -> None:
    a = features(200, 8) + 1
    assert abs(kernel_distance(a, -a[:150], degree=2, offset=0.0)) < 0.05
    assert kernel_distance(a, -a[:150]) > 10


@pytest.mark.parametrize(("distance", "truth"), [(kernel_distance, moments_distance(0.5)), (frechet_distance, 0.25)])
def test_intervals_hold_the_truth(distance, truth: float) -> None:
    held = 0
    for seed in range(100):
        found = estimate(distance, features(60, 1, seed), features(60, 1, 1000 + seed) + 0.5, draws=40, seed=seed)
        assert found.low < found.value < found.high
        held += found.low <= truth <= found.high
    assert held >= 85, "95 are promised; 40 halves and a skewed figure cost a few"


def test_of_the_same_source_the_interval_of_the_kernel_distance_holds_zero() -> None:
    held = 0
    for seed in range(50):
        found = estimate(kernel_distance, features(30, 8, seed), features(30, 8, 1000 + seed), draws=60)
        held += found.low <= 0 <= found.high
    assert held >= 45


def test_an_interval_needs_four_clips_and_is_the_same_again() -> None:
    few = estimate(frechet_distance, features(3, 2), features(30, 2))
    assert few.value > 0
    assert math.isnan(few.low)
    assert math.isnan(few.high)
    a, b = features(9, 2), features(30, 2)
    assert estimate(frechet_distance, a, b) == estimate(frechet_distance, a, b)


def test_diversity_counts_pairs_of_one_prompt_and_prompts_alike() -> None:
    clips = torch.tensor([[0.0, 0], [3, 4], [1, 1], [1, 1], [1, 1], [9, 9]])
    found = diversity(clips, ["ball", "ball", "star", "star", "star", "alone"])
    assert found.value == pytest.approx((5 + 0) / 2)
    assert math.isnan(found.low)


def test_the_interval_of_diversity_is_over_prompts() -> None:
    spread = torch.arange(1.0, 21).repeat_interleave(2)
    clips = torch.stack([spread, torch.zeros(40)], dim=1) * torch.tensor([1.0, -1]).repeat(20)[:, None]
    found = diversity(clips, [row // 2 for row in range(40)], draws=1000)
    expected = 1.96 * float((2 * torch.arange(1.0, 21)).std()) / math.sqrt(20)
    assert found.value == pytest.approx(21)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_what_cannot_be_compared_is_refused(distance) -> None:
    with pytest.raises(OpenSoraError, match=r"shapes \(4, 3\) and \(4, 2\)"):
        distance(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(OpenSoraError, match="sets of 1 and 4 clips"):
        distance(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(OpenSoraError, match="NaN"):
        distance(torch.full((4, 3), math.nan), torch.zeros(4, 3))


def test_diversity_of_single_clips_is_refused() -> None:
    with pytest.raises(OpenSoraError, match="two or more clips of some prompt"):
        diversity(torch.zeros(2, 3), ["a", "b"])
    with pytest.raises(OpenSoraError, match="2 clips and 1 prompts"):
        diversity(torch.zeros(2, 3), ["a"])
