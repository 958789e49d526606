"""Verdicts on latents whose figures are known: what is said, and how sure one must be to say it."""

import pytest
import torch

from opensora.lab.latents.known import KnownSpace, nearest_known
from opensora.lab.latents.statistics import ChannelFigures, ChannelStatistics
from opensora.lab.latents.verdict import MOST_OFF, Place, Verdict, figures_under, judge, normalising, right_factor
from opensora.models.autoencoders.latent_space import LatentSpace


def figures(
    deviations: list[float], means: list[float] | None = None, *, num_clips: int = 40, differ: float = 0.0
) -> ChannelFigures:
    """Of Gaussian latents; the means of clips differ by so much."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(num_clips, len(deviations), 1, 8, 8, generator=generator)
    offsets = torch.tensor(means or [0.0] * len(deviations)) + differ * torch.randn(
        num_clips, len(deviations), generator=generator
    )
    statistics = ChannelStatistics(len(deviations))
    statistics.add(noise * torch.tensor(deviations)[:, None, None, None] + offsets[:, :, None, None, None])
    return statistics.figures()


def verdict(own: ChannelFigures, space: LatentSpace, place: Place = "one part") -> Verdict:
    return judge(place, figures_under(own, space, has_factor=place != "after parts"), own, space, [])


def test_right_latents_are_good_whatever_their_own_size():
    own = figures([4.0, 4.2, 3.8], [0.1, -0.1, 0.0])
    assert verdict(own, LatentSpace(0.25)).kind == "good"
    assert verdict(own, LatentSpace(4.0, "divide")).kind == "good"


@pytest.mark.parametrize("convention", ["multiply", "divide"])
@pytest.mark.parametrize("off", [0.25, 1 / 1.4, 1.4, 4.0])
def test_the_right_factor_is_named_in_its_own_convention(convention, off):
    own = figures([4.0, 4.2, 3.8])
    declared = 0.25 * off if convention == "multiply" else 1 / (0.25 * off)
    found = verdict(own, LatentSpace(declared, convention))
    assert found.kind == "wrong factor" and found.right.convention == convention
    assert found.right.factor == pytest.approx(0.25, rel=0.01)
    assert figures_under(own, found.right).deviation == pytest.approx(1)


def test_beside_shift_and_scale_the_factor_that_goes_with_them_is_named():
    own = figures([4.0, 1.0], [3.0, -1.0])
    right = normalising(own, LatentSpace(0.25))
    assert verdict(own, right).kind == "good" and right_factor(own, right) == pytest.approx(0.25)
    wrong = LatentSpace(0.4, shift=right.shift, scale=right.scale)
    found = verdict(own, wrong)
    assert found.kind == "wrong factor" and found.right.factor == pytest.approx(0.25, rel=1e-6)
    assert found.right.shift == right.shift and found.right.scale == right.scale


def test_statistics_of_quite_other_latents_are_to_be_measured_anew():
    own = figures([1.0, 1.0], [10.0, 10.0])
    found = verdict(own, LatentSpace(shift=(-10.0, -10.0), scale=(1.0, 1.0)))
    assert found.kind == "normalise" and right_factor(own, LatentSpace(shift=(-10.0, -10.0), scale=(1.0, 1.0))) < 0


@pytest.mark.parametrize(
    ("deviations", "means", "words"),
    [([0.6, 1.2, 1.1], None, "deviations from 0.6"), ([1.0, 0.95, 0.9], [0.5, -0.5, 0.1], "means up to 0.5")],
)
def test_uneven_channels_are_to_be_normalised(deviations, means, words):
    found = verdict(figures(deviations, means), LatentSpace())
    assert found.kind == "normalise" and words in found.text


def test_uneven_channels_are_no_matter_between_two_parts_nor_a_factor_after_them():
    assert verdict(figures([0.6, 1.2, 1.1]), LatentSpace(), "between parts").kind == "good"
    assert verdict(figures([3.0, 3.0]), LatentSpace(), "after parts").kind == "normalise"


def test_what_clips_happen_to_show_is_not_taken_for_uneven_channels():
    few = figures([0.8] * 16, num_clips=8, differ=0.5)
    assert float(few.mean.abs().max()) > 0.3
    assert verdict(few, LatentSpace()).kind == "good"
    many = figures([0.8] * 16, [0.5] + [0.0] * 15, num_clips=400, differ=0.5)
    assert verdict(many, LatentSpace()).kind == "normalise"


def test_at_the_border_few_clips_do_not_tell_and_more_do():
    few, many = (figures([1.06 * MOST_OFF], num_clips=number, differ=0.6) for number in (4, 2000))
    assert verdict(few, LatentSpace()).kind == "cannot tell"
    assert verdict(many, LatentSpace(), "between parts").kind == "wrong factor"


def test_a_known_factor_is_named_where_it_is_near():
    known = [KnownSpace(name, None, LatentSpace(factor)) for name, factor in (("SD", 0.18215), ("SDXL", 0.13025))]
    assert nearest_known(0.1290, known).name == "SDXL" and nearest_known(0.1830, known).name == "SD"
    assert nearest_known(0.155, known) is None and nearest_known(1.0, []) is None
