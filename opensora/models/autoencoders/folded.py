"""A small temporal autoencoder: `temporal_factor` frames are folded into channels and mixed causally.

Where `temporal.py` strides through time at full frame rate, this one works at the latent frame rate from the first
layer on, which makes it many times cheaper: the choice for the small models that run in seconds on a CPU.
A clip of T frames is padded in front with copies of its first frame to a multiple of r, so that the first latent frame
holds one real frame and later ones r each (17 frames -> 5 latent frames at r = 4), as in the published autoencoders.

Letters: B batch, C channels of a frame latent, Z channels of a video latent, T frames, N latent frames,
h, w latent height and width, r temporal factor, D width of the network.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.models.autoencoders.posterior import Posterior


class CausalMixer(nn.Module):
    """Residual block: RMS norm per position, 3x3 convolution over this and the previous latent frame, SiLU, 1x1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(dim))
        self.mix = nn.Conv3d(dim, dim, (2, 3, 3), padding=(0, 1, 1))
        self.out = nn.Conv3d(dim, dim, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, D, N, h, w) -> same shape."""
        mean_square = hidden_states.float().square().mean(dim=1, keepdim=True)
        scale = torch.rsqrt(mean_square + 1e-6).to(hidden_states.dtype)
        normed = hidden_states * scale * self.norm.to(hidden_states.dtype)[:, None, None, None]
        mixed = self.mix(F.pad(normed, (0, 0, 0, 0, 1, 0)))
        return hidden_states + self.out(F.silu(mixed))


class FoldedTemporalAutoencoder(nn.Module):
    """Variational autoencoder over time for frame latents (B, C, T, h, w).

    Args:
        in_channels: C, channels of a frame latent.
        latent_channels: Z, channels of a video latent.
        dim: width D of the network.
        encoder_depth: residual blocks before the posterior.
        decoder_depth: residual blocks after the latent.
        temporal_factor: r, frames folded into one latent frame.
    """

    def __init__(
        self,
        in_channels: int = 4,
        latent_channels: int = 4,
        dim: int = 256,
        encoder_depth: int = 2,
        decoder_depth: int = 3,
        temporal_factor: int = 4,
    ) -> None:
        super().__init__()
        self.in_channels, self.latent_channels, self.temporal_factor = in_channels, latent_channels, temporal_factor
        folded = in_channels * temporal_factor
        self.encoder_in = nn.Conv3d(folded, dim, 1)
        self.encoder_blocks = nn.ModuleList(CausalMixer(dim) for _ in range(encoder_depth))
        self.encoder_out = nn.Conv3d(dim, 2 * latent_channels, 1)
        self.decoder_in = nn.Conv3d(latent_channels, dim, 1)
        self.decoder_blocks = nn.ModuleList(CausalMixer(dim) for _ in range(decoder_depth))
        self.decoder_out = nn.Conv3d(dim, folded, 1)

    def latent_frames(self, num_frames: int) -> int:
        """N for a clip of `num_frames` frames: ceil(T / r)."""
        return -(-num_frames // self.temporal_factor)

    def encode(self, frame_latents: Tensor) -> Posterior:
        """Posterior of the video latent.

        Args:
            frame_latents: (B, C, T, h, w), any T >= 1.

        Returns:
            Gaussian with mean and log-variance of shape (B, Z, N, h, w).
        """
        batch, channels, num_frames, height, width = frame_latents.shape
        padding = -num_frames % self.temporal_factor
        if padding:
            first = frame_latents[:, :, :1].expand(-1, -1, padding, -1, -1)
            frame_latents = torch.cat([first, frame_latents], dim=2)
        folded = frame_latents.reshape(batch, channels, -1, self.temporal_factor, height, width)
        folded = folded.transpose(2, 3).reshape(batch, channels * self.temporal_factor, -1, height, width)
        hidden_states = self.encoder_in(folded)
        for block in self.encoder_blocks:
            hidden_states = block(hidden_states)
        return Posterior.from_moments(self.encoder_out(hidden_states))

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """Frame latents (B, C, num_frames, h, w) of video latents (B, Z, N, h, w)."""
        hidden_states = self.decoder_in(latents)
        for block in self.decoder_blocks:
            hidden_states = block(hidden_states)
        folded = self.decoder_out(hidden_states)
        batch, _, latent_frames, height, width = folded.shape
        unfolded = folded.reshape(batch, self.in_channels, self.temporal_factor, latent_frames, height, width)
        frames = unfolded.transpose(2, 3).reshape(batch, self.in_channels, -1, height, width)
        return frames[:, :, frames.shape[2] - num_frames :]
