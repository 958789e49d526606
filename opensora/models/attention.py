"""Attention along one axis of a video's tokens, and attention from tokens to text.

Letters: B samples, H heads, N queries, L keys, d features of a head, D = H * d hidden size.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from opensora.models.fused import FusedLinear
from opensora.models.pieces import in_cache, is_hooked

# Within these bounds two batched products and a softmax take the place of the fused kernel on a CPU. Measured without
# AMX, forward and backward: in bf16 5 to 10 times as fast from 5 to 128 keys, in float32 a little faster; from 256 keys
# on the fused kernel wins. Where a processor has AMX it wins earlier: at 100 keys of text it takes 0.6 of the time, at
# 30 as much, at 15 frames 1.4 (`python -m benchmarks kernels`). The bound on all scores of a call keeps them within
# 256 MiB in float32.
SHORT_KEYS = 64 if torch.cpu._is_amx_tile_supported() else 128
SHORT_SCORES = 2**26
# Memory is planned on tensors without data, for any device; they count the products, which take more.
_COUNTED_AS_CPU = ("cpu", "meta")


class AttentionBackend:
    """Which fused kernel diffusers picks for one module; None = the active one (`model.set_attention_backend`)."""

    _attention_backend: Any = None
    _parallel_config: Any = None


def prefers_products(device_type: str, scores: Sequence[int]) -> bool:
    """Whether plain products beat the fused kernel: on a CPU, for few keys and scores that fit in memory.

    Args:
        device_type: where the tensors are, such as `"cuda"`.
        scores: shape of the scores, (B, H, N, L).
    """
    return device_type in _COUNTED_AS_CPU and scores[-1] <= SHORT_KEYS and math.prod(scores) <= SHORT_SCORES


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, backend: AttentionBackend | None = None
) -> Tensor:
    """Scaled dot-product attention, softmax(q k^T / sqrt(d) + bias) v.

    Args:
        query: (B, H, N, d).
        key, value: (B, H, L, d).
        bias: (B, 1, 1, L), added to the scores; minus infinity hides a key.
        backend: fused kernel, used where `prefers_products` says no: always on accelerators.

    Returns:
        (B, H, N, d).
    """
    length, head_dim = key.shape[-2:]
    if not prefers_products(query.device.type, (*query.shape[:-1], length)):
        arguments = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), bias)
        name, parallel = (backend._attention_backend, backend._parallel_config) if backend else (None, None)
        return dispatch_attention_fn(*arguments, backend=name, parallel_config=parallel).transpose(1, 2)
    q, k, v = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    scale = 1 / math.sqrt(head_dim)
    if bias is None:
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
    else:
        per_head = bias.expand(-1, query.shape[1], -1, -1).reshape(-1, 1, length)
        scores = torch.baddbmm(per_head, q, k.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(dim=-1), v).unflatten(0, query.shape[:2])


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang & Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight.to(hidden_states.dtype)
        return F.rms_norm(hidden_states, weight.shape, weight, self.eps)


class RotaryEmbedding(nn.Module):
    """Rotary positions of one axis (Su et al., 2021), pairs of neighbouring features.

    The frequencies are part of the published state dicts, so they are a (frozen) parameter here too. What is computed
    with is derived anew, because a cast to half precision would round the parameter, and with it far positions.

    Args:
        head_dim: d, even.
        theta: longest period / (2 pi).
    """

    def __init__(self, head_dim: int, theta: float = 10_000.0) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self.freqs = nn.Parameter(self.frequencies(), requires_grad=False)

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """theta^(-2i / d), (d / 2,) float32."""
        return self.theta ** -(torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines (-sin, +sin of each pair) of positions 0 .. length - 1; two (length, d), float32."""
        return self.grid(torch.arange(length, dtype=torch.float32, device=self.freqs.device))

    def grid(self, *positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same for all points of a grid; each axis turns d features of its own, one after the other.

        Args:
            positions: of each axis, (N_i,) float32.

        Returns:
            Two (product of all N_i, d times the number of axes), float32, the last axis fastest.
        """
        frequencies = self.frequencies(positions[0].device)
        points = torch.stack(torch.meshgrid(*positions, indexing="ij"), dim=-1)
        angles = (points[..., None] * frequencies).flatten(-2).flatten(0, -2)
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([cos, cos], dim=-1).flatten(1), torch.stack([-sin, sin], dim=-1).flatten(1)


def rotate(hidden_states: Tensor, rope: tuple[Tensor, Tensor], *, halves: bool = False) -> Tensor:
    """Turn every pair of features by its position's angle.

    Args:
        hidden_states: (..., N, d).
        rope: cosines and signed sines (N, d), as of `RotaryEmbedding`.
        halves: feature j is paired with feature j + d / 2, in place of neighbours with each other.
    """
    cos, sin = (table.to(hidden_states.dtype) for table in rope)
    if halves:
        swapped = hidden_states.roll(hidden_states.shape[-1] // 2, dims=-1)
    else:
        swapped = hidden_states.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(hidden_states * cos, swapped, sin)


class SelfAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention among the tokens along one axis; all other axes are batch.

    Args:
        hidden_size: D.
        num_heads: H.
        qk_norm: RMS-normalise queries and keys per head.
        rotate_before_norm: rotary positions before that norm (the order some published weights were trained with).
    """

    is_cross_attention = False

    def __init__(
        self, hidden_size: int, num_heads: int, *, qk_norm: bool = True, rotate_before_norm: bool = False
    ) -> None:
        super().__init__()
        self.processor = AttentionBackend()
        self.num_heads, self.rotate_before_norm = num_heads, rotate_before_norm
        self.qkv = FusedLinear(hidden_size, 3 * hidden_size)
        self.q_norm = RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.proj = FusedLinear(hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, dim: int = 1, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend along axis `dim`.

        Args:
            hidden_states: (B, ..., D), three or more axes.
            dim: the axis that attends, between batch and features.
            rope: tables of `RotaryEmbedding` for that axis.

        Returns:
            Same shape.
        """
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
        qkv = qkv.movedim((-3, dim), (0, -2)).contiguous()  # (3, batch axes, H, N, d); one copy here saves ten later
        attended = self.attend_all(qkv.flatten(1, -4), rope).unflatten(0, qkv.shape[1:-3])
        return self.proj(attended.movedim(-2, dim).flatten(-2))

    def attend_all(self, qkv: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Every token attends to all, (3, B, H, N, d) to (B, H, N, d); `rope` holds tables of the N positions."""
        query, key, value = qkv.unbind()
        query, key = self._placed(query, self.q_norm, rope), self._placed(key, self.k_norm, rope)
        return attend(query, key, value, backend=self.processor)

    def _placed(self, states: Tensor, norm: nn.Module, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries or keys (B, H, N, d), normed and turned by their positions."""

        def placed(states: Tensor) -> Tensor:
            if rope is None:
                return norm(states)
            return norm(rotate(states, rope)) if self.rotate_before_norm else rotate(norm(states), rope)

        if is_hooked(norm) or (rope is None and isinstance(norm, nn.Identity)):
            return placed(states)
        return in_cache(placed, states)


class CrossAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention from tokens to text.

    Keys and values depend on the text only: `project_text` makes them, once for all denoising steps if kept.

    Args:
        hidden_size: D, of tokens and of projected text.
        num_heads: H.
    """

    is_cross_attention = True

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.processor = AttentionBackend()
        self.num_heads = num_heads
        self.q_linear = FusedLinear(hidden_size, hidden_size)
        self.kv_linear = FusedLinear(hidden_size, 2 * hidden_size)
        self.proj = FusedLinear(hidden_size, hidden_size)

    def project_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> keys and values, (B, H, L, d) each."""
        key, value = self.kv_linear(text).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
        return key, value

    def forward(self, hidden_states: Tensor, keys_values: tuple[Tensor, Tensor], bias: Tensor | None = None) -> Tensor:
        """Attend to the text.

        Args:
            hidden_states: (B, ..., D).
            keys_values: from `project_text`; of a text for every sample, or for every entry of the first axes.
            bias: of `text_bias`, one for each text; None = every token counts.

        Returns:
            Same shape as `hidden_states`.
        """
        query = self.q_linear(hidden_states).view(len(keys_values[0]), -1, self.num_heads, keys_values[0].shape[-1])
        attended = attend(query.transpose(1, 2), *keys_values, bias, self.processor)
        return self.proj(attended.transpose(1, 2).reshape(hidden_states.shape))


def text_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Bias of the scores that hides the tokens where `mask` (B, L) is 0; (B, 1, 1, L), 0 or minus infinity."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(mask == 0, -math.inf)[:, None, None]
