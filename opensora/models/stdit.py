"""STDiT, the diffusion transformer of Open-Sora 1.0: every block attends in space, in time and to the text.

Positions are sine-cosine codes: of the patch at the entrance, of the frame in the first block only. Attention along
time reads the tokens as they are, neither normed nor modulated, and is gated like attention in space.

Open-Sora 1.1 and later ship the same network with a frame mask: conditioning frames, kept rather than generated
(`frame_mask` False) are modulated with the embedding of timestep 0. Attention along time keeps the gate of the real
timestep for them. Without a mask both forms are the same function.

Letters: B samples, C latent channels, T, H, W latent frames and cells, D hidden size, S = h * w patches of a frame,
L text tokens, D_c width of the text encoder.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # diffusers looks for it beside the class
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

from opensora.distributed.sequence_parallel import Shards
from opensora.errors import OpenSoraError
from opensora.models.attention import SelfAttention
from opensora.models.clip_conditions import ClipConditions
from opensora.models.embeddings import PatchEmbed, ScalarEmbedder, TextEmbedder, position_code, position_embedding_2d
from opensora.models.format import TensorShapes
from opensora.models.spacetime_format import SpaceTimeFormat
from opensora.models.transformer import (
    SPACE,
    TIME,
    FinalLayer,
    KeysValues,
    SpaceTimeBlock,
    SpaceTimeTransformer,
    TextContext,
    frame_modulation,
    values_per_sample,
)


class STDiTBlock(SpaceTimeBlock):
    """Attention in space, in time and to the text, MLP.

    Args:
        hidden_size: D.
        num_heads: attention heads.
        mlp_ratio: width of the MLP in units of D.
        exact_gelu: see `MLP`.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, exact_gelu: bool = False) -> None:
        super().__init__(hidden_size, num_heads, mlp_ratio, exact_gelu=exact_gelu)
        self.attn_temp = SelfAttention(hidden_size, num_heads, qk_norm=False)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        time_gate: Tensor,
        text_bias: Tensor | None = None,
        text_keys_values: KeysValues | None = None,
        frame_positions: Tensor | None = None,
        shards: Shards | None = None,
    ) -> Tensor:
        """One block.

        Args:
            hidden_states: (B, T, S, D).
            encoder_hidden_states: (B, L, D) projected text, read only without `text_keys_values`.
            modulation: (B, 1 or T, 6, D), from the timestep.
            time_gate: (B, 1, D), the gate within `modulation` as it is where frames are generated.
            text_bias: (B, 1, 1, L) of `TextContext`.
            text_keys_values: this block's entry of `TextContext`.
            frame_positions: (T, 1, D), added to what attends in time; None but in the first block.
            shards: how the tokens lie on several ranks; None = all are here.

        Returns:
            (B, T, S, D), in the dtype of `hidden_states`.
        """
        dtype = hidden_states.dtype
        table = (self.scale_shift_table + modulation).to(dtype).unsqueeze(3).unbind(2)
        hidden_states = self.modulated_attention(self.attn, hidden_states, table[:3], SPACE, shards=shards)

        gate = (self.scale_shift_table[2] + time_gate).to(dtype).unsqueeze(2)
        in_time = hidden_states if frame_positions is None else hidden_states + frame_positions.to(dtype)
        hidden_states = torch.addcmul(hidden_states, gate, self.attn_temp(in_time, TIME).to(dtype))

        return self.text_and_mlp(hidden_states, encoder_hidden_states, table[3:], text_bias, text_keys_values)


class STDiT(SpaceTimeTransformer):
    """Space-time diffusion transformer, first generation (Open-Sora 1.0, and frame-masked as in 1.1 and later).

    The network was trained at one size. It takes any other, with the same distance between neighbouring positions, but
    published weights know nothing of it.

    The published position tables are in the state dict under their names; what is computed with is derived anew, so
    that no cast rounds it and no file replaces it.

    What of diffusers works is listed at `SpaceTimeTransformer`.

    Args:
        input_size: latent frames, rows and columns that the model was trained at; the size of the saved tables.
        in_channels: C.
        pred_sigma: predict 2 C channels; the second half is the learned variance.
        patch_size: latent frames, rows and columns of a patch.
        hidden_size: D, a multiple of 4 and of `num_heads`.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs in units of D.
        caption_channels: D_c.
        model_max_length: most text tokens, and tokens of the null text.
        space_scale: patches are `1 / space_scale` positions apart.
        time_scale: frames are `1 / time_scale` positions apart.
        class_dropout_prob: share of captions that training replaces by the null text; a record for trainers, which
            draw and pass `drop_text` themselves.
        learn_null_text: train the null text (published models keep it as drawn).
        exact_gelu: GELU of the blocks by the error function instead of the published tanh approximation.
    """

    _no_split_modules = ["STDiTBlock"]
    _repeated_blocks = ["STDiTBlock"]

    @register_to_config
    def __init__(
        self,
        input_size: Sequence[int] = (16, 32, 32),
        in_channels: int = 4,
        pred_sigma: bool = True,
        patch_size: Sequence[int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 120,
        space_scale: float = 1.0,
        time_scale: float = 1.0,
        class_dropout_prob: float = 0.1,
        learn_null_text: bool = False,
        exact_gelu: bool = False,
    ) -> None:
        super().__init__()
        self._set_sizes(in_channels, pred_sigma, patch_size, hidden_size, multiple_of=math.lcm(4, num_heads))
        if len(input_size) != 3:
            raise OpenSoraError(f"input_size is {list(input_size)}; give latent frames, rows and columns")
        if not (space_scale > 0 and time_scale > 0):
            raise OpenSoraError(f"space_scale is {space_scale} and time_scale {time_scale}; both must be positive")
        self.hidden_size, self.space_scale, self.time_scale = hidden_size, space_scale, time_scale

        num_frames, h, w = (-(-n // p) for n, p in zip(input_size, self.patch_size, strict=True))
        device = torch.get_default_device()
        self.register_buffer("pos_embed", self._patch_positions(h, w, device))
        self.register_buffer("pos_embed_temporal", self._frame_positions(num_frames, device)[None])
        self.x_embedder = PatchEmbed(self.patch_size, in_channels, hidden_size)
        self.t_embedder = ScalarEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = TextEmbedder(caption_channels, hidden_size, model_max_length, learn_null_text=learn_null_text)
        self.blocks = nn.ModuleList(
            STDiTBlock(hidden_size, num_heads, mlp_ratio, exact_gelu=exact_gelu) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, math.prod(self.patch_size) * self.out_channels)
        self._initialize(self.t_block[1])

    def _patch_positions(self, h: int, w: int, device: torch.device) -> Tensor:
        """(1, h * w, D)."""
        return position_embedding_2d(h, w, self.hidden_size, torch.full((1,), self.space_scale, device=device))

    def _frame_positions(self, num_frames: int, device: torch.device) -> Tensor:
        """(T, D)."""
        frames = torch.arange(num_frames, dtype=torch.float32, device=device)
        return position_code(frames / self.time_scale, self.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        clip_conditions: ClipConditions | None = None,
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
            clip_conditions: accepted, so that all models of the family are called alike, and unused: this one was never
                told what its training clips had.
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
        tokens = tokens.flatten(2, 3) + self._patch_positions(h, w, device)[:, None].to(tokens.dtype)  # (B, T, S, D)
        tokens, shards = self._split(tokens)
        frame_positions: Tensor | None = self._frame_positions(num_frames, device)[:, None]

        embedding = self.t_embedder(values_per_sample(timestep, batch, device), dtype).expand(batch, -1)
        modulation, clean_embedding = frame_modulation(self.t_block, embedding), None
        time_gate = modulation[:, :, 2]
        if frame_mask is not None:
            clean_embedding = self.t_embedder(torch.zeros(1, device=device), dtype)
            modulation = frame_modulation(self.t_block, embedding, clean_embedding, frame_mask)

        text = self._text(batch, encoder_hidden_states, encoder_attention_mask, drop_text, text_context)
        for block, keys_values in zip(self.blocks, text.keys_values, strict=True):
            arguments = (text.states, modulation, time_gate, text.bias, keys_values, frame_positions, shards)
            tokens = self._run_block(block, tokens, *arguments)
            frame_positions = None
        return self._output(tokens, embedding, clean_embedding, frame_mask, (h, w), hidden_states, return_dict, shards)


class _STDiTFormat(SpaceTimeFormat):
    cls = STDiT
    summary = "transformer of Open-Sora 1.0"
    prefixes = ("blocks.0.attn_temp.", "t_block.")
    first_block = "blocks.0"
    dropped = frozenset({"no_temporal_pos_emb"})

    def recognises(self, shapes: TensorShapes) -> bool:
        return super().recognises(shapes) and not shapes.has("t_block_temp.")

    def read_shapes(self, shapes: TensorShapes) -> tuple[dict[str, Any], dict[str, str]]:
        config, unsure = super().read_shapes(shapes)
        unsure["num_heads"] = "shapes do not tell; 16 in every published model"
        unsure["space_scale"] = "shapes do not tell; 0.5 for 16x256x256, 1 for 512x512"
        unsure["time_scale"] = "shapes do not tell; 1 for 16 frames, 2/3 for 64"
        patches, frames = shapes.size("pos_embed", 1), shapes.size("pos_embed_temporal", 1)
        side = math.isqrt(patches or 0)
        patch_size = config.get("patch_size")
        if patches and frames and patch_size and side * side == patches:
            config["input_size"] = [frames * patch_size[0], side * patch_size[1], side * patch_size[2]]
        else:
            unsure["input_size"] = "no position tables of a square in the file; needed only to size these tables"
        return config, unsure

    def translate_config(
        self, stored: Mapping[str, Any], where: Path, base: Mapping[str, Any], assumed: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        if stored.get("no_temporal_pos_emb"):
            raise OpenSoraError(f"{where}: no_temporal_pos_emb is set; an STDiT has positions along time")
        return super().translate_config(stored, where, base, assumed)


FORMAT = _STDiTFormat()
