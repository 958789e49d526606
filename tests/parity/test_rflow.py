"""Rectified flow against the reference's recorded schedules, losses and trajectories."""

import re
from typing import Any

import pytest
import torch
from guided import combined

from opensora.diffusion import flow
from opensora.diffusion.losses import mean_per_sample
from opensora.models.guidance import ChannelGuidance, GuidanceStep, default_guider
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler

N = 1000  # timestep of pure noise, the same in every published model; the toy network divides by it


def steps_of_training(fixture) -> int:
    return int(fixture.meta.get("num_timesteps", N))


def assert_near(actual, expected):
    """Equal up to float32 rounding, which along a guided trajectory grows with the values."""
    atol = 2e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=atol)


def toy(fixture, x, t, y, frame_mask=None):
    """The fixtures' linear network; y is (B, ...), of which only the mean of a sample counts."""
    a, b, d, e = (fixture[f"in.toy.{name}"].reshape(1, -1, 1, 1, 1) for name in "abde")
    per_sample = (-1, 1, 1, 1, 1)
    repeated = x[:, [channel % x.shape[1] for channel in range(a.shape[1])]]
    mask = 0.0 if frame_mask is None else frame_mask.to(x.dtype)[:, None, :, None, None]
    text = y.flatten(1).mean(dim=1).reshape(per_sample)
    return a * repeated + b * torch.as_tensor(t, dtype=x.dtype).reshape(per_sample) / N + d * text + e * mask


# --- losses -----------------------------------------------------------------------------------------------------------


def test_noising_and_losses(golden):
    fixture = golden("rflow_v1_2_losses")
    clean, noise, t, mask = (fixture[f"in.{name}"] for name in ("x_start", "noise", "t", "mask"))
    mask = mask.bool()
    grid = steps_of_training(fixture)
    target = flow.velocity_target(clean, noise)

    noisy = flow.interpolate(clean, noise, t / grid)
    assert_near(noisy, fixture["out.add_noise"])
    torch.testing.assert_close(RectifiedFlowScheduler(grid).add_noise(clean, noise, t), noisy)
    loss = mean_per_sample((toy(fixture, noisy, t, fixture["in.y"])[:, : clean.shape[1]] - target).square())
    assert_near(loss, fixture["out.plain.loss"])

    noisy = flow.interpolate(clean, noise, t / grid, mask)
    assert_near(noisy, fixture["mid.mask.x_t"])
    # The reference's loss leaves telling the network about the mask to its caller, and here nobody did.
    loss = mean_per_sample((toy(fixture, noisy, t, fixture["in.y"])[:, : clean.shape[1]] - target).square(), mask)
    # Departure: without a generated frame the reference divides by zero, here the loss is 0.
    assert_near(loss, torch.where(mask.any(dim=1), fixture["out.mask.loss"], 0.0))
    assert set(fixture.under("out")) == {"add_noise", "plain.loss", "mask.loss"}


# --- the time shift ---------------------------------------------------------------------------------------------------


def reference_frames(num_frames: int, version: str, first: int | None = None) -> int:
    """The frame count of the reference's shift, with its constants; 0 where it breaks down.

    The reference takes a whole batch for images if its first sample, of `first` frames, is one.
    """
    if (num_frames if first is None else first) == 1:
        return 1
    return num_frames // 17 * 5 if version == "1.2" else (num_frames - 1) // 4


def scheduler_of(
    version: str, num_frames: int, scale: float = 1.0, *, first: int | None = None, **options
) -> RectifiedFlowScheduler:
    """Our scheduler for a release of the reference.

    Departure: at lengths where the reference counts other frames than its autoencoder makes (no whole chunk of 17, or
    too short), we count the autoencoder's. The scale makes up for it here, so that the rest can still be compared.
    """
    rule: Any = "latent" if version == "1.2" else "after_first"
    ours = flow.latent_frames(num_frames, 4, 17) if version == "1.2" else flow.frames_after_first(num_frames, 4)
    theirs = reference_frames(num_frames, version, first) or ours
    return RectifiedFlowScheduler(
        use_timestep_transform=True, transform_scale=scale * (theirs / ours) ** 0.5, transform_frames=rule, **options
    )


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_time_shift(golden, version):
    fixture = golden(f"rflow_v{version.replace('.', '_')}_transform")
    t = fixture["in.t"] / N
    name = re.compile(r"out\.(\d+)(?:\.(scale(?P<scale>[\d.]+)|unit|notemporal))?")
    cases = [name.fullmatch(key) for key in fixture.tensors if key.startswith("out.")]
    assert cases
    for case in cases:
        assert case is not None
        height, width, num_frames = fixture["in.sizes_h_w_numframes"][int(case[1])].tolist()
        if case[2] == "notemporal":  # Open-Sora 1.3 can be told to treat a video like one image
            num_frames = 1
        scheduler = scheduler_of(version, num_frames, scale=float(case["scale"] or 1))
        shifted = flow.time_shift(t, scheduler.time_shift.ratio(height, width, num_frames))
        assert torch.isfinite(shifted).all()
        expected = fixture[case.string]
        if reference_frames(num_frames, version) == 0:
            # Departure: the reference breaks down. It has 0 below pure noise, and there NaN (stored as a number < 0).
            assert ((expected == 0) | (expected < 0) | expected.isnan()).all()
            continue
        expected = expected / (1 if case[2] == "unit" else N)
        torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-6)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_sampling_trajectories(golden):
    fixture = golden("rflow_v1_2_sample")
    cases = [name.removesuffix(".final") for name in fixture.under("out")]
    assert cases
    for case in cases:
        words = set(case.split("_"))
        assert words <= {"plain", "discrete", "transform", "mask"}, f"{case} is no case of this test"
        for row in range(len(fixture["in.z"])):
            check_trajectory(fixture, case, words, row)


def check_trajectory(fixture, case: str, words: set[str], row: int) -> None:
    """One row of the batch by itself: here one run has one size, the fixture has one per row."""
    grid = steps_of_training(fixture)
    steps = fixture.meta.get("discrete_steps" if "discrete" in words else "steps", fixture.meta["steps"])
    size: dict[str, int] = {}
    options: dict[str, Any] = {"num_train_timesteps": grid, "use_discrete_timesteps": "discrete" in words}
    if "transform" in words:
        size = {name: int(fixture[f"in.{name}"][row]) for name in ("height", "width", "num_frames")}
        first = int(fixture["in.num_frames"][0])
        if reference_frames(size["num_frames"], "1.2", first) == 0:
            return  # Departure: the reference breaks down at this length, see test_time_shift.
        scheduler = scheduler_of("1.2", size["num_frames"], first=first, **options)
    else:
        scheduler = RectifiedFlowScheduler(**options)
    scheduler.set_timesteps(steps, **size)

    one = slice(row, row + 1)
    z, y, null = (fixture[f"in.{name}"][one] for name in ("z", "y", "y_null"))
    strength = fixture["in.mask"][one] if "mask" in words else None
    guidance = ChannelGuidance(default_guider(fixture.meta["cfg_scale"]), "all", z.shape[1])
    seen = fixture.under(f"mid.{case}")
    for i, t in enumerate(scheduler.timesteps):
        frame_mask = None
        if strength is not None:
            noise = fixture[f"in.{case}.noise"][i, one]
            z, frame_mask = scheduler.activate_frames(z, t, strength, noise=noise)
            if "x_mask" in seen:
                assert torch.equal(frame_mask, seen["x_mask"][i, one].bool())
        if "model_t" in seen:
            torch.testing.assert_close(t, seen["model_t"][i, row], rtol=1e-5, atol=1e-3)
        if "model_x" in seen:
            assert_near(z, seen["model_x"][i, one])
        cond, uncond = (toy(fixture, z, t, text, frame_mask) for text in (y, null))
        guided = combined(guidance, cond, uncond, GuidanceStep(i, steps, t))
        z = scheduler.step(guided, t, z, frame_mask=frame_mask).prev_sample
    assert_near(z, fixture[f"out.{case}.final"][one])
