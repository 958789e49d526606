"""Training losses against torch.distributions, sums to one, gradients, masks and weights."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from opensora.diffusion import gaussian
from opensora.diffusion.losses import (
    DiffusionLosses,
    discretized_log_likelihood,
    known_frame_weights,
    mean_per_sample,
    normal_kl,
    speed_tables,
    training_losses,
    variational_bound,
    velocity_weights,
)
from opensora.errors import OpenSoraError

TABLES = gaussian.make_tables(gaussian.linear_betas(100))
SHAPE = (3, 2, 4, 2, 2)
STEPS = torch.tensor([0, 40, 99])


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def losses(prediction: Tensor, *, rows: slice = slice(None), **options) -> DiffusionLosses:
    clean, noise, t = normal(0)[rows], normal(1)[rows], STEPS[rows]
    noisy = gaussian.q_sample(TABLES, clean, t, noise)
    return training_losses(TABLES, prediction, clean=clean, noisy=noisy, noise=noise, t=t, **options)


def learned(seed: int = 2) -> Tensor:
    return normal(seed, (3, 4, 4, 2, 2))


def test_kl_is_that_of_torch() -> None:
    mean1, log1, mean2, log2 = (normal(seed).double() for seed in range(4))
    first, second = (torch.distributions.Normal(mean, (log / 2).exp()) for mean, log in ((mean1, log1), (mean2, log2)))
    assert_close(normal_kl(mean1, log1, mean2, log2), torch.distributions.kl_divergence(first, second))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.1), (0.9, 0.5), (-1.2, 0.02)])
def test_likelihood_of_all_levels_sums_to_one(mean: float, std: float) -> None:
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_likelihood = discretized_log_likelihood(
        levels, torch.full_like(levels, mean), torch.full_like(levels, math.log(std))
    )
    assert_close(log_likelihood.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_bound_vanishes_where_the_network_knows_the_posterior() -> None:
    clean, noise = normal(0), normal(1)
    t = torch.tensor([1, 40, 99])
    noisy = gaussian.q_sample(TABLES, clean, t, noise)
    prediction = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    reverse = gaussian.p_distribution(TABLES, prediction, noisy, t)
    bound = variational_bound(TABLES, reverse, clean=clean, noisy=noisy, t=t)
    assert_close(bound, torch.zeros(3), atol=1e-5, rtol=0)


def test_squared_error_teaches_the_prediction_and_the_bound_the_variance() -> None:
    prediction = learned().requires_grad_()
    result = losses(prediction)
    assert result.mse is not None and result.vb is not None
    assert_close(result.loss, result.mse + result.vb)
    (from_vb,) = torch.autograd.grad(result.vb.sum(), prediction, retain_graph=True)
    (from_mse,) = torch.autograd.grad(result.mse.sum(), prediction)
    assert torch.all(from_vb[:, :2] == 0) and torch.all(from_vb[:, 2:] != 0)
    assert torch.all(from_mse[:, :2] != 0) and torch.all(from_mse[:, 2:] == 0)
    (from_kl,) = torch.autograd.grad(losses(prediction, loss_type="kl").loss.sum(), prediction)
    assert torch.all(from_kl[1:, :2] != 0)


def test_rescaled_losses() -> None:
    prediction = learned()
    plain, rescaled = losses(prediction), losses(prediction, loss_type="rescaled_mse")
    assert plain.vb is not None and rescaled.vb is not None and plain.mse is not None
    assert_close(rescaled.vb, plain.vb * len(TABLES) / 1000)
    assert_close(rescaled.loss, plain.mse + rescaled.vb)
    assert_close(losses(prediction, loss_type="kl").loss, plain.vb)
    assert_close(losses(prediction, loss_type="rescaled_kl").loss, plain.vb * len(TABLES))


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_variance(variance_type: gaussian.VarianceType, dtype: torch.dtype) -> None:
    """Also with float32 tables, where the reference raises."""
    tables = gaussian.make_tables(gaussian.linear_betas(100), dtype=dtype)
    clean, noise = normal(0), normal(1)
    noisy = gaussian.q_sample(tables, clean, STEPS, noise)
    arguments = {"clean": clean, "noisy": noisy, "noise": noise, "t": STEPS, "variance_type": variance_type}
    result = training_losses(tables, normal(2), **arguments)
    assert result.vb is None
    assert result.loss is result.mse
    assert training_losses(tables, normal(2), loss_type="kl", **arguments).loss.isfinite().all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_perfect_prediction_costs_nothing(prediction_type: gaussian.PredictionType) -> None:
    target = normal(1) if prediction_type == "epsilon" else normal(0)
    result = losses(target, prediction_type=prediction_type, variance_type="fixed_small")
    assert torch.all(result.loss == 0)


def test_conditioning_frames_do_not_count() -> None:
    mask = torch.tensor([[True, True, False, False], [False, True, False, True], [True] * 4])
    prediction = learned()
    changed = torch.where(mask[:, None, :, None, None], prediction, prediction + 7)
    for first, second in zip(losses(prediction, frame_mask=mask), losses(changed, frame_mask=mask), strict=True):
        assert first is not None and second is not None
        assert torch.equal(first, second)
    assert not torch.allclose(losses(prediction).loss, losses(changed).loss)
    assert_close(losses(prediction, frame_mask=torch.ones_like(mask)).loss, losses(prediction).loss)


def test_sample_without_generated_frames_costs_nothing() -> None:
    mask = torch.tensor([[False] * 4, [True] * 4, [True] * 4])
    assert mean_per_sample(normal(0), mask)[0] == 0
    result = losses(learned(), frame_mask=mask)
    assert result.loss[0] == 0
    assert result.loss.isfinite().all()


def test_timestep_weights_scale_the_squared_error_only() -> None:
    weights = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, weighted = losses(learned()), losses(learned(), timestep_weights=weights)
    assert plain.mse is not None and weighted.mse is not None and plain.vb is not None and weighted.vb is not None
    assert_close(weighted.mse, plain.mse * weights[STEPS].float())
    assert torch.equal(weighted.vb, plain.vb)


def test_losses_are_those_of_the_steps_given() -> None:
    """The reference's 1.2 draws its own."""
    first, again = losses(learned()), losses(learned())
    assert torch.equal(first.loss, again.loss)


def test_batch_of_three_is_three_of_one() -> None:
    prediction = learned()
    together = losses(prediction)
    for i in range(3):
        row = slice(i, i + 1)
        assert_close(losses(prediction[row], rows=row).loss, together.loss[row])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(OpenSoraError, match="loss type 'huber'"):
        losses(learned(), loss_type="huber")
    with pytest.raises(OpenSoraError, match="expected \\(100,\\)"):
        losses(learned(), timestep_weights=torch.ones(50))
    with pytest.raises(OpenSoraError, match="expected 4"):
        losses(normal(2))


def test_losses_on_another_device_than_the_tables() -> None:
    """The meta device refuses to mix with the CPU, and stands in for an accelerator here."""
    clean = torch.empty(SHAPE, device="meta")
    result = training_losses(
        TABLES,
        torch.empty((3, 4, 4, 2, 2), device="meta"),
        clean=clean,
        noisy=clean,
        noise=clean,
        t=torch.empty(3, dtype=torch.int64, device="meta"),
        frame_mask=torch.ones(3, 4, dtype=torch.bool),
        timestep_weights=torch.ones(100, dtype=torch.float64),
    )
    assert result.loss.dtype == torch.float32


def test_speed_tables_are_a_distribution_and_weights() -> None:
    speed = speed_tables(gaussian.make_tables(gaussian.linear_betas(1000)))
    assert_close(speed.probabilities.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert speed.probabilities.max() / speed.probabilities.min() == pytest.approx(5, rel=1e-6)
    assert 500 < speed.meaningful_steps < 1000
    assert torch.all((speed.weights > 0) & (speed.weights < 1))


def test_short_schedule_without_flat_steps_is_meaningful_throughout() -> None:
    tables = gaussian.make_tables(gaussian.linear_betas(30))
    assert speed_tables(tables, flat=0.0).meaningful_steps <= len(tables)
    assert speed_tables(tables, flat=-1.0).meaningful_steps == len(tables)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_velocity_weights_turn_an_error_into_the_velocitys(prediction_type) -> None:
    tables = gaussian.make_tables(gaussian.linear_betas(1000))
    weights = velocity_weights(tables, prediction_type, most=1e9)
    t = 400
    a, s = tables.sqrt_alphas_cumprod[t], tables.sqrt_one_minus_alphas_cumprod[t]
    clean, noise, error = torch.tensor([0.7, -0.4, 0.1], dtype=torch.float64)
    noisy = a * clean + s * noise
    if prediction_type == "epsilon":
        predicted_noise = noise + error
        predicted_clean = (noisy - s * predicted_noise) / a
    else:
        predicted_clean = clean + error
        predicted_noise = (noisy - a * predicted_clean) / s
    velocity_error = (predicted_clean - predicted_noise) - (clean - noise)
    # Both sides are of a path whose noise level is s / (a + s), on which the network's input is noisy / (a + s).
    torch.testing.assert_close(weights[t] * error.square(), velocity_error.square())


def test_velocity_weights_are_bounded() -> None:
    tables = gaussian.make_tables(gaussian.linear_betas(1000))
    weights = velocity_weights(tables, "epsilon", most=10.0)
    assert weights.min() >= 1
    assert weights.max() == 10


def test_nan_in_a_frame_that_does_not_count_reaches_neither_loss_nor_gradient() -> None:
    tables = gaussian.make_tables(gaussian.linear_betas(100))
    clean, noise = torch.zeros(1, 2, 3, 1, 1), torch.ones(1, 2, 3, 1, 1)
    mask, t = torch.tensor([[True, False, True]]), torch.tensor([4])
    clean[:, :, 1] = float("nan")
    noisy = gaussian.q_sample(tables, clean, t, noise)
    prediction = torch.full((1, 4, 3, 1, 1), 0.5, requires_grad=True)
    loss = training_losses(tables, prediction, clean=clean, noisy=noisy, noise=noise, t=t, frame_mask=mask).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all() and prediction.grad is not None and torch.isfinite(prediction.grad).all()


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_known_frames_weigh_less_and_all_frames_as_much_as_before(weight):
    known = torch.tensor([[True, False, False, False], [False] * 4, [True] * 4, [True, True, True, False]])
    weights = known_frame_weights(known, weight)
    assert weights.shape == (4, 1, 4, 1, 1)
    assert_close(weights.sum(dim=2).flatten(), torch.full((4,), 4.0))
    some = known[[0, 3]]
    assert (weights[[0, 3]][:, 0, :, 0, 0][some] == weight).all()
    assert (weights[1:3] == 1).all()
