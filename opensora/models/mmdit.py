"""MMDiT, the diffusion transformer of Open-Sora 2.0: text and video tokens attend together, everywhere.

It is the network of FLUX.1 (https://github.com/black-forest-labs/flux) turned to video. Tokens are patches of p x p
latent cells of one frame; every layer attends over all tokens of the text and of the video at once. In the first layers
(double-stream) text and video have weights of their own and meet in attention alone, in the others (single-stream) they
share them. Time, the pooled text and, in guidance-distilled weights, the guidance scale modulate all layers (adaLN).
Rotary positions code frame, row and column; text tokens stand at position 0 of all three.

What a clip is conditioned on (latents and a mask of where they count) has a linear layer of its own, `cond_in`, whose
result is added to the tokens. Padding of the text takes part in attention as it did in training, so masks are not read.
Parameter names are those of the published checkpoints.

Letters: B samples, C latent channels, T, H, W latent frames and cells, p patch, h, w patches of a frame, N = T * h * w
video tokens, L text tokens, D hidden size, d = D / heads, D_c and P widths of the text states and of the pooled text.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # diffusers looks for it beside the class
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

from opensora.distributed.sequence_parallel import JointShards, Shards
from opensora.errors import OpenSoraError
from opensora.models.attention import AttentionBackend, attend, rotate
from opensora.models.caching import CacheIdentifiers
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.clip_conditions import ClipConditions
from opensora.models.embeddings import sinusoid
from opensora.models.fused import FusedLinear, gelu_mlp
from opensora.models.network import VideoTransformer
from opensora.models.text.t5_clip import T5ClipConditioner
from opensora.models.transformer import modulate, values_per_sample

DISTILLED_GUIDANCE = 4.0
"""The guidance scale that guidance-distilled weights are told in training, and by default in sampling."""

QueriesKeysValues = tuple[Tensor, Tensor, Tensor]


class ScaledRMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, the quotient in float32 (Zhang & Sennrich, 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = F.rms_norm(hidden_states.float(), hidden_states.shape[-1:], eps=1e-6)
        return normed.to(hidden_states.dtype) * self.scale.to(hidden_states.dtype)


class QKNorm(nn.Module):
    """The norms of queries and keys, per head."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = ScaledRMSNorm(head_dim)
        self.key_norm = ScaledRMSNorm(head_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> QueriesKeysValues:
        """(B, N, D) each -> (B, H, N, d) each, queries and keys normed."""
        head_dim = len(self.query_norm.scale)
        query, key, value = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (query, key, value))
        return self.query_norm(query), self.key_norm(key), value


class AxialRotaryEmbedding(nn.Module):
    """Rotary positions along several axes (Su et al., 2021): each axis turns its own share of a head's features.

    Args:
        axes_dim: features of each axis, even; together they are d.
        theta: longest period / (2 pi).
        interleaved: turn neighbouring features together, as FLUX does; else feature j turns with feature j + d / 2.
    """

    def __init__(self, axes_dim: Sequence[int], theta: float, *, interleaved: bool) -> None:
        super().__init__()
        self.axes_dim, self.theta, self.interleaved = tuple(axes_dim), theta, interleaved

    def forward(self, positions: Sequence[Tensor], num_text: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines (-, + of each pair) of the text's tokens, then of every point of a grid.

        Args:
            positions: of the points along each axis, 1D.
            num_text: L, tokens at position 0.

        Returns:
            Two (L + N, d), float32, the last axis of the grid fastest.
        """
        lengths = [len(axis) for axis in positions]
        angles = []
        for axis, (dim, along) in enumerate(zip(self.axes_dim, positions, strict=True)):
            exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=along.device) / dim
            turned = along.float()[:, None] * self.theta**-exponents  # (length, dim / 2)
            ones = [1] * len(lengths)
            ones[axis] = lengths[axis]
            angles.append(turned.view(*ones, -1).expand(*lengths, -1))
        grid = F.pad(torch.cat(angles, dim=-1).flatten(0, -2), (0, 0, num_text, 0))  # (L + N, d / 2)
        cos, sin = grid.cos(), grid.sin()
        if self.interleaved:
            return torch.stack([cos, cos], dim=-1).flatten(1), torch.stack([-sin, sin], dim=-1).flatten(1)
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class JointAttention(nn.Module, AttentionModuleMixin):
    """Attention of all tokens to all tokens; it has no weights.

    Args:
        interleaved: see `AxialRotaryEmbedding`.
    """

    is_cross_attention = False

    def __init__(self, *, interleaved: bool) -> None:
        super().__init__()
        self.processor = AttentionBackend()
        self.interleaved = interleaved

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, rope: tuple[Tensor, Tensor], shards: Shards | None = None
    ) -> Tensor:
        """(B, H, L + N, d) each -> (B, L + N, D); with `shards` this rank's share of the tokens."""
        query, key = (rotate(x, rope, halves=not self.interleaved) for x in (query, key))
        if shards is None:
            attended = attend(query, key, value, backend=self.processor)
        else:
            attended = shards.in_whole_frames(self._attend_heads, torch.cat([query, key, value], dim=-1))
        return attended.transpose(1, 2).flatten(2)

    def _attend_heads(self, heads: Tensor) -> Tensor:
        """Queries, keys and values of some heads, (M, L + N, 3 d) -> (M, L + N, d)."""
        query, key, value = heads[:, None].chunk(3, dim=-1)
        return attend(query, key, value, backend=self.processor)[:, 0]


class Modulation(nn.Module):
    """What shifts, scales and gates a layer, from the vector that all layers share.

    Args:
        hidden_size: D.
        count: of vectors, three for each branch of a layer.
    """

    def __init__(self, hidden_size: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(hidden_size, count * hidden_size)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        """(B, D) -> `count` times (B, 1, D)."""
        return self.lin(F.silu(vector))[:, None].chunk(self.count, dim=-1)


class StreamAttention(nn.Module):
    """What a stream of tokens, text or video, brings to joint attention and makes of its result.

    Args:
        hidden_size: D.
        num_heads: attention heads.
        bias: of the layers of queries, keys and values.
        fused: one such layer in place of three.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, bias: bool, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv = FusedLinear(hidden_size, 3 * hidden_size, bias=bias)
        else:
            self.q_proj = FusedLinear(hidden_size, hidden_size, bias=bias)
            self.k_proj = FusedLinear(hidden_size, hidden_size, bias=bias)
            self.v_proj = FusedLinear(hidden_size, hidden_size, bias=bias)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = FusedLinear(hidden_size, hidden_size)

    def queries_keys_values(self, tokens: Tensor) -> QueriesKeysValues:
        """(B, N, D) -> (B, H, N, d) each."""
        if self.fused:
            return self.norm(*self.qkv(tokens).chunk(3, dim=-1))
        return self.norm(self.q_proj(tokens), self.k_proj(tokens), self.v_proj(tokens))


class StreamMLP(nn.Sequential):
    """Linear, GELU (tanh), linear, under the numbers that the published weights give them.

    Args:
        hidden_size: D, in and out.
        inner: width between the two.
    """

    def __init__(self, hidden_size: int, inner: int) -> None:
        layers = {"0": FusedLinear(hidden_size, inner), "2": FusedLinear(inner, hidden_size)}
        super().__init__(OrderedDict(layers))

    def forward(self, input: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        first, last = self
        return gelu_mlp(input, first, last, "tanh")


class DoubleStreamBlock(nn.Module):
    """A layer in which text and video have weights of their own and attend together.

    Args:
        hidden_size: D.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs in units of D.
        qkv_bias: of the layers of queries, keys and values.
        fused_qkv: one such layer in place of three.
        interleaved_rope: see `AxialRotaryEmbedding`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qkv_bias: bool,
        fused_qkv: bool,
        interleaved_rope: bool,
    ) -> None:
        super().__init__()
        _tell_caches(type(self))
        self.img_mod = Modulation(hidden_size, 6)
        self.img_attn = StreamAttention(hidden_size, num_heads, bias=qkv_bias, fused=fused_qkv)
        self.img_mlp = StreamMLP(hidden_size, int(hidden_size * mlp_ratio))
        self.txt_mod = Modulation(hidden_size, 6)
        self.txt_attn = StreamAttention(hidden_size, num_heads, bias=qkv_bias, fused=fused_qkv)
        self.txt_mlp = StreamMLP(hidden_size, int(hidden_size * mlp_ratio))
        self.attn = JointAttention(interleaved=interleaved_rope)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        vector: Tensor,
        rope: tuple[Tensor, Tensor],
        shards: Shards | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One layer.

        Args:
            hidden_states: (B, N, D) of the video.
            encoder_hidden_states: (B, L, D) of the text.
            vector: (B, D) of time and pooled text.
            rope: rotary tables of text, then video.
            shards: how these tokens lie on several ranks, text first; None = all are here.

        Returns:
            Both, in the same order.
        """
        video, text = hidden_states, encoder_hidden_states
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.img_mod(vector)
        txt_shift, txt_scale, txt_gate, txt_mlp_shift, txt_mlp_scale, txt_mlp_gate = self.txt_mod(vector)
        of_text = self.txt_attn.queries_keys_values(modulate(text, txt_shift, txt_scale))
        of_video = self.img_attn.queries_keys_values(modulate(video, shift, scale))
        joint = [torch.cat(both, dim=2) for both in zip(of_text, of_video, strict=True)]
        attended_text, attended = self.attn(*joint, rope, shards).split([text.shape[1], video.shape[1]], dim=1)

        video = torch.addcmul(video, gate, self.img_attn.proj(attended))
        video = torch.addcmul(video, mlp_gate, self.img_mlp(modulate(video, mlp_shift, mlp_scale)))
        text = torch.addcmul(text, txt_gate, self.txt_attn.proj(attended_text))
        text = torch.addcmul(text, txt_mlp_gate, self.txt_mlp(modulate(text, txt_mlp_shift, txt_mlp_scale)))
        return video, text


class SingleStreamBlock(nn.Module):
    """A layer in which text and video share all weights, attention and MLP side by side.

    Args: as of `DoubleStreamBlock`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qkv_bias: bool,
        fused_qkv: bool,
        interleaved_rope: bool,
    ) -> None:
        super().__init__()
        _tell_caches(type(self))
        self.hidden_size, self.fused = hidden_size, fused_qkv
        self.mlp_size = int(hidden_size * mlp_ratio)
        if fused_qkv:
            self.linear1 = FusedLinear(hidden_size, 3 * hidden_size + self.mlp_size)
        else:
            self.q_proj = FusedLinear(hidden_size, hidden_size, bias=qkv_bias)
            self.k_proj = FusedLinear(hidden_size, hidden_size, bias=qkv_bias)
            self.v_mlp = FusedLinear(hidden_size, hidden_size + self.mlp_size)
        self.linear2 = FusedLinear(hidden_size + self.mlp_size, hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.modulation = Modulation(hidden_size, 3)
        self.attn = JointAttention(interleaved=interleaved_rope)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        vector: Tensor,
        rope: tuple[Tensor, Tensor],
        shards: Shards | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One layer, see `DoubleStreamBlock.forward`."""
        num_text, num_video = encoder_hidden_states.shape[1], hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = self.modulation(vector)
        modulated = modulate(tokens, shift, scale)
        if self.fused:
            query, key, value, inner = self.linear1(modulated).split([*[self.hidden_size] * 3, self.mlp_size], dim=-1)
        else:
            query, key = self.q_proj(modulated), self.k_proj(modulated)
            value, inner = self.v_mlp(modulated).split([self.hidden_size, self.mlp_size], dim=-1)
        attended = self.attn(*self.norm(query, key, value), rope, shards)
        both = torch.cat([attended, F.gelu(inner, approximate="tanh")], dim=-1)
        text, video = torch.addcmul(tokens, gate, self.linear2(both)).split([num_text, num_video], dim=1)
        return video, text


class VectorEmbedder(nn.Module):
    """Linear, SiLU, linear: a vector for each sample to the width of the network."""

    def __init__(self, in_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, vector: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(vector)))


class LastLayer(nn.Module):
    """Modulated norm and the projection of a token to its patch."""

    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, hidden_states: Tensor, vector: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, out_features)."""
        shift, scale = self.adaLN_modulation(vector)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(hidden_states, shift, scale))


class MMDiT(VideoTransformer):
    """Multimodal diffusion transformer (Open-Sora 2.0, FLUX.1).

    Args:
        in_channels: C.
        patch_size: p, rows and columns of a patch; patches hold one frame.
        hidden_size: D.
        num_heads: attention heads.
        depth: double-stream layers.
        depth_single_blocks: single-stream layers, which follow.
        mlp_ratio: width of the MLPs in units of D.
        axes_dim: features of a head that code frame, row and column.
        theta: see `AxialRotaryEmbedding`.
        qkv_bias: whether the layers of queries, keys and values have a bias.
        caption_channels: D_c.
        pooled_channels: P.
        model_max_length: text tokens; shorter texts are padded to as many.
        pred_sigma: 2 C channels come out; no weights of this family do that, and rectified flow needs none.
        guidance_embed: the network is told a guidance scale (guidance-distilled weights).
        cond_embed: it takes latents and a mask to condition on.
        known_frames_alone: these latents were encoded alone in its training, see `VideoTransformer`.
        fused_qkv: one layer for queries, keys and values in place of three.
        interleaved_rope: FLUX's rotary positions, see `AxialRotaryEmbedding`; weights of one kind become those of the
            other by `mmdit_format.convert_layout`.
        bf16_timesteps: t and 1000 t are rounded to bfloat16 before they are embedded, as the published weights were
            trained and are sampled: above 512 they then lie 4 apart.
    """

    text_conditioner = T5ClipConditioner
    reads_frame_mask = False

    _supports_gradient_checkpointing = True
    _supports_sequence_parallel = True
    _no_split_modules = ["DoubleStreamBlock", "SingleStreamBlock"]
    _repeated_blocks = ["DoubleStreamBlock", "SingleStreamBlock"]
    # What is small and decides much is not stored in 8 bits.
    _skip_layerwise_casting_patterns = ["_in", "_mod", "modulation", "norm", "final_layer"]

    _cache_identifiers = CacheIdentifiers(
        spatial=r"[.]attn$",
        layers=r"(double|single)_blocks[.][0-9]+[.](attn|img_mlp|txt_mlp|linear2)",
        blocks=r"(double|single)_blocks[.][0-9]+",
    )

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        patch_size: int = 2,
        hidden_size: int = 3072,
        num_heads: int = 24,
        depth: int = 19,
        depth_single_blocks: int = 38,
        mlp_ratio: float = 4.0,
        axes_dim: Sequence[int] = (16, 56, 56),
        theta: float = 10_000.0,
        qkv_bias: bool = True,
        caption_channels: int = 4096,
        pooled_channels: int = 768,
        model_max_length: int = 512,
        pred_sigma: bool = False,
        guidance_embed: bool = False,
        cond_embed: bool = True,
        known_frames_alone: bool = True,
        fused_qkv: bool = False,
        interleaved_rope: bool = False,
        bf16_timesteps: bool = True,
    ) -> None:
        super().__init__()
        _check_heads(hidden_size, num_heads, axes_dim)
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if pred_sigma else in_channels
        self.patch_size = (1, patch_size, patch_size)
        self.bf16_timesteps = bf16_timesteps
        self.reads_channels, self.reads_guidance = cond_embed, guidance_embed
        self.known_frames_alone = cond_embed and known_frames_alone
        self.gradient_checkpointing = False

        cells = patch_size**2
        self.img_in = FusedLinear(in_channels * cells, hidden_size)
        self.time_in = VectorEmbedder(_TIME_FEATURES, hidden_size)
        self.vector_in = VectorEmbedder(pooled_channels, hidden_size)
        self.guidance_in = VectorEmbedder(_TIME_FEATURES, hidden_size) if guidance_embed else None
        self.cond_in = nn.Linear((in_channels + 1) * cells, hidden_size) if cond_embed else None
        self.txt_in = FusedLinear(caption_channels, hidden_size)
        self.rope = AxialRotaryEmbedding(axes_dim, theta, interleaved=interleaved_rope)
        sizes = (hidden_size, num_heads, mlp_ratio)
        kind = {"qkv_bias": qkv_bias, "fused_qkv": fused_qkv, "interleaved_rope": interleaved_rope}
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(*sizes, **kind) for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(*sizes, **kind) for _ in range(depth_single_blocks))
        self.final_layer = LastLayer(hidden_size, self.out_channels * cells)
        if self.cond_in is not None:  # a network that is adapted begins as the one that it was
            nn.init.zeros_(self.cond_in.weight)
            nn.init.zeros_(self.cond_in.bias)

    @property
    def blocks(self) -> list[nn.Module]:
        """All layers in the order in which they run."""
        return [*self.double_blocks, *self.single_blocks]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        clip_conditions: ClipConditions | None = None,
        pooled_projections: Tensor | None = None,
        guidance: Tensor | float | None = None,
        frame_mask: Tensor | None = None,
        drop_text: Tensor | None = None,
        text_context: Any = None,
        channel_conditioning: ChannelConditioning | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity, noise - data, from noisy latents.

        Args:
            hidden_states: (B, C, T, H, W) latents of any size; what does not fill a patch is padded with zeros.
            timestep: (B,) or a number, 0 (clean) .. 1000 (noise).
            encoder_hidden_states: (B, L, D_c) text states, padded as in training; or give `text_context`.
            encoder_attention_mask: not read; padding takes part.
            clip_conditions: not read; this network is told the frame rate in words.
            pooled_projections: (B, P) pooled text.
            guidance: (B,) or a number, the scale that guidance-distilled weights are told.
            frame_mask: None; known frames enter by `channel_conditioning`.
            drop_text: None; an empty text is text too.
            text_context: result of `encode_text`, instead of the text arguments.
            channel_conditioning: known frames; None for none, of weights with `cond_embed`.
            return_dict: a tuple of one instead of an output object when False.

        Returns:
            `.sample`, (B, C, T, H, W), in the model's dtype.

        Raises:
            OpenSoraError: shapes that do not fit, or what this network does not know.
        """
        self._check(hidden_states, frame_mask, drop_text, channel_conditioning)
        batch, device, dtype = len(hidden_states), hidden_states.device, get_parameter_dtype(self.time_in)
        if text_context is not None:
            encoder_hidden_states, pooled_projections = _own_text(text_context, encoder_hidden_states)
        self._check_text(batch, encoder_hidden_states, pooled_projections)
        assert encoder_hidden_states is not None and pooled_projections is not None

        patches, grid = self._pack(hidden_states.to(dtype))
        condition = None if self.cond_in is None else self._condition(channel_conditioning, patches)
        rope = self.rope([torch.arange(length, device=device) for length in grid], encoder_hidden_states.shape[1])
        states, shards = encoder_hidden_states.to(dtype), None
        if self._sequence_group is not None:
            shards = JointShards(self._sequence_group, states.shape[1], patches.shape[1], device)
            if condition is not None and condition.shape[1] > 1:
                condition = shards.split(states, condition)[1]
            states, patches = shards.split(states, patches)
            rope = (shards.both.split(rope[0][None, None])[0, 0], shards.both.split(rope[1][None, None])[0, 0])
        text, video = self.txt_in(states), self.img_in(patches)
        if self.cond_in is not None:
            video = video + self.cond_in(condition)
        vector = self._vector(timestep, guidance, pooled_projections.to(dtype))
        for block in self.blocks:
            video, text = self._run_block(block, video, text, vector, rope, shards and shards.both)
        patches = self.final_layer(video, vector)
        sample = self._unpack(patches if shards is None else shards.gather(patches), grid, hidden_states)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def switched(self, tokens: Sequence[int]) -> tuple[int, int, int, int]:
        """Heads in place of frames: queries, keys and values on the way there, values on the way back."""
        batch, video, _ = tokens
        head_dim = self.config.hidden_size // self.config.num_heads
        return batch, self.config.num_heads, self.max_text_tokens + video, 2 * head_dim

    def _vector(self, timestep: Tensor | float, guidance: Tensor | float | None, pooled: Tensor) -> Tensor:
        """(B, D) of time, guidance and pooled text."""
        dtype, batch, device = pooled.dtype, len(pooled), pooled.device
        time = self._rounded(values_per_sample(timestep, batch, device))
        vector = self.time_in(sinusoid(time, _TIME_FEATURES).to(dtype)) + self.vector_in(pooled)
        if self.guidance_in is not None:
            scale = values_per_sample(DISTILLED_GUIDANCE if guidance is None else guidance, batch, device)
            vector = vector + self.guidance_in(sinusoid(self._rounded(1000 * scale), _TIME_FEATURES).to(dtype))
        elif guidance is not None:
            raise OpenSoraError("guidance is for guidance-distilled weights, and these are not; leave it out")
        return vector

    def _rounded(self, thousandfold: Tensor) -> Tensor:
        """1000 x as training computed it of x."""
        return ((thousandfold / 1000).bfloat16() * 1000).float() if self.bf16_timesteps else thousandfold

    def _condition(self, known: ChannelConditioning | None, video: Tensor) -> Tensor:
        """What `cond_in` reads: tokens of a mask, 1 where a frame is known, and of the latents, 0 where none is."""
        if known is None:
            return video.new_zeros(1, 1, (self.in_channels + 1) * math.prod(self.patch_size))
        latents = known.masked_latents
        mask = known.mask[:, None, :, None, None].expand(-1, 1, -1, *latents.shape[3:])
        return self._pack(torch.cat([mask.to(latents.dtype), latents], dim=1).to(video.dtype))[0]

    def _pack(self, latents: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """(B, C, T, H, W) -> (B, T * h * w, C * p * p), channels slowest, and (T, h, w)."""
        _, p, _ = self.patch_size
        rows, columns = latents.shape[3:]
        latents = F.pad(latents, (0, -columns % p, 0, -rows % p))
        cells = latents.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # (B, C, T, h, p, w, p)
        grid = (cells.shape[2], cells.shape[3], cells.shape[5])
        return cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3), grid

    def _unpack(self, tokens: Tensor, grid: tuple[int, int, int], like: Tensor) -> Tensor:
        """The inverse, without the padding."""
        _, p, _ = self.patch_size
        cells = tokens.unflatten(2, (-1, p, p)).unflatten(1, grid)  # (B, T, h, w, C, p, p)
        latents = cells.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)
        return latents[..., : like.shape[3], : like.shape[4]]

    def _check(
        self,
        hidden_states: Tensor,
        frame_mask: Tensor | None,
        drop_text: Tensor | None,
        known: ChannelConditioning | None,
    ) -> None:
        if hidden_states.ndim != 5 or hidden_states.shape[1] != self.in_channels:
            raise OpenSoraError(
                f"hidden_states has shape {tuple(hidden_states.shape)}; expected (B, {self.in_channels}, T, H, W)"
            )
        if frame_mask is not None:
            raise OpenSoraError("this transformer knows no frame_mask; give known frames as channel_conditioning")
        if drop_text is not None:
            raise OpenSoraError("this transformer has no learned null text for drop_text; give an empty prompt's text")
        if known is None:
            return
        if self.cond_in is None:
            raise OpenSoraError("this transformer reads no channel_conditioning (cond_embed is False); leave it out")
        if known.latents.shape != hidden_states.shape:
            raise OpenSoraError(
                f"channel_conditioning has shape {tuple(known.latents.shape)}; expected that of hidden_states, "
                f"{tuple(hidden_states.shape)}"
            )

    def _check_text(self, batch: int, states: Tensor | None, pooled: Tensor | None) -> None:
        if states is None or pooled is None:
            raise OpenSoraError("no text: give encoder_hidden_states and pooled_projections, or text_context")
        for name, given, width in (
            ("encoder_hidden_states", states, self.config.caption_channels),
            ("pooled_projections", pooled, self.config.pooled_channels),
        ):
            wanted = (batch, *given.shape[1:-1], width)
            if given.shape != wanted or given.ndim != (3 if given is states else 2):
                axes = f"({batch}, L, {width})" if given is states else f"({batch}, {width})"
                raise OpenSoraError(f"{name} has shape {tuple(given.shape)}; expected {axes}")


_TIME_FEATURES = 256


def _tell_caches(block: type[nn.Module]) -> None:
    """Caches of diffusers ask there where a block's hidden states are among its outputs."""
    places = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
    TransformerBlockRegistry.register(block, places)


def _own_text(context: dict[str, Tensor], states: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """States and pooled text of `encode_text`."""
    if states is not None:
        raise OpenSoraError("text_context came with encoder_hidden_states; give either")
    return context.get("encoder_hidden_states"), context.get("pooled_projections")


def _check_heads(hidden_size: int, num_heads: int, axes_dim: Sequence[int]) -> None:
    if hidden_size % num_heads:
        raise OpenSoraError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads}")
    head_dim = hidden_size // num_heads
    if len(axes_dim) != 3 or sum(axes_dim) != head_dim or any(dim % 2 for dim in axes_dim):
        raise OpenSoraError(
            f"axes_dim is {list(axes_dim)}; expected three even numbers with the sum {head_dim}, the features of a head"
        )
