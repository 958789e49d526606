"""Text and image guidance with scales that change on the way, and what of it need not be computed."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.models.guidance import ChannelGuidance, GuidanceStep
from opensora.models.guidance_rules import DistilledGuidance, TextImageGuidance

FRAMES = 5


def branches_of(seed: int = 0, channels: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("text", "null", "unconditional")
    return {name: torch.randn(2, channels, FRAMES, 3, 3, generator=generator) for name in names}


def step(index: int, num_steps: int = 20, *, conditioned: bool = True) -> GuidanceStep:
    return GuidanceStep(index, num_steps, 500.0, conditioned)


def formula(said: dict[str, Tensor], text: float, image: Tensor | float) -> Tensor:
    c, u, n = (said[name].double() for name in ("text", "null", "unconditional"))
    return (n + image * (u - n) + text * (c - u)).float()


@settings(max_examples=60)
@given(
    st.sampled_from([0.5, 1.0, 3.0, 7.5]), st.sampled_from([1.0, 2.5, 3.0]), st.sampled_from([1.0, 2.0]),
    st.sampled_from([None, "to_last_step", "past_last_step"]), st.sets(st.sampled_from(["text", "image"])),
    st.integers(0, 19), st.booleans(),
)  # fmt: skip
def test_what_is_left_out_changes_nothing(text, image, start, ramp, oscillating, index, conditioned):
    rule = TextImageGuidance(
        text, image, image_ramp=ramp, image_ramp_start=start, oscillating=sorted(oscillating), steady_steps=4
    )
    now, said = step(index, conditioned=conditioned), branches_of()
    if not conditioned:  # then the denoiser finds that they read the same
        said["unconditional"] = said["null"]
    off = index >= 4 and index % 2 == 1
    text_scale = 1.0 if off and "text" in oscillating else text
    image_scale: Tensor | float = 1.0 if off and "image" in oscillating else image
    if ramp is not None and image_scale > start:
        last = torch.linspace(image, start, 20 if ramp == "to_last_step" else 21)[index]
        image_scale = torch.linspace(start, float(last), FRAMES)[:, None, None]
    needed = rule.branches(now)
    actual = rule.combine({name: said[name] for name in needed}, now)
    torch.testing.assert_close(actual, formula(said, text_scale, image_scale), rtol=1e-5, atol=1e-5)
    if needed == ("text",):
        assert actual is said["text"]


def test_only_branches_with_a_weight_are_asked_for():
    def asked(*scales: float, index: int = 0, conditioned: bool = True, **options: Any) -> tuple[str, ...]:
        return TextImageGuidance(*scales, **options).branches(step(index, conditioned=conditioned))

    assert asked(7.5, 3.0) == ("text", "null", "unconditional")
    assert asked(7.5, 1.0) == asked(7.5, 3.0, conditioned=False) == ("text", "null")
    assert asked(3.0, 3.0) == ("text", "unconditional")
    assert asked(1.0, 1.0) == asked(1.0, 3.0, conditioned=False) == ("text",)
    both = ("text", "image")
    assert asked(7.5, 3.0, index=11, oscillating=both) == asked(7.5, 3.0, index=3, steady_steps=0, oscillating=both)
    assert asked(7.5, 3.0, index=11, oscillating=both) == ("text",)
    assert asked(7.5, 3.0, index=9, oscillating=both) == asked(7.5, 3.0, index=10, oscillating=both) != ("text",)
    # The ramp of 1.3 has come down to no image guidance in the last step, that of 2.0 would in the next one.
    assert asked(7.5, 3.0, index=19, image_ramp="to_last_step") == ("text", "null")
    assert asked(7.5, 3.0, index=19, image_ramp="past_last_step") == ("text", "null", "unconditional")


def test_a_ramp_for_pictures_alone():
    ramped = TextImageGuidance(7.5, 3.0, image_ramp="to_last_step", image_ramp_for="pictures")
    said, flat = branches_of(), TextImageGuidance(7.5, 3.0)
    clips = GuidanceStep(3, 20, 500.0, conditioned=True, clips_known=(True,))
    assert ramped.combine(said, clips).equal(flat.combine(said, clips))
    assert not torch.allclose(ramped.combine(said, step(3)), flat.combine(said, step(3)))


def test_rescaled_to_the_spread_of_the_conditional_prediction():
    said = branches_of()
    rescaled, plain = (TextImageGuidance(7.5, guidance_rescale=share) for share in (1.0, 0.0))
    now = step(0, conditioned=False)
    spread = rescaled.combine(said, now).flatten(1).std(dim=1)
    torch.testing.assert_close(spread, said["text"].flatten(1).std(dim=1))
    assert (plain.combine(said, now).flatten(1).std(dim=1) > 2 * spread).all()
    assert rescaled.combine(said, step(0)).equal(plain.combine(said, step(0)))  # not in runs with known frames


@pytest.mark.parametrize("variance", [False, True])
def test_channels_restrict_every_rule(variance):
    said = branches_of(channels=8 if variance else 4)
    rule = TextImageGuidance(7.5, 3.0, image_ramp="to_last_step")
    restricted = ChannelGuidance(rule, [0, 2], latent_channels=4)
    assert restricted.branches(step(0)) == rule.branches(step(0))
    guided, everywhere = restricted.combine(said, step(0)), rule.combine(said, step(0))
    for channel in range(guided.shape[1]):
        expected = everywhere if channel in (0, 2) else said["text"]
        torch.testing.assert_close(guided[:, channel], expected[:, channel])
    assert restricted.describe() == {"cfg_channels": [0, 2], **rule.describe()}


def test_other_channels_need_the_prediction_with_the_text():
    class Null(DistilledGuidance):
        def branches(self, step: GuidanceStep) -> tuple[str, ...]:
            return ("null",)

    with pytest.raises(OpenSoraError, match="leave cfg_channels out") as error:
        ChannelGuidance(Null(1.0), 3, 4).combine({"null": branches_of()["null"]}, step(0))
    assert "\n" not in str(error.value)


def test_distilled_guidance_is_the_network_s():
    rule, said = DistilledGuidance(4.0), branches_of()["text"]
    assert rule.branches(step(0)) == ("text",)
    assert rule.combine({"text": said}, step(0)) is said
    assert rule.describe()["guidance_scale"] == 4.0


def test_settings_are_plain_values():
    rule = TextImageGuidance(7.5, 3.0, oscillating=("text",), guidance_rescale=0.7)
    described = rule.describe()
    assert json.loads(json.dumps(described)) == described
    assert (described["guidance_scale"], described["image_guidance_scale"]) == (7.5, 3.0)
    options = {name: value for name, value in described["guider"].items() if name != "class"}
    assert TextImageGuidance(7.5, 3.0, **options).describe() == described


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
        ({"image_guidance_scale": float("nan")}, "image_guidance_scale=nan"),
        ({"image_ramp_start": -2.0}, "image_ramp_start=-2.0"),
        ({"oscillating": "text"}, "oscillating='text'"),
        ({"oscillating": ["picture"]}, "picture"),
        ({"image_ramp": "up"}, "to_last_step or past_last_step"),
        ({"image_ramp_for": "films"}, "image_ramp_for='films'"),
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5"),
    ],
)
def test_options_out_of_range(options, named):
    with pytest.raises(OpenSoraError, match=named) as error:
        TextImageGuidance(**{"guidance_scale": 7.5, **options})
    assert "\n" not in str(error.value)
