"""A tiny MMDiT, and what it is called with."""

from typing import Any

import torch
from torch import nn

from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.mmdit import MMDiT

TINY: dict[str, Any] = {
    "in_channels": 3,
    "hidden_size": 32,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": (4, 6, 6),
    "caption_channels": 10,
    "pooled_channels": 6,
    "model_max_length": 5,
}


def build(**changes: Any) -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(**{**TINY, **changes})
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(batch: int = 2, size: tuple[int, int, int] = (3, 4, 6)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(batch, size[0], dtype=torch.bool)
    mask[:, 0] = True
    known = ChannelConditioning(torch.randn(batch, 3, *size, generator=generator), mask)
    return {
        "hidden_states": torch.randn(batch, 3, *size, generator=generator),
        "timestep": torch.linspace(900, 3, batch),
        "encoder_hidden_states": torch.randn(batch, 5, 10, generator=generator),
        "pooled_projections": torch.randn(batch, 6, generator=generator),
        "channel_conditioning": known,
    }
