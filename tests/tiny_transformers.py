"""Tiny space-time transformers, and what they are called with."""

from typing import Any

import torch
from torch import Tensor

from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.clip_conditions import ClipConditions
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3
from opensora.models.stdit4 import STDiT4

MODELS = [STDiT, STDiT2, STDiT3, STDiT4]
TINY: dict[str, Any] = {
    "in_channels": 3,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "caption_channels": 10,
    "model_max_length": 7,
}
CLIP = ClipConditions(fps=8.0, height=32.0, width=48.0, num_frames=3.0)
SIZES: dict[str, ClipConditions] = {"clip_conditions": CLIP}


def build(cls: Any, **changes: Any) -> Any:
    """A tiny model without zero-initialised layers, which would hide mistakes."""
    torch.manual_seed(0)
    model = cls(**{**TINY, **changes})
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(batch: int = 2, size: tuple[int, int, int] = (3, 4, 6)) -> dict[str, Tensor]:
    """Latents, timesteps and text of different lengths."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, 6, dtype=torch.long)
    mask[-1, 4:] = 0
    return {
        "hidden_states": torch.randn(batch, 3, *size, generator=generator),
        "timestep": torch.linspace(900, 3, batch),
        "encoder_hidden_states": torch.randn(batch, 6, 10, generator=generator),
        "encoder_attention_mask": mask,
    }


def channels(model: Any) -> dict[str, Any]:
    """What else a model reads: known frames beside the noise, if it does."""
    if not model.reads_channels:
        return {}
    latents = torch.randn(2, 3, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[True, False, False], [False, True, True]])
    return {"channel_conditioning": ChannelConditioning(latents, mask)}


def some_frames_kept() -> Tensor:
    """(2, 3), True = generated."""
    return torch.tensor([[True, False, True], [True, True, True]])
