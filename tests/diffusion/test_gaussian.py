"""Diffusion maths against Bayes' rule, closed forms for normal data, and itself."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from opensora.diffusion import gaussian
from opensora.errors import OpenSoraError

SHAPE = (3, 2, 4, 2, 2)


@pytest.fixture(params=["linear", "cosine", "respaced"])
def tables(request: pytest.FixtureRequest) -> gaussian.GaussianTables:
    if request.param == "linear":
        return gaussian.make_tables(gaussian.linear_betas(60))
    if request.param == "cosine":
        return gaussian.make_tables(gaussian.cosine_betas(60))
    return gaussian.make_tables(gaussian.linear_betas(1000), gaussian.respaced_timesteps(1000, "25"))


def normal(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def steps_of(tables: gaussian.GaussianTables) -> Tensor:
    """First, a middle and last step, one per sample of SHAPE."""
    return torch.tensor([0, len(tables) // 2, len(tables) - 1])


# --- schedules --------------------------------------------------------------------------------------------------------


def test_shorter_linear_schedules_reach_the_same_noise() -> None:
    long, short = (gaussian.make_tables(gaussian.linear_betas(n)).alphas_cumprod[-1] for n in (1000, 250))
    assert_close(long.log(), short.log(), rtol=0.1, atol=0)


def test_linear_schedule_of_too_few_steps_is_refused() -> None:
    with pytest.raises(OpenSoraError, match="all in \\(0, 1\\)"):
        gaussian.linear_betas(10)


def test_cosine_schedule_follows_the_cosine() -> None:
    tables = gaussian.make_tables(gaussian.cosine_betas(100))
    angle = (torch.arange(1, 100, dtype=torch.float64) / 100 + 0.008) / 1.008 * torch.pi / 2
    start = torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64))
    assert_close(tables.alphas_cumprod[:-1], (torch.cos(angle) / start) ** 2)


@pytest.mark.parametrize("spec", ["7", 7, "ddim25", "10,15,20", [10, 15, 20], "1000"])
def test_respacing_keeps_the_noise_levels(spec: str | int | list[int]) -> None:
    betas = gaussian.linear_betas(1000)
    kept = gaussian.respaced_timesteps(1000, spec)
    assert kept == sorted(set(kept))
    assert 0 <= kept[0] <= kept[-1] < 1000
    full, short = gaussian.make_tables(betas), gaussian.make_tables(betas, kept)
    assert short.timestep_map.tolist() == kept
    assert_close(short.alphas_cumprod, full.alphas_cumprod[kept])


@pytest.mark.parametrize(
    "spec", ["ddim999", "ddim", "dim5", "", "10,,20", "0", 0, -5, "1.5", True, "600,600", 1001, []]
)
def test_impossible_specs_are_refused(spec: object) -> None:
    with pytest.raises(OpenSoraError, match="expected"):
        gaussian.respaced_timesteps(1000, spec)  # pyright: ignore[reportArgumentType]


def test_impossible_stride_names_the_nearest() -> None:
    with pytest.raises(OpenSoraError, match="ddim1000"):
        gaussian.respaced_timesteps(1000, "ddim999")


def test_float32_tables_are_the_float64_ones_rounded_early() -> None:
    betas = gaussian.linear_betas(1000)
    single, double = (gaussian.make_tables(betas, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert single.alphas_cumprod.dtype == torch.float32
    assert_close(single.alphas_cumprod.double(), double.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert not torch.equal(single.alphas_cumprod, double.alphas_cumprod.float())


# --- one step of the chain --------------------------------------------------------------------------------------------


def test_clean_and_epsilon_predictions_invert_noising(tables: gaussian.GaussianTables) -> None:
    clean, noise, t = normal(0), normal(1), steps_of(tables)
    # The last entry of the cosine schedule leaves nothing of the data to recover.
    t = t.clamp(max=len(tables) - 2)
    noisy = gaussian.q_sample(tables, clean, t, noise)
    assert_close(gaussian.predict_clean(tables, noisy, t, noise), clean)
    assert_close(gaussian.predict_epsilon(tables, noisy, t, clean), noise)


def test_noising_has_the_moments_of_its_distribution(tables: gaussian.GaussianTables) -> None:
    clean, t = torch.full((3, 1, 1, 100, 200), 0.7), steps_of(tables)
    drawn = gaussian.q_sample(tables, clean, t, normal(2, tuple(clean.shape)))
    expected = gaussian.q_distribution(tables, clean, t)
    assert_close(drawn.mean(dim=(1, 2, 3, 4)).float(), expected.mean.mean(dim=(1, 2, 3, 4)), atol=0.03, rtol=0)
    assert_close(drawn.var(dim=(1, 2, 3, 4)).float(), expected.variance.flatten(), atol=0, rtol=0.05)


def test_posterior_is_bayes_rule(tables: gaussian.GaussianTables) -> None:
    t = torch.arange(1, len(tables))
    shape = (len(t), 1, 1, 1, 1)
    clean, noisy = normal(3, shape), normal(4, shape)
    beta, abar_prev = tables.betas[t].reshape(shape), tables.alphas_cumprod_prev[t].reshape(shape)
    # Prior q(x_{t-1} | x) times likelihood q(x_t | x_{t-1}), both normal: precisions add.
    precision = 1 / (1 - abar_prev) + (1 - beta) / beta
    mean = (abar_prev.sqrt() * clean / (1 - abar_prev) + (1 - beta).sqrt() * noisy / beta) / precision
    posterior = gaussian.q_posterior(tables, clean, noisy, t)
    assert_close(posterior.mean, mean)
    assert_close(posterior.variance, 1 / precision)
    assert_close(posterior.log_variance, (1 / precision).log())


def test_every_frame_may_have_its_own_step(tables: gaussian.GaussianTables) -> None:
    clean, noise, t = normal(5), normal(6), steps_of(tables)
    mask = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    noisy = gaussian.q_sample(tables, clean, gaussian.frame_timesteps(t, mask), noise)
    at_t, at_0 = gaussian.q_sample(tables, clean, t, noise), gaussian.q_sample(tables, clean, t * 0, noise)
    for sample in range(SHAPE[0]):
        for frame in range(SHAPE[2]):
            expected = at_t if mask[sample, frame] else at_0
            assert torch.equal(noisy[sample, :, frame], expected[sample, :, frame])


def test_learned_variance_reaches_both_fixed_ones(tables: gaussian.GaussianTables) -> None:
    noisy, output, t = normal(7), normal(8), steps_of(tables)
    small = gaussian.p_distribution(tables, output, noisy, t, variance_type="fixed_small")
    large = gaussian.p_distribution(tables, output, noisy, t, variance_type="fixed_large")
    for edge, fixed in ((-1.0, small), (1.0, large)):
        prediction = torch.cat([output, torch.full_like(output, edge)], dim=1)
        learned = gaussian.p_distribution(tables, prediction, noisy, t)
        assert torch.equal(learned.mean, fixed.mean)
        # At the first step the large variance is that of the second one, on purpose.
        assert_close(learned.log_variance[1:], fixed.log_variance[1:].expand_as(noisy[1:]))


def test_clipping_bounds_the_clean_estimate(tables: gaussian.GaussianTables) -> None:
    noisy, output = 3 * normal(9), normal(10)
    options = {"prediction_type": "sample", "variance_type": "fixed_small", "clip": True}
    reverse = gaussian.p_distribution(tables, 2 * output, noisy, steps_of(tables), **options)
    assert torch.equal(reverse.clean, (2 * output).clamp(-1, 1))


def test_wrong_number_of_channels_is_refused(tables: gaussian.GaussianTables) -> None:
    with pytest.raises(OpenSoraError, match=r"got a prediction of 2 channels .* expected 4"):
        gaussian.p_distribution(tables, normal(0), normal(1), steps_of(tables))


def test_batch_of_two_is_two_of_one(tables: gaussian.GaussianTables) -> None:
    noisy, prediction = normal(11, dtype=torch.float32), normal(12, (3, 4, 4, 2, 2), torch.float32)
    t = steps_of(tables)
    together = gaussian.p_distribution(tables, prediction, noisy, t)
    for i in range(len(noisy)):
        row = slice(i, i + 1)
        alone = gaussian.p_distribution(tables, prediction[row], noisy[row], t[row])
        assert all(torch.equal(a, b[row]) for a, b in zip(alone, together, strict=True))


def test_half_precision_is_computed_in_float32(tables: gaussian.GaussianTables) -> None:
    clean, t = normal(13, dtype=torch.bfloat16), steps_of(tables)
    assert gaussian.q_sample(tables, clean, t, clean).dtype == torch.float32


def test_tables_on_another_device_than_the_latents(tables: gaussian.GaussianTables) -> None:
    """The meta device refuses to mix with the CPU, and stands in for an accelerator here."""
    noisy, t = torch.empty(SHAPE, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    prediction = torch.empty((3, 4, 4, 2, 2), device="meta")
    for placed in (tables, tables.to("meta")):
        for steps in (t, steps_of(tables)) if placed is tables else (t,):
            reverse = gaussian.p_distribution(placed, prediction, noisy, steps)
            stepped = gaussian.ancestral_step(reverse, steps, noisy)
            ddim = gaussian.ddim_step(placed, reverse.clean, noisy, steps, noisy, 0.5)
            assert all(x.device.type == "meta" and x.dtype == torch.float32 for x in (*reverse, stepped, ddim))


# --- DDIM -------------------------------------------------------------------------------------------------------------


def test_ddim_with_eta_1_has_the_posterior(tables: gaussian.GaussianTables) -> None:
    clean, noisy, t = normal(14), normal(15), steps_of(tables)
    noise = torch.ones_like(noisy)
    mean = gaussian.ddim_step(tables, clean, noisy, t, eta=1.0)
    posterior = gaussian.q_posterior(tables, clean, noisy, t)
    assert_close(mean, posterior.mean)
    spread = gaussian.ddim_step(tables, clean, noisy, t, noise, eta=1.0) - mean
    assert_close(spread.square(), posterior.variance.expand_as(noisy), rtol=1e-6, atol=1e-12)


def test_ddim_inversion_is_undone_by_a_step(tables: gaussian.GaussianTables) -> None:
    clean, noise = normal(16), normal(17)
    t = torch.tensor([0, 3, len(tables) - 3])
    noisy = gaussian.q_sample(tables, clean, t, noise)
    further = gaussian.ddim_inverse_step(tables, clean, noisy, t)
    assert_close(further, gaussian.q_sample(tables, clean, t + 1, noise))
    assert_close(gaussian.ddim_step(tables, clean, further, t + 1), noisy)


# --- whole chains on data whose best network is known: x ~ N(m, s^2) --------------------------------------------------

DATA_MEAN, DATA_STD = 0.4, 0.6


def best_clean(tables: gaussian.GaussianTables, noisy: Tensor, t: int) -> Tensor:
    """E[x | x_t]."""
    abar = tables.alphas_cumprod[t]
    gain = DATA_STD**2 * abar.sqrt() / (abar * DATA_STD**2 + 1 - abar)
    return DATA_MEAN + gain * (noisy - abar.sqrt() * DATA_MEAN)


def two_points() -> Tensor:
    """x_t = 0 and 1: enough to read off a step that is linear in x_t."""
    return torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1, 1)


def test_ancestral_chain_with_the_best_network_has_the_exact_distribution(tables: gaussian.GaussianTables) -> None:
    """The best epsilon and a variance in the learned range make q(x_{t-1} | x_t) itself, so all marginals are exact."""
    for t in range(len(tables) - 1, 0, -1):
        abar, abar_prev = tables.alphas_cumprod[t], tables.alphas_cumprod_prev[t]
        steps = torch.tensor([t, t])
        noisy = two_points()
        epsilon = gaussian.predict_epsilon(tables, noisy, steps, best_clean(tables, noisy, t))
        spread = DATA_STD**2 * (1 - abar) / (abar * DATA_STD**2 + 1 - abar)
        variance = tables.posterior_variance[t] + tables.posterior_mean_coef1[t] ** 2 * spread
        small, large = tables.posterior_variance[t].log(), tables.betas[t].log()
        v = 2 * (variance.log() - small) / (large - small) - 1
        assert -1 <= v <= 1, "data narrower than the noise lie within the learned range"
        reverse = gaussian.p_distribution(tables, torch.cat([epsilon, v.expand_as(epsilon)], dim=1), noisy, steps)
        offset, slope = reverse.mean.flatten()[0], reverse.mean.flatten().diff()[0]
        marginal_mean, marginal_variance = abar.sqrt() * DATA_MEAN, abar * DATA_STD**2 + 1 - abar
        mean = offset + slope * marginal_mean
        variance = slope**2 * marginal_variance + reverse.variance.flatten()[0]
        assert_close(mean, abar_prev.sqrt() * DATA_MEAN)
        assert_close(variance, abar_prev * DATA_STD**2 + 1 - abar_prev)


def ddim_error(num_steps: int) -> float:
    """How far DDIM's samples of the data are from the right standard deviation."""
    betas = gaussian.linear_betas(1000)
    tables = gaussian.make_tables(betas, gaussian.respaced_timesteps(1000, num_steps))
    abar = tables.alphas_cumprod[-1]
    points = two_points()
    for t in range(num_steps - 1, -1, -1):
        points = gaussian.ddim_step(tables, best_clean(tables, points, t), points, torch.tensor([t, t]))
    slope = points.flatten().diff()[0]
    return abs(float(slope * (abar * DATA_STD**2 + 1 - abar).sqrt()) - DATA_STD)


def test_ddim_converges_to_the_data_at_first_order() -> None:
    errors = [ddim_error(n) for n in (50, 100, 200)]
    assert errors[-1] < 0.01
    for coarse, fine in itertools.pairwise(errors):
        assert 1.6 < coarse / fine < 2.4
