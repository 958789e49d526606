"""STDiT3 as it is described: adaLN-single blocks in space and time by turns, each with text and an MLP.

Queries, keys and their rotation are normed and turned in float32, texts are padded to the model's length and their
padding is hidden by a mask, keys and values of the text are made anew in every step. Conditioning frames are left out.

Letters: B samples, T latent frames, S patches of a frame, N = T * S tokens, L text tokens, D hidden size, H heads,
d = D / H features of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """In float32, whatever comes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.to(torch.float32)
        variance = x32.pow(2).mean(-1, keepdim=True)
        return self.weight * (x32 * torch.rsqrt(variance + 1e-6)).to(x.dtype)


class Rotary(nn.Module):
    """Angles of positions 0 .. T - 1, each for two neighbouring features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(10_000 ** -(torch.arange(0, dim, 2).float() / dim), requires_grad=False)

    def forward(self, length: int) -> Tensor:
        """(T, d), float32."""
        return torch.outer(torch.arange(length).float(), self.freqs.float()).repeat_interleave(2, dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """(..., T, d) in float32."""
    x32 = x.to(torch.float32)
    even, odd = x32[..., 0::2], x32[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x32 * angles.cos() + turned * angles.sin()).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads)
        self.k_norm = RMSNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """Sequences (n, length, D), each by itself."""
        n, length, dim = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(n, length, dim))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, N, D) look at texts (B, L, D) where the mask (B, L) is True."""
        batch, length, dim = x.shape
        q = self.q_linear(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv_linear(text).view(batch, text.shape[1], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.proj(attended.transpose(1, 2).reshape(batch, length, dim))


class MLP(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Attention in space, or in time if `temporal`; attention to the text; MLP."""

    def __init__(self, dim: int, num_heads: int, *, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(dim, num_heads)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(dim, 4 * dim, dim)

    def forward(
        self, x: Tensor, text: Tensor, mask: Tensor, modulation: Tensor, angles: Tensor, num_frames: int
    ) -> Tensor:
        """Tokens (B, N, D), frame after frame; `modulation` is (B, 6, D), `angles` are those of `Rotary`."""
        batch, _, dim = x.shape
        table = (self.scale_shift_table + modulation).to(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=1)
        frames = modulate(self.norm1(x), shift1, scale1).view(batch, num_frames, -1, dim)
        if self.temporal:
            columns = frames.transpose(1, 2).reshape(-1, num_frames, dim)
            attended = self.attn(columns, angles).view(batch, -1, num_frames, dim).transpose(1, 2)
        else:
            attended = self.attn(frames.flatten(0, 1)).view(frames.shape)
        x = x + gate1 * attended.reshape(x.shape)
        x = x + self.cross_attn(x, text, mask)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class NumberEmbedder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) -> (B, D)."""
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128).float() / 128)
        angles = values.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


class PatchEmbedder(nn.Module):
    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, T, H, W) with even H and W -> (B, T, H / 2, W / 2, D)."""
        return self.proj(latents).movedim(1, -1)


class TextEmbedder(nn.Module):
    def __init__(self, in_dim: int, dim: int, max_length: int) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.randn(max_length, in_dim) / in_dim**0.5)
        self.y_proj = MLP(in_dim, dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        return self.y_proj(text)


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + embedding[:, None]).to(x.dtype).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def patch_positions(h: int, w: int, dim: int, scale: float) -> Tensor:
    """(S, D): sines and cosines of the column, then of the row, in steps of a square of as many patches."""
    side = round(math.sqrt(h * w))

    def code(length: int) -> Tensor:
        positions = torch.arange(length).float() * side / length / scale
        frequencies = torch.exp(-math.log(10_000) * torch.arange(0, dim // 2, 2).float() / (dim // 2))
        angles = torch.outer(positions, frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    columns = code(w)[None].expand(h, w, -1)
    rows = code(h)[:, None].expand(h, w, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


class STDiT3(nn.Module):
    """The whole network; loads the state dict of `opensora.models.stdit3.STDiT3` with these sizes."""

    def __init__(
        self,
        *,
        hidden_size: int,
        depth: int,
        num_heads: int,
        caption_channels: int,
        in_channels: int = 4,
        model_max_length: int = 300,
        input_sq_size: int = 512,
    ) -> None:
        super().__init__()
        dim = hidden_size
        self.input_sq_size = input_sq_size
        self.rope = Rotary(dim // num_heads)
        self.x_embedder = PatchEmbedder(in_channels, dim)
        self.t_embedder = NumberEmbedder(dim)
        self.fps_embedder = NumberEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = TextEmbedder(caption_channels, dim, model_max_length)
        self.spatial_blocks = nn.ModuleList(Block(dim, num_heads, temporal=False) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(Block(dim, num_heads, temporal=True) for _ in range(depth))
        self.final_layer = FinalLayer(dim, 2 * 2 * 2 * in_channels)

    def forward(
        self, latents: Tensor, timestep: Tensor, text: Tensor, mask: Tensor, fps: Tensor, height: float, width: float
    ) -> Tensor:
        """Latents (B, C, T, H, W) and texts (B, L, D_c) with their mask (B, L), True = token, to (B, 2 C, T, H, W)."""
        tokens = self.x_embedder(latents)
        batch, num_frames, h, w, dim = tokens.shape
        positions = patch_positions(h, w, dim, math.sqrt(height * width) / self.input_sq_size)
        x = (tokens.flatten(2, 3) + positions.to(tokens.dtype)).flatten(1, 2)
        embedding = self.t_embedder(timestep, latents.dtype) + self.fps_embedder(fps, latents.dtype)
        modulation = self.t_block(embedding).view(batch, 6, dim)
        states, angles = self.y_embedder(text), self.rope(num_frames)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, states, mask, modulation, angles, num_frames)
            x = temporal(x, states, mask, modulation, angles, num_frames)
        patches = self.final_layer(x, embedding).view(batch, num_frames, h, w, 2, 2, -1)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, num_frames, 2 * h, 2 * w)
