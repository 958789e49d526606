"""What latents look like without decoding them: each colour as a weighted sum of the latent channels.

A fit by least squares is blurred and a little pale, but takes a millisecond, so it can follow the steps of a sampler.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.errors import OpenSoraError


@dataclass(frozen=True)
class LatentRgb:
    """Colours of one latent space.

    Attributes:
        weight: for red, green and blue, a factor for each latent channel.
        bias: for each colour; colours are in [0, 1].
    """

    weight: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    bias: tuple[float, float, float]

    @classmethod
    def fit(cls, latents: Tensor, frames: np.ndarray) -> "LatentRgb":
        """The best colours for a clip of which both are known.

        Args:
            latents: normalised, (C, T, H, W).
            frames: that were decoded of them, uint8, (T', H', W', 3).
        """
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 255
        colours = F.adaptive_avg_pool3d(pixels, latents.shape[1:])[0].flatten(1).T  # (T H W, 3)
        values = latents.float().cpu().flatten(1).T
        values = torch.cat([values, torch.ones(len(values), 1)], dim=1)
        # A hair of ridge: of few latents, or of channels that say the same, there would be many solutions.
        square = values.T @ values + 1e-4 * len(values) * torch.eye(values.shape[1])
        solution = torch.linalg.solve(square, values.T @ colours).T
        red, green, blue = (tuple(row) for row in solution[:, :-1].tolist())
        return cls((red, green, blue), tuple(solution[:, -1].tolist()))

    def pictures(self, latents: Tensor) -> np.ndarray:
        """Frames of latents (C, T, H, W), one for each latent frame: uint8, (T, H, W, 3).

        Raises:
            OpenSoraError: latents of another number of channels.
        """
        if len(latents) != len(self.weight[0]):
            raise OpenSoraError(f"got latents of {len(latents)} channels, expected {len(self.weight[0])}")
        values = torch.einsum("rc,cthw->thwr", torch.tensor(self.weight), latents.float().cpu())
        return ((values + torch.tensor(self.bias)).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
