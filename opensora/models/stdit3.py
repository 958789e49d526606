"""STDiT3, the diffusion transformer of Open-Sora 1.2: space and time attend in turns.

Every layer is a pair of blocks. The first attends among the patches of one frame, the second among the frames at one
patch, with rotary positions; both then attend to the text and end in an MLP. Time and frame rate modulate the blocks
(adaLN-single of PixArt-alpha: one linear layer for the whole network, a small table per block).

Frames that are given rather than generated (`frame_mask` False) are modulated with the embedding of timestep 0. Text
keys and values do not depend on time: `encode_text` makes them once for all denoising steps. Parameter names are those
of the published checkpoints.

What of diffusers works on this model, and what does not, is listed at `STDiT3`.

Letters: B samples, C latent channels, T, H, W latent frames and cells, D hidden size, S patches of a frame, L text
tokens, D_c width of the text encoder.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
)
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin, get_parameter_dtype
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.models.attention import CrossAttention, RotaryEmbedding, SelfAttention, text_bias
from opensora.models.embeddings import (
    MLP,
    PatchEmbed,
    ScalarEmbedder,
    TextEmbedder,
    position_embedding_2d,
    unpatchify,
)
from opensora.models.portable_config import PortableConfigMixin

STDIT3_XL2: dict[str, Any] = {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": (1, 2, 2)}
"""The published 1.1 B model (OpenSora-STDiT-v3)."""

STDIT3_3B2: dict[str, Any] = {"depth": 28, "hidden_size": 1872, "num_heads": 26, "patch_size": (1, 2, 2)}
"""The 3 B variant of the reference; no published weights."""

SPACE, TIME = 2, 1  # axes of the tokens (B, T, S, D)

KeysValues = tuple[Tensor, Tensor]


@dataclass
class TextContext:
    """What the transformer needs of a text, computed once per sample by `STDiT3.encode_text`.

    Attributes:
        states: (B, L, D) projected text; or, with `raw`, (B, L, D_c) text states as given.
        bias: (B, 1, 1, L), 0 for tokens and minus infinity for padding; None when there is no padding.
        keys_values: cross-attention keys and values, (B, heads, L, D / heads) each, in the order in which blocks run;
            None = the block makes its own from `states` in every step.
        raw: mask and `drop_text` of a text that `forward` still has to project, because the weights that do it were
            offloaded.
    """

    states: Tensor
    bias: Tensor | None
    keys_values: list[KeysValues | None]
    raw: tuple[Tensor | None, Tensor | None] | None = None


def modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then x * (1 + scale) + shift; shift and scale are (B, 1 or T, 1, D)."""
    normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, normed, 1 + scale)


class STDiT3Block(nn.Module):
    """Attention along one axis, attention to the text, MLP; the first and last modulated and gated.

    Args:
        hidden_size: D.
        num_heads: attention heads.
        mlp_ratio: width of the MLP in units of D.
        qk_norm: RMS-normalise queries and keys.
        exact_gelu: see `MLP`.
        axis: which axis of (B, T, S, D) attends, 2 (space) or 1 (time).
    """

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool, exact_gelu: bool, axis: int
    ) -> None:
        super().__init__()
        self.axis = axis
        self.scale_shift_table = nn.Parameter(torch.zeros(6, hidden_size))
        self.attn = SelfAttention(hidden_size, num_heads, qk_norm=qk_norm)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.mlp = MLP(hidden_size, int(hidden_size * mlp_ratio), hidden_size, exact=exact_gelu)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        text_bias: Tensor | None = None,
        text_keys_values: KeysValues | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One block.

        Args:
            hidden_states: (B, T, S, D).
            encoder_hidden_states: (B, L, D) projected text, read only without `text_keys_values`.
            modulation: (B, 1 or T, 6, D), from timestep and frame rate.
            text_bias: (B, 1, 1, L) of `TextContext`.
            text_keys_values: this block's entry of `TextContext`.
            rope: rotary tables of the attending axis.

        Returns:
            (B, T, S, D), in the dtype of `hidden_states`.
        """
        dtype = hidden_states.dtype
        table = (self.scale_shift_table + modulation).to(dtype).unsqueeze(3)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = table.unbind(2)

        attended = self.attn(modulate(hidden_states, shift_attn, scale_attn), self.axis, rope)
        hidden_states = torch.addcmul(hidden_states, gate_attn, attended.to(dtype))

        keys_values = text_keys_values or self.cross_attn.project_text(encoder_hidden_states)
        hidden_states = hidden_states + self.cross_attn(hidden_states, keys_values, text_bias).to(dtype)

        transformed = self.mlp(modulate(hidden_states, shift_mlp, scale_mlp))
        return torch.addcmul(hidden_states, gate_mlp, transformed.to(dtype))


TransformerBlockRegistry.register(STDiT3Block, TransformerBlockMetadata(return_hidden_states_index=0))


class FinalLayer(nn.Module):
    """Modulated norm and the projection of a token to its patch.

    Args:
        hidden_size: D.
        out_features: values of a patch.
    """

    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, hidden_size))
        self.linear = nn.Linear(hidden_size, out_features)

    def forward(
        self, hidden_states: Tensor, embedding: Tensor, given: Tensor | None = None, frame_mask: Tensor | None = None
    ) -> Tensor:
        """Tokens to patches.

        Args:
            hidden_states: (B, T, S, D).
            embedding: (B, D) of timestep and frame rate.
            given: (1 or B, D), the same at timestep 0; with `frame_mask` only.
            frame_mask: (B, T) bool, True = generated.

        Returns:
            (B, T, S, out_features).
        """

        def modulated(tokens: Tensor, embedding: Tensor) -> Tensor:
            table = (self.scale_shift_table + embedding[:, None]).to(tokens.dtype)
            shift, scale = table[:, None, None].unbind(3)
            return modulate(tokens, shift, scale)

        tokens = modulated(hidden_states, embedding)
        if given is not None and frame_mask is not None:
            # Given frames are normed and modulated a second time, on top of the first: published weights were trained
            # so. What the network says about given frames is not used in sampling.
            tokens = torch.where(frame_mask[..., None, None], tokens, modulated(tokens, given))
        return self.linear(tokens)


class _BlocksInOrder(nn.Module):
    """All blocks of a model as one list, for hooks that look for a list named `blocks` and run along it."""

    def __init__(self, blocks: list[STDiT3Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class STDiT3(ModelMixin, PortableConfigMixin, CacheMixin):
    """Space-time diffusion transformer, third generation (Open-Sora 1.2).

    What of diffusers works here:

    - `enable_gradient_checkpointing`, `compile_repeated_blocks`, `enable_layerwise_casting`, `set_attention_backend`
      (sequences of more than 128 keys; shorter ones never need it), save and load, LoRA through peft.
    - `enable_group_offload` and the pipeline's offloading. While the weights are away, `encode_text` only stores the
      text and every step projects it anew.
    - `enable_cache` with FirstBlockCache, MagCache, PyramidAttentionBroadcast (block identifiers `"spatial_blocks"`
      and `"temporal_blocks"`; by default both count as spatial) and TaylorSeer (cache identifiers such as
      `r"(spatial|temporal)_blocks[.][0-9]+[.](attn|mlp)"`).

    What does not, and raises: FasterCache and TextKVCache look for module names of other models, and SeaCache for the
    inputs of two others. Diffusers' context parallelism has no plan for alternating axes.

    Args:
        in_channels: C.
        pred_sigma: predict 2 C channels; the second half is the learned variance (unused by rectified flow).
        patch_size: latent frames, rows and columns of a patch.
        hidden_size: D, a multiple of 4 and of twice `num_heads`.
        depth: pairs of a spatial and a temporal block.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs in units of D.
        caption_channels: D_c.
        model_max_length: most text tokens, and tokens of the null text.
        qk_norm: RMS-normalise queries and keys.
        input_sq_size: side in pixels of the square at which patch positions count in whole steps.
        class_dropout_prob: share of captions that training replaces by the null text; a record for trainers, which
            draw and pass `drop_text` themselves.
        learn_null_text: train the null text (published models keep it as drawn).
        exact_gelu: GELU of the blocks by the error function instead of the published tanh approximation; for small
            models trained on a CPU, where it is four times as fast.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["STDiT3Block"]
    _repeated_blocks = ["STDiT3Block"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        pred_sigma: bool = True,
        patch_size: Sequence[int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        qk_norm: bool = True,
        input_sq_size: int = 512,
        class_dropout_prob: float = 0.1,
        learn_null_text: bool = False,
        exact_gelu: bool = False,
    ) -> None:
        super().__init__()
        if len(patch_size) != 3:
            raise OpenSoraError(f"patch_size is {list(patch_size)}; give frames, rows and columns, such as [1, 2, 2]")
        if hidden_size % (2 * num_heads) or hidden_size % 4:
            raise OpenSoraError(
                f"hidden_size {hidden_size} with {num_heads} heads: it must be a multiple of 4 and of twice the heads"
            )
        self.patch_size = (patch_size[0], patch_size[1], patch_size[2])
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if pred_sigma else in_channels
        self.input_sq_size = input_sq_size
        self.gradient_checkpointing = False

        self.rope = RotaryEmbedding(hidden_size // num_heads)
        self.x_embedder = PatchEmbed(self.patch_size, in_channels, hidden_size)
        self.t_embedder = ScalarEmbedder(hidden_size)
        self.fps_embedder = ScalarEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = TextEmbedder(caption_channels, hidden_size, model_max_length, learn_null_text=learn_null_text)

        def blocks(axis: int) -> nn.ModuleList:
            return nn.ModuleList(
                STDiT3Block(hidden_size, num_heads, mlp_ratio, qk_norm=qk_norm, exact_gelu=exact_gelu, axis=axis)
                for _ in range(depth)
            )

        self.spatial_blocks = blocks(SPACE)
        self.temporal_blocks = blocks(TIME)
        self.final_layer = FinalLayer(hidden_size, math.prod(self.patch_size) * self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """For training from scratch: Xavier-uniform layers; every block starts as the identity, the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        zero: list[nn.Linear] = [self.final_layer.linear]
        zero += [module for module in [self.t_block[1], self.fps_embedder.mlp[2]] if isinstance(module, nn.Linear)]
        zero += [block.cross_attn.proj for block in self.blocks]
        for linear in zero:
            nn.init.zeros_(linear.weight)

    def enable_cache(self, config: Any) -> None:
        """Reuse what changes little between steps; see the class for which configurations work.

        Raises:
            OpenSoraError: a kind of cache that does not work with this model, or a second one at once.
        """
        if self.is_cache_enabled:
            raise OpenSoraError(f"{type(self._cache_config).__name__} is enabled already; call disable_cache() first")
        if isinstance(config, PyramidAttentionBroadcastConfig | TaylorSeerCacheConfig):
            super().enable_cache(config)
            return
        if isinstance(config, FirstBlockCacheConfig):
            apply_first_block_cache(_BlocksInOrder(self.blocks), config)
        elif isinstance(config, MagCacheConfig):
            apply_mag_cache(_BlocksInOrder(self.blocks), config)
        else:
            raise OpenSoraError(
                f"{type(config).__name__} does not work with STDiT3; use FirstBlockCacheConfig, MagCacheConfig, "
                "PyramidAttentionBroadcastConfig or TaylorSeerCacheConfig"
            )
        HookRegistry.check_if_exists_or_initialize(self).invalidate_child_registries_cache()
        self._cache_config = config

    @property
    def blocks(self) -> list[STDiT3Block]:
        """All blocks in the order in which they run: space, time, space, time, ..."""
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return [block for pair in pairs for block in pair if isinstance(block, STDiT3Block)]

    @property
    def null_text(self) -> Tensor:
        """(model_max_length, D_c), the text that stands for "no caption"."""
        return self.y_embedder.y_embedding

    @apply_forward_hook
    def encode_text(
        self,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        *,
        drop_text: Tensor | None = None,
    ) -> TextContext:
        """Project the text once; pass the result to every step's `forward` as `text_context`. Differentiable.

        Args:
            encoder_hidden_states: (B, L, D_c), L at most `model_max_length`.
            encoder_attention_mask: (B, L), 1 = token; at least one per sample. None = all are tokens.
            drop_text: (B,) bool; True = the null text takes the place of this sample's (its mask stays).

        Raises:
            OpenSoraError: shapes that do not fit, or a sample without any token.
        """
        resident = encoder_hidden_states.device
        if self.y_embedder.y_proj.fc1.weight.device != resident:  # offloaded: only `forward` brings weights in
            raw = (encoder_attention_mask, drop_text)
            return TextContext(encoder_hidden_states, None, [None] * len(self.blocks), raw)
        states, bias = self._project_text(encoder_hidden_states, encoder_attention_mask, drop_text)
        keys_values = [
            block.cross_attn.project_text(states) if block.cross_attn.kv_linear.weight.device == resident else None
            for block in self.blocks
        ]
        return TextContext(states, bias, keys_values)

    def _project_text(
        self, text_states: Tensor, mask: Tensor | None, drop_text: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) projected text and its bias."""
        width = self.null_text.shape[1]
        if text_states.ndim != 3 or text_states.shape[-1] != width:
            raise OpenSoraError(
                f"encoder_hidden_states has shape {tuple(text_states.shape)}; expected (B, L, {width}), "
                "the width of the text encoder this model was trained with"
            )
        if drop_text is not None and drop_text.shape != text_states.shape[:1]:
            raise OpenSoraError(f"drop_text has shape {tuple(drop_text.shape)}; expected ({len(text_states)},)")
        states = self.y_embedder(text_states.to(get_parameter_dtype(self.t_block)), drop_text)
        if mask is None:
            return states, None
        if mask.shape != text_states.shape[:2]:
            raise OpenSoraError(
                f"encoder_attention_mask has shape {tuple(mask.shape)}; expected {tuple(text_states.shape[:2])}"
            )
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look would stall the device
            if not mask.any(dim=1).all():
                raise OpenSoraError("encoder_attention_mask hides every token of a sample; give each at least one")
            if mask.all():
                return states, None
        return states, text_bias(mask, states.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        fps: Tensor | float,
        height: Tensor | float,
        width: Tensor | float,
        frame_mask: Tensor | None = None,
        drop_text: Tensor | None = None,
        text_context: TextContext | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict from noisy latents.

        Args:
            hidden_states: (B, C, T, H, W) latents of any size.
            timestep: (B,) or a number, 0 (clean) .. 1000 (noise); integers are not rounded, whatever the dtype.
            encoder_hidden_states: (B, L, D_c) text states; or give `text_context`.
            encoder_attention_mask: (B, L), 1 = token.
            fps: frames per second (the family uses 120 for images), (B,) or a number.
            height, width: size of the video in pixels, (B,) or a number.
            frame_mask: (B, T) bool, True = generated, False = given, taken to be clean. None = all are generated.
            drop_text: (B,) bool, True = null text in place of this sample's.
            text_context: result of `encode_text`, instead of the three text arguments.
            return_dict: a tuple of one instead of an output object when False.

        Returns:
            `.sample`, (B, C or 2 C, T, H, W), in the model's dtype.

        Raises:
            OpenSoraError: shapes that do not fit.
        """
        batch, device = self._check(hidden_states, frame_mask), hidden_states.device
        dtype = get_parameter_dtype(self.t_block)
        tokens = self.x_embedder(hidden_states.to(dtype))  # (B, T, h, w, D)
        _, num_frames, h, w, dim = tokens.shape
        scale = torch.sqrt(_values(height, batch, device) * _values(width, batch, device)) / self.input_sq_size
        positions = position_embedding_2d(h, w, dim, scale, base_size=round(math.sqrt(h * w)))
        tokens = tokens.flatten(2, 3) + positions[:, None].to(tokens.dtype)  # (B, T, S, D)

        rate = self.fps_embedder(_values(fps, batch, device), dtype)
        embedding = (self.t_embedder(_values(timestep, batch, device), dtype) + rate).expand(batch, -1)
        modulation, given = self.t_block(embedding).view(batch, 1, 6, dim), None
        if frame_mask is not None:
            given = self.t_embedder(torch.zeros(1, device=device), dtype) + rate
            given_modulation = self.t_block(given).view(-1, 1, 6, dim)
            modulation = torch.where(frame_mask[..., None, None], modulation, given_modulation)

        text = self._text(batch, encoder_hidden_states, encoder_attention_mask, drop_text, text_context)
        rope = self.rope(num_frames)
        for block, keys_values in zip(self.blocks, text.keys_values, strict=True):
            arguments = (tokens, text.states, modulation, text.bias, keys_values, rope if block.axis == TIME else None)
            if torch.is_grad_enabled() and self.gradient_checkpointing and self._gradient_checkpointing_func:
                tokens = self._gradient_checkpointing_func(block, *arguments)
            else:
                tokens = block(*arguments)

        patches = self.final_layer(tokens, embedding, given, frame_mask).unflatten(2, (h, w))
        size = (hidden_states.shape[2], hidden_states.shape[3], hidden_states.shape[4])
        sample = unpatchify(patches, self.patch_size, size)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _text(
        self,
        batch: int,
        text_states: Tensor | None,
        mask: Tensor | None,
        drop_text: Tensor | None,
        text_context: TextContext | None,
    ) -> TextContext:
        """The text of one call; without a context every block makes its own keys and values."""
        if text_context is not None:
            if text_states is not None or mask is not None or drop_text is not None:
                raise OpenSoraError("text_context came with encoder_hidden_states, its mask or drop_text; give either")
            if text_context.raw is not None:
                states, bias = self._project_text(text_context.states, *text_context.raw)
                text_context = TextContext(states, bias, text_context.keys_values)
        elif text_states is None:
            raise OpenSoraError("no text: give encoder_hidden_states, or the text_context of encode_text")
        else:
            states, bias = self._project_text(text_states, mask, drop_text)
            text_context = TextContext(states, bias, [None] * len(self.blocks))
        if len(text_context.states) != batch:
            raise OpenSoraError(f"the text has {len(text_context.states)} samples, hidden_states {batch}; repeat one")
        return text_context

    def _check(self, hidden_states: Tensor, frame_mask: Tensor | None) -> int:
        """The number of samples, if the shapes fit."""
        if hidden_states.ndim != 5 or hidden_states.shape[1] != self.in_channels:
            raise OpenSoraError(
                f"hidden_states has shape {tuple(hidden_states.shape)}; expected (B, {self.in_channels}, T, H, W)"
            )
        batch, num_frames = hidden_states.shape[0], hidden_states.shape[2]
        if frame_mask is not None:
            if frame_mask.shape != (batch, num_frames) or frame_mask.dtype != torch.bool:
                raise OpenSoraError(
                    f"frame_mask is {frame_mask.dtype} {tuple(frame_mask.shape)}; "
                    f"expected torch.bool {(batch, num_frames)}"
                )
            if self.patch_size[0] != 1:
                raise OpenSoraError(
                    f"frame_mask needs patches of one frame; this model's patches hold {self.patch_size[0]}"
                )
        return batch


def _values(value: Tensor | float, batch: int, device: torch.device) -> Tensor:
    """One float32 number for all samples, (1,), or one for each, (B,)."""
    if not isinstance(value, Tensor):
        return torch.full((1,), float(value), device=device)
    value = value.to(device=device, dtype=torch.float32)
    if value.ndim == 0:
        return value[None]
    if value.shape not in ((1,), (batch,)):
        raise OpenSoraError(f"timestep, fps, height and width are numbers or ({batch},); one is {tuple(value.shape)}")
    return value
