"""What is STDiT's own: positions of one training size, and attention along time without a norm."""

import pytest
import torch
from tiny_transformers import SIZES, TINY, build, inputs

from opensora.errors import OpenSoraError
from opensora.models.stdit import STDiT


@pytest.fixture(scope="module")
def shared() -> STDiT:
    return build(STDiT, input_size=(3, 4, 6)).requires_grad_(False)


def test_tables_have_the_size_it_was_trained_at():
    model = build(STDiT, input_size=(5, 6, 7), patch_size=(2, 2, 2))
    assert model.get_buffer("pos_embed").shape == (1, 3 * 4, 24)
    assert model.get_buffer("pos_embed_temporal").shape == (1, 3, 24)


def test_scales_are_distances_between_positions():
    """Half the scale is twice the distance, along either axis."""
    near, far = (build(STDiT, input_size=(9, 18, 18), space_scale=s, time_scale=s) for s in (1.0, 0.5))
    grids = [model.get_buffer("pos_embed").unflatten(1, (9, 9)) for model in (near, far)]
    torch.testing.assert_close(grids[1][:, :5, :5], grids[0][:, ::2, ::2])
    frames = [model.get_buffer("pos_embed_temporal") for model in (near, far)]
    torch.testing.assert_close(frames[1][:, :5], frames[0][:, ::2])


def test_another_training_size_changes_nothing_but_the_tables(shared):
    """Any size is taken, at the same distances; the tables of a file are not computed with."""
    other = build(STDiT, input_size=(8, 10, 4)).requires_grad_(False)
    tables = {name: tensor for name, tensor in other.state_dict().items() if name.startswith("pos_embed")}
    other.load_state_dict(shared.state_dict() | {name: 0 * tensor for name, tensor in tables.items()})
    torch.testing.assert_close(other(**inputs()).sample, shared(**inputs()).sample, rtol=0, atol=0)


def test_sizes_and_frame_rate_are_accepted_and_unused(shared):
    torch.testing.assert_close(shared(**inputs(), **SIZES).sample, shared(**inputs()).sample, rtol=0, atol=0)


def test_frames_have_positions_in_the_first_block_only(shared):
    seen = []
    handles = [block.register_forward_hook(lambda _m, args, _out: seen.append(args[6])) for block in shared.blocks]
    shared(**inputs())
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(seen[0][:, 0], shared.get_buffer("pos_embed_temporal")[0])
    assert seen[1:] == [None]


def test_order_of_frames_matters(shared):
    arguments = inputs()
    plain = shared(**arguments).sample
    arguments["hidden_states"] = arguments["hidden_states"].flip(2)
    assert not torch.allclose(shared(**arguments).sample.flip(2), plain)


def test_conditioning_frames_keep_the_time_gate_of_the_timestep(shared):
    """With every frame given, attention along time alone still tells timesteps apart."""
    seen = []
    handle = shared.blocks[0].register_forward_hook(lambda _m, args, out: seen.append((args[2], args[3], out)))
    for timestep in (0.0, 700.0):
        shared(**{**inputs(), "timestep": timestep}, frame_mask=torch.zeros(2, 3, dtype=torch.bool))
    handle.remove()
    (modulation, gate, out), (other_modulation, other_gate, other_out) = seen
    torch.testing.assert_close(modulation, other_modulation, rtol=0, atol=0)
    assert not torch.allclose(gate, other_gate)
    assert not torch.allclose(out, other_out)


def test_positions_are_not_rounded_by_a_cast():
    model = build(STDiT).to(torch.bfloat16)
    exact = model._frame_positions(64, torch.device("cpu"))
    assert exact.dtype == torch.float32
    assert not torch.equal(exact, exact.bfloat16().float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": (32, 32)}, "input_size"),
        ({"space_scale": 0}, "space_scale"),
        ({"time_scale": -1.0}, "time_scale"),
    ],
)
def test_mistakes_of_configuration(changes, message):
    with pytest.raises(OpenSoraError, match=message):
        STDiT(**{**TINY, **changes})
