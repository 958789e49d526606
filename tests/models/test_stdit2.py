"""What is STDiT2's own: what it is told about a clip, and the order of rotation and norm."""

from dataclasses import replace

import pytest
import torch
from tiny_transformers import CLIP, SIZES, build, inputs

from opensora.models.stdit2 import STDiT2


@pytest.fixture(scope="module")
def shared() -> STDiT2:
    return build(STDiT2, input_sq_size=64).requires_grad_(False)


def test_conditions_are_not_rounded():
    """854 and 856 are one number in bf16; the model tells them apart all the same."""
    model, seen = build(STDiT2).to(torch.bfloat16), []
    model.csize_embedder.register_forward_hook(lambda _module, _args, out: seen.append(out))
    for width in (854, 856):
        model(**inputs(), clip_conditions=replace(CLIP, width=width))
    assert not torch.equal(seen[0], seen[1])


def test_ratio_follows_from_the_size(shared):
    plain = shared(**inputs(), **SIZES).sample
    torch.testing.assert_close(
        shared(**inputs(), clip_conditions=replace(CLIP, aspect_ratio=32 / 48)).sample, plain, rtol=0, atol=0
    )


@pytest.mark.parametrize("size", [(1, 4, 6), (3, 4, 6)])
def test_rotation_before_or_after_the_norm(size):
    """The order matters once the norm's weights differ, and where there are several frames."""
    legacy, modern = (build(STDiT2, qk_norm_legacy=order) for order in (True, False))
    for model in (legacy, modern):
        for block in model.blocks:
            block.attn_temp.q_norm.weight.data = torch.linspace(0.2, 3, 12)
    assert legacy.state_dict().keys() == modern.state_dict().keys()
    same = torch.allclose(legacy(**inputs(size=size), **SIZES).sample, modern(**inputs(size=size), **SIZES).sample)
    assert same == (size[0] == 1)


def test_space_is_not_rotated(shared):
    """Order of the patches enters through their positions only: without these, patches may change places."""
    block = shared.blocks[0]
    tokens, text = torch.randn(1, 3, 5, 24), torch.randn(1, 2, 24)
    modulation = torch.zeros(1, 1, 6, 24), torch.zeros(1, 1, 3, 24)
    order = torch.randperm(5)
    rope = shared.rope(3)
    plain = block(tokens, text, *modulation, rope=rope)
    torch.testing.assert_close(block(tokens[:, :, order], text, *modulation, rope=rope), plain[:, :, order])
    turned = block(tokens.flip(1), text, *modulation, rope=rope)
    assert not torch.allclose(turned.flip(1), plain)
