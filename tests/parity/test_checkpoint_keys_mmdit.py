"""Names and shapes of the full-size MMDiTs equal the published ones, and tell what they are."""

from typing import Any

import pytest
import torch

from opensora.models.identify import identify
from opensora.models.mmdit import MMDiT

OPENSORA: dict[str, Any] = {}
DC_AE = {"in_channels": 128, "patch_size": 1}
FLUX = {"cond_embed": False, "guidance_embed": True, "fused_qkv": True, "interleaved_rope": True}


@pytest.mark.parametrize(
    ("name", "config", "summary"),
    [
        ("mmdit_11b_v2_0", OPENSORA, "transformer of Open-Sora 2.0"),
        ("mmdit_11b_v2_0_dcae", DC_AE, "transformer of Open-Sora 2.0, for the deep compression autoencoder"),
        ("flux1_dev_img", FLUX, "FLUX.1 image transformer"),
    ],
)
def test_names_and_shapes(golden_json, name, config, summary):
    published = golden_json(f"checkpoint_keys/{name}")
    with torch.device("meta"):
        model = MMDiT(**config)
    state = model.state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == {
        key: shape for key, (shape, _dtype) in published["keys"].items()
    }
    assert {key for key, _ in model.named_buffers()} == set(published["buffers"])
    assert sum(parameter.numel() for parameter in model.parameters()) == published["num_parameters"]

    found = identify(state)
    assert found is not None and found.supported
    assert (found.kind, found.class_name, found.summary) == ("transformer", "MMDiT", summary)
    untold = {"theta", "bf16_timesteps", "known_frames_alone", "model_max_length", "pred_sigma"}
    told = {name: value for name, value in model.config.items() if name not in untold and name[0] != "_"}
    assert found.config == told | {"axes_dim": [*model.config["axes_dim"]]}
