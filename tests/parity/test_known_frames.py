"""Known frames of training clips against the draws of Open-Sora 1.3."""

import random

from opensora.conditioning.known_frames import draw_kinds, draw_known_ends, known_mask
from opensora.recipes import v1_3

# As the published configurations list them; the fixture's JSON is sorted.
ORDER = {
    "stage1_hq": ("none", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail", "other"),
    "adapt_i2v": (
        *("i2v_head", "i2v_tail", "i2v_loop", "v2v_head"),
        *("v2v_head_noisy", "v2v_tail", "other", "none"),
    ),
}


def named(kind: str) -> str:
    """Our name of the same kind."""
    return {"i2v": "i2v_head"}.get(kind, kind)


def known_of(kind: str, num_frames: int, rng: random.Random) -> list[int]:
    ends = draw_known_ends({named(kind): 1.0}, 1, num_frames, rng, lambda frames: frames)
    return known_mask(ends, num_frames)[0].nonzero().flatten().tolist()


class FramesAlone(random.Random):
    """Draws numbers of frames; the reference draws kinds from another generator."""

    def choices(self, population, weights=None, **options):
        return list(population)


def test_places(golden_json):
    for key, expected in golden_json("mask_index_v1_3")["get_mask_index"].items():
        kind, num_frames = key.split("|")
        assert known_of(kind, int(num_frames), random.Random(0)) == expected, key


def test_random_places(golden_json):
    for key, expected in golden_json("mask_index_v1_3")["get_mask_index_random"].items():
        kind, num_frames, seed = key.split("|")
        assert known_of(kind, int(num_frames), FramesAlone(int(seed))) == expected, key


def test_kinds(golden_json):
    fixture = golden_json("mask_index_v1_3")
    for key, expected in fixture["get_mask_cond"].items():
        name, rank = key.split("|rank")
        weights = {kind: fixture["weights"][name][kind] for kind in ORDER[name]}
        assert draw_kinds(weights, len(expected), random.Random(int(rank))) == expected, key


def test_recipes_draw_as_the_published_configurations_do(golden_json):
    weights = golden_json("mask_index_v1_3")["weights"]
    for name, ours in (("stage1_hq", v1_3.KNOWN_FRAMES), ("adapt_i2v", v1_3.KNOWN_FRAMES_I2V)):
        assert ours == weights[name] and tuple(ours) == ORDER[name]


def test_a_beginning_alone_is_noisy():
    drawn = draw_known_ends({"other_noisy": 1.0}, 40, 9, random.Random(0), lambda frames: frames)
    assert {ends.noisy for ends in drawn if ends.head} == {True}
    assert {ends.noisy for ends in drawn if ends.tail} == {False}
