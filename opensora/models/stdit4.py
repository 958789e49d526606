"""STDiT4, the diffusion transformer of Open-Sora 1.3: time attends within windows, known frames lie beside the noise.

Every layer is a pair of blocks, as in `stdit3`. What is new: blocks over time attend among all tokens of a window of
8 x 8 patches that lasts for the whole clip; positions of frame, row and column turn a third of every head each, in the
windows and, without time, within frames. Known frames (`ChannelConditioning`) and their mask are embedded like the
noisy latents and added to them, and their tokens attend to the null text in place of the clip's.

With `kernel_size` None, blocks over time are those of `stdit3`: among the frames at one patch. The reference's class,
and the one that published files name, is called STDiT3 too. Parameter names are those of the published checkpoints.

Letters: B samples, C latent channels, T, H, W latent frames and cells, D hidden size, S patches of a frame, L text
tokens, D_c width of the text encoder, d features of a head.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # diffusers looks for it beside the class
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

from opensora.distributed.sequence_parallel import Shards
from opensora.errors import OpenSoraError
from opensora.models.attention import RotaryEmbedding, SelfAttention
from opensora.models.caching import CacheIdentifiers
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.clip_conditions import ClipConditions
from opensora.models.embeddings import PatchEmbed, ScalarEmbedder, TextEmbedder
from opensora.models.format import RenamedWeights, TensorShapes
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
from opensora.models.windows import PlacedWindows, WindowAttention, WindowGrid, place_windows

_PATCHES = "x_embedder.proj.weight"
_LAST_LAYER = ("final_layer.linear.weight", "final_layer.linear.bias")

logger = logging.getLogger(__name__)


class STDiT4Block(SpaceTimeBlock):
    """Attention within frames or along time, attention to the text, MLP; the first and last modulated and gated.

    Args:
        hidden_size: D.
        num_heads: attention heads.
        mlp_ratio: width of the MLP in units of D.
        qk_norm: RMS-normalise queries and keys.
        exact_gelu: see `MLP`.
        axis: which axis of (B, T, S, D) attends, 2 (space) or 1 (time).
        windowed: time attends within windows of patches, not at each patch.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qk_norm: bool,
        exact_gelu: bool,
        axis: int,
        windowed: bool,
    ) -> None:
        attention = WindowAttention if windowed and axis == TIME else SelfAttention
        super().__init__(hidden_size, num_heads, mlp_ratio, qk_norm=qk_norm, exact_gelu=exact_gelu, attention=attention)
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
        rope: tuple[Tensor, Tensor] | Sequence[PlacedWindows] | None = None,
        shards: Shards | None = None,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One block.

        Args:
            hidden_states: (B, T, S, D).
            encoder_hidden_states: (B, L, D) projected text, read only without `text_keys_values`.
            modulation: (B, 1 or T, 6, D), from timestep and frame rate.
            text_bias: (B, 1, 1, L) of `TextContext`.
            text_keys_values: this block's entry of `TextContext`.
            rope: rotary tables of the attending axis; windows with theirs for attention within windows.
            shards: how the tokens lie on several ranks; None = all are here.
            known: which frames attend to the null text, (B, T) bool, and that text, (1, L, D) projected; None = none.

        Returns:
            (B, T, S, D), in the dtype of `hidden_states`.
        """
        table = (self.scale_shift_table + modulation).to(hidden_states.dtype).unsqueeze(3).unbind(2)
        hidden_states = self.modulated_attention(self.attn, hidden_states, table[:3], self.axis, rope, shards)
        if known is not None:
            text_keys_values = text_keys_values or self.cross_attn.project_text(encoder_hidden_states)
            text_bias, text_keys_values = self._text_of_frames(text_bias, text_keys_values, *known)
        return self.text_and_mlp(hidden_states, encoder_hidden_states, table[3:], text_bias, text_keys_values)

    def _text_of_frames(
        self, text_bias: Tensor | None, text_keys_values: KeysValues, known: Tensor, null_text: Tensor
    ) -> tuple[Tensor | None, KeysValues]:
        """Bias, keys and values of every frame, B * T of them: the null text's for those that are known."""
        chosen = known[:, :, None, None, None]
        key, value = (
            torch.where(chosen, null[:, None], text[:, None]).flatten(0, 1)
            for null, text in zip(self.cross_attn.project_text(null_text), text_keys_values, strict=True)
        )
        bias = None if text_bias is None else text_bias.repeat_interleave(known.shape[1], dim=0)
        return bias, (key, value)


class STDiT4(SpaceTimeTransformer):
    """Space-time diffusion transformer, fourth generation (Open-Sora 1.3).

    What of diffusers works is listed at `SpaceTimeTransformer`.

    Args:
        in_channels: C.
        pred_sigma: predict 2 C channels; the second half is the learned variance (unused by rectified flow).
        patch_size: latent frames, rows and columns of a patch.
        hidden_size: D, a multiple of 4 and of 6 times `num_heads` (of twice without windows).
        depth: pairs of a spatial and a temporal block.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs in units of D.
        caption_channels: D_c.
        model_max_length: most text tokens, and tokens of the null text.
        qk_norm: RMS-normalise queries and keys.
        kernel_size: rows, columns and frames of a window in patches; frames are -1, all of them. None = no windows:
            time attends at each patch.
        use_spatial_rope: rotary positions of rows and columns within frames; with windows only.
        input_sq_size: side in pixels of the square at which patch positions count in whole steps.
        class_dropout_prob: share of captions that training replaces by the null text; a record for trainers, which
            draw and pass `drop_text` themselves.
        learn_null_text: train the null text (published models keep it as drawn).
        exact_gelu: GELU of the blocks by the error function instead of the published tanh approximation.

    Raises:
        OpenSoraError: sizes that do not go together.
    """

    _no_split_modules = ["STDiT4Block"]
    _repeated_blocks = ["STDiT4Block"]
    _cache_identifiers = CacheIdentifiers(spatial="spatial_blocks", temporal="temporal_blocks")
    reads_channels = carries_latents = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        pred_sigma: bool = True,
        patch_size: Sequence[int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        qk_norm: bool = True,
        kernel_size: Sequence[int] | None = (8, 8, -1),
        use_spatial_rope: bool = True,
        input_sq_size: int = 512,
        class_dropout_prob: float = 0.1,
        learn_null_text: bool = False,
        exact_gelu: bool = False,
    ) -> None:
        super().__init__()
        axes = 1 if kernel_size is None else 3
        self._set_sizes(in_channels, pred_sigma, patch_size, hidden_size, multiple_of=math.lcm(4, 2 * axes * num_heads))
        self._check_windows(kernel_size, use_spatial_rope)
        self.window = None if kernel_size is None else (kernel_size[0], kernel_size[1])
        self.use_spatial_rope, self.input_sq_size = use_spatial_rope, input_sq_size

        self.rope = RotaryEmbedding(hidden_size // num_heads // axes)
        self.x_embedder, self.x_embedder_cond, self.x_embedder_cond_mask = (
            PatchEmbed(self.patch_size, in_channels, hidden_size) for _ in range(3)
        )
        self.t_embedder = ScalarEmbedder(hidden_size)
        self.fps_embedder = ScalarEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = TextEmbedder(caption_channels, hidden_size, model_max_length, learn_null_text=learn_null_text)

        def blocks(axis: int) -> nn.ModuleList:
            options: dict[str, Any] = {
                "qk_norm": qk_norm,
                "exact_gelu": exact_gelu,
                "windowed": kernel_size is not None,
            }
            return nn.ModuleList(
                STDiT4Block(hidden_size, num_heads, mlp_ratio, axis=axis, **options) for _ in range(depth)
            )

        self.spatial_blocks = blocks(SPACE)
        self.temporal_blocks = blocks(TIME)
        self.final_layer = FinalLayer(hidden_size, math.prod(self.patch_size) * self.out_channels)
        self._initialize()

    @staticmethod
    def _check_windows(kernel_size: Sequence[int] | None, use_spatial_rope: bool) -> None:
        if kernel_size is None:
            if use_spatial_rope:
                raise OpenSoraError(
                    "use_spatial_rope needs windows; give kernel_size, or set use_spatial_rope to false"
                )
        elif len(kernel_size) != 3 or min(kernel_size[:2]) < 1 or kernel_size[2] != -1:
            raise OpenSoraError(
                f"kernel_size is {list(kernel_size)}; give rows, columns and -1 for all frames, such as [8, 8, -1]"
            )

    def _initialize(self, *last_layers: nn.Module) -> None:
        """For training from scratch, as the published models began.

        Linear layers are Xavier-uniform; frame rate and known frames add nothing at first, and neither do blocks over
        time, so that images may be learned before clips.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.fps_embedder.mlp[0].weight, std=0.02)  # type: ignore[arg-type]
        zero: list[Any] = [self.fps_embedder.mlp[2], self.x_embedder_cond.proj, self.x_embedder_cond_mask.proj]
        for block in self.temporal_blocks:
            if isinstance(block, STDiT4Block):
                zero += [block.attn.proj, block.cross_attn.proj, block.mlp.fc2]
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def blocks(self) -> list[STDiT4Block]:
        """All blocks in the order in which they run: space, time, space, time, ..."""
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return [block for pair in pairs for block in pair if isinstance(block, STDiT4Block)]

    def without_known_frames(self, channels: ChannelConditioning) -> ChannelConditioning:
        """Guided against zeros under the same mask, as the published samplers are."""
        return channels.without_latents()

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
        channel_conditioning: ChannelConditioning | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict from noisy latents.

        Args:
            hidden_states: (B, C, T, H, W) latents of any size.
            timestep: (B,) or a number, 0 (clean) .. 1000 (noise); never rounded, whatever the model's dtype.
            encoder_hidden_states: (B, L, D_c) text states; or give `text_context`.
            encoder_attention_mask: (B, L), 1 = token.
            clip_conditions: size, one for all samples, and frame rate are told.
            frame_mask: (B, T) bool, True = generated, False = clean in `hidden_states` itself. None = all True.
            drop_text: (B,) bool, True = null text in place of this sample's.
            text_context: result of `encode_text`, instead of the three text arguments.
            channel_conditioning: known frames beside the noise. Without, the embedders of them are left out, as in
                published sampling from text; with one in which no frame is known their biases act, as in training.
            return_dict: a tuple of one instead of an output object when False.

        Returns:
            `.sample`, (B, C or 2 C, T, H, W), in the model's dtype.

        Raises:
            OpenSoraError: shapes that do not fit.
        """
        batch, device = self._check(hidden_states, frame_mask), hidden_states.device
        dtype = get_parameter_dtype(self.t_block)
        tokens = self.x_embedder(hidden_states.to(dtype))  # (B, T, h, w, D)
        if channel_conditioning is not None:
            tokens = tokens + self._embed_known(channel_conditioning, hidden_states)
        h, w = tokens.shape[2:4]
        rows, columns = (self._one_size(getattr(clip_conditions, name), batch, device) for name in ("height", "width"))
        scale = torch.sqrt(rows * columns) / self.input_sq_size
        tokens, ropes, order, shards = self._place(place_tokens(tokens, scale), (h, w), scale)  # (B, T, S, D)

        rate = self.fps_embedder(values_per_sample(clip_conditions.fps, batch, device), dtype)
        time = values_per_sample(timestep, batch, device)
        embedding, clean_embedding = embed_time_and_rate(
            self.t_embedder, time, rate, frame_mask, batch=batch, dtype=dtype
        )
        modulation = frame_modulation(self.t_block, embedding, clean_embedding, frame_mask)

        text = self._text(batch, encoder_hidden_states, encoder_attention_mask, drop_text, text_context)
        known = None
        if channel_conditioning is not None:
            null_text = self.y_embedder(self.null_text[None, : text.states.shape[1]].to(dtype))
            known = (channel_conditioning.mask, null_text)
        for block, keys_values in zip(self.blocks, text.keys_values, strict=True):
            arguments = (text.states, modulation, text.bias, keys_values, ropes[block.axis], shards, known)
            tokens = self._run_block(block, tokens, *arguments)
        return self._output(
            tokens, embedding, clean_embedding, frame_mask, (h, w), hidden_states, return_dict, shards, order
        )

    @staticmethod
    def _one_size(value: Tensor | float, batch: int, device: torch.device) -> Tensor:
        """(1,), the height or width of all samples: positions turn the heads of all alike."""
        values = values_per_sample(value, batch, device)
        # A look would stall an accelerator, and there is nothing to see in a plan's tensors.
        seen = len(values) > 1 and type(values) is Tensor and device.type == "cpu"
        if seen and not torch.compiler.is_compiling() and (values != values[0]).any():
            raise OpenSoraError(f"height and width are told once for all samples; one of them is {values.tolist()}")
        return values[:1]

    def _embed_known(self, conditioning: ChannelConditioning, latents: Tensor) -> Tensor:
        """(B, T, h, w, D) of known frames and their mask."""
        if conditioning.latents.shape != latents.shape:
            raise OpenSoraError(
                f"channel_conditioning has latents of shape {tuple(conditioning.latents.shape)}; "
                f"expected {tuple(latents.shape)}, that of hidden_states"
            )
        if self.patch_size[0] != 1:
            raise OpenSoraError(
                f"channel_conditioning needs patches of one frame; this model's hold {self.patch_size[0]}"
            )
        dtype = get_parameter_dtype(self.t_block)
        known = self.x_embedder_cond(conditioning.masked_latents.to(dtype))
        mask = conditioning.mask[:, None, :, None, None].to(dtype)
        return known + self.x_embedder_cond_mask(mask.expand(latents.shape))

    def _place(
        self, tokens: Tensor, grid: tuple[int, int], scale: Tensor
    ) -> tuple[Tensor, dict[int, Any], Tensor | None, Shards | None]:
        """Tokens in the order in which they are kept, this rank's part of them where several share a clip.

        Returns:
            tokens; for each axis what its attention takes as `rope`; numbers of the patches in that order, None where
            they are kept row by row; how the tokens lie on several ranks.
        """
        num_frames, (h, w) = tokens.shape[1], grid
        if self.window is None:
            tokens, shards = self._split(tokens)
            return tokens, {SPACE: None, TIME: self.rope(num_frames)}, None, shards
        windows = WindowGrid.cut(h, w, *self.window, tokens.device)
        within_frames = None
        if self.use_spatial_rope:
            first, *sides = (torch.arange(n, dtype=torch.float32, device=tokens.device) for n in (1, h, w))
            tables = self.rope.grid(first, *(side / scale for side in sides))
            within_frames = tuple(table[windows.order] for table in tables)
        shapes, held = windows.shapes, None
        if self._sequence_group is not None:
            held, shapes_of_ranks = windows.shared_among(self._sequence_group.size())
            shapes = shapes_of_ranks[self._sequence_group.rank()]
        tokens, shards = self._split(tokens.index_select(2, windows.order), held)
        ropes = {SPACE: within_frames, TIME: place_windows(self.rope, shapes, num_frames, scale)}
        return tokens, ropes, windows.order, shards


class _STDiT4Format(SpaceTimeFormat):
    cls = STDiT4
    summary = "transformer of Open-Sora 1.3"
    prefixes = ("spatial_blocks.0.", "temporal_blocks.0.", "x_embedder_cond.")
    first_block = "spatial_blocks.0"
    dropped = SpaceTimeFormat.dropped | {"skip_temporal", "use_cond"}

    _known_frames = r"x_embedder_cond(_mask)?\."
    parts = {**SpaceTimeFormat.parts, "conditions": re.compile(rf"^(fps_embedder\.|{_known_frames})")}
    zero_at_first = (*SpaceTimeFormat.zero_at_first, re.compile(rf"^{_known_frames}"))

    def read_shapes(self, shapes: TensorShapes) -> tuple[dict[str, Any], dict[str, str]]:
        config, unsure = super().read_shapes(shapes)
        config |= read_heads(shapes, config, unsure, "spatial_blocks.0.attn")
        normed, rotated = shapes.size("spatial_blocks.0.attn.q_norm.weight", 0), shapes.size("rope.freqs", 0)
        if normed and rotated and normed == 2 * rotated:  # all of a head turns by its frame
            return config | {"kernel_size": None, "use_spatial_rope": False}, unsure
        if not (normed and rotated):
            config.pop("num_heads", None)
            unsure["num_heads"] = "the norm of queries or the rotary frequencies, which tell it, are missing"
        unsure["kernel_size"] = "shapes do not tell; [8, 8, -1] in every published model"
        unsure["use_spatial_rope"] = "shapes do not tell; True in every published model"
        return config, unsure

    def from_ancestor(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """An image model's or an earlier generation's, whose few latent channels are repeated.

        The first layer adds up what it is given, so its repeated weights are divided: channels that are repeated
        themselves make the tokens that they made, and come out repeated.
        """
        weights = super().from_ancestor(model, weights)
        stored, wanted = weights.get(_PATCHES), model.state_dict()[_PATCHES].shape[1]
        times, rest = divmod(wanted, stored.shape[1]) if stored is not None and stored.ndim == 5 else (1, 0)
        if stored is None or rest or times < 2:
            return weights
        logger.warning("the %d latent channels of the weights are repeated to %d", stored.shape[1], wanted)
        replaced = {_PATCHES: stored.repeat(1, times, 1, 1, 1) / times}
        for name in _LAST_LAYER:
            if name in weights:
                cells = weights[name].unflatten(0, (math.prod(stored.shape[2:]), -1, stored.shape[1]))
                replaced[name] = torch.cat([cells] * times, dim=2).flatten(0, 2)
        return RenamedWeights(weights, {name: name for name in weights}, replaced)

    def name_of_ancestor(self, name: str) -> str:
        """Blocks of an image model or an earlier generation become those within frames."""
        return f"spatial_{name}" if name.startswith("blocks.") else name


FORMAT = _STDiT4Format()
