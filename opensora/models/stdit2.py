"""STDiT2, the diffusion transformer of Open-Sora 1.1: one network for many sizes, lengths and frame rates.

Blocks are those of STDiT with attention along time normed, modulated and gated on its own, and with rotary positions
of the frames. Space and MLP are told the timestep, the size in pixels and its ratio; time is told the timestep, the
number of frames and the frame rate.

Conditioning frames (`frame_mask` False) are kept clean and modulated with the embedding of timestep 0.

Letters: B samples, C latent channels, T, H, W latent frames and cells, D hidden size, S = h * w patches of a frame,
L text tokens, D_c width of the text encoder.
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
from opensora.models.attention import RotaryEmbedding, SelfAttention
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
    frame_modulation,
    place_tokens,
    values_per_sample,
)


class STDiT2Block(SpaceTimeBlock):
    """Attention in space, in time and to the text, MLP; the first, second and last modulated and gated.

    Args:
        hidden_size: D.
        num_heads: attention heads.
        mlp_ratio: width of the MLP in units of D.
        qk_norm: RMS-normalise queries and keys.
        qk_norm_legacy: rotary positions before that norm.
        exact_gelu: see `MLP`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qk_norm: bool = True,
        qk_norm_legacy: bool = True,
        exact_gelu: bool = False,
    ) -> None:
        super().__init__(hidden_size, num_heads, mlp_ratio, qk_norm=qk_norm, exact_gelu=exact_gelu)
        self.scale_shift_table_temporal = nn.Parameter(torch.zeros(3, hidden_size))
        self.attn_temp = SelfAttention(hidden_size, num_heads, qk_norm=qk_norm, rotate_before_norm=qk_norm_legacy)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        time_modulation: Tensor,
        text_bias: Tensor | None = None,
        text_keys_values: KeysValues | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        shards: Shards | None = None,
    ) -> Tensor:
        """One block.

        Args:
            hidden_states: (B, T, S, D).
            encoder_hidden_states: (B, L, D) projected text, read only without `text_keys_values`.
            modulation: (B, 1 or T, 6, D), from timestep and size.
            time_modulation: (B, 1 or T, 3, D), from timestep, number of frames and frame rate.
            text_bias: (B, 1, 1, L) of `TextContext`.
            text_keys_values: this block's entry of `TextContext`.
            rope: rotary tables of the frames.
            shards: how the tokens lie on several ranks; None = all are here.

        Returns:
            (B, T, S, D), in the dtype of `hidden_states`.
        """
        dtype = hidden_states.dtype
        table = (self.scale_shift_table + modulation).to(dtype).unsqueeze(3).unbind(2)
        time_table = (self.scale_shift_table_temporal + time_modulation).to(dtype).unsqueeze(3).unbind(2)
        hidden_states = self.modulated_attention(self.attn, hidden_states, table[:3], SPACE, shards=shards)
        hidden_states = self.modulated_attention(self.attn_temp, hidden_states, time_table, TIME, rope)
        return self.text_and_mlp(hidden_states, encoder_hidden_states, table[3:], text_bias, text_keys_values)


class STDiT2(SpaceTimeTransformer):
    """Space-time diffusion transformer, second generation (Open-Sora 1.1).

    What of diffusers works is listed at `SpaceTimeTransformer`.

    Args:
        in_channels: C.
        pred_sigma: predict 2 C channels; the second half is the learned variance.
        patch_size: latent frames, rows and columns of a patch.
        hidden_size: D, a multiple of 12 and of twice `num_heads`.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs in units of D.
        caption_channels: D_c.
        model_max_length: most text tokens, and tokens of the null text.
        qk_norm: RMS-normalise queries and keys.
        qk_norm_legacy: rotary positions before that norm, the order the published weights were trained with; False is
            for weights trained with version 1.2 of the reference and its default order.
        input_sq_size: side in pixels of the square at which patch positions count in whole steps.
        class_dropout_prob: share of captions that training replaces by the null text; a record for trainers, which
            draw and pass `drop_text` themselves.
        learn_null_text: train the null text (published models keep it as drawn).
        exact_gelu: GELU of the blocks by the error function instead of the published tanh approximation.
    """

    _no_split_modules = ["STDiT2Block"]
    _repeated_blocks = ["STDiT2Block"]

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
        model_max_length: int = 200,
        qk_norm: bool = True,
        qk_norm_legacy: bool = True,
        input_sq_size: int = 512,
        class_dropout_prob: float = 0.1,
        learn_null_text: bool = False,
        exact_gelu: bool = False,
    ) -> None:
        super().__init__()
        multiple_of = math.lcm(12, 2 * num_heads)
        self._set_sizes(in_channels, pred_sigma, patch_size, hidden_size, multiple_of=multiple_of)
        self.input_sq_size = input_sq_size

        self.rope = RotaryEmbedding(hidden_size // num_heads)
        self.x_embedder = PatchEmbed(self.patch_size, in_channels, hidden_size)
        self.t_embedder = ScalarEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.t_block_temp = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 3 * hidden_size))
        self.csize_embedder = ScalarEmbedder(hidden_size // 3)  # height and width
        self.ar_embedder = ScalarEmbedder(hidden_size // 3)  # height / width
        self.fl_embedder = ScalarEmbedder(hidden_size)  # number of frames
        self.fps_embedder = ScalarEmbedder(hidden_size)
        self.y_embedder = TextEmbedder(caption_channels, hidden_size, model_max_length, learn_null_text=learn_null_text)
        norm: dict[str, bool] = {"qk_norm": qk_norm, "qk_norm_legacy": qk_norm_legacy}
        self.blocks = nn.ModuleList(
            STDiT2Block(hidden_size, num_heads, mlp_ratio, exact_gelu=exact_gelu, **norm) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, math.prod(self.patch_size) * self.out_channels)
        self._initialize(self.t_block[1], self.t_block_temp[1], self.fl_embedder.mlp[2], self.fps_embedder.mlp[2])

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
            clip_conditions: all of it is told.
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

        def values(value: Tensor | float) -> Tensor:
            return values_per_sample(value, batch, device)

        tokens = self.x_embedder(hidden_states.to(dtype))  # (B, T, h, w, D)
        h, w = tokens.shape[2:4]
        rows, columns = torch.broadcast_tensors(values(clip_conditions.height), values(clip_conditions.width))
        scale = torch.sqrt(rows * columns) / self.input_sq_size
        tokens, shards = self._split(place_tokens(tokens, scale))  # (B, T, S, D)

        aspect_ratio = clip_conditions.aspect_ratio
        ratio = rows / columns if aspect_ratio is None else values(aspect_ratio)
        size = self.csize_embedder(torch.stack([rows, columns], dim=-1).flatten(), dtype).view(len(rows), -1)
        size = torch.cat([size.expand(batch, -1), self.ar_embedder(ratio, dtype).expand(batch, -1)], dim=-1)
        frames = self.fl_embedder(values(clip_conditions.num_frames), dtype)
        length = frames + self.fps_embedder(values(clip_conditions.fps), dtype)

        embedding = self.t_embedder(values(timestep), dtype).expand(batch, -1)
        clean_embedding = clean_space = clean_time = None
        if frame_mask is not None:
            clean_embedding = self.t_embedder(torch.zeros(1, device=device), dtype)
            clean_space, clean_time = clean_embedding + size, clean_embedding + length
        modulation = frame_modulation(self.t_block, embedding + size, clean_space, frame_mask)
        time_modulation = frame_modulation(self.t_block_temp, embedding + length, clean_time, frame_mask)

        text = self._text(batch, encoder_hidden_states, encoder_attention_mask, drop_text, text_context)
        rope = self.rope(tokens.shape[1])
        for block, keys_values in zip(self.blocks, text.keys_values, strict=True):
            arguments = (text.states, modulation, time_modulation, text.bias, keys_values, rope, shards)
            tokens = self._run_block(block, tokens, *arguments)
        # The last layer is told the size for conditioning frames only: published weights were trained so.
        return self._output(tokens, embedding, clean_space, frame_mask, (h, w), hidden_states, return_dict, shards)


class _STDiT2Format(SpaceTimeFormat):
    cls = STDiT2
    summary = "transformer of Open-Sora 1.1"
    prefixes = ("blocks.0.attn_temp.", "t_block.", "t_block_temp.")
    first_block = "blocks.0"

    def read_shapes(self, shapes: TensorShapes) -> tuple[dict[str, Any], dict[str, str]]:
        config, unsure = super().read_shapes(shapes)
        config |= read_heads(shapes, config, unsure, "blocks.0.attn")
        if config["qk_norm"]:
            unsure["qk_norm_legacy"] = "shapes do not tell; True for the published weights of 1.1"
        return config, unsure


FORMAT = _STDiT2Format()
