"""What is STDiT2's own: what it is told about a clip, and the order of rotation and norm."""

import pytest
import torch
from tiny_transformers import SIZES, build, inputs

from opensora.errors import OpenSoraError
from opensora.models.stdit2 import STDiT2

CONDITIONS = {**SIZES, "num_frames": 3.0, "height_to_width": 32 / 48}


@pytest.fixture(scope="module")
def shared() -> STDiT2:
    return build(STDiT2, input_sq_size=64).requires_grad_(False)


@pytest.mark.parametrize("name", ["timestep", *CONDITIONS])
def test_conditions_matter(shared, name):
    arguments = {**inputs(), **CONDITIONS}
    changed = {**arguments, name: arguments[name] * 0.5}
    assert not torch.allclose(shared(**arguments).sample, shared(**changed).sample)


def test_conditions_are_not_rounded():
    """854 and 856 are one number in bf16; the model tells them apart all the same."""
    model, seen = build(STDiT2).to(torch.bfloat16), []
    model.csize_embedder.register_forward_hook(lambda _module, _args, out: seen.append(out))
    for width in (854, 856):
        model(**inputs(), **{**SIZES, "width": width})
    assert not torch.equal(seen[0], seen[1])


def test_length_and_ratio_follow_from_the_sizes(shared):
    """Latents have as many frames as the video, and the ratio is height by width."""
    plain = shared(**inputs(), **SIZES).sample
    torch.testing.assert_close(shared(**inputs(), **CONDITIONS).sample, plain, rtol=0, atol=0)


def test_each_sample_has_its_own_size(shared):
    """Sizes, lengths and frame rates may differ within a batch, or be one number."""
    arguments = inputs()
    conditions = {name: torch.tensor([value, value * 2]) for name, value in CONDITIONS.items()}
    both = shared(**arguments, **conditions).sample
    mixed = shared(**arguments, **{**conditions, "height": 32.0}).sample
    torch.testing.assert_close(mixed[0], both[0], atol=1e-6, rtol=1e-5)
    for i in range(2):
        one = {name: value[i : i + 1] for name, value in arguments.items()}
        sample = shared(**one, **{name: value[i].item() for name, value in conditions.items()}).sample
        torch.testing.assert_close(sample[0], both[i], atol=1e-6, rtol=1e-5)


def test_given_frames_ignore_the_timestep(shared):
    """With every frame given, the blocks never see the timestep; the last layer alone still does."""
    seen = []
    handle = shared.blocks[-1].register_forward_hook(lambda _module, _args, out: seen.append(out))
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for timestep, frame_mask in ((0.0, mask), (700.0, mask), (0.0, None)):
        shared(**{**inputs(), "timestep": timestep}, **SIZES, frame_mask=frame_mask)
    handle.remove()
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
    torch.testing.assert_close(seen[0], seen[2], rtol=1e-5, atol=1e-6)


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


def test_sizes_are_required(shared):
    with pytest.raises(TypeError, match="fps"):
        shared(**inputs(), height=32, width=48)
    with pytest.raises(OpenSoraError, match="height"):
        shared(**inputs(), **{**SIZES, "height": torch.ones(3)})
