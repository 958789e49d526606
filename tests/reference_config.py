"""Configurations of fixtures: what their metadata says, and what it leaves to the shapes of the weights."""

import math
from typing import Any


def transformer_config(fixture: Any) -> dict[str, Any]:
    """Keywords of the transformer whose weights `fixture` (`Golden`) holds."""
    config = dict(fixture.meta["config"])
    out_features, dim = fixture["sd.final_layer.linear.weight"].shape
    _, channels, *patch_size = fixture["sd.x_embedder.proj.weight"].shape
    mlp = next(tensor for name, tensor in fixture.tensors.items() if name.endswith("mlp.fc1.weight"))
    read = {
        "hidden_size": dim,
        "in_channels": channels,
        "patch_size": patch_size,
        "pred_sigma": out_features == 2 * channels * math.prod(patch_size),
        "mlp_ratio": len(mlp) / dim,
    }
    return read | config
