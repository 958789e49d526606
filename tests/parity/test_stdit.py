"""STDiT against the reference, number by number: version 1.0, and its frame-masked form."""

import pytest
import torch
from reference_config import transformer_config

from opensora.models.stdit import STDiT


def load(fixture) -> STDiT:
    model = STDiT(**transformer_config(fixture)).eval().requires_grad_(False)
    model.load_state_dict(fixture.under("sd"))
    return model


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def plain(golden):
    fixture = golden("stdit_v1_0")
    return fixture, load(fixture)


@pytest.fixture(scope="module")
def masked(golden):
    fixture = golden("stdit_v1_1plus_xmask")
    return fixture, load(fixture)


def inputs(fixture) -> dict[str, torch.Tensor]:
    """Arguments of `forward`, without masks."""
    return {
        "hidden_states": fixture["in.x"],
        "timestep": fixture["in.timestep"],
        "encoder_hidden_states": fixture["in.y"].squeeze(1),
    }


def test_outputs(plain):
    """Without a text mask, with one, and with masks of other shapes under their own names; no output goes by unseen."""
    fixture, model = plain
    masks = {"masked": fixture["in.mask"], "nomask": None}
    masks |= {name: mask for name, mask in fixture.under("in").items() if name.startswith("mask_")}
    outputs = fixture.under("out")
    outputs.pop("cfg_batch", None)  # test_guidance_batch
    assert outputs
    for variant, expected in outputs.items():
        close(model(**inputs(fixture), encoder_attention_mask=masks[variant]).sample, expected)


def test_guidance_batch(plain):
    """Conditional and null rows in one batch; the null rows read as many tokens as the conditional ones."""
    fixture, model = plain
    if "out.cfg_batch" not in fixture:
        pytest.skip("the fixture holds no guidance batch")
    text = fixture["in.y"].squeeze(1)
    null = model.null_text[: text.shape[1]].expand_as(text)
    context = model.encode_text(torch.cat([text, null]), fixture["in.mask"].repeat(2, 1))
    sample = model(fixture["in.x"].repeat(2, 1, 1, 1, 1), fixture["in.timestep"].repeat(2), text_context=context).sample
    close(sample, fixture["out.cfg_batch"])


def test_intermediates(plain):
    fixture, model = plain
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _module, _args, out, name=name: seen.update({name.replace(".", "_"): out}))
        for name, module in model.named_modules()
        if name
    ]
    model(**inputs(fixture), encoder_attention_mask=fixture["in.mask"])
    for hook in hooks:
        hook.remove()
    if not fixture.under("mid"):
        pytest.skip("the fixture holds no intermediates")
    for name, expected in fixture.under("mid").items():
        assert name in seen, f"no module returns {name}"
        close(seen[name].reshape(expected.shape), expected)


@pytest.mark.parametrize("version", ["plain", "masked"])
def test_position_tables(request, version):
    """Ours are those of the weights, so that deriving them anew changes nothing."""
    fixture, _ = request.getfixturevalue(version)
    fresh = STDiT(**transformer_config(fixture))
    for name in ("pos_embed", "pos_embed_temporal"):
        close(fresh.get_buffer(name), fixture[f"sd.{name}"])


def test_frame_mask(masked):
    """With and without conditioning frames; no output goes by unseen."""
    fixture, model = masked
    frame_masks = {"nomaskx": None, "x_mask": fixture["in.x_mask"].bool()}
    assert fixture.under("out")
    for variant, expected in fixture.under("out").items():
        masks = {"encoder_attention_mask": fixture["in.mask"], "frame_mask": frame_masks[variant]}
        close(model(**inputs(fixture), **masks).sample, expected)
