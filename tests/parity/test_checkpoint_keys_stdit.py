"""Names and shapes of the full-size models of 1.0 and 1.1 equal the published ones."""

import pytest
import torch

from opensora.checkpoints.published import PUBLISHED
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2

STDIT_256, STDIT_512, STDIT2 = (
    PUBLISHED[name].transformer.config
    for name in ("opensora-1.0-hq-16x256x256", "opensora-1.0-hq-16x512x512", "opensora-1.1-stage3")
)
# The long variant of 1.0, whose weights were never published.
STDIT_LONG = {**STDIT_512, "input_size": [64, 64, 64], "time_scale": 2 / 3}


@pytest.mark.parametrize(
    ("name", "cls", "config"),
    [
        ("stdit_xl2_v1_0_16x256x256", STDiT, STDIT_256),
        ("stdit_xl2_v1_0_16x512x512", STDiT, STDIT_512),
        ("stdit_xl2_v1_0_64x512x512", STDiT, STDIT_LONG),
        ("stdit2_xl2_v1_1", STDiT2, STDIT2),
    ],
)
def test_names_and_shapes(golden_json, name, cls, config):
    published = golden_json(f"checkpoint_keys/{name}")
    with torch.device("meta"):
        model = cls(**config)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == {
        key: shape for key, (shape, _dtype) in published["keys"].items()
    }
    assert {key for key, _ in model.named_buffers()} == set(published["buffers"])
    assert sum(parameter.numel() for parameter in model.parameters()) == published["num_parameters"]
