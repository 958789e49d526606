"""The deep compression autoencoder of Open-Sora 2.0 (Video DC-AE): 4 frames of 32x32 pixels to a latent cell.

    video --stages of blocks, each but the last followed by half the size, of some also half the frames--> latents

What changes the size goes round its convolution on a shortcut without weights: pixels (and frames) are folded into
channels and groups of channels averaged, or channels are repeated and unfolded (Chen et al., "Deep Compression
Autoencoder", arXiv:2410.10733, in three dimensions). Deep stages have attention, linear in the number of positions.
There is no posterior, the latents are what the encoder makes; nor is it causal, all of a tile sees all of it. A latent
frame stands for 4 frames; an image has one of its own, and is not made smaller in time. Parameter names are the
published ones.

Letters: B batch, T frames, H, W height and width in pixels, Z channels of a latent, N latent frames, h, w latent height
and width, D channels inside.
"""

import functools
import math
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
from opensora.models.autoencoders.joint import JointFormat
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.layout import for_convolution
from opensora.models.autoencoders.posterior import Certain, Posterior
from opensora.models.autoencoders.strided import StridedConv3d, conv3d
from opensora.models.autoencoders.temporal import Levels
from opensora.models.autoencoders.tiles import TiledCodec, in_tiles
from opensora.models.format import TensorShapes, known_values
from opensora.models.offload_hooks import apply_offload_hooks

Factors = tuple[int, int, int]
"""By how much time, height and width are divided or multiplied."""

# --- pixels and channels ----------------------------------------------------------------------------------------------


def pixel_unshuffle_3d(hidden_states: Tensor, factors: Factors) -> Tensor:
    """(B, D, T, h, w) -> (B, D f, T / ft, h / fh, w / fw), f = ft fh fw; channel d f + (it fh + ih) fw + iw."""
    batch, dim, num_frames, height, width = hidden_states.shape
    ft, fh, fw = factors
    cells = hidden_states.reshape(batch, dim, num_frames // ft, ft, height // fh, fh, width // fw, fw)
    return cells.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(batch, -1, num_frames // ft, height // fh, width // fw)


def pixel_shuffle_3d(hidden_states: Tensor, factors: Factors) -> Tensor:
    """Inverse of `pixel_unshuffle_3d`."""
    batch, dim, num_frames, height, width = hidden_states.shape
    ft, fh, fw = factors
    cells = hidden_states.reshape(batch, dim // math.prod(factors), ft, fh, fw, num_frames, height, width)
    return cells.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(batch, -1, num_frames * ft, height * fh, width * fw)


def average_channels(hidden_states: Tensor, dim: int) -> Tensor:
    """(B, D, ...) -> (B, dim, ...): means of D / dim channels in a row."""
    return hidden_states.unflatten(1, (dim, -1)).mean(dim=2)


def repeat_channels(hidden_states: Tensor, dim: int) -> Tensor:
    """(B, D, ...) -> (B, dim, ...): every channel dim / D times in a row."""
    return hidden_states.repeat_interleave(dim // hidden_states.shape[1], dim=1)


# --- layers, each (B, D, T, h, w) -> (B, D', T, h, w) -----------------------------------------------------------------


class RMSNorm3d(nn.Module):
    """x / sqrt(mean of x^2 over channels + epsilon), scaled and shifted per channel; in float32."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        values = hidden_states.float()
        values = values * torch.rsqrt(values.square().mean(dim=1, keepdim=True) + self.eps)
        weight, bias = (vector.float()[:, None, None, None] for vector in (self.weight, self.bias))
        return (values * weight + bias).to(hidden_states.dtype)


class PaddedConv3d(StridedConv3d):
    """3D convolution of odd kernels with zeros on all sides.

    Of a single frame only the middle of a kernel meets anything but zeros, so the rest is left out: a third of the
    work, and kernels of torch 2.13 for bfloat16 on CPUs with AMX read memory that was never written there.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: Any = 1, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, **options)

    def forward(self, input: Tensor) -> Tensor:
        input = for_convolution(input)
        if input.shape[2] > 1:
            return super().forward(input)
        middle = self.kernel_size[0] // 2
        padding = (0, middle, middle)
        return conv3d(input, self.weight[:, :, middle, None], self.bias, self.stride, padding, self.groups)


class ConvLayer(nn.Module):
    """3D convolution with zeros on all sides, then, as asked for, a norm and SiLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int | Factors = 1,
        groups: int = 1,
        bias: bool = True,
        norm: bool = False,
        silu: bool = False,
    ) -> None:
        super().__init__()
        self.conv = PaddedConv3d(in_channels, out_channels, kernel_size, stride, groups=groups, bias=bias)
        self.norm = RMSNorm3d(out_channels) if norm else nn.Identity()
        self.act = nn.SiLU() if silu else nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(hidden_states)))


class ResBlock(nn.Module):
    """Two convolutions, the second normalised."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvLayer(dim, dim, silu=True)
        self.conv2 = ConvLayer(dim, dim, bias=False, norm=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.conv2(self.conv1(hidden_states))


class LiteMLA(nn.Module):
    """Multi-scale linear attention (Cai et al., arXiv:2205.14756) over all positions: ReLU in place of softmax.

    Args:
        dim: D; heads have `head_dim` channels each.
        head_dim: channels of a head.
        scales: edges of the neighbourhoods that queries, keys and values are gathered over for further heads.
    """

    def __init__(self, dim: int, head_dim: int, scales: Sequence[int]) -> None:
        super().__init__()
        heads = dim // head_dim
        self.head_dim = head_dim
        self.qkv = ConvLayer(dim, 3 * dim, 1, bias=False)
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                PaddedConv3d(3 * dim, 3 * dim, scale, groups=3 * dim, bias=False),
                nn.Conv3d(3 * dim, 3 * dim, 1, groups=3 * heads, bias=False),
            )
            for scale in scales
        )
        self.proj = ConvLayer(dim * (1 + len(scales)), dim, 1, bias=False, norm=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        qkv = self.qkv(hidden_states)
        qkv = torch.cat([qkv, *(gather(qkv) for gather in self.aggreg)], dim=1)
        return self.proj(linear_attention(qkv, self.head_dim))


def linear_attention(qkv: Tensor, head_dim: int, eps: float = 1e-15) -> Tensor:
    """relu(q) (relu(k)^T v) / (relu(q) sum relu(k)) of each head: (B, 3 D, T, h, w) -> (B, D, T, h, w).

    Channels are those of one head after the other, of each its q, k and v.
    """
    dtype, shape = qkv.dtype, qkv.shape[2:]
    q, k, v = qkv.flatten(2).unflatten(1, (-1, 3 * head_dim)).split(head_dim, dim=2)
    if dtype == torch.float16:  # sums over so many positions leave its range
        q, k, v = q.float(), k.float(), v.float()
    q, k = F.relu(q), F.relu(k)
    counted = F.pad(v, (0, 0, 0, 1), value=1.0)  # a row of ones, whose attention is the divisor
    sums = (counted @ k.transpose(2, 3) @ q).float()
    attended = sums[:, :, :-1] / (sums[:, :, -1:] + eps)
    return attended.to(dtype).flatten(1, 2).unflatten(2, shape)


class GLUMBConv(nn.Module):
    """Inverted bottleneck whose depthwise convolution makes a gate beside the values."""

    def __init__(self, dim: int, expansion: int = 4) -> None:
        super().__init__()
        inner = expansion * dim
        self.inverted_conv = ConvLayer(dim, 2 * inner, 1, silu=True)
        self.depth_conv = ConvLayer(2 * inner, 2 * inner, groups=2 * inner)
        self.point_conv = ConvLayer(inner, dim, 1, bias=False, norm=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        values, gate = self.depth_conv(self.inverted_conv(hidden_states)).chunk(2, dim=1)
        return self.point_conv(values * F.silu(gate))


class Residual(nn.Module):
    """A module beside its input."""

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.main(hidden_states)


class EfficientViTBlock(nn.Module):
    """Attention to everything, then a convolution."""

    def __init__(self, dim: int, head_dim: int, scales: Sequence[int]) -> None:
        super().__init__()
        self.context_module = Residual(LiteMLA(dim, head_dim, scales))
        self.local_module = Residual(GLUMBConv(dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.local_module(self.context_module(hidden_states))


# --- other sizes and widths, beside shortcuts without weights ---------------------------------------------------------


class Downsample(nn.Module):
    """Half the height and width, and of a video half the frames if `temporal`."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.temporal, self.out_channels = temporal, out_channels
        self.main = ConvLayer(in_channels, out_channels, stride=(2 if temporal else 1, 2, 2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        folded = pixel_unshuffle_3d(hidden_states, (2 if self.temporal and hidden_states.shape[2] > 1 else 1, 2, 2))
        return self.main(hidden_states) + average_channels(folded, self.out_channels)


class InterpolateConv(nn.Module):
    """Every position as often as it is to be there, and a convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvLayer(in_channels, out_channels)

    def forward(self, hidden_states: Tensor, factors: Factors) -> Tensor:
        sizes = [size * factor for size, factor in zip(hidden_states.shape[2:], factors, strict=True)]
        return self.conv(F.interpolate(hidden_states, size=sizes, mode="nearest"))


class Upsample(nn.Module):
    """Twice the height and width, and of a video twice the frames if `temporal`."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.temporal, self.out_channels = temporal, out_channels
        self.main = InterpolateConv(in_channels, out_channels)

    def forward(self, hidden_states: Tensor, is_image: bool) -> Tensor:
        factors = (2 if self.temporal and not is_image else 1, 2, 2)
        repeated = repeat_channels(hidden_states, self.out_channels * math.prod(factors))
        return self.main(hidden_states, factors) + pixel_shuffle_3d(repeated, factors)


class Widen(nn.Module):
    """More channels: a convolution beside every channel several times."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.main = ConvLayer(in_channels, out_channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.main(hidden_states) + repeat_channels(hidden_states, self.main.conv.out_channels)


class Ops(nn.Module):
    """Modules in turn, under the name of the published weights; each may be recomputed in the backward pass."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any

    def __init__(self, *ops: nn.Module) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(ops)

    def forward(self, hidden_states: Tensor, is_image: bool = False) -> Tensor:
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for op in self.op_list:
            arguments = (hidden_states, is_image) if isinstance(op, Upsample) else (hidden_states,)
            run = functools.partial(self._gradient_checkpointing_func, op) if recompute else op
            hidden_states = run(*arguments)
        return hidden_states


class Narrow(nn.Module):
    """Fewer channels: a convolution beside means of several channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.main = Ops(ConvLayer(in_channels, out_channels))
        self.out_channels = out_channels

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.main(hidden_states) + average_channels(hidden_states, self.out_channels)


# --- the two networks -------------------------------------------------------------------------------------------------


class DCEncoder(nn.Module):
    """A tile (B, 3, T, H, W) -> latents (B, Z, N, h, w); arguments as in `VideoDCAutoencoder`."""

    def __init__(
        self,
        latent_channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        attention: Sequence[bool],
        temporal: Sequence[bool],
        head_dim: int,
        scales: Sequence[int],
    ) -> None:
        super().__init__()
        self.project_in = ConvLayer(3, widths[0])
        self.stages = nn.ModuleList()
        for stage, (dim, depth, attends) in enumerate(zip(widths, depths, attention, strict=True)):
            ops = [_block(dim, attends, head_dim, scales) for _ in range(depth)]
            if stage < len(temporal):
                ops.append(Downsample(dim, widths[stage + 1], temporal[stage]))
            self.stages.append(Ops(*ops))
        self.project_out = Narrow(widths[-1], latent_channels)

    def forward(self, video: Tensor) -> Tensor:
        hidden_states = self.project_in(video)
        for stage in self.stages:
            hidden_states = stage(hidden_states)
        return self.project_out(hidden_states)


class DCDecoder(nn.Module):
    """Latents of a tile (B, Z, N, h, w) -> (B, 3, T, H, W). Stages are indexed as in the encoder."""

    def __init__(
        self,
        latent_channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        attention: Sequence[bool],
        temporal: Sequence[bool],
        head_dim: int,
        scales: Sequence[int],
    ) -> None:
        super().__init__()
        self.project_in = Widen(latent_channels, widths[-1])
        stages: list[Ops] = []
        for stage, (dim, depth, attends) in enumerate(zip(widths, depths, attention, strict=True)):
            ops = [_block(dim, attends, head_dim, scales) for _ in range(depth)]
            if stage < len(temporal):
                ops.insert(0, Upsample(widths[stage + 1], dim, temporal[stage]))
            stages.append(Ops(*ops))
        self.stages = Levels(stages)
        self.project_out = Ops(RMSNorm3d(widths[0]), nn.ReLU(), ConvLayer(widths[0], 3))

    def forward(self, latents: Tensor, is_image: bool) -> Tensor:
        hidden_states = self.project_in(latents)
        for stage in reversed(range(len(self.stages))):
            hidden_states = self.stages[stage](hidden_states, is_image)
        return self.project_out(hidden_states)


def _block(dim: int, attends: bool, head_dim: int, scales: Sequence[int]) -> nn.Module:
    return EfficientViTBlock(dim, head_dim, scales) if attends else Residual(ResBlock(dim))


# --- the codec --------------------------------------------------------------------------------------------------------


class VideoDCAutoencoder(TiledCodec):
    """The deep compression autoencoder of Open-Sora 2.0.

    Clips have one frame, an image, or a multiple of 2 ** (number of temporal stages).

    Args:
        latent_channels: Z.
        widths: channels of every stage; each but the last is followed by half the height and width.
        encoder_depths: blocks of every stage of the encoder.
        decoder_depths: blocks of every stage of the decoder.
        attention: of every stage, whether its blocks attend to everything; residual blocks otherwise.
        temporal_downsample: of every stage but the last, whether half the frames follow.
        head_dim: channels of an attention head.
        scales: see `LiteMLA`.
        latent_space: fields of `LatentSpace`.
        tile_sample_size: edge of a tile in pixels, a multiple of 4 * `spatial_factor`, a quarter of which overlaps with
            the next; None for whole frames.
        tile_sample_frames: frames of a tile, a multiple of 4 * `temporal_factor`, likewise; None for whole clips.

    Raises:
        OpenSoraError: for options that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Residual", "EfficientViTBlock", "Upsample", "Downsample"]
    _group_offload_block_modules = ["encoder", "decoder"]
    name_of_last_layer = "project_out.op_list.2.conv"
    single_frame = True

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 128,
        widths: Sequence[int] = (128, 256, 512, 512, 1024, 1024),
        encoder_depths: Sequence[int] = (2, 2, 2, 3, 3, 3),
        decoder_depths: Sequence[int] = (3, 3, 3, 3, 3, 3),
        attention: Sequence[bool] = (False, False, False, True, True, True),
        temporal_downsample: Sequence[bool] = (False, False, False, True, True),
        head_dim: int = 32,
        scales: Sequence[int] = (5,),
        latent_space: dict[str, Any] | None = None,
        tile_sample_size: int | None = 256,
        tile_sample_frames: int | None = 32,
    ) -> None:
        super().__init__()
        stages = len(widths)
        lengths = {"encoder_depths": stages, "decoder_depths": stages, "attention": stages}
        for name, expected in {**lengths, "temporal_downsample": stages - 1}.items():
            if (found := len(locals()[name])) != expected:
                raise OpenSoraError(f"{name} has {found} entries, but {stages} stages need {expected}")
        if any(scale % 2 == 0 for scale in scales):
            raise OpenSoraError(f"scales are {list(scales)}; neighbourhoods have a middle, so give odd numbers")
        self.latent_channels = latent_channels
        self.spatial_factor = 2 ** (stages - 1)
        self.temporal_factor = 2 ** sum(bool(halve) for halve in temporal_downsample)
        self.frame_multiple = self.temporal_factor
        shared = (attention, temporal_downsample, head_dim, scales)
        self.encoder = DCEncoder(latent_channels, widths, encoder_depths, *shared)
        self.decoder = DCDecoder(latent_channels, widths, decoder_depths, *shared)
        self._set_tiles(tile_sample_size, tile_sample_frames)
        self._declare(LatentSpace.from_dict(latent_space or {}))

    def latent_frames(self, num_frames: int) -> int:
        """N for a clip of `num_frames` frames: 1 -> 1, 4 -> 1, 32 -> 8 in Open-Sora 2.0."""
        VideoSize(num_frames, self.spatial_factor, self.spatial_factor).check(self.size_rule())
        return -(-num_frames // self.temporal_factor)

    # ---- the whole way

    @apply_offload_hooks
    def encode_raw(self, video: Tensor) -> Posterior:
        """Latents of a video (B, 3, T, H, W), float32 (B, Z, N, h, w), which are certain: every draw is the same."""
        return Certain(in_tiles(self.encoder, video.to(self.dtype), self._sample_tile, self._latent_tile).float())

    @apply_offload_hooks
    def decode_raw(self, latents: Tensor, num_frames: int) -> Tensor:
        """Video (B, 3, num_frames, H, W), float32, of latents (B, Z, N, h, w) before factor, shift and scale."""
        decode = functools.partial(self.decoder, is_image=num_frames == 1)
        # A lone latent frame at the end is seen by the tile before as well; alone, the decoder knows it as an image.
        return in_tiles(decode, latents.to(self.dtype), self._latent_tile, self._sample_tile, shortest=2).float()


# --- how it is published ----------------------------------------------------------------------------------------------


class _DCFormat(JointFormat):
    cls = VideoDCAutoencoder
    summary = "deep compression autoencoder of Open-Sora 2.0"
    prefixes = ("encoder.project_in.conv.", "encoder.stages.")

    def read_shapes(self, shapes: TensorShapes) -> tuple[dict[str, Any], dict[str, str]]:
        stages = range(shapes.count("encoder.stages") or 0)
        attention = [shapes.has(f"encoder.stages.{i}.op_list.0.context_module.") for i in stages]
        first = ["context_module.main.qkv" if attends else "main.conv1" for attends in attention]
        widths = [shapes.size(f"encoder.stages.{i}.op_list.0.{first[i]}.conv.weight", 1) for i in stages]
        config = known_values(
            latent_channels=shapes.size("decoder.project_in.main.conv.weight", 1),
            widths=widths if widths and None not in widths else None,
            encoder_depths=_depths(shapes, "encoder") or None,
            decoder_depths=_depths(shapes, "decoder") or None,
            attention=attention or None,
        )
        if True in attention:
            gathers = f"encoder.stages.{attention.index(True)}.op_list.0.context_module.main.aggreg"
            scales = [shapes.size(f"{gathers}.{i}.0.weight", 2) for i in range(shapes.count(gathers) or 0)]
            config |= known_values(head_dim=shapes.size(f"{gathers}.0.1.weight", 1), scales=scales or None)
        unsure = {
            "temporal_downsample": "shapes do not tell; the fourth and the fifth stage of Open-Sora 2.0",
            "latent_space": "weights do not hold it; published inference computes without a scaling factor, and "
            "training declares 0.493 (divide) but never applies it",
        }
        return config, unsure

    def complete(self, config: Mapping[str, Any], assumed: Mapping[str, Any], where: Path) -> dict[str, Any]:
        complete = super().complete(config, assumed, where)
        if len(complete["temporal_downsample"]) != len(complete["widths"]) - 1:
            stages = len(complete["widths"])
            raise OpenSoraError(f"{where} has {stages} stages; give temporal_downsample in a config.json beside it")
        return complete


def _depths(shapes: TensorShapes, network: str) -> list[int]:
    """Blocks of every stage; what changes the size beside them is none, and the last stage has none such."""
    counts = [shapes.count(f"{network}.stages.{i}.op_list") or 0 for i in range(shapes.count(f"{network}.stages") or 0)]
    return [count - 1 for count in counts[:-1]] + counts[-1:]


FORMAT = _DCFormat()
