"""The autoencoder of Open-Sora 1.3: one causal network over space and time, in chunks that share a frame.

    video --chunks of M frames, each beginning with the last frame of the one before--> encoder --(z - shift) / scale-->
          normalised latents, ceil(M / r) of every chunk, one after the other

Convolutions see this and earlier frames (zeros stand in front of the first), attention in the middle sees this and
earlier positions in raster order over (t, h, w). Only group normalisation, whose statistics run over a whole chunk,
looks ahead within it. What halves time halves height and width too; what halves these alone works frame by frame. The
frame that two chunks share is decoded twice, and averaged. Parameter names are the published ones.

Letters: B batch, T frames, H, W height and width in pixels, Z channels of a latent, N latent frames, h, w latent height
and width, r temporal factor, M frames of a chunk, D channels inside.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # diffusers looks for it beside the class
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
from opensora.models.autoencoders.joint import JointCodec, JointFormat
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.posterior import Posterior
from opensora.models.autoencoders.statistics_v1_3 import STATISTICS
from opensora.models.autoencoders.strided import StridedConv3d
from opensora.models.autoencoders.temporal import Levels, ResBlocks
from opensora.models.format import REFERENCE_OPTIONS, TensorShapes, known_keywords, known_values
from opensora.models.offload_hooks import apply_offload_hooks

_EPS = 1e-6

# --- layers, each (B, D, T, h, w) -> (B, D', T', h', w') --------------------------------------------------------------


class ChunkNorm(nn.GroupNorm):
    """Group norm whose statistics are those of a whole chunk, also where it is applied to some of its frames."""

    def statistics(self, chunk: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Mean and 1 / standard deviation of every group, (B, D, 1, 1, 1) float32, read a few frames at a time."""
        shape, parts = (len(chunk), self.num_groups, -1), chunk.split(frames, dim=2)
        count = chunk[0].numel() // self.num_groups
        mean = chunk.new_zeros((len(chunk), self.num_groups, 1), dtype=torch.float32)
        variance = torch.zeros_like(mean)
        for part in parts:
            mean += part.reshape(shape).float().sum(dim=2, keepdim=True) / count
        for part in parts:
            variance += (part.reshape(shape).float() - mean).square().sum(dim=2, keepdim=True) / count
        width = self.num_channels // self.num_groups
        figures = (mean, torch.rsqrt(variance + self.eps))
        mean, scale = (figure.repeat_interleave(width, dim=1)[..., None, None] for figure in figures)
        return mean, scale

    def forward(self, hidden_states: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if statistics is None:
            return super().forward(hidden_states)
        mean, scale = statistics
        weight, bias = (values.float()[:, None, None, None] for values in (self.weight, self.bias))
        return torch.addcmul(bias - mean * scale * weight, hidden_states, scale * weight).to(hidden_states.dtype)


def in_micro_batches(hidden_states: Tensor, size: int | None, *layers: nn.Module) -> bool:
    """Whether layers work on so many frames `size` at a time; gradients need them all anyway."""
    if size is None or size >= hidden_states.shape[2]:
        return False
    tensors = (hidden_states, *(parameter for layer in layers for parameter in layer.parameters()))
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def convolve(conv: nn.Conv3d, hidden_states: Tensor, size: int | None, norm: ChunkNorm | None = None) -> Tensor:
    """A causal convolution of stride 1, of what `norm` and SiLU make of its input if there is one; T frames stay T.

    Args:
        conv: pads height and width; zeros in front of the first frame are added here.
        hidden_states: (B, D, T, h, w).
        size: frames that come out at once; None for all.
        norm: applied to as many frames as are convolved.
    """
    front, num_frames = conv.kernel_size[0] - 1, hidden_states.shape[2]
    if not in_micro_batches(hidden_states, size, conv, *([] if norm is None else [norm])):
        hidden_states = hidden_states if norm is None else F.silu(norm(hidden_states))
        return conv(F.pad(hidden_states, (0, 0, 0, 0, front, 0)))
    assert size is not None
    batch, _, _, height, width = hidden_states.shape
    found = hidden_states.new_empty(batch, conv.out_channels, num_frames, height, width)
    statistics = None if norm is None else norm.statistics(hidden_states, size)
    for start in range(0, num_frames, size):
        seen = hidden_states[:, :, max(0, start - front) : start + size]
        if norm is not None:
            seen = F.silu(norm(seen, statistics))
        found[:, :, start : start + size] = conv(F.pad(seen, (0, 0, 0, 0, max(0, front - start), 0)))
    return found


def normalise(norm: ChunkNorm, hidden_states: Tensor, size: int | None) -> Tensor:
    """A norm without a convolution after it; changes its input where nobody needs that any more."""
    if not in_micro_batches(hidden_states, size, norm):
        return norm(hidden_states)
    assert size is not None
    statistics = norm.statistics(hidden_states, size)
    for part in hidden_states.split(size, dim=2):
        part.copy_(norm(part, statistics))
    return hidden_states


class CausalConv3d(nn.Module):
    """3D convolution that sees no later frame; its stride is that of time, height and width.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kernel_size: odd edge of the cubic kernel.
        stride: 2 halves all three, rounded up.
    """

    micro_batch_size: int | None = None  # frames that come out at once

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        side = kernel_size // 2
        self.conv = StridedConv3d(in_channels, out_channels, kernel_size, stride, padding=(0, side, side))

    def forward(self, hidden_states: Tensor) -> Tensor:
        size = self.micro_batch_size if self.conv.stride[0] == 1 else None
        return convolve(self.conv, hidden_states, size)

    def of_normed(self, norm: ChunkNorm, hidden_states: Tensor) -> Tensor:
        """The convolution of SiLU of a norm, without ever holding all of that."""
        return convolve(self.conv, hidden_states, self.micro_batch_size, norm)


class FrameConv(nn.Module):
    """2D convolution of every frame by itself, `micro_batch_size` frames at once."""

    micro_batch_size: int | None = None

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, **options)

    def _resampled(self, frames: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden_states: Tensor) -> Tensor:
        size = self.micro_batch_size
        if size is None or not in_micro_batches(hidden_states, size, self.conv):
            return self._clip(hidden_states)
        found: Tensor | None = None
        for start, part in enumerate(hidden_states.split(size, dim=2)):
            made = self._clip(part)
            if found is None:
                found = made.new_empty(*made.shape[:2], hidden_states.shape[2], *made.shape[3:])
            found[:, :, start * size : (start + 1) * size] = made
        assert found is not None
        return found

    def _clip(self, clip: Tensor) -> Tensor:
        return self._resampled(clip.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clip), -1)).transpose(1, 2)


class SpatialDownsample(FrameConv):
    """Halves height and width, rounded down: zeros at the right and the bottom, a convolution of stride 2."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, stride=2)

    def _resampled(self, frames: Tensor) -> Tensor:
        return self.conv(F.pad(frames, (0, 1, 0, 1)))


class SpatialUpsample(FrameConv):
    """Doubles height and width: every pixel four times, and a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, padding=1)

    def _resampled(self, frames: Tensor) -> Tensor:
        return self.conv(F.interpolate(frames, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """Halves time, height and width, each rounded up."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(dim, dim, stride=2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.conv(hidden_states)


class Upsample(nn.Module):
    """Doubles time, height and width: every position eight times, added to what a residual block makes of it."""

    def __init__(self, dim: int, num_groups: int) -> None:
        super().__init__()
        self.conv3d = PostNormBlock(dim, num_groups)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        return self.conv3d(hidden_states) + hidden_states


class PostNormBlock(nn.Module):
    """Residual block whose norms follow its convolutions, with another epsilon than all the others."""

    def __init__(self, dim: int, num_groups: int) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(dim, dim)
        self.norm1 = ChunkNorm(num_groups, dim, eps=1e-5)
        self.conv2 = CausalConv3d(dim, dim)
        self.norm2 = ChunkNorm(num_groups, dim, eps=1e-5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        size = self.conv1.micro_batch_size
        inner = F.silu(normalise(self.norm1, self.conv1(hidden_states), size))
        inner = normalise(self.norm2, self.conv2(inner), size)
        return F.silu(inner + hidden_states)


class ResnetBlock(nn.Module):
    """Two rounds of group norm, SiLU and causal convolution beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = ChunkNorm(num_groups, in_channels, eps=_EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = ChunkNorm(num_groups, out_channels, eps=_EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        widens = in_channels != out_channels
        self.nin_shortcut = CausalConv3d(in_channels, out_channels, kernel_size=1) if widens else nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = self.conv2.of_normed(self.norm2, self.conv1.of_normed(self.norm1, hidden_states))
        inner += self.nin_shortcut(hidden_states)
        return inner


class CausalAttention(nn.Module):
    """One head over all positions of a chunk, each of which sees itself and those before it in order of (t, h, w)."""

    def __init__(self, dim: int, num_groups: int) -> None:
        super().__init__()
        self.norm = ChunkNorm(num_groups, dim, eps=_EPS)
        self.q = CausalConv3d(dim, dim, kernel_size=1)
        self.k = CausalConv3d(dim, dim, kernel_size=1)
        self.v = CausalConv3d(dim, dim, kernel_size=1)
        self.proj_out = CausalConv3d(dim, dim, kernel_size=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = self.norm(hidden_states)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k, v = (tokens.contiguous()[:, None] for tokens in (q, k, v))  # fused kernels want channels side by side
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return hidden_states + self.proj_out(seen[:, 0].transpose(1, 2).view_as(hidden_states))


class MiddleBlock(nn.Module):
    """Attention between two residual blocks."""

    def __init__(self, dim: int, num_groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(dim, dim, num_groups)
        self.attn_1 = CausalAttention(dim, num_groups)
        self.block_2 = ResnetBlock(dim, dim, num_groups)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden_states)))


# --- the two networks -------------------------------------------------------------------------------------------------


def _level(block: ResBlocks, **resample: nn.Module | None) -> nn.Sequential:
    """Residual blocks, then another size; parts under the names of the published weights."""
    parts = {"block": block, **{name: module for name, module in resample.items() if module is not None}}
    return nn.Sequential(OrderedDict(parts))


class CausalEncoder(nn.Module):
    """A chunk (B, 3, T, H, W) -> moments (B, 2Z, ceil(T / r), h, w); arguments as in `CausalVideoAutoencoder`."""

    def __init__(
        self,
        latent_channels: int,
        filters: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        temporal_downsample: Sequence[bool],
        num_groups: int,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(3, filters)
        self.down = nn.ModuleList()
        dim = filters
        for level, multiplier in enumerate(channel_multipliers):
            blocks = ResBlocks()
            for _ in range(num_res_blocks):
                blocks.append(ResnetBlock(dim, filters * multiplier, num_groups))
                dim = filters * multiplier
            downsample = None
            if level < len(temporal_downsample):
                downsample = Downsample(dim) if temporal_downsample[level] else SpatialDownsample(dim)
            self.down.append(_level(blocks, downsample=downsample))
        self.mid = MiddleBlock(dim, num_groups)
        self.norm_out = ChunkNorm(num_groups, dim, eps=_EPS)
        self.conv_out = CausalConv3d(dim, 2 * latent_channels)

    def forward(self, video: Tensor) -> Tensor:
        hidden_states = self.conv_in(video)
        for level in self.down:
            hidden_states = level(hidden_states)
        return self.conv_out.of_normed(self.norm_out, self.mid(hidden_states))


class CausalDecoder(nn.Module):
    """Latents of a chunk (B, Z, N, h, w) -> (B, 3, rN - r + 1, H, W): the first latent frame stands for one frame.

    Levels are indexed as in the encoder, so they run from the last to the first, with one more residual block each.
    """

    micro_batch_size: int | None = None

    def __init__(
        self,
        latent_channels: int,
        filters: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        temporal_downsample: Sequence[bool],
        num_groups: int,
    ) -> None:
        super().__init__()
        self.before_first = 2 ** sum(bool(halve) for halve in temporal_downsample) - 1
        dim = filters * channel_multipliers[-1]
        self.conv_in = CausalConv3d(latent_channels, dim)
        self.mid = MiddleBlock(dim, num_groups)
        levels: list[nn.Module] = []
        for level in reversed(range(len(channel_multipliers))):
            blocks = ResBlocks()
            for _ in range(num_res_blocks + 1):
                blocks.append(ResnetBlock(dim, filters * channel_multipliers[level], num_groups))
                dim = filters * channel_multipliers[level]
            upsample = None
            if level > 0:
                upsample = Upsample(dim, num_groups) if temporal_downsample[level - 1] else SpatialUpsample(dim)
            levels.insert(0, _level(blocks, upsample=upsample))
        self.up = Levels(levels)
        self.norm_out = ChunkNorm(num_groups, dim, eps=_EPS)
        self.conv_out = nn.Conv3d(dim, 3, 3, padding=(0, 1, 1))

    def forward(self, latents: Tensor) -> Tensor:
        hidden_states = self.mid(self.conv_in(latents))
        for level in reversed(range(len(self.up))):
            hidden_states = self.up[level](hidden_states)
        video = convolve(self.conv_out, hidden_states, self.micro_batch_size, self.norm_out)
        return video[:, :, self.before_first :]


# --- the codec --------------------------------------------------------------------------------------------------------


class CausalVideoAutoencoder(JointCodec):
    """The variational autoencoder of Open-Sora 1.3.

    Clips have 1, M, 2M - 1, 3M - 2, ... frames: every chunk shares its first frame with the one before.

    Args:
        latent_channels: Z.
        filters: channels at the first level.
        channel_multipliers: channels of every level in units of `filters`; each level but the last halves the size.
        num_res_blocks: residual blocks of a level of the encoder; one more in the decoder.
        temporal_downsample: for every level but the last, whether it halves time as well; r = 2 ** their sum.
        num_groups: groups of every normalisation.
        latent_space: fields of `LatentSpace`.
        micro_frame_size: M, a multiple of r and 1 more; None for the whole clip as one chunk.
        micro_batch_size: frames that a convolution works on at once; None for all. Bounds memory, changes rounding.

    Raises:
        OpenSoraError: for options that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock", "CausalAttention", "PostNormBlock"]
    _group_offload_block_modules = ["encoder", "decoder"]
    name_of_last_layer = "conv_out"

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        filters: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        temporal_downsample: Sequence[bool] = (False, True, True),
        num_groups: int = 32,
        latent_space: dict[str, Any] | None = None,
        micro_frame_size: int | None = 17,
        micro_batch_size: int | None = 4,
    ) -> None:
        super().__init__()
        if len(temporal_downsample) != len(channel_multipliers) - 1:
            raise OpenSoraError(
                f"temporal_downsample has {len(temporal_downsample)} entries for {len(channel_multipliers)} levels; "
                "give one for every level but the last"
            )
        self.latent_channels = latent_channels
        self.spatial_factor = 2 ** len(temporal_downsample)
        self.temporal_factor = 2 ** sum(bool(halve) for halve in temporal_downsample)
        if micro_frame_size is not None and (micro_frame_size < 2 or (micro_frame_size - 1) % self.temporal_factor):
            raise OpenSoraError(
                f"micro_frame_size is {micro_frame_size}, but it must be 1 more than a multiple of "
                f"{self.temporal_factor}, or None for the whole clip at once"
            )
        if micro_batch_size is not None and micro_batch_size < 1:
            raise OpenSoraError(f"micro_batch_size is {micro_batch_size}, but it must be 1 or more, or None for all")
        options = (filters, channel_multipliers, num_res_blocks, temporal_downsample, num_groups)
        self.encoder = CausalEncoder(latent_channels, *options)
        self.decoder = CausalDecoder(latent_channels, *options)
        self.micro_frame_size = micro_frame_size
        self.micro_batch_size = micro_batch_size
        self._declare(LatentSpace.from_dict(latent_space or {}))

    @property
    def micro_batch_size(self) -> int | None:
        """Frames that a convolution works on at once; None for all."""
        return self._micro_batch_size

    @micro_batch_size.setter
    def micro_batch_size(self, size: int | None) -> None:
        self._micro_batch_size = size
        for module in self.modules():
            if isinstance(module, CausalConv3d | FrameConv | CausalDecoder):
                module.micro_batch_size = size

    # ---- sizes

    @property
    def frame_multiple(self) -> int:
        """Clips are one frame longer than a multiple of this: what a chunk has besides the frame that it shares."""
        return self.temporal_factor if self.micro_frame_size is None else self.micro_frame_size - 1

    frame_offset = 1

    def latent_frames(self, num_frames: int) -> int:
        """N for a clip of `num_frames` frames: 1 -> 1, 17 -> 5, 33 -> 10, 113 -> 35 in Open-Sora 1.3."""
        VideoSize(num_frames, self.spatial_factor, self.spatial_factor).check(self.size_rule())
        return 1 if num_frames == 1 else self._chunks(num_frames) * self._chunk_latents(num_frames)

    def frames_before(self, latent_frame: int, num_frames: int) -> int:
        """Video frames that latent frames 0 .. `latent_frame` - 1 of a clip of `num_frames` frames stand for.

        The first latent frame of a later chunk stands for a frame that the one before it stands for as well.
        """
        self._check_latent_frame(latent_frame, self.latent_frames(num_frames), num_frames)
        return 0 if latent_frame == 0 else self.frame_span(latent_frame - 1, num_frames)[1]

    def frame_span(self, latent_frame: int, num_frames: int) -> tuple[int, int]:
        """Video frames that a latent frame stands for: of 33 frames, 4 for 13 .. 17, 5 for 16 .. 17, 6 for 17 .. 21."""
        self._check_latent_frame(latent_frame + 1, self.latent_frames(num_frames), num_frames)
        chunk, within = divmod(latent_frame, self._chunk_latents(num_frames))
        end = chunk * self.frame_multiple + within * self.temporal_factor + 1 if num_frames > 1 else 1
        return (end - self.temporal_factor if within else end - 1), end

    def chunk_start(self, frame: int, num_frames: int) -> int:
        """The first frame of the last chunk in which a frame of a clip of `num_frames` lies."""
        step = self.frame_multiple if self.micro_frame_size else num_frames
        return min(frame // step, self._chunks(num_frames) - 1) * step

    def _chunks(self, num_frames: int) -> int:
        return 1 if self.micro_frame_size is None else max(1, (num_frames - 1) // self.frame_multiple)

    def _chunk_latents(self, num_frames: int) -> int:
        """Latent frames of a chunk of a clip that is longer than an image."""
        return ((self.micro_frame_size or num_frames) - 1) // self.temporal_factor + 1

    # ---- the whole way

    @apply_offload_hooks
    def encode_raw(self, video: Tensor) -> Posterior:
        """Posterior of a video (B, 3, T, H, W), chunk by chunk, float32 (B, Z, N, h, w) before shift and scale.

        Of any length; what the last chunk lacks of whole latent frames is not seen by a decoder.
        """
        num_frames = video.shape[2]
        size = self.micro_frame_size or num_frames
        starts = range(0, max(1, num_frames - 1), max(1, size - 1))
        chunks = (video[:, :, start : start + size].to(self.dtype) for start in starts)
        return Posterior.cat([Posterior.from_moments(self.encoder(chunk)) for chunk in chunks], dim=2).float()

    @apply_offload_hooks
    def decode_raw(self, latents: Tensor, num_frames: int) -> Tensor:
        """Video (B, 3, T, H, W), float32, of latents (B, Z, N, h, w) without shift and scale.

        A frame that two chunks share is the average of both. Of any length; a chunk of n latent frames has
        r (n - 1) + 1 frames.
        """
        size = latents.shape[2] if self.micro_frame_size is None else self._chunk_latents(self.micro_frame_size)
        first, *others = (self.decoder(chunk.to(self.dtype)).float() for chunk in latents.split(size, dim=2))
        pieces = [first]
        for frames in others:
            shared = (pieces[-1][:, :, -1:] + frames[:, :, :1]) / 2
            pieces[-1] = pieces[-1][:, :, :-1]
            pieces += [shared, frames[:, :, 1:]]
        return torch.cat(pieces, dim=2)


# --- how it is published ----------------------------------------------------------------------------------------------

# Options of the reference that say how it computes, or repeat what shapes tell.
_DROPPED = {
    *("encoder", "decoder", "cal_loss", "sample_posterior"),
    *("micro_frame_size", "temporal_overlap", "micro_batch_size_2d", "use_tiled_conv3d", "tile_size"),
}


class _CausalFormat(JointFormat):
    cls = CausalVideoAutoencoder
    summary = "autoencoder of Open-Sora 1.3"
    prefixes = ("encoder.down.0.block.", "encoder.conv_in.conv.")

    def read_shapes(self, shapes: TensorShapes) -> tuple[dict[str, Any], dict[str, str]]:
        filters, levels = shapes.size("encoder.conv_in.conv.weight", 0), shapes.count("encoder.down") or 0
        widths = [shapes.size(f"encoder.down.{i}.block.0.conv1.conv.weight", 0) for i in range(levels)]
        halvings = [shapes.has(f"encoder.down.{i}.downsample.conv.conv.") for i in range(levels - 1)]
        config = known_values(
            latent_channels=shapes.size("decoder.conv_in.conv.weight", 1),
            filters=filters,
            channel_multipliers=[width // filters if width and filters else 1 for width in widths] or None,
            num_res_blocks=shapes.count("encoder.down.0.block"),
            temporal_downsample=halvings if levels else None,
        )
        unsure = {
            "num_groups": "shapes do not tell; 32 in the published autoencoder",
            "micro_frame_size": "shapes do not tell; 17 for Open-Sora 1.3",
            "latent_space": "weights do not hold it; the published transformers take the statistics 'video'",
        }
        return config, unsure

    def translate_config(
        self, stored: Mapping[str, Any], where: Path, base: Mapping[str, Any], assumed: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        values = dict(stored)
        statistics = values.pop("normalization", None)
        found = known_keywords(values, where, self.cls, REFERENCE_OPTIONS | _DROPPED)
        for name in _DROPPED:
            found.pop(name, None)
        if statistics is None:
            return found
        if statistics not in STATISTICS:
            known = ", ".join(STATISTICS)
            raise OpenSoraError(f"{where}: normalization is {statistics!r}; known are {known}")
        return {**found, "latent_space": STATISTICS[statistics]}


FORMAT = _CausalFormat()
