"""Known frames of training clips: where they lie, how often, and what is dropped."""

import random

import pytest
import torch

from opensora.conditioning.known_frames import check_drops, check_weights, draw_drops, draw_known_ends, known_mask
from opensora.errors import OpenSoraError


def draw_known_frames(weights: dict[str, float], size: int, num_frames: int, rng: random.Random) -> torch.Tensor:
    """Of an autoencoder that puts four frames into one latent frame."""
    return known_mask(draw_known_ends(weights, size, num_frames, rng, lambda frames: frames // 4), num_frames)


def test_every_clip_has_frames_of_its_own():
    known = draw_known_frames({"i2v_head": 1.0, "i2v_tail": 1.0}, 40, 5, random.Random(0))
    head, tail = torch.tensor([True, False, False, False, False]), torch.tensor([False, False, False, False, True])
    kinds = [(row.equal(head), row.equal(tail)) for row in known]
    assert set(kinds) == {(True, False), (False, True)} and 10 < sum(first for first, _ in kinds) < 30


@pytest.mark.parametrize("kind", ["none", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail", "other"])
@pytest.mark.parametrize("num_frames", [2, 3, 5, 35])
def test_something_is_left_to_make(kind, num_frames):
    known = draw_known_frames({kind: 1.0}, 20, num_frames, random.Random(1))
    assert known.any() == (kind != "none")
    assert not known.all(dim=1).any() or (kind, num_frames) == ("i2v_loop", 2)


def test_single_frames_and_no_weights_are_made_from_text_alone():
    assert not draw_known_frames({"i2v_head": 1.0}, 3, 1, random.Random(0)).any()
    assert not draw_known_frames({}, 3, 5, random.Random(0)).any()


def test_so_many_frames_of_video_are_known_of_longer_clips_alone():
    for kind, count in (("v2v_head_32", 8), ("v2v_tail_32", 8), ("v2v_head_64", 16), ("v2v_tail_64", 16)):
        known = draw_known_frames({kind: 1.0}, 1, count + 2, random.Random(0))[0]
        assert known.sum() == count and known[0 if "head" in kind else -1]
        assert not draw_known_frames({kind: 1.0}, 1, count, random.Random(0)).any()


def test_what_is_dropped():
    known = torch.zeros(4000, 3, dtype=torch.bool)
    known[:2000, 0] = True
    shares = {"both": 0.1, "text": 0.2, "frames": 0.3}
    text, frames = draw_drops(shares, known, torch.Generator().manual_seed(0))
    assert not text[2000:].any() and not frames[2000:].any()
    found = {"both": text & frames, "text": text & ~frames, "frames": frames & ~text}
    for name, share in shares.items():
        assert found[name].sum().item() / 2000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("check", "given", "message"),
    [
        (check_weights, {"i2v": 1.0}, "unknown kind of known frames 'i2v'; known are none, i2v_head"),
        (check_weights, {"other": -1.0}, "expected 0 or more"),
        (check_weights, {"other": 0.0}, "give one of them more"),
        (check_drops, {"image": 0.1}, "known are text, frames, both"),
        (check_drops, {"text": -0.1}, "expected 0 or more"),
        (check_drops, {"text": 0.6, "both": 0.6}, "sum to 1.2"),
    ],
)
def test_mistakes(check, given, message):
    with pytest.raises(OpenSoraError, match=message):
        check(given)
