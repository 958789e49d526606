"""A guidance scale for each latent channel: how it is written, what each channel becomes, and what is not computed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    TangentialClassifierFreeGuidance,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.models.channel_scales import ChannelScaleGuidance, resolve_channel_scales
from opensora.models.guidance import ChannelGuidance, GuidanceStep, GuiderRule, default_guider
from opensora.models.guidance_rules import TextImageGuidance
from opensora.sampling.guiding import at_scale

MIDDLE = GuidanceStep(3, 10, 500.0)
C = 4

GUIDERS: dict[str, Any] = {
    "cfg": ClassifierFreeGuidance(5.0),
    "cfg rescale": ClassifierFreeGuidance(5.0, guidance_rescale=0.7),
    "cfg original": ClassifierFreeGuidance(4.0, use_original_formulation=True),
    "cfg in an interval": ClassifierFreeGuidance(5.0, start=0.2, stop=0.6),
    "apg": AdaptiveProjectedGuidance(5.0, eta=0.3),
    "apg momentum": AdaptiveProjectedGuidance(5.0, adaptive_projected_guidance_momentum=-0.5),
    "zero star": ClassifierFreeZeroStarGuidance(5.0),
    "tangential": TangentialClassifierFreeGuidance(5.0),
    "text and image": TextImageGuidance(5.0, 3.0, oscillating=("text",), steady_steps=2, guidance_rescale=0.7),
}


def branches_of(channels: int = C, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("text", "null", "unconditional")
    return {name: torch.randn(2, channels, 3, 2, 2, generator=generator) for name in names}


def scaled(scales: Sequence[float], guider: Any = None) -> ChannelScaleGuidance:
    """The guider at these scales; plain guidance for none."""

    def rule_at(scale: float, channels: Sequence[int]) -> ChannelGuidance:
        at = default_guider(scale) if guider is None else at_scale(guider, scale)
        return ChannelGuidance(at, channels, len(scales))

    return ChannelScaleGuidance(scales, rule_at)


def combined(rule: Any, said: Mapping[str, Tensor], step: GuidanceStep = MIDDLE) -> Tensor:
    """From nothing but the branches that it asks for."""
    return rule.combine({name: said[name] for name in rule.branches(step)}, step)


# --- how they are written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    [
        [7, 7, 7, 1],
        (7.0, 7, 7.0, 1),
        "[7, 7, 7, 1]",
        " [7,7,7.0,1e0] ",
        "0-2:7,3:1",
        " 3 : 1 , 0 - 2 : 7 ",
        "0:7,1-1:7.0,2:7,3:1",
    ],
)
def test_a_list_json_and_ranges_say_the_same(written):
    assert resolve_channel_scales(written, 4) == (7.0, 7.0, 7.0, 1.0)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ([7, 7, 1], "has 3 scales, expected 4"),
        ("[7, 7, 7, 7, 1]", "has 5 scales, expected 4"),
        ([7.0] * 100_000, "has 100,000 scales, expected at most"),
        ([7, 7, -1, 1], "holds the number -1 for channel 2, expected a finite number >= 0"),
        ([7, 7, float("nan"), 1], "the number nan for channel 2"),
        ([7, 7, float("inf"), 1], "the number inf for channel 2"),
        ([7, 7, 10**400, 1], "of about 401 digits for channel 2"),
        ([7, 7, True, 1], "holds true for channel 2"),
        ([7, 7, "7", 1], "holds the text '7' for channel 2"),
        ([7, [7], 7, 1], "holds a list of 1 for channel 1"),
        ([], "a list of 0, expected a scale for each latent channel"),
        (7.0, "the number 7.0, expected a scale for each latent channel"),
        ({0: 7.0, 1: 7.0, 2: 7.0, 3: 1.0}, "an object of 4, expected"),
        ("", "is '', expected a scale for each latent channel: a list such as"),
        ("7", "ranges such as 0-2:7,3:1"),
        ("7,7,7,1", "a list such as [7, 7, 7, 1]"),
        ("[7, 7, 7", "not valid JSON"),
        ("[7, 7, 7, NaN]", "not valid JSON"),
        ("0-2:7,3:seven", "'0-2:7,3:seven', expected"),
        ("0-2:7,3:1_0", "expected a scale"),
        ("0-2:7,3:-1", "holds the number -1 for channel 3, expected a finite number"),
        ("0-2:nan,3:1", "the number nan for channels 0 to 2"),
        ("0-2:1e999,3:1", "the number inf for channels 0 to 2"),
        ("0-2:7,2:1,3:1", "names channel 2 twice"),
        ("0:7,0:7,1-3:1", "names channel 0 twice"),
        ("2-0:7,3:1", "the range 2-0, which runs backwards; write 0-2"),
        ("0-2:7", "leaves out channel 3; add 3:1 for no guidance there"),
        ("3:7", "leaves out channels 0 to 2; add 0-2:1 for no guidance there"),
        ("0-4:7", "names channel 4, expected channels from 0 to 3"),
        ("0-999999:7", "names channel 999999, expected channels from 0 to 3"),
        ("0-1000000000:7", "is 1000000000, expected a whole number from 0 to"),
        ("0-" + "9" * 5000 + ":7", "expected a whole number from 0 to"),
        ("-1:7", "expected a scale"),
        ("0-2:7," * 5000, "expected at most 10,000 characters"),
    ],
)
def test_what_is_no_scale_for_each_channel_is_refused_in_a_line(written, says):
    with pytest.raises(OpenSoraError) as error:
        resolve_channel_scales(written, 4)
    text = str(error.value)
    assert says in text and "`channel_scales`" in text and "\n" not in text and len(text) < 300


# --- what channels become ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [1, 3, 4])
@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("name", GUIDERS)
def test_a_scale_on_the_first_channels_is_cfg_channels_bit_for_bit(name, variance, guided):
    said = branches_of(2 * C if variance else C)
    ours, first = scaled([7.0] * guided + [1.0] * (C - guided), GUIDERS[name]), at_scale(GUIDERS[name], 7.0)
    theirs = ChannelGuidance(first, guided, C)
    for index in range(10):  # momentum, intervals and oscillation among them
        step = GuidanceStep(index, 10, 500.0)
        assert set(ours.branches(step)) == set(theirs.branches(step))
        assert torch.equal(combined(ours, said, step), combined(theirs, said, step))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 20), min_size=C, max_size=C), st.booleans(), st.integers(0, 100))
def test_each_channel_is_linear_in_its_own_scale(scales, variance, seed):
    said = branches_of(2 * C if variance else C, seed)
    cond, pull = said["text"], said["text"] - said["null"]
    guided = combined(scaled(scales), said)
    for channel, scale in enumerate(scales):
        if scale == 1:
            assert torch.equal(guided[:, channel], cond[:, channel])
        # A few roundings of float32, of numbers of the size of scale * pull.
        expected = cond[:, channel] + (scale - 1) * pull[:, channel]
        torch.testing.assert_close(guided[:, channel], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(guided[:, C:], cond[:, C:])


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(C)), st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0]), min_size=C, max_size=C), st.data())
def test_channels_in_another_order_are_guided_alike(order, scales, data):
    guider, said = GUIDERS[data.draw(st.sampled_from(sorted(set(GUIDERS) - {"cfg original"})))], branches_of()
    guided = combined(scaled(scales, guider), said)
    shuffled = combined(scaled([scales[c] for c in order], guider), {name: said[name][:, order] for name in said})
    # Sums over channels in another order.
    torch.testing.assert_close(shuffled, guided[:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GUIDERS)
def test_without_guidance_of_any_channel_the_conditional_prediction_is_all_that_is_computed(name):
    rule, said = scaled([1.0] * C, GUIDERS[name]), branches_of(2 * C)
    assert rule.branches(MIDDLE) == ("text",)
    assert combined(rule, said) is said["text"]


def test_a_rule_is_handed_the_channels_of_its_scale_and_nothing_else():
    handed: dict[float, tuple[Tensor, ...]] = {}

    class Halfway:
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def branches(self, step: GuidanceStep) -> tuple[str, ...]:
            return ("text", "null") if self.scale < 5 else ("text", "unconditional")

        def combine(self, predictions: Mapping[str, Tensor], step: GuidanceStep) -> Tensor:
            assert tuple(predictions) == self.branches(step)
            handed[self.scale] = tuple(predictions.values())
            return self.scale * predictions["text"]

        def describe(self) -> dict[str, Any]:
            return {}

    scales, said = (2.0, 7.0, 3.0, 2.0), branches_of(2 * C)
    rule = ChannelScaleGuidance(scales, lambda scale, channels: ChannelGuidance(Halfway(scale), channels, C))
    assert rule.branches(MIDDLE) == ("text", "null", "unconditional")
    guided = combined(rule, said)
    for scale, channels in {2.0: [0, 3], 3.0: [2], 7.0: [1]}.items():
        other = "null" if scale < 5 else "unconditional"
        assert all(map(torch.equal, handed[scale], (said["text"][:, channels], said[other][:, channels])))
        assert torch.equal(guided[:, channels], scale * said["text"][:, channels])
    assert torch.equal(guided[:, C:], said["text"][:, C:])


def test_the_image_scale_is_that_of_every_channel():
    rule, scales = TextImageGuidance(9.0, 3.0, image_ramp="to_last_step"), (7.0, 7.0, 2.0, 1.0)
    said, step = branches_of(), GuidanceStep(3, 20, 500.0, conditioned=True)
    guided = combined(scaled(scales, rule), said, step)
    c, u, n = said["text"], said["null"], said["unconditional"]
    image = rule.image_scale(step, c)
    for channel, scale in enumerate(scales):
        expected = (n + image * (u - n) + scale * (c - u))[:, channel]
        torch.testing.assert_close(guided[:, channel], expected, rtol=1e-5, atol=1e-5)


def test_steps_in_which_a_rule_is_at_scale_1_stay_so():
    rule = scaled((7.0, 5.0, 1.0, 1.0), TextImageGuidance(9.0, oscillating=("text",), steady_steps=4))
    asked = [rule.branches(GuidanceStep(index, 10, 500.0)) for index in range(10)]
    assert asked == [("text", "null") if index < 4 or index % 2 == 0 else ("text",) for index in range(10)]


def test_momentum_is_kept_for_each_scale_by_itself():
    guider, said, other = GUIDERS["apg momentum"], branches_of(), branches_of(seed=1)
    both, alone = scaled((7.0, 7.0, 3.0, 3.0), guider), scaled((7.0, 7.0, 1.0, 1.0), guider)
    for index, predictions in enumerate((said, other, said)):
        step = GuidanceStep(index, 3, 500.0)
        assert torch.equal(combined(both, predictions, step)[:, :2], combined(alone, predictions, step)[:, :2])


def test_inputs_are_left_unchanged():
    said = branches_of()
    before = {name: prediction.clone() for name, prediction in said.items()}
    combined(scaled((1.0, 7.0, 3.0, 3.0)), said)
    assert all(torch.equal(said[name], before[name]) for name in said)


def test_settings_tell_every_scale_and_no_other():
    described = scaled((7.0, 7.0, 3.0, 1.0), AdaptiveProjectedGuidance(5.0, eta=0.3)).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["channel_scales"] == [7.0, 7.0, 3.0, 1.0]
    assert described["guidance_scale"] is None and described["cfg_channels"] is None
    assert described["guider"]["eta"] == 0.3 and "guidance_scale" not in described["guider"]


# --- guiders at other scales ------------------------------------------------------------------------------------------


def test_a_guider_of_ones_own_is_left_as_it_was():
    guider, rule = ClassifierFreeGuidance(5.0), TextImageGuidance(5.0)
    assert at_scale(guider, 7.0).guidance_scale == at_scale(rule, 7.0).guidance_scale == 7.0
    assert guider.guidance_scale == rule.guidance_scale == 5.0


def test_a_guider_that_counts_from_0_is_as_strong():
    said = branches_of()
    counted = GuiderRule(at_scale(GUIDERS["cfg original"], 7.0))
    torch.testing.assert_close(combined(counted, said), combined(GuiderRule(ClassifierFreeGuidance(7.0)), said))
    with pytest.raises(OpenSoraError, match="no scale below 1"):
        at_scale(GUIDERS["cfg original"], 0.5)


@pytest.mark.parametrize(
    ("guider", "says"),
    [
        (AdaptiveProjectedMixGuidance(), "guidance_scale, adaptive_projected_guidance_scale"),
        ("cfg", "got str as guider"),
        (ChannelGuidance(None, 3, 4), "give it a method at_scale"),
    ],
)
def test_guiders_without_the_one_scale_are_refused(guider, says):
    with pytest.raises(OpenSoraError, match=says) as error:
        at_scale(guider, 7.0)
    assert "\n" not in str(error.value)
