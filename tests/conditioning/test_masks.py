"""Which frames a strategy gives, also those that the reference does not know."""

import random

import pytest
import torch
from torch import Tensor

from opensora.conditioning.masks import check_ratios, draw_frame_masks
from opensora.errors import OpenSoraError


def masks(ratios: dict[str, float], num_frames: int = 6, batch: int = 200) -> Tensor:
    return draw_frame_masks(ratios, batch, num_frames, random.Random(0), torch.Generator().manual_seed(0))


def test_head_and_tail_give_any_number_of_frames_but_all():
    for strategy, given_first in (("head", True), ("tail", False)):
        drawn = masks({strategy: 1.0})
        assert set((~drawn).sum(dim=1).tolist()) == {1, 2, 3, 4, 5}
        towards_end = drawn if given_first else drawn.flip(1)
        assert torch.equal(towards_end, towards_end.int().cummax(dim=1).values.bool())  # given ones first, then none


def test_short_clips_have_quarters_too():
    """Open-Sora cannot draw a quarter of two or three frames."""
    assert (~masks({"quarter_head_tail": 1.0}, num_frames=3)).sum(dim=1).unique().tolist() == [2]


def test_what_the_ratios_leave_over_is_generated():
    given = ~masks({"image_head": 0.25}, batch=2000).all(dim=1)
    assert 0.2 < given.float().mean() < 0.3


def test_images_are_generated():
    assert masks({"image_head": 1.0}, num_frames=1).all()


@pytest.mark.parametrize(
    ("ratios", "said"),
    [({"imagehead": 0.1}, "imagehead"), ({"head": -0.1}, r"-0\.1"), ({"head": 0.7, "tail": 0.4}, r"1\.1")],
)
def test_impossible_ratios(ratios, said):
    with pytest.raises(OpenSoraError, match=said):
        check_ratios(ratios)
