"""The causal 3D variational autoencoder of Open-Sora 1.2: frame latents, usually four times fewer in time.

It works on the latents of a 2D autoencoder. Every convolution sees only this and earlier frames (zeros stand in front
of the first); a clip is padded in front with zero frames to a multiple of r, so 17 frames give 5 latent frames at
r = 4. Only the group normalisation, whose statistics run over a whole chunk, looks ahead within that chunk.
Parameter names are those of the published weights.

Letters: B batch, C channels of a frame latent, Z channels of a video latent, T frames, N latent frames,
h, w latent height and width, r temporal factor, D channels inside.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.models.autoencoders.layout import for_convolution, is_half_on_cpu
from opensora.models.autoencoders.posterior import Posterior
from opensora.models.pieces import is_hooked

_SHORT = 10
"""Frames of up to so many in a chunk are convolved without the zeros in front: of 5 frames a fifth of the work is
theirs, of 20 a twentieth, which is less than what joining the frames takes."""


class CausalConv3d(nn.Module):
    """3D convolution that sees no later frame; height and width stay.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kernel_size: odd edge of the cubic kernel.
        time_stride: 2 halves the number of frames.
        bias: whether to add one.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, time_stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.front = kernel_size - time_stride  # k - 1 frames of context, less those a strided window starts later
        side = kernel_size // 2
        self.conv = nn.Conv3d(
            in_channels, out_channels, kernel_size, stride=(time_stride, 1, 1), padding=(0, side, side), bias=bias
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, C_in, T, h, w) -> (B, C_out, ceil(T / time_stride), h, w)."""
        hidden_states = for_convolution(hidden_states)
        if self.front == 0:
            return self.conv(hidden_states)
        if self._leaves_out_zeros(hidden_states):
            return self._without_zeros(hidden_states)
        # In time only: the convolution itself pads height and width without a copy.
        return self.conv(F.pad(hidden_states, (0, 0, 0, 0, self.front, 0)))

    def _leaves_out_zeros(self, hidden_states: Tensor) -> bool:
        """Whether what the zeros in front would take is worth two convolutions more; in float32 it is not."""
        is_short = self.front < hidden_states.shape[2] <= _SHORT and self.conv.stride[0] == 1
        return is_short and is_half_on_cpu(hidden_states) and not torch.is_grad_enabled() and not is_hooked(self.conv)

    def _without_zeros(self, hidden_states: Tensor) -> Tensor:
        """The first frames see none in front of them, so they are convolved with the end of the kernel."""
        conv = self.conv
        first = [
            F.conv3d(hidden_states[:, :, :seen], conv.weight[:, :, -seen:], conv.bias, padding=conv.padding)
            for seen in range(1, self.front + 1)
        ]
        return torch.cat([*first, conv(hidden_states)], dim=2)


class ResBlock(nn.Module):
    """Two rounds of group norm, SiLU and causal convolution beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, bias=False)
        if in_channels != out_channels:
            self.conv3 = CausalConv3d(in_channels, out_channels, kernel_size=1, bias=False)
        self.has_shortcut_conv = in_channels != out_channels

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, D_in, T, h, w) -> (B, D_out, T, h, w)."""
        shortcut = self.conv3(hidden_states) if self.has_shortcut_conv else hidden_states
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states)))
        return hidden_states + shortcut


class ResBlocks(nn.Sequential):
    """Residual blocks in turn, each of which may be recomputed in the backward pass."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, D_in, T, h, w) -> (B, D_out, T, h, w)."""
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self:
            run = functools.partial(self._gradient_checkpointing_func, block) if recompute else block
            hidden_states = run(hidden_states)
        return hidden_states


class Levels(nn.Module):
    """Modules by number, called from the last to the first; a `ModuleList` would be offloaded in its own order."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        for number, module in enumerate(modules):
            self.add_module(str(number), module)

    def __getitem__(self, number: int) -> nn.Module:
        return self.get_submodule(str(number))

    def __len__(self) -> int:
        return len(self._modules)


class TemporalEncoder(nn.Module):
    """Frame latents -> moments before the quantisation convolution; halves time after every block so marked."""

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
        self.block_res_blocks = nn.ModuleList()
        self.conv_blocks = nn.ModuleList()
        dim = filters
        for level, multiplier in enumerate(channel_multipliers):
            blocks = ResBlocks()
            for _ in range(num_res_blocks):
                blocks.append(ResBlock(dim, filters * multiplier, num_groups))
                dim = filters * multiplier
            self.block_res_blocks.append(blocks)
            if level < len(temporal_downsample):
                halve = temporal_downsample[level]
                self.conv_blocks.append(CausalConv3d(dim, dim, time_stride=2) if halve else nn.Identity())
        self.res_blocks = ResBlocks(*(ResBlock(dim, dim, num_groups) for _ in range(num_res_blocks)))
        self.norm1 = nn.GroupNorm(num_groups, dim)
        self.conv2 = CausalConv3d(dim, out_channels, kernel_size=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, C, N * r, h, w) -> (B, 2Z, N, h, w)."""
        hidden_states = self.conv_in(hidden_states)
        for level, blocks in enumerate(self.block_res_blocks):
            hidden_states = blocks(hidden_states)
            if level < len(self.conv_blocks):
                hidden_states = self.conv_blocks[level](hidden_states)
        hidden_states = self.res_blocks(hidden_states)
        return self.conv2(F.silu(self.norm1(hidden_states)))


class TemporalDecoder(nn.Module):
    """Mirror of the encoder. Block lists are indexed as in the encoder, so they run from the last to the first."""

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
        self.res_blocks = ResBlocks(*(ResBlock(dim, dim, num_groups) for _ in range(num_res_blocks)))
        block_res_blocks: list[ResBlocks] = []
        conv_blocks: list[nn.Module] = []
        for level in reversed(range(len(channel_multipliers))):
            blocks = ResBlocks()
            for _ in range(num_res_blocks):
                blocks.append(ResBlock(dim, filters * channel_multipliers[level], num_groups))
                dim = filters * channel_multipliers[level]
            block_res_blocks.insert(0, blocks)
            if level > 0:
                double = temporal_downsample[level - 1]
                conv_blocks.insert(0, CausalConv3d(dim, 2 * dim) if double else nn.Identity())
        self.block_res_blocks = Levels(block_res_blocks)
        self.conv_blocks = Levels(conv_blocks)
        self.temporal_downsample = tuple(temporal_downsample)
        self.norm1 = nn.GroupNorm(num_groups, dim)
        self.conv_out = CausalConv3d(dim, out_channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, Z, N, h, w) -> (B, C, N * r, h, w)."""
        hidden_states = self.res_blocks(self.conv1(hidden_states))
        for level in reversed(range(len(self.block_res_blocks))):
            hidden_states = self.block_res_blocks[level](hidden_states)
            if level > 0 and self.temporal_downsample[level - 1]:
                hidden_states = _channels_to_time(self.conv_blocks[level - 1](hidden_states))
        return self.conv_out(F.silu(self.norm1(hidden_states)))


def _channels_to_time(hidden_states: Tensor) -> Tensor:
    """(B, 2D, T, h, w) -> (B, D, 2T, h, w); channel 2d + s becomes channel d of frame 2t + s."""
    batch, channels, num_frames, height, width = hidden_states.shape
    pairs = hidden_states.reshape(batch, channels // 2, 2, num_frames, height, width)
    return pairs.transpose(2, 3).reshape(batch, channels // 2, 2 * num_frames, height, width)


class TemporalAutoencoder(nn.Module):
    """Causal variational autoencoder over time for frame latents (B, C, T, h, w).

    Args:
        in_channels: C, channels of a frame latent.
        latent_channels: Z, channels of a video latent.
        filters: channels at the first level.
        num_res_blocks: residual blocks a level, and after the last one.
        channel_multipliers: channels of every level in units of `filters`.
        temporal_downsample: for every level but the last, whether time is halved after it; r = 2 ** their sum.
        num_groups: groups of every normalisation.

    Raises:
        OpenSoraError: if `temporal_downsample` does not fit `channel_multipliers`.
    """

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
        if len(temporal_downsample) != len(channel_multipliers) - 1:
            raise OpenSoraError(
                f"temporal_downsample has {len(temporal_downsample)} entries for {len(channel_multipliers)} levels; "
                "give one for every level but the last"
            )
        self.in_channels, self.latent_channels = in_channels, latent_channels
        self.temporal_factor = 2 ** sum(bool(halve) for halve in temporal_downsample)
        levels = (filters, num_res_blocks, channel_multipliers, temporal_downsample, num_groups)
        self.encoder = TemporalEncoder(in_channels, 2 * latent_channels, *levels)
        self.quant_conv = CausalConv3d(2 * latent_channels, 2 * latent_channels, kernel_size=1)
        self.post_quant_conv = CausalConv3d(latent_channels, latent_channels, kernel_size=1)
        self.decoder = TemporalDecoder(latent_channels, in_channels, *levels)

    def latent_frames(self, num_frames: int) -> int:
        """N for a clip of `num_frames` frames: ceil(T / r)."""
        return -(-num_frames // self.temporal_factor)

    def encode(self, frame_latents: Tensor) -> Posterior:
        """Posterior of the video latent, mean and log-variance (B, Z, N, h, w), of frame latents (B, C, T, h, w)."""
        padding = -frame_latents.shape[2] % self.temporal_factor
        if padding:
            frame_latents = F.pad(frame_latents, (0, 0, 0, 0, padding, 0))
        return Posterior.from_moments(self.quant_conv(self.encoder(frame_latents)))

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """Frame latents (B, C, num_frames, h, w) of video latents (B, Z, N, h, w) with N = ceil(num_frames / r).

        Raises:
            OpenSoraError: if that many latent frames do not hold `num_frames` frames.
        """
        if latents.shape[2] != self.latent_frames(num_frames):
            raise OpenSoraError(
                f"{latents.shape[2]} latent frames given for {num_frames} frames, "
                f"which need {self.latent_frames(num_frames)}"
            )
        frames = self.decoder(self.post_quant_conv(latents))
        return frames[:, :, frames.shape[2] - num_frames :]
