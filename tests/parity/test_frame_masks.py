"""Frame masks of training against the reference, draw by draw: every case is read from the fixture."""

import random

import pytest
import torch

from opensora.conditioning.masks import draw_frame_masks

OUR_NAMES = {"no": "identity", "intepolate": "interpolate"}


def ours(name: str) -> str:
    name = name.removeprefix("mask_")
    return OUR_NAMES.get(name, name)


def drawn(ratios: dict[str, float], batch: int, num_frames: int, seed: int) -> list[list[int]]:
    masks = draw_frame_masks(ratios, batch, num_frames, random.Random(seed), torch.Generator().manual_seed(seed))
    return masks.int().tolist()


@pytest.mark.parametrize("version", ["1_1", "1_2", "1_3"])
def test_each_strategy(version, golden_json):
    compared = 0
    for key, expected in golden_json(f"mask_generator_v{version}")["single"].items():
        name, frames, seed = key.split("|")
        if isinstance(expected, list):  # else: the reference raised
            num_frames = int(frames.removeprefix("T"))
            assert drawn({ours(name): 1.0}, len(expected), num_frames, int(seed.removeprefix("seed"))) == expected, key
            compared += 1
    assert compared


@pytest.mark.parametrize("version", ["1_1", "1_2", "1_3"])
def test_mixture(version, golden_json):
    fixture = golden_json(f"mask_generator_v{version}")
    ratios = {ours(name): ratio for name, ratio in fixture["mix_ratios"].items()}
    for key, expected in fixture["mix"].items():
        assert drawn(ratios, len(expected), len(expected[0]), int(key.removeprefix("seed"))) == expected, key
