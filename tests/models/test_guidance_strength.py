"""Equal strength of guidance on some channels and on others."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora.errors import OpenSoraError
from opensora.models.channel_scales import ChannelScaleGuidance
from opensora.models.guidance import ChannelGuidance, GuidanceStep, default_guider
from opensora.models.guidance_strength import equivalent_scale


def test_the_figures_that_were_reported():
    """DiT on ImageNet: 1.5 on three of four channels is like 1.375 on all."""
    assert equivalent_scale(1.5, guided=3, channels=4) == 1.375
    assert equivalent_scale(7, guided=3, channels=4, to="all") == 5.5
    assert equivalent_scale(5.5, guided=4, channels=4, to=3) == 7


@given(st.floats(1, 100), st.integers(1, 16), st.integers(1, 16))
def test_there_and_back(scale, guided, to):
    there = equivalent_scale(scale, guided=guided, channels=16, to=to)
    assert equivalent_scale(there, guided=to, channels=16, to=guided) == pytest.approx(scale)
    assert equivalent_scale(1, guided=guided, channels=16, to=to) == 1


@pytest.mark.parametrize("guided", [1, 2, 3])
def test_it_keeps_the_mean_pull_where_channels_differ_as_much(guided):
    cond, uncond = torch.randn(2, 1, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    cond = uncond + (cond - uncond).mean(dim=1, keepdim=True)  # the same pull in each channel
    said, step = {"text": cond, "null": uncond}, GuidanceStep(0, 1, 500.0)

    def pull(*scales: float) -> torch.Tensor:
        rule = ChannelScaleGuidance(scales, lambda s, channels: ChannelGuidance(default_guider(s), channels, 4))
        return (rule.combine(said, step) - cond).mean(dim=1)

    some = pull(*[7.0] * guided, *[1.0] * (4 - guided))
    torch.testing.assert_close(pull(*[equivalent_scale(7.0, guided=guided, channels=4)] * 4), some)


@pytest.mark.parametrize(
    ("scale", "options", "says"),
    [
        (-1, {"guided": 3, "channels": 4}, "scale=-1; expected a finite number >= 0"),
        (float("nan"), {"guided": 3, "channels": 4}, "scale=nan"),
        (float("inf"), {"guided": 3, "channels": 4}, "scale=inf"),
        (7, {"guided": 0, "channels": 4}, "guided is 0, expected a whole number from 1 to 4"),
        (7, {"guided": 5, "channels": 4}, "guided is 5"),
        (7, {"guided": 3, "channels": 4, "to": 5}, "to is 5"),
        (7, {"guided": 3, "channels": 0}, "channels is 0"),
        (0, {"guided": 4, "channels": 4, "to": 1}, "has no equal on 1: that would be -3, below 0"),
    ],
)
def test_what_has_no_equal_is_refused(scale, options, says):
    with pytest.raises(OpenSoraError, match=says) as error:
        equivalent_scale(scale, **options)
    assert "\n" not in str(error.value)
