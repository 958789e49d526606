"""The autoencoders of Open-Sora 1.0 to 1.2 as plain formulas in float64: latent space, and the part over time.

The 2D part is diffusers' AutoencoderKL, frame by frame. Clips are (C, T, H, W), `w` are published weights by their
names within the part they belong to. Nothing of the package is used here.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

FACTOR = 0.18215  # of every release up to 1.2
CHUNK = 17
Weights = dict[str, Tensor]


def frame_autoencoder(w: Weights, **config: Any) -> AutoencoderKL:
    """The 2D part in float64, strictly of these weights."""
    levels = len(config["block_out_channels"])
    blocks: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    autoencoder = AutoencoderKL(**blocks, latent_channels=4, **config).double().eval().requires_grad_(False)
    autoencoder.load_state_dict(w)
    return autoencoder


def encode_frames(autoencoder: AutoencoderKL, video: Tensor) -> Tensor:
    """Means of the latents of every frame, times the factor; video in [-1, 1]."""
    latents = [autoencoder.encode(video[:, t][None]).latent_dist.mean[0] for t in range(video.shape[1])]  # type: ignore
    return torch.stack(latents, dim=1) * FACTOR


def decode_frames(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    frames = [autoencoder.decode(latents[:, t][None] / FACTOR).sample[0] for t in range(latents.shape[1])]  # type: ignore
    return torch.stack(frames, dim=1)


# --- over time, 1.2 ---------------------------------------------------------------------------------------------------


def causal_conv(x: Tensor, w: Weights, name: str, stride: int = 1) -> Tensor:
    """Zeros before the first frame instead of around; `stride` in time."""
    weight, bias = w[f"{name}.conv.weight"], w.get(f"{name}.conv.bias")
    kernel = weight.shape[2]
    front = max(0, kernel - 1 + (1 - stride))
    side = kernel // 2
    padded = F.pad(x, (side, side, side, side, front, 0))
    return F.conv3d(padded[None], weight, bias, stride=(stride, 1, 1))[0]


def norm_silu(x: Tensor, w: Weights, name: str, groups: int) -> Tensor:
    """Group norm over all frames at once, then x * sigmoid(x)."""
    channels = x.shape[0]
    grouped = x.reshape(groups, -1)
    centred = grouped - grouped.mean(1, keepdim=True)
    normed = (centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-5)).reshape(x.shape)
    weight, bias = (w[f"{name}.{part}"].reshape(channels, 1, 1, 1) for part in ("weight", "bias"))
    normed = normed * weight + bias
    return normed * torch.sigmoid(normed)


def res_block(x: Tensor, w: Weights, name: str, groups: int) -> Tensor:
    hidden = causal_conv(norm_silu(x, w, f"{name}.norm1", groups), w, f"{name}.conv1")
    hidden = causal_conv(norm_silu(hidden, w, f"{name}.norm2", groups), w, f"{name}.conv2")
    return hidden + (causal_conv(x, w, f"{name}.conv3") if f"{name}.conv3.conv.weight" in w else x)


def run_blocks(x: Tensor, w: Weights, name: str, groups: int) -> Tensor:
    number = 0
    while f"{name}.{number}.conv1.conv.weight" in w:
        x = res_block(x, w, f"{name}.{number}", groups)
        number += 1
    return x


def number_of_levels(w: Weights, part: str) -> int:
    return 1 + max(int(name.split(".")[2]) for name in w if name.startswith(f"{part}.block_res_blocks."))


def encode_chunk(x: Tensor, w: Weights, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of at most 17 frames of 2D latents; levels that have a convolution halve time after it."""
    levels = number_of_levels(w, "encoder")
    factor = 2 ** sum(f"encoder.conv_blocks.{i}.conv.weight" in w for i in range(levels - 1))
    x = F.pad(x, (0, 0, 0, 0, -x.shape[1] % factor, 0))
    x = causal_conv(x, w, "encoder.conv_in")
    for level in range(levels):
        x = run_blocks(x, w, f"encoder.block_res_blocks.{level}", groups)
        if f"encoder.conv_blocks.{level}.conv.weight" in w:
            x = causal_conv(x, w, f"encoder.conv_blocks.{level}", stride=2)
    x = run_blocks(x, w, "encoder.res_blocks", groups)
    x = causal_conv(norm_silu(x, w, "encoder.norm1", groups), w, "encoder.conv2")
    mean, log_variance = causal_conv(x, w, "quant_conv").chunk(2)
    return mean, log_variance.clamp(-30, 20)


def decode_chunk(z: Tensor, w: Weights, groups: int, num_frames: int) -> Tensor:
    """At most 17 frames of 2D latents; where time is doubled, channel 2c + s becomes channel c of frame 2t + s."""
    x = causal_conv(causal_conv(z, w, "post_quant_conv"), w, "decoder.conv1")
    x = run_blocks(x, w, "decoder.res_blocks", groups)
    for level in reversed(range(number_of_levels(w, "decoder"))):
        x = run_blocks(x, w, f"decoder.block_res_blocks.{level}", groups)
        if f"decoder.conv_blocks.{level - 1}.conv.weight" in w:
            both = causal_conv(x, w, f"decoder.conv_blocks.{level - 1}")
            x = torch.empty(both.shape[0] // 2, both.shape[1] * 2, *both.shape[2:], dtype=both.dtype)
            x[:, 0::2], x[:, 1::2] = both[0::2], both[1::2]
    x = causal_conv(norm_silu(x, w, "decoder.norm1", groups), w, "decoder.conv_out")
    return x[:, x.shape[1] - num_frames :]


def encode_time(frame_latents: Tensor, w: Weights, groups: int, chunk: int = CHUNK) -> Tensor:
    """Means, chunk by chunk."""
    return torch.cat([encode_chunk(part, w, groups)[0] for part in frame_latents.split(chunk, dim=1)], dim=1)


def decode_time(z: Tensor, w: Weights, groups: int, num_frames: int, chunk: int = CHUNK, factor: int = 4) -> Tensor:
    parts = []
    for part in z.split(math.ceil(chunk / factor), dim=1):
        length = min(chunk, num_frames)
        parts.append(decode_chunk(part, w, groups, length))
        num_frames -= length
    return torch.cat(parts, dim=1)


def normalised(z: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale per channel, (C, 1, 1, 1)."""
    return (z - shift) / scale


def denormalised(z: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return z * scale + shift
