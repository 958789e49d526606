"""Rectified flow against the reference's recorded schedules, losses and trajectories."""

import re
from typing import Any

import pytest
import torch

from opensora import flow
from opensora.models.guidance import ChannelGuidance, default_guider
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler

TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
N = 1000  # timesteps of pure noise, the same in every published model


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
    target = flow.velocity_target(clean, noise)

    noisy = flow.interpolate(clean, noise, t / N)
    torch.testing.assert_close(noisy, fixture["out.add_noise"], **TOLERANCE)
    torch.testing.assert_close(RectifiedFlowScheduler().add_noise(clean, noise, t), noisy)
    loss = flow.masked_mse(toy(fixture, noisy, t, fixture["in.y"]), target)
    torch.testing.assert_close(loss, fixture["out.plain.loss"], **TOLERANCE)

    noisy = flow.interpolate(clean, noise, t / N, mask)
    torch.testing.assert_close(noisy, fixture["mid.mask.x_t"], **TOLERANCE)
    # The reference's loss leaves telling the network about the mask to its caller, and here nobody did.
    loss = flow.masked_mse(toy(fixture, noisy, t, fixture["in.y"]), target, mask)
    torch.testing.assert_close(loss, fixture["out.mask.loss"], **TOLERANCE)


# --- the time shift ---------------------------------------------------------------------------------------------------


def reference_frames(num_frames: int, version: str) -> int:
    """The frame count of the reference's shift, with its constants; 0 where it goes wrong."""
    if num_frames == 1:
        return 1
    return num_frames // 17 * 5 if version == "1.2" else (num_frames - 1) // 4


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_time_shift(golden, version):
    fixture = golden(f"rflow_v{version.replace('.', '_')}_transform")
    t = fixture["in.t"]
    cases = [
        m for name in fixture.tensors if (m := re.fullmatch(r"out\.(\d+)(?:\.(scale(?P<scale>[\d.]+)|\w+))?", name))
    ]
    assert cases
    for case in cases:
        height, width, num_frames = fixture["in.sizes_h_w_numframes"][int(case[1])].tolist()
        variant, expected = case[2], fixture[case.string]
        scheduler = RectifiedFlowScheduler(
            use_timestep_transform=True,
            transform_scale=float(case["scale"] or 1),
            transform_frames="latent" if version == "1.2" else "after_first",
        )
        frames = reference_frames(num_frames, version)
        if variant == "notemporal":  # 1.3 can be told to treat a video like an image
            frames, scale = 1, 1.0
            ratio = flow.time_shift_ratio(height, width, frames)
        else:
            scale = scheduler.transform_scale if version == "1.2" or num_frames > 1 else 1.0
            ratio = scheduler.time_shift_ratio(height, width, num_frames)
        unit = t / N
        shifted = flow.time_shift(unit, ratio)
        if variant != "unit":
            expected = expected / N

        # Departure: lengths for which the reference counts other frames than its autoencoder makes.
        if frames != 1 and frames != shift_frames(scheduler, num_frames):
            assert torch.isfinite(shifted).all()
            assert torch.equal(shifted[unit == 1], unit[unit == 1])
            if frames == 0:
                continue  # the reference has 0 or NaN there
            shifted = flow.time_shift(unit, flow.time_shift_ratio(height, width, frames, scale=scale))
        torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-6)


def shift_frames(scheduler, num_frames):
    if scheduler.transform_frames == "latent":
        return flow.latent_frames(num_frames, scheduler.temporal_factor, scheduler.micro_frame_size)
    return flow.frames_after_first(num_frames, scheduler.temporal_factor)


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "discrete", "transform", "plain_mask", "transform_mask"])
def test_sampling_trajectory(golden, case):
    fixture = golden("rflow_v1_2_sample")
    if f"out.{case}.final" not in fixture:
        pytest.skip(f"no case {case} in this fixture")
    scheduler = RectifiedFlowScheduler(
        use_discrete_timesteps="discrete" in case, use_timestep_transform="transform" in case
    )
    size = {name: fixture[f"in.{name}"][0].item() for name in ("height", "width", "num_frames")}
    size["num_frames"] = int(size["num_frames"])
    steps = fixture.meta["discrete_steps" if "discrete" in case else "steps"]
    scheduler.set_timesteps(steps, **size)

    z, y, null = fixture["in.z"], fixture["in.y"], fixture["in.y_null"]
    strength = fixture["in.mask"] if "mask" in case else None
    guidance = ChannelGuidance(default_guider(fixture.meta["cfg_scale"]), "all", z.shape[1])
    for i, t in enumerate(scheduler.timesteps):
        frame_mask = None
        if strength is not None:
            z, frame_mask = scheduler.activate_frames(z, t, strength, noise=fixture[f"in.{case}.noise"][i])
            assert torch.equal(frame_mask, fixture[f"mid.{case}.x_mask"][i, : len(z)])
        torch.testing.assert_close(t, fixture[f"mid.{case}.model_t"][i, 0], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(z, fixture[f"mid.{case}.model_x"][i], **TOLERANCE)
        cond, uncond = (toy(fixture, z, t, text, frame_mask) for text in (y, null))
        guided = guidance(cond, uncond, step=i, num_inference_steps=steps, timestep=t)
        z = scheduler.step(guided, t, z, frame_mask=frame_mask).prev_sample
    torch.testing.assert_close(z, fixture[f"out.{case}.final"], **TOLERANCE)
