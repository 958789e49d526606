"""Latents as the fixtures of Open-Sora 2.0 have them: tokens of 2 x 2 cells."""

from torch import Tensor


def packed(latents: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, tokens, 4 C) of 2 x 2 cells, channels slowest."""
    cells = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))
    return cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse."""
    _, channels, frames, height, width = like.shape
    cells = tokens.reshape(-1, frames, height // 2, width // 2, channels, 2, 2)
    return cells.permute(0, 4, 1, 2, 5, 3, 6).reshape(-1, channels, frames, height, width)
