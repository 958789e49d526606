"""DPM-Solver++ against the reference's recorded runs, each over a grid of its own, with and without guidance."""

import re

import pytest
import torch
from guided import combined
from torch import Tensor
from torch.testing import assert_close

from opensora.models.guidance import ChannelGuidance, GuidanceStep, default_guider
from opensora.models.schedulers.dpm_solver import DPMSolverScheduler

F32 = {"atol": 2e-5, "rtol": 1e-4}
OUTPUTS = r"ns\.(log_alpha|std|lambda|inverse_lambda)|steps\d+\.(traj|final)|cfg[\d.]+\.final"


@pytest.fixture
def fixture(golden):
    fixture = golden("dpm_solver_v1_0")
    unread = [name for name in fixture.under("out") if not re.fullmatch(OUTPUTS, name)]
    assert not unread  # no number of the reference goes by unseen because of its name
    return fixture


def test_runs_of_open_sora_1_3(golden) -> None:
    """There the last step is always of first order."""
    fixture = golden("dpm_solver_v1_3")
    scheduler = DPMSolverScheduler(lower_order_final=True)
    counts = fixture.meta["steps"]
    assert set(fixture.under("out")) == {f"steps{count}.final" for count in counts}
    for num_steps in counts:
        final, expected = (
            sample(fixture, scheduler, num_steps, fixture.meta["cfg_scale"])[-1],
            fixture[f"out.steps{num_steps}.final"],
        )
        assert_close(final, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
        assert_close(scheduler.timesteps, fixture[f"mid.steps{num_steps}.model_t"][:, 0], atol=1e-3, rtol=1e-5)


def step_counts(fixture) -> list[int]:
    return sorted(int(match[1]) for name in fixture.tensors if (match := re.fullmatch(r"out\.steps(\d+)\.traj", name)))


def scheduler_of(fixture) -> DPMSolverScheduler:
    """The reference's grid of continuous times ends at 1 / N."""
    end = fixture[f"mid.steps{step_counts(fixture)[0]}.timesteps"][-1]
    return DPMSolverScheduler(num_train_timesteps=round(1 / float(end)))


def network(fixture, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
    """The network of the fixtures: a_c x + b_c t / 1000 + d_c mean(y), channels of x repeated as needed."""
    a, b, d = (fixture[f"in.toy.{name}"][None, :, None, None, None] for name in "abd")
    s = y.flatten(1).mean(dim=1)[:, None, None, None, None]
    return a * x[:, torch.arange(a.shape[1]) % x.shape[1]] + b * timestep / 1000 + d * s


def sample(fixture, scheduler: DPMSolverScheduler, num_steps: int, guidance_scale: float) -> Tensor:
    """A pipeline's loop; returns the latents before the first and after every step."""
    latents = fixture["in.z"] * scheduler.init_noise_sigma
    guidance = ChannelGuidance(default_guider(guidance_scale), "all", latents.shape[1])
    scheduler.set_timesteps(num_steps)
    trajectory = [latents]
    for step, timestep in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(latents, timestep)
        cond, uncond = (network(fixture, model_input, timestep, fixture[f"in.{y}"]) for y in ("y", "y_null"))
        prediction = combined(guidance, cond, uncond, GuidanceStep(step, num_steps, timestep))
        latents = scheduler.step(prediction, timestep, latents).prev_sample
        trajectory.append(latents)
    return torch.stack(trajectory)


def test_noise_levels(fixture) -> None:
    scheduler = scheduler_of(fixture)
    one, none = torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1)

    def levels(times: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at continuous times in [1 / N, 1]."""
        steps = (times.double() * len(scheduler) - 1).clamp(0, len(scheduler) - 1)
        alpha, sigma = scheduler.add_noise(one, none, steps), scheduler.add_noise(none, one, steps)
        return alpha.flatten(), sigma.flatten()

    alpha, sigma = levels(fixture["in.tq"])
    assert_close(alpha.log(), fixture["out.ns.log_alpha"], atol=2e-6, rtol=1e-5)
    assert_close(sigma, fixture["out.ns.std"], atol=1e-6, rtol=1e-5)
    # The reference computes in float32 how little noise there is at the end.
    assert_close((alpha / sigma).log(), fixture["out.ns.lambda"], atol=2e-4, rtol=1e-5)
    # The reference's inverse of lambda: at those times lambda is as given.
    alpha, sigma = levels(fixture["out.ns.inverse_lambda"])
    assert_close((alpha / sigma).log(), fixture["out.ns.lambda"], atol=2e-4, rtol=1e-5)


def test_the_network_is_told_the_same_times(fixture) -> None:
    scheduler = scheduler_of(fixture)
    for num_steps in step_counts(fixture):
        scheduler.set_timesteps(num_steps)
        assert_close(scheduler.timesteps, fixture[f"mid.steps{num_steps}.model_t"][:, 0], atol=1e-4, rtol=1e-6)
        continuous = fixture[f"mid.steps{num_steps}.timesteps"]
        assert_close((scheduler.timesteps + 1) / len(scheduler), continuous[:-1], atol=1e-6, rtol=1e-6)


def test_guided_runs(fixture) -> None:
    scheduler = scheduler_of(fixture)
    for num_steps in step_counts(fixture):
        trajectory = sample(fixture, scheduler, num_steps, fixture.meta["cfg_scale"])
        assert_close(trajectory, fixture[f"out.steps{num_steps}.traj"], **F32)
        assert_close(trajectory[-1], fixture[f"out.steps{num_steps}.final"], **F32)
        for half in fixture["mid.first_call_x"].chunk(2):  # unconditional and conditional rows
            assert_close(trajectory[0], half, **F32)


def test_runs_of_another_guidance_scale(fixture) -> None:
    """The fixture does not say how many steps these took: as many as one of its other runs."""
    scheduler = scheduler_of(fixture)
    for name, expected in fixture.under("out").items():
        if (match := re.fullmatch(r"cfg([\d.]+)\.final", name)) is None:
            continue
        finals = [sample(fixture, scheduler, n, float(match[1]))[-1] for n in step_counts(fixture)]
        nearest = min(finals, key=lambda final: float((final - expected).abs().max()))
        assert_close(nearest, expected, **F32)
