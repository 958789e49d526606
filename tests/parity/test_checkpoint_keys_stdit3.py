"""Names and shapes of the full-size models equal the published ones."""

import pytest
import torch

from opensora.models.stdit3 import STDIT3_3B2, STDIT3_XL2, STDiT3


@pytest.mark.parametrize(("name", "config"), [("stdit3_xl2_v1_2", STDIT3_XL2), ("stdit3_3b2_v1_2", STDIT3_3B2)])
def test_names_and_shapes(golden_json, name, config):
    published = golden_json(f"checkpoint_keys/{name}")
    with torch.device("meta"):
        model = STDiT3(**config)
    state = model.state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == {
        key: shape for key, (shape, _dtype) in published["keys"].items()
    }
    assert {key for key, _ in model.named_buffers()} == set(published["buffers"])
    assert sum(parameter.numel() for parameter in model.parameters()) == published["num_parameters"]
