"""The autoencoder over time of Open-Sora 1.2 as it is described: zeros are written around every convolution's input.

Letters: B batch, C channels of a frame latent, Z channels of a video latent, T frames, N latent frames, h, w latent
height and width, r = 4 the temporal factor of the released one.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class CausalConv3d(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, time_stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        side = kernel_size // 2
        self.padding = (side, side, side, side, kernel_size - time_stride, 0)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride=(time_stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, bias=False)
        if in_channels != out_channels:
            self.conv3 = CausalConv3d(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.conv3(x) if hasattr(self, "conv3") else x
        x = self.conv1(F.silu(self.norm1(x)))
        x = self.conv2(F.silu(self.norm2(x)))
        return x + shortcut


class Encoder(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        filters: int,
        num_res_blocks: int,
        channel_multipliers: Sequence[int],
        temporal_downsample: Sequence[bool],
        num_groups: int,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, filters, bias=False)
        self.block_res_blocks, self.conv_blocks = nn.ModuleList(), nn.ModuleList()
        dim = filters
        for level, multiplier in enumerate(channel_multipliers):
            blocks = nn.Sequential()
            for _ in range(num_res_blocks):
                blocks.append(ResBlock(dim, filters * multiplier, num_groups))
                dim = filters * multiplier
            self.block_res_blocks.append(blocks)
            if level < len(temporal_downsample):
                halve = temporal_downsample[level]
                self.conv_blocks.append(CausalConv3d(dim, dim, time_stride=2) if halve else nn.Identity())
        self.res_blocks = nn.Sequential(*(ResBlock(dim, dim, num_groups) for _ in range(num_res_blocks)))
        self.norm1 = nn.GroupNorm(num_groups, dim)
        self.conv2 = CausalConv3d(dim, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            x = blocks(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        x = self.res_blocks(x)
        return self.conv2(F.silu(self.norm1(x)))


class Decoder(nn.Module):
    """Runs its levels from the last to the first; where time is doubled, pairs of channels become pairs of frames."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        filters: int,
        num_res_blocks: int,
        channel_multipliers: Sequence[int],
        temporal_downsample: Sequence[bool],
        num_groups: int,
    ) -> None:
        super().__init__()
        dim = filters * channel_multipliers[-1]
        self.conv1 = CausalConv3d(in_channels, dim)
        self.res_blocks = nn.Sequential(*(ResBlock(dim, dim, num_groups) for _ in range(num_res_blocks)))
        levels: list[nn.Module] = []
        convolutions: list[nn.Module] = []
        for level in reversed(range(len(channel_multipliers))):
            blocks = nn.Sequential()
            for _ in range(num_res_blocks):
                blocks.append(ResBlock(dim, filters * channel_multipliers[level], num_groups))
                dim = filters * channel_multipliers[level]
            levels.append(blocks)
            if level > 0:
                double = temporal_downsample[level - 1]
                convolutions.append(CausalConv3d(dim, 2 * dim) if double else nn.Identity())
        self.block_res_blocks = nn.ModuleList(reversed(levels))
        self.conv_blocks = nn.ModuleList(reversed(convolutions))
        self.doubles = tuple(temporal_downsample)
        self.norm1 = nn.GroupNorm(num_groups, dim)
        self.conv_out = CausalConv3d(dim, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(x))
        for level in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[level](x)
            if level > 0:
                x = self.conv_blocks[level - 1](x)
                if self.doubles[level - 1]:
                    batch, channels, length, h, w = x.shape
                    x = x.view(batch, channels // 2, 2, length, h, w).transpose(2, 3)
                    x = x.reshape(batch, channels // 2, 2 * length, h, w)
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalAutoencoder(nn.Module):
    """Loads the state dict of `opensora.models.autoencoders.temporal.TemporalAutoencoder` with these sizes."""

    def __init__(
        self,
        in_channels: int = 4,
        latent_channels: int = 4,
        filters: int = 128,
        num_res_blocks: int = 4,
        channel_multipliers: Sequence[int] = (1, 2, 2, 4),
        temporal_downsample: Sequence[bool] = (False, True, True),
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.factor = 2 ** sum(temporal_downsample)
        levels = (filters, num_res_blocks, channel_multipliers, temporal_downsample, num_groups)
        self.encoder = Encoder(in_channels, 2 * latent_channels, *levels)
        self.quant_conv = CausalConv3d(2 * latent_channels, 2 * latent_channels, kernel_size=1)
        self.post_quant_conv = CausalConv3d(latent_channels, latent_channels, kernel_size=1)
        self.decoder = Decoder(latent_channels, in_channels, *levels)

    def encode(self, frame_latents: Tensor) -> tuple[Tensor, Tensor]:
        """One chunk (B, C, T, h, w) -> mean and log-variance (B, Z, N, h, w)."""
        padded = F.pad(frame_latents, (0, 0, 0, 0, -frame_latents.shape[2] % self.factor, 0))
        mean, log_variance = self.quant_conv(self.encoder(padded)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """One chunk (B, Z, N, h, w) -> (B, C, num_frames, h, w)."""
        return self.decoder(self.post_quant_conv(latents))[:, :, -num_frames:]
