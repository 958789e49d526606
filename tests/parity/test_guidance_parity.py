"""Guidance against the reference's recorded outputs, for every sampler of the family.

The reference returns both halves of its doubled batch and later drops the unconditional one; here there is only the
conditional half, so that is what is compared. What we do differently on purpose is in docs/reference-parity.md.
"""

import re
from typing import Any

import pytest
import torch
from guided import combined

from opensora.errors import OpenSoraError
from opensora.models.channel_scales import ChannelScaleGuidance
from opensora.models.guidance import ChannelGuidance, GuidanceStep, default_guider

STEP = GuidanceStep(0, 1, 500.0)
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
CASE = re.compile(r"out\.(?:(?P<raw>raw\w*)\.)?scale(?P<scale>[\d.]+?)\.cfg(?P<channels>None|\d+)")


def guide(cond, uncond, scale, channels, latent_channels):
    return combined(ChannelGuidance(default_guider(scale), channels, latent_channels), cond, uncond, STEP)


def guide_each(cond, uncond, scales):
    """A scale for each latent channel."""

    def rule_at(scale, channels):
        return ChannelGuidance(default_guider(scale), channels, len(scales))

    predictions = {"text": cond, "null": uncond}
    rule = ChannelScaleGuidance(scales, rule_at)
    return rule.combine({name: predictions[name] for name in rule.branches(STEP)}, STEP)


def cases_of(fixture, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    """Every output of the fixture; one whose name says something else fails the test."""
    matches = [(name, pattern.fullmatch(name)) for name in fixture.tensors if name.startswith("out.")]
    assert matches
    assert not [name for name, match in matches if match is None]
    return [match for _, match in matches if match is not None]


@pytest.mark.parametrize("version", ["v1_0", "v1_1", "v1_2"])
def test_iddpm_guides_the_first_channels(golden, version):
    fixture = golden(f"cfg_iddpm_{version}")
    rows, latent = fixture.meta["B"], fixture["in.x"].shape[1]
    for case in cases_of(fixture, CASE):
        raw, expected = fixture[f"in.{case['raw'] or 'raw'}"], fixture[case.string]
        cond, uncond = raw[:rows], raw[rows:]
        scale = float(case["scale"])
        # Without a number the reference takes half of the output channels: the latent, if there are variances too.
        asked = raw.shape[1] // 2 if case["channels"] == "None" else int(case["channels"])
        if asked <= latent:
            guided = guide(cond, uncond, scale, asked, latent)
            torch.testing.assert_close(guided, expected[:rows], **TOLERANCE)
            # The half that the reference drops later holds the guided channels too.
            torch.testing.assert_close(guided[:, :asked], expected[rows:, :asked], **TOLERANCE)
            assert torch.equal(guide_each(cond, uncond, [scale] * asked + [1.0] * (latent - asked)), guided)
        else:
            with pytest.raises(OpenSoraError, match="cfg_channels"):
                guide(cond, uncond, scale, asked, latent)


@pytest.mark.parametrize("version", ["v1_1", "v1_2"])
def test_all_channels_are_the_latent_with_or_without_variances(golden, version):
    """Departure: with no number the reference guides half of a network output without variances, we guide all of it."""
    fixture = golden(f"cfg_iddpm_{version}")
    rows, latent = fixture.meta["B"], fixture["in.x"].shape[1]
    for case in cases_of(fixture, CASE):
        if case["channels"] != "None":
            continue
        raw, expected = fixture[f"in.{case['raw'] or 'raw'}"], fixture[case.string][:rows]
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
    for case in cases_of(fixture, CASE):
        if case["channels"] == "None" or int(case["channels"]) <= latent:
            continue
        raw, expected = fixture[f"in.{case['raw'] or 'raw'}"], fixture[case.string][:rows]
        guided = guide(raw[:rows], raw[rows:], float(case["scale"]), "all", latent)
        torch.testing.assert_close(guided[:, :latent], expected[:, :latent], **TOLERANCE)
        assert torch.equal(guided[:, latent:], raw[:rows, latent:])


def test_other_samplers_guide_every_latent_channel(golden):
    fixture = golden("cfg_dpm_rflow")
    rows, latent = fixture.meta["B"], fixture["in.x"].shape[1]
    raw = fixture["in.raw"]
    for case in cases_of(fixture, re.compile(r"out\.(?:dpm\.scale([\d.]+)\.noise|rflow\.scale([\d.]+)\.v)")):
        scale, expected = float(case[1] or case[2]), fixture[case.string]
        first, second = raw[:rows], raw[rows:]
        # The DPM solver puts the unconditional rows first, and at scale 1 asks for the conditional ones alone.
        cond, uncond = (second, first) if case[1] and scale != 1 else (first, second)
        guided = guide(cond, uncond, scale, "all", latent)
        torch.testing.assert_close(guided[:, :latent], expected, **TOLERANCE)
        assert torch.equal(guide_each(cond, uncond, [scale] * latent), guided)
