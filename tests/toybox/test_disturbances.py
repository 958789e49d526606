"""Disturbances do what their strengths say, and nothing where these are 0."""

import pytest
import torch

from opensora.toybox.disturbances import PICTURE_DISTURBANCES, TIME_DISTURBANCES, disturb, draw_times
from opensora.toybox.textures import draw_scenes

NUM_FRAMES = 12


@pytest.fixture(scope="module")
def times() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return draw_times(400, NUM_FRAMES, torch.Generator().manual_seed(0))


def alone(strengths: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Clips with this disturbance and no other."""
    others = torch.stack([values for key, values in strengths.items() if key != name])
    return (strengths[name] != 0) & (others == 0).all(dim=0)


def test_times_are_within_what_a_source_has_to_draw(times) -> None:
    when, strengths = times
    assert tuple(strengths) == TIME_DISTURBANCES
    assert when.shape == (400, NUM_FRAMES)
    assert when.min() >= 0
    assert when.max() <= 2 * NUM_FRAMES
    assert all(values.abs().max() <= 1 for values in strengths.values())
    assert all(0.1 < (values != 0).float().mean() < 0.25 for values in strengths.values())


def test_undisturbed_times_are_frame_after_frame(times) -> None:
    when, strengths = times
    clean = torch.stack([values == 0 for values in strengths.values()]).all(dim=0)
    assert clean.sum() > 100
    assert torch.equal(when[clean], torch.arange(float(NUM_FRAMES)).expand(int(clean.sum()), -1))


def test_each_disturbance_of_times_is_what_it_is_called(times) -> None:
    when, strengths = times
    shuffled = when[alone(strengths, "shuffled")]
    assert torch.equal(shuffled.sort(dim=1).values, torch.arange(float(NUM_FRAMES)).expand_as(shuffled))
    assert (shuffled.diff(dim=1) < 0).any(dim=1).float().mean() > 0.7
    one = alone(strengths, "repeated")
    distinct = torch.tensor([len(row.unique()) for row in when[one]])
    torch.testing.assert_close(distinct / NUM_FRAMES, 1 - strengths["repeated"][one])
    frozen = alone(strengths, "frozen")
    assert ((when[frozen].diff(dim=1) == 0).sum(dim=1) - NUM_FRAMES * strengths["frozen"][frozen]).abs().max() <= 1
    one = alone(strengths, "speed_change")
    faster = when[one].diff(dim=1)[:, -1] / when[one].diff(dim=1)[:, 0]
    torch.testing.assert_close(faster, 3 ** strengths["speed_change"][one])


def test_pictures_and_flow_are_disturbed_as_told() -> None:
    generator = torch.Generator().manual_seed(0)
    times = torch.zeros(10, 5)  # still, so that whatever changes was disturbed
    source, flow = draw_scenes(10, generator).render(times)
    source, flow = source.repeat(20, 1, 1, 1, 1), flow.repeat(20, 1, 1, 1, 1)
    video, told, strengths = disturb(source, flow, generator)
    assert tuple(sorted(strengths)) == tuple(sorted(PICTURE_DISTURBANCES))
    assert video.shape == source.shape
    clean = torch.stack([values == 0 for values in strengths.values()]).all(dim=0)
    torch.testing.assert_close(video[clean], source[clean], atol=1e-5, rtol=0)
    change = (video[:, :, 1:] - video[:, :, :-1]).square().mean(dim=(1, 2, 3, 4)).sqrt()
    for name in ("flicker", "noise"):
        one = alone(strengths, name)
        assert one.sum() > 5
        assert torch.corrcoef(torch.stack([change[one], strengths[name][one]]))[0, 1] > 0.5, name
    cut = alone(strengths, "cut")
    assert (told[cut].isnan().all(dim=(1, 3, 4)).sum(dim=1) == 1).all()
    assert not told[strengths["cut"] == 0].isnan().any()
    assert told[clean].abs().max() < 1e-4
    assert told[alone(strengths, "jitter")].abs().amax(dim=(1, 2, 3, 4)).min() > 0.1


def test_jitter_moves_the_picture_by_the_flow_that_is_told() -> None:
    generator = torch.Generator().manual_seed(3)
    ramp = torch.linspace(-0.8, 0.8, 64).expand(64, -1)  # brighter to the right, so its mean tells a shift in x
    source = ramp.expand(200, 3, 2, -1, -1)
    video, flow, strengths = disturb(source, torch.zeros(200, 2, 1, 8, 8), generator)
    one = alone(strengths, "jitter")
    brighter = (video[:, :, 1] - video[:, :, 0])[..., 16:48, 16:48].mean(dim=(1, 2, 3))
    moved = flow[:, 0].mean(dim=(1, 2, 3))
    torch.testing.assert_close(brighter[one], -moved[one] * 1.6 / 63, atol=1e-3, rtol=0.01)
