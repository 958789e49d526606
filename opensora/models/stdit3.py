"""STDiT3, the diffusion transformer of Open-Sora 1.2: space and time attend in turns.

Every layer is a pair of blocks. The first attends among the patches of one frame, the second among the frames at one
patch, with rotary positions; both then attend to the text and end in an MLP. Time and frame rate modulate the blocks
(adaLN-single of PixArt-alpha: one linear layer for the whole network, a small table per block).

Conditioning frames (`frame_mask` False) are kept clean and modulated with the embedding of timestep 0. Text keys
and values do not depend on time: `encode_text` makes them once for all denoising steps. Parameter names are those
of the published checkpoints.

Letters: B samples, C latent channels, T, H, W latent frames and cells, D hidden size, S patches of a frame, L text
tokens, D_c width of the text encoder.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # diffusers looks for it beside the class
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

from opensora.distributed.sequence_parallel import Shards
from opensora.models.attention import RotaryEmbedding
from opensora.models.caching import CacheIdentifiers
from opensora.models.clip_conditions import ClipConditions
from opensora.models.embeddings import PatchEmbed, ScalarEmbedder, TextEmbedder
from opensora.models.format import TensorShapes
from opensora.models.spacetime_format import SpaceTimeFormat, read_heads
from opensora.models.transformer import (
    SPACE,
    TIME,
    FinalLayer,
    KeysValues,
    SpaceTimeBlock,
    SpaceTimeTransformer,
    TextContext,
    embed_time_and_rate,
    frame_modulation,
    place_tokens,
    values_per_sample,
)


class STDiT3Block(SpaceTimeBlock):
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
        super().__init__(hidden_size, num_heads, mlp_ratio, qk_norm=qk_norm, exact_gelu=exact_gelu)
        self.axis = axis

    def extra_repr(self) -> str:
        """What tells blocks apart that have the same layers."""
        return f"axis={self.axis}"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        text_bias: Tensor | None = None,
        text_keys_values: KeysValues | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        shards: Shards | None = None,
    ) -> Tensor:
        """One block.

        Args:
            hidden_states: (B, T, S, D).
            encoder_hidden_states: (B, L, D) projected text, read only without `text_keys_values`.
            modulation: (B, 1 or T, 6, D), from timestep and frame rate.
            text_bias: (B, 1, 1, L) of `TextContext`.
            text_keys_values: this block's entry of `TextContext`.
            rope: rotary tables of the attending axis.
            shards: how the tokens lie on several ranks; None = all are here.

        Returns:
            (B, T, S, D), in the dtype of `hidden_states`.
        """
        table = (self.scale_shift_table + modulation).to(hidden_states.dtype).unsqueeze(3).unbind(2)
        hidden_states = self.modulated_attention(self.attn, hidden_states, table[:3], self.axis, rope, shards)
        return self.text_and_mlp(hidden_states, encoder_hidden_states, table[3:], text_bias, text_keys_values)


class STDiT3(SpaceTimeTransformer):
    """Space-time diffusion transformer, third generation (Open-Sora 1.2).

    What of diffusers works is listed at `SpaceTimeTransformer`.

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

    _no_split_modules = ["STDiT3Block"]
    _repeated_blocks = ["STDiT3Block"]
    _cache_identifiers = CacheIdentifiers(spatial="spatial_blocks", temporal="temporal_blocks")

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
        multiple_of = math.lcm(4, 2 * num_heads)
        self._set_sizes(in_channels, pred_sigma, patch_size, hidden_size, multiple_of=multiple_of)
        self.input_sq_size = input_sq_size

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
        self._initialize(self.t_block[1], self.fps_embedder.mlp[2])

    @property
    def blocks(self) -> list[STDiT3Block]:
        """All blocks in the order in which they run: space, time, space, time, ..."""
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return [block for pair in pairs for block in pair if isinstance(block, STDiT3Block)]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        clip_conditions: ClipConditions,
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
            clip_conditions: size and frame rate are told.
            frame_mask: (B, T) bool, True = generated, False = conditioning, taken to be clean. None = all True.
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
        _, num_frames, h, w, _ = tokens.shape
        rows = values_per_sample(clip_conditions.height, batch, device)
        columns = values_per_sample(clip_conditions.width, batch, device)
        scale = torch.sqrt(rows * columns) / self.input_sq_size
        tokens, shards = self._split(place_tokens(tokens, scale))  # (B, T, S, D)

        rate = self.fps_embedder(values_per_sample(clip_conditions.fps, batch, device), dtype)
        time = values_per_sample(timestep, batch, device)
        embedding, clean_embedding = embed_time_and_rate(
            self.t_embedder, time, rate, frame_mask, batch=batch, dtype=dtype
        )
        modulation = frame_modulation(self.t_block, embedding, clean_embedding, frame_mask)

        text = self._text(batch, encoder_hidden_states, encoder_attention_mask, drop_text, text_context)
        rope = self.rope(num_frames)
        for block, keys_values in zip(self.blocks, text.keys_values, strict=True):
            axis_rope = rope if block.axis == TIME else None
            arguments = (text.states, modulation, text.bias, keys_values, axis_rope, shards)
            tokens = self._run_block(block, tokens, *arguments)
        return self._output(tokens, embedding, clean_embedding, frame_mask, (h, w), hidden_states, return_dict, shards)


class _STDiT3Format(SpaceTimeFormat):
    cls = STDiT3
    summary = "transformer of Open-Sora 1.2"
    prefixes = ("spatial_blocks.0.", "temporal_blocks.0.")
    first_block = "spatial_blocks.0"

    def recognises(self, shapes: TensorShapes) -> bool:
        # Open-Sora 1.3 has blocks of these names too.
        return shapes.has(*self.prefixes) and not shapes.has("x_embedder_cond.")

    def read_shapes(self, shapes: TensorShapes) -> tuple[dict[str, Any], dict[str, str]]:
        config, unsure = super().read_shapes(shapes)
        return config | read_heads(shapes, config, unsure, "spatial_blocks.0.attn"), unsure

    def name_of_ancestor(self, name: str) -> str:
        """Blocks of an image model or an earlier generation become those within frames."""
        return f"spatial_{name}" if name.startswith("blocks.") else name


FORMAT = _STDiT3Format()
