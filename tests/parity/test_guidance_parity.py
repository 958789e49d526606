"""Guidance against the reference's recorded outputs, for every sampler of the family.

The reference returns both halves of its doubled batch and later drops the unconditional one; here there is only the
conditional half, so that is what is compared. What we do differently on purpose is in docs/reference-parity.md.
"""

import re
from typing import Any

import pytest
import torch

from opensora.errors import OpenSoraError
from opensora.models.guidance import ChannelGuidance, default_guider

STEP: dict[str, Any] = {"step": 0, "num_inference_steps": 1, "timestep": 500.0}
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
CASE = re.compile(r"out\.(?:(?P<raw>raw\w*)\.)?scale(?P<scale>[\d.]+?)\.cfg(?P<channels>\w+)")


def guide(cond, uncond, scale, channels, latent_channels):
    return ChannelGuidance(default_guider(scale), channels, latent_channels)(cond, uncond, **STEP)


@pytest.mark.parametrize("version", ["v1_0", "v1_1", "v1_2"])
def test_iddpm_guides_the_first_channels(golden, version):
    fixture = golden(f"cfg_iddpm_{version}")
    rows, latent = fixture.meta["B"], fixture["in.x"].shape[1]
    cases = [match for name in fixture.tensors if (match := CASE.fullmatch(name))]
    assert cases
    for case in cases:
        raw, expected = fixture[f"in.{case['raw'] or 'raw'}"], fixture[case.string]
        cond, uncond, expected = raw[:rows], raw[rows:], expected[:rows]
        scale = float(case["scale"])
        # Without a number the reference takes half of the output channels: the latent, if there are variances too.
        asked = raw.shape[1] // 2 if case["channels"] == "None" else int(case["channels"])
        if asked <= latent:
            torch.testing.assert_close(guide(cond, uncond, scale, asked, latent), expected, **TOLERANCE)
        else:
            with pytest.raises(OpenSoraError, match="cfg_channels"):
                guide(cond, uncond, scale, asked, latent)


@pytest.mark.parametrize("version", ["v1_1", "v1_2"])
def test_all_channels_are_the_latent_with_or_without_variances(golden, version):
    """Departure: with no number the reference guides half of a network output without variances, we guide all of it."""
    fixture = golden(f"cfg_iddpm_{version}")
    rows, latent = fixture.meta["B"], fixture["in.x"].shape[1]
    for name in [name for name in fixture.tensors if (match := CASE.fullmatch(name)) and match["channels"] == "None"]:
        case = CASE.fullmatch(name)
        assert case is not None
        raw, expected = fixture[f"in.{case['raw'] or 'raw'}"], fixture[name][:rows]
        cond, uncond, scale = raw[:rows], raw[rows:], float(case["scale"])
        guided = guide(cond, uncond, scale, None, latent)
        half = raw.shape[1] // 2
        torch.testing.assert_close(guided[:, :half], expected[:, :half], **TOLERANCE)
        torch.testing.assert_close(guided[:, :latent], (uncond + scale * (cond - uncond))[:, :latent], **TOLERANCE)
        assert torch.equal(guided[:, latent:], cond[:, latent:])


@pytest.mark.parametrize("version", ["v1_1", "v1_2"])
def test_variance_channels_are_never_guided(golden, version):
    """Departure: a number beyond the latent makes the reference guide variances too; here it is an error."""
    fixture = golden(f"cfg_iddpm_{version}")
    rows, latent = fixture.meta["B"], fixture["in.x"].shape[1]
    for name in fixture.tensors:
        case = CASE.fullmatch(name)
        if case is None or case["channels"] == "None" or int(case["channels"]) <= latent:
            continue
        raw, expected = fixture["in.raw"], fixture[name][:rows]
        guided = guide(raw[:rows], raw[rows:], float(case["scale"]), "all", latent)
        torch.testing.assert_close(guided[:, :latent], expected[:, :latent], **TOLERANCE)
        assert torch.equal(guided[:, latent:], raw[:rows, latent:])


@pytest.mark.parametrize(("sampler", "output"), [("dpm", "noise"), ("rflow", "v")])
def test_other_samplers_guide_every_latent_channel(golden, sampler, output):
    fixture = golden("cfg_dpm_rflow")
    rows, latent = fixture.meta["B"], fixture["in.x"].shape[1]
    raw = fixture["in.raw"]
    cases = [m for name in fixture.tensors if (m := re.fullmatch(rf"out\.{sampler}\.scale([\d.]+)\.{output}", name))]
    assert cases
    for case in cases:
        scale, expected = float(case[1]), fixture[case.string]
        first, second = raw[:rows], raw[rows:]
        # The DPM solver puts the unconditional rows first, and at scale 1 asks for the conditional ones alone.
        cond, uncond = (second, first) if sampler == "dpm" and scale != 1 else (first, second)
        guided = guide(cond, uncond, scale, "all", latent)
        torch.testing.assert_close(guided[:, :latent], expected, **TOLERANCE)
