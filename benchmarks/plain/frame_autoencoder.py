"""The image autoencoder of Stable Diffusion as it is described, applied to the frames of a video.

Letters: B batch, C channels of a frame latent, T frames, h, w latent height and width, D channels inside.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x
        x = self.conv1(F.silu(self.norm1(x)))
        x = self.conv2(F.silu(self.norm2(x)))
        return shortcut + x


class Attention(nn.Module):
    """Among all places of a frame, with one head."""

    def __init__(self, dim: int, num_groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(num_groups, dim, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        places = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.to_q(places), self.to_k(places), self.to_v(places)
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.to_out[0](attended).transpose(1, 2).reshape(x.shape)


class MiddleBlock(nn.Module):
    def __init__(self, dim: int, num_groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(dim, dim, num_groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(dim, num_groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """Residual blocks, then what changes height and width, under the name that is given."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, num_groups: int, **resamplers: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        channels = [in_channels] + num_layers * [out_channels]
        self.resnets = nn.Sequential(*(ResnetBlock(*ends, num_groups) for ends in pairwise(channels)))
        for name, layers in resamplers.items():
            self.add_module(name, nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        for layers in self.children():
            x = layers(x)
        return x


class Downsampler(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Encoder(nn.Module):
    def __init__(self, latent_channels: int, channels: Sequence[int], layers_per_block: int, num_groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(*ends, layers_per_block, num_groups, downsamplers=[Downsampler(ends[1])] if more else [])
            for ends, more in _levels(channels)
        )
        self.mid_block = MiddleBlock(channels[-1], num_groups)
        self.conv_norm_out = nn.GroupNorm(num_groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Upsampler(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Decoder(nn.Module):
    def __init__(self, latent_channels: int, channels: Sequence[int], layers_per_block: int, num_groups: int) -> None:
        super().__init__()
        widths = list(reversed(channels))
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = MiddleBlock(widths[0], num_groups)
        self.up_blocks = nn.ModuleList(
            Level(*ends, layers_per_block + 1, num_groups, upsamplers=[Upsampler(ends[1])] if more else [])
            for ends, more in _levels(widths)
        )
        self.conv_norm_out = nn.GroupNorm(num_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class FrameAutoencoder(nn.Module):
    """Loads the weights of diffusers' AutoencoderKL with these sizes."""

    def __init__(
        self, block_out_channels: Sequence[int], layers_per_block: int, norm_num_groups: int, latent_channels: int = 4
    ) -> None:
        super().__init__()
        sizes = (latent_channels, block_out_channels, layers_per_block, norm_num_groups)
        self.encoder, self.decoder = Encoder(*sizes), Decoder(*sizes)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, video: Tensor, micro_batch_size: int) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) -> mean and log-variance (B, C, T, h, w), so many frames at once."""
        parts = _frames(video).split(micro_batch_size)
        moments = torch.cat([self.quant_conv(self.encoder(part)) for part in parts])
        mean, log_variance = _clips(moments, len(video)).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, frame_latents: Tensor, micro_batch_size: int) -> Tensor:
        """(B, C, T, h, w) -> (B, 3, T, H, W), so many frames at once."""
        parts = _frames(frame_latents).split(micro_batch_size)
        return _clips(torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts]), len(frame_latents))


def _levels(widths: Sequence[int]) -> Iterator[tuple[tuple[int, int], bool]]:
    """Channels in and out of every level, and whether there is one after it, in another size."""
    for number, ends in enumerate(pairwise([widths[0], *widths]), start=1):
        yield ends, number < len(widths)


def _frames(clips: Tensor) -> Tensor:
    """(B, C, T, h, w) -> (B T, C, h, w)."""
    return clips.transpose(1, 2).flatten(0, 1)


def _clips(frames: Tensor, batch: int) -> Tensor:
    """Inverse of `_frames`."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)
