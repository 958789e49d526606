"""The MMDiT against the reference, number by number, in every layout that weights are published in."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import Golden
from torch import Tensor

from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.mmdit import AxialRotaryEmbedding, MMDiT
from opensora.models.mmdit_format import FORMAT
from opensora.models.mmdit_layout import convert_layout

FORWARDS = ["a_fused_rope_guid", "b_unfused_liger_cond", "c_fused_liger_cond_guid", "d_unfused_rope_plain"]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def build(fixture: Any, weights: Mapping[str, Tensor] | None = None, **changes: Any) -> MMDiT:
    """The model of a fixture; its reference embeds timesteps in the precision they come in, float32."""
    config = FORMAT.translate_config(fixture.meta["config"], fixture, {}, None)
    model = MMDiT(**{**config, "bf16_timesteps": False, **changes}).eval().requires_grad_(False)
    model.load_state_dict(dict(fixture.weights() if weights is None else weights))
    return model


def unpacked(tokens: Tensor, grid: tuple[int, int, int], patch: int = 2) -> Tensor:
    """'b (t h w) (c p q) -> b c t (h p) (w q)', axis by axis."""
    batch, (t, h, w) = len(tokens), grid
    cells = tokens.reshape(batch, t, h, w, -1, patch, patch)
    return cells.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, -1, t, h * patch, w * patch)


def inputs(fixture: Any, grid: tuple[int, int, int]) -> dict[str, Any]:
    named = fixture.under("in")
    given = {
        "hidden_states": unpacked(named["img"], grid),
        "timestep": 1000 * named["timesteps"],
        "encoder_hidden_states": named["txt"],
        "pooled_projections": named["y_vec"],
    }
    given |= {"guidance": named["guidance"]} if "guidance" in named else {}
    return given | ({"channel_conditioning": known_frames(named["cond"], grid)} if "cond" in named else {})


def known_frames(packed: Tensor, grid: tuple[int, int, int]) -> ChannelConditioning:
    condition = unpacked(packed, grid)
    mask = condition[:, 0, :, 0, 0].bool()
    assert torch.equal(mask[:, :, None, None].expand(condition[:, 0].shape).float(), condition[:, 0])
    return ChannelConditioning(condition[:, 1:], mask)


@pytest.fixture(scope="module", params=FORWARDS)
def forward(request, golden):
    return golden(f"mmdit_v2_0_{request.param}")


def test_forward(forward):
    model, (*_, frames, rows, columns) = build(forward), forward["in.z"].shape
    grid = (frames, rows // 2, columns // 2)
    given = inputs(forward, grid)
    torch.testing.assert_close(given["hidden_states"], forward["in.z"], atol=0, rtol=0)
    if "in.masks" in forward:
        torch.testing.assert_close(given["channel_conditioning"].latents, forward["in.masked_ref"], atol=0, rtol=0)
    assert set(forward.under("out")) == {"pred"}
    close(model(**given).sample, unpacked(forward["out.pred"], grid))


def test_every_layer_on_the_way(forward):
    """What the reference recorded of its layers, so that a mistake is found where it is made."""
    model, (*_, frames, rows, columns) = build(forward), forward["in.z"].shape
    recorded: dict[str, Tensor] = {}

    def record(name: str, output: Any) -> None:
        if name.startswith("single_blocks"):  # its tokens are text and video in one
            output = torch.cat([output[1], output[0]], dim=1)
        recorded[name] = output[0] if isinstance(output, tuple) else output

    wanted = forward.under("mid")
    for name in wanted:
        module = model.get_submodule(name.replace("blocks_", "blocks."))
        module.register_forward_hook(lambda _m, _i, output, name=name: record(name, output))
    model(**inputs(forward, (frames, rows // 2, columns // 2)))
    assert recorded.keys() == wanted.keys()
    for name, expected in wanted.items():
        close(recorded[name], expected)


def test_no_condition_is_one_that_is_zero_everywhere(golden):
    fixture = golden("mmdit_v2_0_b_unfused_liger_cond")
    given = inputs(fixture, (3, 3, 4))
    del given["channel_conditioning"]
    model, none = build(fixture), ChannelConditioning.none(given["hidden_states"])
    close(model(**given).sample, model(**given, channel_conditioning=none).sample)


def test_the_geometry_of_published_heads(golden):
    """Heads of 128 with angles as large as at 768px, in float32 and in bfloat16; what is known is no mask there."""
    fixture = golden("mmdit_v2_0_head128")
    grid, steps = tuple(fixture.meta["grid"]), fixture.meta["id_steps_t_h_w"]
    model = build(fixture)

    def stretched(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        positions, num_text = arguments
        return [axis * step for axis, step in zip(positions, steps, strict=True)], num_text

    model.rope.register_forward_pre_hook(stretched)
    cond_in = model.cond_in
    assert cond_in is not None
    cond_in.register_forward_pre_hook(lambda *_: fixture["in.cond"].to(model.dtype))
    given = inputs(Golden(fixture.meta, {k: v for k, v in fixture.tensors.items() if k != "in.cond"}), grid)
    assert set(fixture.under("out")) == {"pred", "pred_bf16"}
    close(model(**given).sample, unpacked(fixture["out.pred"], grid))
    half = model.bfloat16()(**given).sample.float()
    torch.testing.assert_close(half, unpacked(fixture["out.pred_bf16"], grid), atol=0.15, rtol=0)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layouts(golden):
    return golden("mmdit_v2_0_rope_permutation")


def grid_of(fixture: Any) -> tuple[int, int, int]:
    frames, rows, columns = fixture.meta["grid_T_H_W_latent"]
    return (frames, rows // 2, columns // 2)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_layouts_compute_the_same(layouts, fused, interleaved):
    stored = layouts.weights()
    weights = convert_layout(stored, interleaved=True, to_fused=fused, to_interleaved=interleaved)
    model = build(layouts, weights, fused_qkv=fused, interleaved_rope=interleaved)
    kind = "interleaved" if interleaved else "halfsplit_permuted"
    expected = layouts[f"out.{'fused' if fused else 'unfused'}_{kind}"]
    close(model(**inputs(layouts, grid_of(layouts))).sample, unpacked(expected, grid_of(layouts)))
    back = convert_layout(weights, interleaved=interleaved, to_fused=True, to_interleaved=True)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())


def test_rotary_positions_of_the_other_kind_are_another_network(layouts):
    model = build(layouts, interleaved_rope=False)
    expected = layouts["out.fused_halfsplit_unpermuted"]
    close(model(**inputs(layouts, grid_of(layouts))).sample, unpacked(expected, grid_of(layouts)))
    assert (expected - layouts["out.fused_interleaved"]).abs().max() > 1e-3


def test_converted_tensors(layouts):
    weights = convert_layout(layouts.weights(), interleaved=True, to_fused=False, to_interleaved=False)
    for name, expected in layouts.under("out.converted").items():
        torch.testing.assert_close(weights[name], expected, atol=0, rtol=0)


def test_the_permutation_of_a_head(layouts):
    scale = "double_blocks.0.img_attn.norm.query_norm.scale"
    given, there, back = (
        layouts[name].reshape(-1, 16) for name in ("in.rearrange", "out.rearrange", "out.rearrange_back")
    )
    for head, halves, neighbours in zip(given, there, back, strict=True):
        to_halves = convert_layout({scale: head}, interleaved=True, to_fused=False, to_interleaved=False)
        torch.testing.assert_close(to_halves[scale], halves, atol=0, rtol=0)
        to_neighbours = convert_layout({scale: head}, interleaved=False, to_fused=False, to_interleaved=True)
        torch.testing.assert_close(to_neighbours[scale], neighbours, atol=0, rtol=0)


def test_rotary_tables(layouts):
    config, grid = layouts.meta["config"], grid_of(layouts)
    positions, num_text = [torch.arange(length) for length in grid], layouts["in.txt"].shape[1]
    halves = AxialRotaryEmbedding(config["axes_dim"], config["theta"], interleaved=False)
    cos, sin = halves(positions, num_text)
    sign = torch.ones(16).index_fill(0, torch.arange(8), -1.0)
    close(cos, layouts["out.pe_halfsplit_cos"][0])
    close(sin * sign, layouts["out.pe_halfsplit_sin"][0])
    neighbours = AxialRotaryEmbedding(config["axes_dim"], config["theta"], interleaved=True)
    cos, sin = (table.unflatten(1, (-1, 2)) for table in neighbours(positions, num_text))
    expected = layouts["out.pe_interleaved"][0, 0]  # [[cos, -sin], [sin, cos]] of every pair
    close(cos, torch.stack([expected[..., 0, 0], expected[..., 1, 1]], dim=-1))
    close(sin, torch.stack([expected[..., 0, 1], expected[..., 1, 0]], dim=-1))


def test_every_output_of_the_layouts_is_read(layouts):
    names = {name.partition(".")[0] for name in layouts.under("out")}
    forwards = {f"{fused}_{kind}" for fused in ("fused", "unfused") for kind in ("interleaved", "halfsplit_permuted")}
    tables = {"pe_halfsplit_cos", "pe_halfsplit_sin", "pe_interleaved", "rearrange", "rearrange_back"}
    assert names == forwards | tables | {"fused_halfsplit_unpermuted", "converted"}
