"""What is STDiT4's own: windows that last for the clip, positions in three axes, known frames beside the noise."""

from dataclasses import replace

import pytest
import torch
from tiny_transformers import CLIP, SIZES, TINY, build, channels, inputs

from opensora.errors import OpenSoraError
from opensora.models.attention import RotaryEmbedding
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.stdit4 import STDiT4
from opensora.models.windows import Shape, WindowGrid, place_windows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shared() -> STDiT4:
    return build(STDiT4, kernel_size=(2, 2, -1), input_sq_size=64).requires_grad_(False)


def padded_windows(h: int, w: int, rows: int, columns: int) -> list[list[int]]:
    """Patches of the windows of a frame that is padded to whole ones, without the padding."""
    corners = [(top, left) for top in range(0, h, rows) for left in range(0, w, columns)]
    return [
        [y * w + x for y in range(top, min(top + rows, h)) for x in range(left, min(left + columns, w))]
        for top, left in corners
    ]


@pytest.mark.parametrize(("h", "w"), [(5, 7), (4, 6), (1, 3), (2, 1), (9, 2)])
def test_every_patch_lies_in_one_window(h, w):
    grid = WindowGrid.cut(h, w, 2, 3, CPU)
    windows, order = [], grid.order.tolist()
    for shape in grid.shapes:
        for _ in range(shape.count):
            windows.append(order[: shape.rows * shape.columns])
            order = order[shape.rows * shape.columns :]
    assert not order and sorted(windows) == sorted(padded_windows(h, w, 2, 3))
    areas = [shape.rows * shape.columns for shape in grid.shapes]
    assert areas == sorted(areas, reverse=True)


@pytest.mark.parametrize(("h", "w", "ranks", "most"), [(45, 80, 8, 464), (23, 40, 2, 488), (7, 3, 4, 21), (1, 1, 3, 1)])
def test_ranks_hold_whole_windows_and_nearly_as_many_patches(h, w, ranks, most):
    grid = WindowGrid.cut(h, w, 8, 8, CPU)
    held, shapes = grid.shared_among(ranks)
    assert sorted(place for place in held.tolist() if place < h * w) == list(range(h * w))
    assert len(held) == ranks * most and -(-h * w // ranks) <= most
    for of_rank in shapes:
        assert sum(shape.count * shape.rows * shape.columns for shape in of_rank) == most
    whole = [shape for of_rank in shapes for shape in of_rank if (shape.rows, shape.columns) != (1, 1)]
    for count, rows, columns in grid.shapes:
        assert (rows, columns) == (1, 1) or count == sum(s.count for s in whole if s[1:] == (rows, columns))


def test_a_block_over_time_mixes_the_tokens_of_one_window(shared):
    tokens, text, modulation = torch.randn(1, 3, 6, 24), torch.randn(1, 2, 24), torch.zeros(1, 1, 6, 24)
    windows = place_windows(shared.rope, [Shape(1, 2, 2), Shape(1, 2, 1)], 3, torch.ones(1))
    changed = tokens.clone()
    changed[:, 1, 2] = torch.randn(24)
    block, reached = shared.temporal_blocks[0], torch.zeros(3, 6, dtype=torch.bool)
    reached[:, :4] = True
    difference = block(changed, text, modulation, rope=windows) - block(tokens, text, modulation, rope=windows)
    assert torch.equal(difference[0].abs().amax(-1) > 1e-6, reached)


def test_a_third_of_a_head_turns_by_each_axis():
    rope = RotaryEmbedding(4)
    cos, sin = rope.grid(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.5]), torch.tensor([0.0, 1.0, 3.0]))
    assert cos.shape == sin.shape == (12, 12)
    angles = torch.tensor([2.0, 1.5, 3.0])[:, None] * torch.tensor([1.0, 0.01])
    torch.testing.assert_close(cos[-1], angles.flatten().cos().repeat_interleave(2))
    torch.testing.assert_close(sin[-1, 1::2], angles.flatten().sin())
    torch.testing.assert_close(sin[-1, ::2], -angles.flatten().sin())
    assert cos[2, :8].eq(1).all() and sin[2, :8].eq(0).all()  # only the column is not 0


def test_larger_pictures_have_finer_positions(shared):
    plain = shared(**inputs(), **SIZES).sample
    for height, width, same in ((48.0, 32.0, True), (32.0, 64.0, False)):
        sample = shared(**inputs(), clip_conditions=replace(CLIP, height=height, width=width)).sample
        assert torch.allclose(sample, plain) == same


# ---- known frames ---------------------------------------------------------------------------------------------------


def test_known_frames_attend_to_the_null_text(shared):
    """What the text says reaches a frame that is known only by way of the others."""
    tokens, modulation = torch.randn(2, 3, 6, 24), torch.zeros(1, 1, 6, 24)
    known = torch.tensor([[True, False, False], [False, False, True]])
    texts, null_text = torch.randn(2, 2, 5, 24), torch.randn(1, 5, 24)
    block = shared.spatial_blocks[0]
    one, other = (block(tokens, text, modulation, known=(known, null_text)) for text in texts)
    assert torch.equal((one - other).abs().amax((-2, -1)) > 1e-6, ~known)
    everywhere = block(tokens, null_text.expand(2, -1, -1), modulation)
    torch.testing.assert_close(one[known], everywhere[known])


def test_a_fresh_model_reads_nothing_beside_the_noise():
    torch.manual_seed(0)
    fresh = STDiT4(**TINY)
    known = ChannelConditioning.none(inputs()["hidden_states"])
    plain = fresh(**inputs(), **SIZES).sample
    assert fresh(**inputs(), **SIZES, channel_conditioning=known).sample.equal(plain)


def test_no_frame_known_and_none_told_differ_by_biases(shared):
    """Published weights saw biases in training and are sampled from without."""
    known = ChannelConditioning.none(inputs()["hidden_states"])
    plain = shared(**inputs(), **SIZES).sample
    assert not torch.allclose(shared(**inputs(), **SIZES, channel_conditioning=known).sample, plain)


def test_text_made_once_or_in_every_call(shared):
    arguments = inputs()
    expected = shared(**arguments, **SIZES, **channels(shared)).sample
    text = arguments.pop("encoder_hidden_states"), arguments.pop("encoder_attention_mask")
    sample = shared(**arguments, **SIZES, **channels(shared), text_context=shared.encode_text(*text)).sample
    torch.testing.assert_close(sample, expected)


# ---- from scratch, and mistakes -------------------------------------------------------------------------------------


def test_blocks_over_time_begin_as_the_identity():
    torch.manual_seed(0)
    fresh, seen = STDiT4(**TINY), []
    for block in fresh.temporal_blocks:
        block.register_forward_hook(lambda _module, args, out: seen.append(torch.equal(args[0], out)))
    assert fresh(**inputs(), **SIZES, **channels(fresh)).sample.any()
    assert seen == [True, True]
    assert 0.01 < fresh.fps_embedder.mlp[0].weight.std() < 0.03 and not fresh.fps_embedder.mlp[2].weight.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_size": (8, 8, 4)}, r"such as \[8, 8, -1\]"),
        ({"kernel_size": (-1, 8, -1)}, r"such as \[8, 8, -1\]"),
        ({"kernel_size": (8, 8)}, r"such as \[8, 8, -1\]"),
        ({"kernel_size": None}, "use_spatial_rope needs windows"),
        ({"hidden_size": 28}, "hidden_size 28 must be a multiple of 12"),
    ],
)
def test_mistakes_of_configuration(changes, message):
    with pytest.raises(OpenSoraError, match=message):
        STDiT4(**{**TINY, **changes})


def test_mistakes(shared):
    other = ChannelConditioning.none(torch.zeros(2, 3, 3, 4, 4))
    with pytest.raises(OpenSoraError, match=r"expected \(2, 3, 3, 4, 6\), that of hidden_states"):
        shared(**inputs(), **SIZES, channel_conditioning=other)
    with pytest.raises(OpenSoraError, match="told once for all samples"):
        shared(**inputs(), clip_conditions=replace(CLIP, height=torch.tensor([32.0, 64.0])))
    with pytest.raises(OpenSoraError, match="patches of one frame"):
        build(STDiT4, patch_size=(3, 2, 2))(**inputs(), **SIZES, **channels(shared))
