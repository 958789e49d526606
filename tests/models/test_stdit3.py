"""What is STDiT3's own: blocks of space and of time in turns, and sizes that count by their area."""

from dataclasses import replace

import pytest
import torch
from tiny_transformers import CLIP, SIZES, build, inputs

from opensora.models.stdit3 import STDiT3


@pytest.fixture(scope="module")
def shared() -> STDiT3:
    return build(STDiT3, input_sq_size=64).requires_grad_(False)


def test_space_and_time_take_turns(shared):
    """A block of space mixes the patches of one frame only, a block of time the frames of one patch."""
    assert list(shared.blocks) == [
        block for pair in zip(shared.spatial_blocks, shared.temporal_blocks, strict=True) for block in pair
    ]
    tokens, text, modulation = torch.randn(1, 3, 5, 24), torch.randn(1, 2, 24), torch.zeros(1, 1, 6, 24)
    changed = tokens.clone()
    changed[:, 1, 2] = torch.randn(24)
    in_space, in_time = torch.zeros(3, 5, dtype=torch.bool), torch.zeros(3, 5, dtype=torch.bool)
    in_space[1], in_time[:, 2] = True, True
    for block, reached in ((shared.spatial_blocks[0], in_space), (shared.temporal_blocks[0], in_time)):
        difference = block(changed, text, modulation) - block(tokens, text, modulation)
        assert torch.equal(difference[0].abs().amax(-1) > 1e-6, reached)


def test_time_alone_is_rotated(shared):
    """The order of the frames reaches the network through the rotation of the blocks of time."""
    seen = []
    handles = [block.register_forward_hook(lambda _m, args, _out: seen.append(args[5])) for block in shared.blocks]
    plain = shared(**inputs(), **SIZES).sample
    for handle in handles:
        handle.remove()
    assert [rope is not None for rope in seen] == [False, True] * 2
    backwards = {**inputs(), "hidden_states": inputs()["hidden_states"].flip(2)}
    assert not torch.allclose(shared(**backwards, **SIZES).sample.flip(2), plain)


def test_sizes_count_by_their_area(shared):
    plain = shared(**inputs(), **SIZES).sample
    for height, width, same in ((48.0, 32.0, True), (32.0, 64.0, False)):
        sample = shared(**inputs(), clip_conditions=replace(CLIP, height=height, width=width)).sample
        assert torch.allclose(sample, plain) == same
