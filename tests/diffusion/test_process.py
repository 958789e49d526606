"""Noise processes: frames that do not count, and times that draw, told and fixed agree on."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from opensora.diffusion import flow, gaussian
from opensora.diffusion.losses import speed_tables
from opensora.diffusion.process import GaussianProcess, NoiseProcess, RectifiedFlowProcess
from opensora.errors import OpenSoraError

TABLES = gaussian.make_tables(gaussian.linear_betas(100))
PROCESSES: dict[str, NoiseProcess] = {
    "flow": RectifiedFlowProcess(),
    "logit-normal": RectifiedFlowProcess(times="logit-normal", time_shift=flow.AreaShift()),
    "discrete": RectifiedFlowProcess(times="discrete"),
    "epsilon": GaussianProcess(TABLES),
    "sample": GaussianProcess(TABLES, "sample", "fixed_small"),
    "speed": GaussianProcess(TABLES, timestep_weights=torch.full((100,), 2.0), emphasis=speed_tables(TABLES)),
}
SHAPE = (3, 2, 4, 2, 2)
MASK = torch.tensor([[True, True, False, False], [False, True, False, True], [True] * 4])


@pytest.fixture(params=PROCESSES)
def process(request: pytest.FixtureRequest) -> NoiseProcess:
    return PROCESSES[request.param]


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def answer_of(process: NoiseProcess) -> Tensor:
    """A network's, with variance channels where it has them."""
    learned = isinstance(process, GaussianProcess) and process.variance_type == "learned_range"
    return torch.cat([normal(2), normal(3)], dim=1) if learned else normal(2)


def losses(process: NoiseProcess, prediction: Tensor, clean: Tensor, mask: Tensor | None = MASK) -> dict[str, Tensor]:
    t, noise = process.fixed_timesteps(3), normal(1)
    noisy = process.corrupt(clean, noise, t, mask)
    return process.losses(prediction, clean=clean, noisy=noisy, noise=noise, t=t, frame_mask=mask, weights=None)


def test_a_network_of_the_other_velocity_learns_its_negative() -> None:
    clean, answer = normal(0), normal(2)
    towards_data, towards_noise = (RectifiedFlowProcess(velocity=kind) for kind in get_args(flow.Velocity))
    expected = losses(towards_data, answer, clean)["velocity"]
    assert_close(losses(towards_noise, -answer, clean)["velocity"], expected)
    assert (losses(towards_noise, normal(1) - clean, clean)["velocity"] == 0).all()


def test_late_times_of_videos_drawn_anew() -> None:
    process, drawn = RectifiedFlowProcess(times="logit-normal", uniform_above=0.5), {}
    for num_frames in (1, 17):
        generator = torch.Generator().manual_seed(0)
        drawn[num_frames] = process.draw_times(4000, num_frames=num_frames, generator=generator)
    late = drawn[1] > 500
    assert torch.equal(drawn[1][~late], drawn[17][~late])
    assert (drawn[17][late] > 500).all()
    # Uniform between 500 and 1000, where logit-normal times hardly ever are near the end.
    assert abs(float(drawn[17][late].mean()) - 750) < 10 and float(drawn[1][late].mean()) < 700


def test_a_nan_in_a_conditioning_frame_reaches_neither_loss_nor_gradient(process: NoiseProcess) -> None:
    hidden = ~MASK[:, None, :, None, None]
    answer, clean = answer_of(process), normal(0)
    expected = losses(process, answer, clean)
    broken = answer.masked_fill(hidden, torch.nan).requires_grad_()
    found = losses(process, broken, clean.masked_fill(hidden, torch.nan))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    (gradient,) = torch.autograd.grad(sum(term.sum() for term in found.values()), broken)
    assert gradient.isfinite().all() and torch.all(gradient.masked_select(hidden) == 0)


def test_generated_frames_count_and_all_of_them_do_without_a_mask(process: NoiseProcess) -> None:
    answer, clean = answer_of(process), normal(0)
    name = next(iter(losses(process, answer, clean)))
    without = losses(process, answer, clean, None)[name]
    assert_close(losses(process, answer, clean, torch.ones_like(MASK))[name], without)
    changed = answer.clone()
    changed[0, :, 1] += 1
    assert losses(process, changed, clean)[name][0] != losses(process, answer, clean)[name][0]


def test_a_sample_without_generated_frames_costs_nothing(process: NoiseProcess) -> None:
    mask = MASK.clone()
    mask[0] = False
    for term in losses(process, answer_of(process), normal(0), mask).values():
        assert term[0] == 0 and term.isfinite().all()


def test_weights_change_what_is_minimised_and_the_plain_error_is_kept_to_watch(process: NoiseProcess) -> None:
    t, clean, noise, answer = process.fixed_timesteps(3), normal(0), normal(1), answer_of(process)
    options = {"clean": clean, "noisy": process.corrupt(clean, noise, t), "noise": noise, "t": t}
    plain = process.losses(answer, **options)
    weighted = process.losses(answer, **options, weights=torch.full((3, 1, 4, 2, 2), 2.0))
    name = next(iter(plain))
    assert_close(weighted[name], 2 * plain[name])
    assert_close(weighted["_mse"], plain.get("_mse", plain[name]))


def test_variance_channels_of_a_flow_network_are_ignored() -> None:
    process = RectifiedFlowProcess()
    both = torch.cat([normal(2), normal(3)], dim=1)
    assert torch.equal(losses(process, both, normal(0))["velocity"], losses(process, normal(2), normal(0))["velocity"])


def test_times_are_in_range_and_told_in_float32(process: NoiseProcess) -> None:
    size = {"height": 64, "width": 64, "num_frames": 17}
    drawn = process.draw_times(5000, **size, generator=torch.Generator().manual_seed(0))
    fixed = process.fixed_timesteps(5)
    assert drawn.shape == (5000,) and fixed.shape == (5,) and fixed.diff().min() > 0
    assert drawn.min() >= fixed[0] == 0 and drawn.max() <= fixed[-1]
    assert process.timesteps(fixed).dtype == torch.float32
    assert_close(process.timesteps(fixed), fixed.float())
    with pytest.raises(OpenSoraError, match="2 or more"):
        process.fixed_timesteps(1)


def test_the_clean_end_is_clean_and_the_noisy_end_noise(process: NoiseProcess) -> None:
    clean, noise = normal(0), normal(1)
    first, last = process.fixed_timesteps(2)
    assert_close(process.corrupt(clean, noise, first.expand(3)), clean, atol=0.15, rtol=0)
    assert_close(process.corrupt(clean, noise, last.expand(3)), noise, atol=0.15, rtol=0)


def test_conditioning_frames_are_shown_clean_or_nearly_so(process: NoiseProcess) -> None:
    clean, noise = normal(0), normal(1)
    noisy = process.corrupt(clean, noise, process.fixed_timesteps(3), MASK)
    hidden = ~MASK[:, None, :, None, None].expand(SHAPE)
    assert_close(noisy[hidden], clean[hidden], atol=0.15, rtol=0)


def test_a_missing_size_is_named_where_times_are_shifted() -> None:
    with pytest.raises(OpenSoraError, match=r"height=None.*needs all three"):
        PROCESSES["logit-normal"].draw_times(2, width=64, num_frames=17)


def test_speed_mirrors_the_second_half_of_its_draws() -> None:
    process = PROCESSES["speed"]
    assert isinstance(process, GaussianProcess) and process.emphasis is not None
    drawn = process.draw_times(9, generator=torch.Generator().manual_seed(0))
    mirrored = (process.emphasis.meaningful_steps - drawn[:5]).abs().clamp(max=99)
    assert torch.equal(drawn[5:], mirrored[:4])


def test_moved_tables_give_the_same_losses_but_for_rounding() -> None:
    process = GaussianProcess(TABLES)
    moved = process.to("cpu")
    assert moved.tables.betas.dtype == torch.float32
    for first, second in zip(
        losses(process, answer_of(process), normal(0)).values(),
        losses(moved, answer_of(process), normal(0)).values(),
        strict=True,
    ):
        assert_close(first, second, rtol=1e-3, atol=1e-5)
    assert replace(process, timestep_weights=torch.ones(100)).to("cpu").timestep_weights is not None
