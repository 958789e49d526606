"""What weights of MMDiTs tell of themselves, and how those of FLUX become a start for Open-Sora 2.0."""

from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.errors import OpenSoraError
from opensora.models.identify import identify
from opensora.models.mmdit import MMDiT
from opensora.models.mmdit_format import FORMAT
from opensora.training.diffusion.adaptation import start_from
from opensora.training.diffusion.lora import LoRAConfig

TINY: dict[str, Any] = {
    "in_channels": 3,
    "hidden_size": 32,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 2,
    "axes_dim": (4, 6, 6),
    "caption_channels": 10,
    "pooled_channels": 6,
}
FLUX = {"fused_qkv": True, "interleaved_rope": True, "guidance_embed": True, "cond_embed": False}
HERE = Path("config.json")


@pytest.mark.parametrize(
    ("changes", "summary"),
    [
        ({}, "transformer of Open-Sora 2.0"),
        ({"patch_size": 1}, "transformer of Open-Sora 2.0, for the deep compression autoencoder"),
        (FLUX, "FLUX.1 image transformer"),
        (
            FLUX | {"fused_qkv": False, "interleaved_rope": False},
            "FLUX.1 image transformer in the layout of Open-Sora 2.0",
        ),
        ({"qkv_bias": False, "mlp_ratio": 3.0}, "transformer of Open-Sora 2.0"),
    ],
)
def test_shapes_tell_the_configuration_and_what_they_cannot_tell(changes, summary):
    with torch.device("meta"):
        model = MMDiT(**{**TINY, **changes})
    found = identify(model.state_dict())
    assert found is not None and found.summary == summary
    told = {name: value for name, value in model.config.items() if name in found.config and name[0] != "_"}
    assert found.config == told
    silent = {"theta", "bf16_timesteps", "model_max_length", "axes_dim", "interleaved_rope", "pred_sigma"}
    assert silent - {"pred_sigma"} <= set(found.unsure)
    assert {**TINY, **changes}.keys() <= found.config.keys() | silent


def test_the_configuration_of_the_reference_is_translated():
    stored = {
        "type": "flux", "from_pretrained": None, "strict_load": False, "guidance_embed": False, "fused_qkv": False,
        "use_liger_rope": True, "grad_ckpt_settings": [8, 100], "in_channels": 64, "vec_in_dim": 768,
        "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19,
        "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "cond_embed": True,
    }  # fmt: skip
    assert FORMAT.is_foreign_config(stored)
    config = FORMAT.translate_config(stored, HERE, {}, None)
    with torch.device("meta"):
        ours, published = MMDiT(**config), MMDiT()
    for name, value in published.config.items():
        assert name == "_use_default_values" or ours.config[name] in (value, [16, 56, 56])
    image = FORMAT.translate_config({"in_channels": 128, "patch_size": 1, "use_liger_rope": False}, HERE, {}, None)
    assert image == {"in_channels": 128, "patch_size": 1, "interleaved_rope": True}


def test_rotary_positions_are_those_of_the_published_model_with_the_same_layout():
    assumed = {"fused_qkv": False, "interleaved_rope": True, "theta": 5.0}
    assert FORMAT.complete({"fused_qkv": False, "interleaved_rope": False}, assumed, HERE)["interleaved_rope"]
    flux = FORMAT.complete({"fused_qkv": True, "interleaved_rope": True}, {**assumed, "interleaved_rope": False}, HERE)
    assert flux == {"fused_qkv": True, "interleaved_rope": True, "theta": 5.0}


@pytest.mark.parametrize("layout", [{}, {"fused_qkv": True, "interleaved_rope": True}], ids=["unfused", "fused"])
def test_training_starts_from_flux_as_the_same_function(layout):
    torch.manual_seed(0)
    flux, model = MMDiT(**{**TINY, **FLUX, "guidance_embed": False}), MMDiT(**{**TINY, **layout})
    for name, parameter in flux.named_parameters():  # norms that tell features apart
        if name.endswith("scale"):
            torch.nn.init.uniform_(parameter, 0.5, 2)
    weights = {name: tensor.clone() for name, tensor in flux.state_dict().items()}
    weights["guidance_in.in_layer.weight"] = torch.zeros(32, 256)  # of the distilled weights, and left behind
    assert start_from(model, weights, ("conditions",), source="flux") == {"conditions": 2}
    given = {
        "hidden_states": torch.randn(1, 3, 2, 4, 6),
        "timestep": 500.0,
        "encoder_hidden_states": torch.randn(1, 5, 10),
        "pooled_projections": torch.randn(1, 6),
    }
    with torch.no_grad():
        torch.testing.assert_close(model(**given).sample, flux(**given).sample, atol=1e-5, rtol=1e-4)


def test_training_starts_from_weights_for_other_latents():
    """Layers that take in and give out latents are new, if they are named, and all others stay."""
    torch.manual_seed(0)
    weights = MMDiT(**TINY).state_dict()
    torch.manual_seed(1)
    model = MMDiT(**{**TINY, "in_channels": 7, "patch_size": 1})
    drawn = model.img_in.weight.clone()
    with pytest.raises(OpenSoraError, match=r"img_in\.weight"):
        start_from(model, weights, ("conditions", "last_layer"), source="2.0")
    new = start_from(model, weights, ("first_layer", "conditions", "last_layer"), source="2.0")
    assert new == {"first_layer": 1, "conditions": 1, "last_layer": 2}
    assert torch.equal(model.img_in.weight, drawn) and torch.equal(model.img_in.bias, weights["img_in.bias"])
    assert not model.final_layer.linear.weight.any() and not model.cond_in.weight.any()
    kept = {name for name, tensor in model.state_dict().items() if tensor.shape == weights[name].shape}
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in kept if "cond_in" not in name)


@pytest.mark.parametrize("fused", [True, False])
def test_adapters_are_put_beside_attention_and_mlps(fused):
    with torch.device("meta"):
        model = MMDiT(**{**TINY, "fused_qkv": fused})
    chosen = LoRAConfig().layers_of(model)
    in_blocks = {
        name for name, module in model.named_modules() if "blocks." in name and isinstance(module, torch.nn.Linear)
    }
    assert set(chosen) == {name for name in in_blocks if not name.endswith("mod.lin") and "modulation" not in name}
