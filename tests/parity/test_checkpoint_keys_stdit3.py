"""Names and shapes of the full-size models equal the published ones."""

import pytest
import torch

from opensora.checkpoints.published import PUBLISHED
from opensora.models.stdit3 import STDiT3
from opensora.models.stdit4 import STDiT4

PUBLISHED_XL2 = PUBLISHED["opensora-1.2"].transformer.config
# The variant of 3 billion parameters, whose weights were never published.
UNPUBLISHED_3B2 = {**PUBLISHED_XL2, "hidden_size": 1872, "num_heads": 26}


@pytest.mark.parametrize(
    ("name", "cls", "config"),
    [
        ("stdit3_xl2_v1_2", STDiT3, PUBLISHED_XL2),
        ("stdit3_3b2_v1_2", STDiT3, UNPUBLISHED_3B2),
        ("stdit3_xl2_v1_3", STDiT4, PUBLISHED["opensora-1.3"].transformer.config),
    ],
)
def test_names_and_shapes(golden_json, name, cls, config):
    published = golden_json(f"checkpoint_keys/{name}")
    with torch.device("meta"):
        model = cls(**config)
    state = model.state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == {
        key: shape for key, (shape, _dtype) in published["keys"].items()
    }
    assert {key for key, _ in model.named_buffers()} == set(published["buffers"])
    assert sum(parameter.numel() for parameter in model.parameters()) == published["num_parameters"]


def test_the_larger_one_of_1_3():
    """Its weights were never published either; heads are as wide, so windows and positions are those of the smaller."""
    with torch.device("meta"):
        model = STDiT4(hidden_size=1872, num_heads=26)
    state = model.state_dict()
    assert state["rope.freqs"].shape == (12,) and state["spatial_blocks.0.attn.q_norm.weight"].shape == (72,)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 1) == 3.2
