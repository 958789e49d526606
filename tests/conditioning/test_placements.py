"""Conditioning frames in their place, starts aligned to chunks, and the numbers that tell a network its size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora.conditioning import references as frames
from opensora.errors import OpenSoraError
from opensora.models.text.prompts import FramePlacement, parse_mask_strategy

CLIP = torch.zeros(4, 6, 2, 3)
REFERENCE = torch.arange(1, 4, dtype=torch.float32).view(1, 3, 1, 1).expand(4, 3, 2, 3)


def test_the_clip_given_in_stays_as_it_was():
    latents = CLIP.clone()
    placed, strength = frames.place_references(latents, [REFERENCE], [FramePlacement(length=2)])
    assert torch.equal(latents, CLIP)
    assert placed[0, :, 0, 0].tolist() == [1, 2, 0, 0, 0, 0]
    assert strength.tolist() == [0, 0, 1, 1, 1, 1]


def test_later_placements_overwrite_earlier_ones():
    placements = parse_mask_strategy("0,0,0,0,3,0.5;0,-1,-1,1")
    placed, strength = frames.place_references(CLIP, [REFERENCE], placements)
    assert placed[0, :, 0, 0].tolist() == [1, 3, 3, 0, 0, 0]
    assert strength.tolist() == [0.5, 0, 0.5, 1, 1, 1]


def test_references_take_the_precision_of_the_clip():
    placed, strength = frames.place_references(CLIP, [REFERENCE.to(torch.bfloat16)], [FramePlacement()])
    assert placed.dtype == CLIP.dtype and strength.dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,1", "names reference 1, but there are 1"),
        ("0,-2", "names reference -2"),
        ("0,0,3", "reference_start is 3, outside of 3 latent frames"),
        ("0,0,-4", "reference_start is -4"),
        ("0,0,0,6", "target_start is 6"),
        ("0,0,0,-7", "target_start is -7"),
    ],
)
def test_placements_outside(text, message):
    with pytest.raises(OpenSoraError, match=message):
        frames.place_references(CLIP, [REFERENCE], parse_mask_strategy(text))


@pytest.mark.parametrize(
    ("latents", "references", "message"),
    [
        (CLIP, [], "there is none"),
        (CLIP[None], [REFERENCE], r"expected one clip \(C, T, H, W\)"),
        (CLIP, [REFERENCE[..., :2]], r"expected \(4, frames, 2, 3\)"),
        (CLIP, [REFERENCE[0]], r"expected \(4, frames, 2, 3\)"),
    ],
)
def test_latents_that_do_not_fit(latents, references, message):
    with pytest.raises(OpenSoraError, match=message):
        frames.place_references(latents, references, [FramePlacement()])


def test_placements_of_other_loops_are_not_looked_at():
    placed, strength = frames.place_references(CLIP, [], [FramePlacement(loop=1)], loop=0)
    assert torch.equal(placed, CLIP) and strength.eq(1).all()


@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 60))
def test_aligned_starts_are_near_multiples(start, alignment, num_frames):
    aligned = frames.align_start(start, alignment, num_frames)
    assert aligned % alignment == 0
    assert aligned <= start or aligned < num_frames
    assert abs(aligned - start) < alignment


def test_impossible_alignment():
    with pytest.raises(OpenSoraError, match="alignment is 0"):
        frames.align_start(3, 0, 10)


def test_previous_loop_is_read_from_its_end():
    placement = frames.placement_of_previous_loop(1, reference=0, num_frames=2)
    placed, strength = frames.place_references(CLIP, [REFERENCE], [placement], loop=1)
    assert placed[0, :, 0, 0].tolist() == [2, 3, 0, 0, 0, 0]
    assert strength.tolist() == [0, 0, 1, 1, 1, 1]


def test_pixel_frames_of_other_chunks():
    assert frames.pixel_frames(7, chunk_latents=1, chunk_frames=1) == 7
    with pytest.raises(OpenSoraError, match="multiple of 5"):
        frames.pixel_frames(-5)
