"""What latents look like without decoding them: each colour as a weighted sum of the latents around a place.

A fit by least squares is blurred and a little pale, but takes a millisecond, so it can follow the steps of a sampler.
A place alone tells too little of its colour: the eight around it are looked at as well.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.errors import OpenSoraError

_SIDE = 3  # of the square of places


@dataclass(frozen=True)
class LatentRgb:
    """Colours of one latent space.

    Attributes:
        weight: for red, green and blue, a factor for each latent channel of each of 3x3 places: C * 9, row by row.
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
        _, num_frames, height, width = latents.shape
        colours = F.adaptive_avg_pool3d(pixels, (num_frames, height, width))[0].flatten(1).T  # (T H W, 3)
        values = F.unfold(_with_border(latents), _SIDE).transpose(1, 2).flatten(0, 1)  # (T H W, 9 C)
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
        channels = len(self.weight[0]) // _SIDE**2
        if len(latents) != channels:
            raise OpenSoraError(f"got latents of {len(latents)} channels, expected {channels}")
        weight = torch.tensor(self.weight).reshape(3, channels, _SIDE, _SIDE)
        colours = F.conv2d(_with_border(latents), weight, torch.tensor(self.bias))
        return (colours.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _with_border(latents: Tensor) -> Tensor:
    """Frames (T, C, H + 2, W + 2) of latents (C, T, H, W), what is at their edges repeated."""
    return F.pad(latents.detach().float().cpu().transpose(0, 1), (1, 1, 1, 1), mode="replicate")
