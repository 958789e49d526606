"""Where frames of references go against Open-Sora 1.3, in the first loop and in those that follow."""

import pytest
import torch

from opensora.conditioning.references import place_references
from opensora.models.text.condition_types import placements_of
from opensora.models.text.prompts import FramePlacement


@pytest.fixture(scope="module")
def fixture(golden):
    return golden("references_v1_3")


def case_of(key: str) -> tuple[str, int, str, int]:
    """Condition type, number of loops, name of the references, latent frames that are taken over."""
    condition_type, loops, references, length = key.split("|")[:4]
    return condition_type, int(loops.removeprefix("loop")), references, int(length.removeprefix("cfl"))


def references_of(fixture, name: str, clip: int) -> list[torch.Tensor]:
    found = fixture.under(f"in.refs.{name}.{clip}")
    return [found[number] for number in sorted(found)]


def wanted(condition_type: str, references: list[torch.Tensor], num_loops: int, length: int) -> list[FramePlacement]:
    if condition_type == "None":
        return []
    taken = references[: 2 if condition_type == "i2v_loop" else 1]  # the scripts leave others unread
    return placements_of(condition_type, len(taken), num_loops, length)


def placed(fixture, key: str, loop: int) -> tuple[torch.Tensor, list[int]]:
    """What all clips are shown in one loop, and which frames these are; the last K frames of `samples` came before."""
    condition_type, num_loops, name, length = case_of(key)
    samples, shown, frames = fixture["in.samples"], [], []
    for clip, before in enumerate(samples):
        references = references_of(fixture, name, clip)
        placements = wanted(condition_type, references, num_loops, length)
        latents, strength = place_references(torch.zeros_like(before), references, placements, loop=loop)
        if loop:
            latents[:, :length], strength[:length] = before[:, -length:], 0.0
        shown.append(latents)
        frames = (strength == 0).nonzero().flatten().tolist()
    return torch.stack(shown), frames


def loop_of(key: str) -> int:
    """Which loop a case is of: the first, one in the middle, or the last."""
    if "last=" not in key:
        return 0
    num_loops = case_of(key)[1]
    return num_loops - 1 if key.endswith("True") else max(1, num_loops - 2)


def reachable(key: str) -> bool:
    """Whether a loop of ours is like that.

    A second loop of two is the last one. The tail image of `i2v_loop` belongs to the last loop, not to all after the
    first; and `i2v_tail` has one reference, of which the scripts take a second one in later loops.
    """
    condition_type, num_loops, references, _ = case_of(key)
    if "last=" not in key or condition_type not in ("i2v_tail", "i2v_loop"):
        return True
    if key.endswith("last=False"):
        return condition_type == "i2v_tail" and num_loops > 2
    return condition_type == "i2v_loop" or references.startswith("one")


def test_which_frames_are_known(fixture):
    compared = 0
    for key, case in fixture.meta["cases"].items():
        if isinstance(case, dict) and reachable(key):
            assert placed(fixture, key, loop_of(key))[1] == case["mask_index"], key
            compared += 1
    assert compared > 100


def test_what_they_show(fixture):
    compared = 0
    for kind in ("first", "next"):
        for key, expected in fixture.under(f"out.{kind}").items():
            if not reachable(key):
                continue
            assert torch.equal(placed(fixture, key, loop_of(key))[0], expected), key
            compared += 1
    assert compared == 55  # of 60


def test_the_tail_image_of_a_loop_is_shown_in_the_last_one_alone(fixture):
    """The reference shows it in every loop after the first, because of how it groups "and" and "or"."""
    key = "i2v_loop|loop3|two|cfl5"
    assert fixture.meta["cases"][f"{key}|next_last=False"]["mask_index"] == [0, 1, 2, 3, 4, 9]
    assert [placed(fixture, key, loop)[1] for loop in range(3)] == [[0], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 9]]
