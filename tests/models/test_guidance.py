"""Guidance on chosen channels: what is guided, what is left alone, and what is refused."""

import logging
from typing import Any

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    BaseGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    SkipLayerGuidance,
    TangentialClassifierFreeGuidance,
)
from guided import combined
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.errors import OpenSoraError
from opensora.models.guidance import (
    ChannelGuidance,
    GuidanceStep,
    default_guider,
    merge_cfg_channel_alias,
    resolve_cfg_channels,
)

MIDDLE = GuidanceStep(3, 10, 500.0)


def predictions(batch: int = 2, channels: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cond, uncond = torch.randn(2, batch, channels, 3, 2, 2, generator=generator)
    return cond, uncond


# --- which channels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_value", "resolved"),
    [
        (None, (0, 1, 2, 3)),
        ("all", (0, 1, 2, 3)),
        (1, (0,)),
        (3, (0, 1, 2)),
        (4, (0, 1, 2, 3)),
        ([3, 1], (1, 3)),
        ((2,), (2,)),
    ],
)
def test_channels_are_resolved(given_value, resolved):
    assert resolve_cfg_channels(given_value, 4) == resolved


@pytest.mark.parametrize(
    "bad", [0, -1, 5, [], [4], [-1], [1, 1], [0.5], ["0"], [True], True, 2.0, "three", "3", {1, 2}, {0: 1.0}]
)
def test_channels_outside_the_latent_are_refused(bad):
    with pytest.raises(OpenSoraError, match="cfg_channels") as error:
        resolve_cfg_channels(bad, 4)
    assert "\n" not in str(error.value)


def test_alias_is_the_same_option():
    assert merge_cfg_channel_alias(cfg_channels=2) == 2
    assert merge_cfg_channel_alias(cfg_channel=[1]) == [1]
    assert merge_cfg_channel_alias(default=3) == 3
    assert merge_cfg_channel_alias(cfg_channel=None, default=3) is None  # None says "all", it is not "not given"
    with pytest.raises(OpenSoraError, match="give cfg_channels only"):
        merge_cfg_channel_alias(cfg_channels=3, cfg_channel=3)


# --- what guidance does -----------------------------------------------------------------------------------------------


@given(
    channels=st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
    scale=st.floats(0, 20),
    with_variance=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_chosen_channels_follow_the_formula_and_all_others_stay_conditional(channels, scale, with_variance, seed):
    cond, uncond = predictions(channels=8 if with_variance else 4, seed=seed)
    guided = combined(ChannelGuidance(default_guider(scale), channels, 4), cond, uncond, MIDDLE)
    plain = uncond + scale * (cond - uncond)
    for channel in range(cond.shape[1]):
        if channel in channels and scale != 1:
            torch.testing.assert_close(guided[:, channel], plain[:, channel], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(guided[:, channel], cond[:, channel])


GUIDERS: dict[str, Any] = {
    "cfg": lambda: ClassifierFreeGuidance(5.0),
    "cfg rescale": lambda: ClassifierFreeGuidance(5.0, guidance_rescale=0.7),
    "cfg original": lambda: ClassifierFreeGuidance(4.0, use_original_formulation=True),
    "apg": lambda: AdaptiveProjectedGuidance(5.0, eta=0.3),
    "apg momentum": lambda: AdaptiveProjectedGuidance(5.0, adaptive_projected_guidance_momentum=-0.5),
    "zero star": lambda: ClassifierFreeZeroStarGuidance(5.0),
    "tangential": lambda: TangentialClassifierFreeGuidance(5.0),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_every_guider_acts_on_the_chosen_channels_only(name):
    cond, uncond = predictions()
    guidance = ChannelGuidance(GUIDERS[name](), [0, 2], 4)
    guided = combined(guidance, cond, uncond, MIDDLE)

    alone: BaseGuidance = GUIDERS[name]()
    alone.set_state(MIDDLE.index, MIDDLE.num_steps, torch.tensor(MIDDLE.timestep))
    expected = alone.forward(cond[:, [0, 2]], uncond[:, [0, 2]]).pred
    torch.testing.assert_close(guided[:, [0, 2]], expected)
    assert torch.equal(guided[:, [1, 3, 4, 5, 6, 7]], cond[:, [1, 3, 4, 5, 6, 7]])
    assert not torch.allclose(guided[:, [0, 2]], cond[:, [0, 2]])


@pytest.mark.parametrize("name", GUIDERS)
def test_batch_of_two_is_two_of_one(name):
    cond, uncond = predictions(batch=2)
    together = combined(ChannelGuidance(GUIDERS[name](), 3, 4), cond, uncond, MIDDLE)
    for row in range(2):
        one = slice(row, row + 1)
        alone = combined(ChannelGuidance(GUIDERS[name](), 3, 4), cond[one], uncond[one], MIDDLE)
        torch.testing.assert_close(together[one], alone)


def test_inputs_are_left_unchanged():
    cond, uncond = predictions()
    before = cond.clone(), uncond.clone()
    combined(ChannelGuidance(default_guider(3.0), 2, 4), cond, uncond, MIDDLE)
    assert torch.equal(cond, before[0]) and torch.equal(uncond, before[1])


# --- when guidance is off ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guider",
    [
        None,
        ClassifierFreeGuidance(1.0, guidance_rescale=0.5),
        ClassifierFreeGuidance(5.0, enabled=False),
        ClassifierFreeZeroStarGuidance(1.0),
        AdaptiveProjectedGuidance(1.0),
    ],
)
def test_without_guidance_the_conditional_prediction_comes_back_untouched(guider):
    cond, _ = predictions()
    guidance = ChannelGuidance(guider, "all", 4)
    for step in range(3):
        state = GuidanceStep(step, 3, 500.0)
        assert guidance.branches(state) == ("text",)
        assert torch.equal(combined(guidance, cond, None, state), cond)


def test_interval_switches_guidance_on_and_off():
    cond, uncond = predictions()
    guidance = ChannelGuidance(default_guider(5.0, guidance_rescale=0.3, start=0.2, stop=0.6), 3, 4)
    steps = [GuidanceStep(step, 10, 1000.0 - 100 * step) for step in range(10)]
    needed = ["null" in guidance.branches(state) for state in steps]
    assert needed == [2 <= step < 6 for step in range(10)]
    for state, on in zip(steps, needed, strict=True):
        guided = combined(guidance, cond, uncond if on else None, state)
        assert torch.equal(guided, cond) is not on


def test_momentum_starts_afresh_at_step_zero():
    cond, uncond = predictions()
    guidance = ChannelGuidance(AdaptiveProjectedGuidance(5.0, adaptive_projected_guidance_momentum=0.9), "all", 4)
    runs = [[combined(guidance, cond, uncond, GuidanceStep(step, 3, 500.0)) for step in range(3)] for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
    assert not torch.allclose(runs[0][0], runs[0][1])  # momentum does act within a run


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf"), "7", None])
def test_bad_scales_are_refused(scale):
    with pytest.raises(OpenSoraError, match="guidance_scale"):
        default_guider(scale)


def test_bad_scale_inside_a_guider_is_refused():
    with pytest.raises(OpenSoraError, match="guidance_scale=-2"):
        ChannelGuidance(ClassifierFreeGuidance(-2.0), "all", 4)


@pytest.mark.parametrize(
    "options", [{"start": 0.5, "stop": 0.2}, {"start": -0.1}, {"stop": 1.2}, {"guidance_rescale": 2.0}]
)
def test_bad_guider_options_are_refused(options):
    with pytest.raises(OpenSoraError):
        default_guider(3.0, **options)


@pytest.mark.parametrize(
    "guider",
    [AutoGuidance(auto_guidance_layers=[0], dropout=0.1), SkipLayerGuidance(skip_layer_guidance_layers=[0]), "cfg"],
)
def test_guiders_that_need_another_network_pass_are_refused(guider):
    with pytest.raises(OpenSoraError, match="expected"):
        ChannelGuidance(guider, "all", 4)


def test_wrong_shapes_and_a_missing_branch_are_refused():
    cond, uncond = predictions()
    guidance = ChannelGuidance(default_guider(3.0), "all", 4)
    with pytest.raises(OpenSoraError, match="second axis"):
        combined(guidance, cond[:, :5], uncond[:, :5], MIDDLE)
    with pytest.raises(OpenSoraError, match="must be equal"):
        combined(guidance, cond, uncond[:1], MIDDLE)
    with pytest.raises(OpenSoraError, match="no unconditional prediction"):
        combined(guidance, cond, None, MIDDLE)


def test_default_guider_is_quiet_and_a_users_own_guider_is_not(caplog):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, "diffusers"):  # the command line asks diffusers for less
            default_guider(3.0)
            assert not caplog.records
            ClassifierFreeGuidance(3.0)
            assert caplog.records
    finally:
        logger.removeHandler(caplog.handler)
