"""Names and shapes of the full-size models equal the published ones."""

import pytest
import torch

from opensora.checkpoints.published import PUBLISHED
from opensora.models.stdit3 import STDiT3

PUBLISHED_XL2 = PUBLISHED["opensora-1.2"].transformer.config
# The variant of 3 billion parameters, whose weights were never published.
UNPUBLISHED_3B2 = {**PUBLISHED_XL2, "hidden_size": 1872, "num_heads": 26}


@pytest.mark.parametrize(("name", "config"), [("stdit3_xl2_v1_2", PUBLISHED_XL2), ("stdit3_3b2_v1_2", UNPUBLISHED_3B2)])
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
