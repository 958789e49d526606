"""Names and shapes of the full-size models of 1.0 and 1.1 equal the published ones."""

import pytest
import torch

from opensora.models.stdit import STDIT_XL2_16X256X256, STDIT_XL2_16X512X512, STDIT_XL2_64X512X512, STDiT
from opensora.models.stdit2 import STDIT2_XL2, STDiT2


@pytest.mark.parametrize(
    ("name", "cls", "config"),
    [
        ("stdit_xl2_v1_0_16x256x256", STDiT, STDIT_XL2_16X256X256),
        ("stdit_xl2_v1_0_16x512x512", STDiT, STDIT_XL2_16X512X512),
        ("stdit_xl2_v1_0_64x512x512", STDiT, STDIT_XL2_64X512X512),
        ("stdit2_xl2_v1_1", STDiT2, STDIT2_XL2),
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
