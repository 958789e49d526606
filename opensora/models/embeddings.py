"""What a diffusion transformer adds to its tokens: patches, positions, time, frame rate and text.

Letters: B samples, C latent channels, T, H, W latent frames and cells, D hidden size, S = h * w patches of a frame,
L text tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.models.fused import FusedLinear, gelu_mlp

MAX_PERIOD = 10_000.0


def sinusoid(values: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of each value at `dim / 2` frequencies from 1 down to 1 / 10,000.

    Args:
        values: (N,), any range.
        dim: even number of features.

    Returns:
        (N, dim), float32.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class PatchProjection(nn.Conv3d):
    """A convolution whose stride is its kernel, computed as one matrix product per patch.

    Convolutions of a few channels are slow on a CPU in bf16; the product is the same sum. It is a `Conv3d`, down to the
    order of its result's axes, so that weights keep their published shape and hooks on convolutions (offloading,
    casting) and adapters, which build two more of them, apply.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, T, H, W), sizes multiples of the patch -> (B, D, T/p_t, H/p_h, W/p_w), features last in memory."""
        batch, channels, *sizes = input.shape
        (p_t, p_h, p_w), (t, h, w) = self.kernel_size, (n // p for n, p in zip(sizes, self.kernel_size, strict=True))
        patches = input.reshape(batch, channels, t, p_t, h, p_h, w, p_w).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return F.linear(patches.reshape(batch, t, h, w, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class PatchEmbed(nn.Module):
    """Latents of any size to patch tokens; what does not fill a patch is padded with zeros at the far ends.

    Args:
        patch_size: (frames, height, width) of a patch.
        in_channels: C.
        hidden_size: D.
    """

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, T', h, w, D)."""
        pad_t, pad_h, pad_w = (-n % p for n, p in zip(hidden_states.shape[2:], self.patch_size, strict=True))
        if pad_t or pad_h or pad_w:
            hidden_states = F.pad(hidden_states, (0, pad_w, 0, pad_h, 0, pad_t))
        return self.proj(hidden_states).movedim(1, -1)


def unpatchify(tokens: Tensor, patch_size: tuple[int, int, int], size: tuple[int, int, int]) -> Tensor:
    """The inverse layout of `PatchEmbed`, without the padding.

    Args:
        tokens: (B, T', h, w, p_t * p_h * p_w * C), channels fastest.
        patch_size: (p_t, p_h, p_w).
        size: (T, H, W) to crop to.

    Returns:
        (B, C, T, H, W).
    """
    batch, t, h, w, _ = tokens.shape
    p_t, p_h, p_w = patch_size
    cells = tokens.reshape(batch, t, h, w, p_t, p_h, p_w, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    video = cells.reshape(batch, -1, t * p_t, h * p_h, w * p_w)
    return video[:, :, : size[0], : size[1], : size[2]]


def position_code(positions: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of positions at `dim / 2` frequencies from 1 down to 1 / 10,000.

    Args:
        positions: (...,) float32, in steps of the finest frequency.
        dim: even number of features.

    Returns:
        (..., dim), float32.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    angles = positions[..., None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def position_embedding_2d(h: int, w: int, dim: int, scale: Tensor, *, base_size: int | None = None) -> Tensor:
    """Sine-cosine code of the patch positions of a frame; the first half of the features codes the column.

    Positions are divided by `scale`, so that a larger picture is a denser sampling of the same plane, and with
    `base_size` stretched so that every aspect ratio covers `base_size` steps along both sides.

    Args:
        h, w: patches of a frame.
        dim: D, a multiple of 4.
        scale: (N,), with N = 1 or one entry per sample.
        base_size: patches along the side of the square with as many patches.

    Returns:
        (N, h * w, dim), float32.
    """

    def along(length: int) -> Tensor:
        stretch = 1.0 if base_size is None else base_size / length
        positions = torch.arange(length, dtype=torch.float32, device=scale.device) * stretch
        return position_code(positions / scale.float()[:, None], dim // 2)  # (N, length, dim / 2)

    columns = along(w)[:, None].expand(-1, h, -1, -1)
    rows = along(h)[:, :, None].expand(-1, -1, w, -1)
    return torch.cat([columns, rows], dim=-1).flatten(1, 2)


class ScalarEmbedder(nn.Module):
    """A number per sample (timestep, frame rate, ...) to a vector: sinusoid, then two linear layers.

    The sinusoid is always computed in float32: in bf16 the timesteps above 256 would lose their last digits.

    Args:
        hidden_size: D.
        frequency_dim: features of the sinusoid.
    """

    def __init__(self, hidden_size: int, frequency_dim: int = 256) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(N,) -> (N, D), computed in `dtype`."""
        return self.mlp(sinusoid(values, self.frequency_dim).to(dtype))


class MLP(nn.Module):
    """Linear, GELU, linear.

    Args:
        in_dim, hidden_dim, out_dim: widths.
        exact: GELU by the error function instead of the tanh approximation of the published models. The two differ by
            less than 5e-4; on a CPU in bf16 the exact one is four times as fast.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, *, exact: bool = False) -> None:
        super().__init__()
        self.approximate = "none" if exact else "tanh"
        self.fc1 = FusedLinear(in_dim, hidden_dim)
        self.fc2 = FusedLinear(hidden_dim, out_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        return gelu_mlp(hidden_states, self.fc1, self.fc2, self.approximate)


class TextEmbedder(nn.Module):
    """Text states to the transformer's width, and the null text that stands for "no caption".

    Args:
        caption_channels: width of the text encoder.
        hidden_size: D.
        max_length: tokens of the null text.
        learn_null_text: whether the null text is trained (a parameter) or fixed (a buffer).
    """

    def __init__(self, caption_channels: int, hidden_size: int, max_length: int, *, learn_null_text: bool) -> None:
        super().__init__()
        null_text = torch.randn(max_length, caption_channels) / math.sqrt(caption_channels)
        if learn_null_text:
            self.y_embedding = nn.Parameter(null_text)
        else:
            self.register_buffer("y_embedding", null_text)
        self.y_proj = MLP(caption_channels, hidden_size, hidden_size)

    def forward(self, text_states: Tensor, drop_text: Tensor | None = None) -> Tensor:
        """(B, L, caption_channels) -> (B, L, D); rows with `drop_text` (B,) bool read the first L null tokens."""
        length = text_states.shape[1]
        if length > len(self.y_embedding):
            raise OpenSoraError(
                f"the text has {length} tokens, the model takes at most {len(self.y_embedding)}; shorten the prompt"
            )
        if drop_text is not None:
            null_text = self.y_embedding[:length].to(text_states.dtype)
            text_states = torch.where(drop_text[:, None, None], null_text, text_states)
        return self.y_proj(text_states)
