"""Guidance of two predictions that are at hand."""

from torch import Tensor

from opensora.models.guidance import ChannelGuidance, GuidanceStep


def combined(guidance: ChannelGuidance, cond: Tensor, uncond: Tensor | None, step: GuidanceStep) -> Tensor:
    """The guided prediction."""
    return guidance.combine({"text": cond} if uncond is None else {"text": cond, "null": uncond}, step)
