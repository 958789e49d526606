"""What networks are told of a clip."""

import pytest
import torch

from opensora.errors import OpenSoraError
from opensora.models.clip_conditions import IMAGE_FPS, ClipConditions


def test_an_image_has_its_own_rate():
    assert ClipConditions.of_clip(64, 128, 1, 24).fps == IMAGE_FPS
    assert ClipConditions.of_clip(64, 128, 17, 24).fps == 24
    assert ClipConditions.of_clip(64, 128, 1, 24, image_fps=None).fps == 24


@pytest.mark.parametrize("values", [(0, 64, 1, 24), (64, -1, 1, 24), (64, 64, 0, 24), (64, 64, 1, float("nan"))])
def test_impossible_clip(values):
    with pytest.raises(OpenSoraError, match="expected a positive number"):
        ClipConditions.of_clip(*values)


def test_repeated_clips_stand_one_batch_after_the_other():
    clip = ClipConditions(fps=8.0, height=torch.tensor([1.0, 2.0]), width=torch.tensor([3.0]), num_frames=5)
    twice = clip.repeat(2)
    assert twice.height.tolist() == [1.0, 2.0, 1.0, 2.0]
    assert (twice.fps, twice.num_frames, twice.width.tolist(), twice.aspect_ratio) == (8.0, 5, [3.0], None)
