"""What the space-time transformers of Open-Sora 1.0 to 1.3 share: text, blocks' parts, the last layer, diffusers.

All of them attend within a frame, then along time, then to the text, and end a layer in an MLP; time
modulates the layers (adaLN-single of PixArt-alpha: one linear layer for the whole network, a small table per block).
They differ in what else modulates, in how positions enter, and in how the parts are grouped into blocks.

Conditioning frames (`frame_mask` False) are kept clean and modulated with the embedding of timestep 0. Text keys
and values do not depend on time: `encode_text` makes them once for all denoising steps. Parameter names are those
of the published checkpoints.

Letters: B samples, C latent channels, T, H, W latent frames and cells, D hidden size, S = h * w patches of a frame,
L text tokens, D_c width of the text encoder.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from opensora.distributed.sequence_parallel import Shards
from opensora.errors import OpenSoraError
from opensora.models.attention import CrossAttention, SelfAttention, text_bias
from opensora.models.embeddings import MLP, ScalarEmbedder, TextEmbedder, position_embedding_2d, unpatchify
from opensora.models.network import VideoTransformer
from opensora.models.text.tokens import tokens_in_use

SPACE, TIME = 2, 1  # axes of the tokens (B, T, S, D)

KeysValues = tuple[Tensor, Tensor]


@dataclass
class TextContext:
    """What a transformer needs of a text, computed once per sample by its `encode_text`.

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
    # Without gradients nobody reads `normed` any more: what is made of it needs no new memory.
    is_free = not torch.is_grad_enabled() and normed.dtype == shift.dtype
    return torch.addcmul(shift, normed, 1 + scale, out=normed if is_free else None)


def frame_modulation(
    layers: nn.Module, embedding: Tensor, clean_embedding: Tensor | None = None, frame_mask: Tensor | None = None
) -> Tensor:
    """What modulates the blocks, frame by frame where some are conditioning frames.

    Args:
        layers: from D to n * D features.
        embedding: (B, D) of timestep and other conditions.
        clean_embedding: (1 or B, D), the same at timestep 0; with `frame_mask` only.
        frame_mask: (B, T) bool, True = generated.

    Returns:
        (B, 1, n, D), or (B, T, n, D) with `frame_mask`.
    """
    dim = embedding.shape[-1]
    modulation = layers(embedding).unflatten(-1, (1, -1, dim))
    if clean_embedding is None or frame_mask is None:
        return modulation
    return torch.where(frame_mask[..., None, None], modulation, layers(clean_embedding).unflatten(-1, (1, -1, dim)))


def place_tokens(tokens: Tensor, scale: Tensor) -> Tensor:
    """Tokens (B, T, h, w, D) with their places in the frame added, (B, T, h * w, D).

    `scale` (1 or B,) is what patch positions are divided by, see `position_embedding_2d`.
    """
    h, w, dim = tokens.shape[2:]
    positions = position_embedding_2d(h, w, dim, scale, base_size=round(math.sqrt(h * w)))
    return tokens.flatten(2, 3) + positions[:, None].to(tokens.dtype)


def embed_time_and_rate(
    t_embedder: ScalarEmbedder,
    timestep: Tensor,
    rate: Tensor,
    frame_mask: Tensor | None,
    *,
    batch: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """What is told of time and frame rate: (B, D), and the same at timestep 0 if there is a `frame_mask`.

    Args:
        t_embedder: of timesteps.
        timestep: (1 or B,).
        rate: (1 or B, D), embedded.
        frame_mask: (B, T) bool, True = generated.
        batch: B.
        dtype: that embedders work in.
    """
    embedding = (t_embedder(timestep, dtype) + rate).expand(batch, -1)
    if frame_mask is None:
        return embedding, None
    return embedding, t_embedder(torch.zeros(1, device=timestep.device), dtype) + rate


class SpaceTimeBlock(nn.Module):
    """The parts that every block has; subclasses put them in order in `forward`.

    Args:
        hidden_size: D.
        num_heads: attention heads.
        mlp_ratio: width of the MLP in units of D.
        qk_norm: RMS-normalise queries and keys.
        rotate_before_norm: see `SelfAttention`.
        exact_gelu: see `MLP`.
        attention: class of the attention within the video.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qk_norm: bool = False,
        rotate_before_norm: bool = False,
        exact_gelu: bool = False,
        attention: type[SelfAttention] = SelfAttention,
    ) -> None:
        super().__init__()
        # Caches of diffusers ask there where a block's hidden states are among its outputs.
        TransformerBlockRegistry.register(type(self), TransformerBlockMetadata(return_hidden_states_index=0))
        self.scale_shift_table = nn.Parameter(torch.zeros(6, hidden_size))
        self.attn = attention(hidden_size, num_heads, qk_norm=qk_norm, rotate_before_norm=rotate_before_norm)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.mlp = MLP(hidden_size, int(hidden_size * mlp_ratio), hidden_size, exact=exact_gelu)

    def modulated_attention(
        self,
        attention: nn.Module,
        hidden_states: Tensor,
        table: Sequence[Tensor],
        axis: int,
        rope: Any = None,
        shards: Shards | None = None,
    ) -> Tensor:
        """Add attention along `axis` of the modulated tokens, gated.

        Args:
            attention: module that attends, called with tokens, axis and `rope`.
            hidden_states: (B, T, S, D).
            table: shift, scale and gate.
            axis: `SPACE` or `TIME`.
            rope: rotary tables of that axis, or what else the attention takes for it.
            shards: how the tokens lie on several ranks; None = all are here.
        """
        shift, scale, gate = table
        modulated = modulate(hidden_states, shift, scale)
        if shards is not None and axis == SPACE:
            attended = shards.in_whole_frames(lambda frames: attention(frames, 1, rope), modulated)
        else:
            attended = attention(modulated, axis, rope)
        return torch.addcmul(hidden_states, gate, attended.to(hidden_states.dtype))

    def text_and_mlp(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        table: Sequence[Tensor],
        text_bias: Tensor | None,
        text_keys_values: KeysValues | None,
    ) -> Tensor:
        """Add attention to the text, as it is, and the MLP of the modulated tokens, gated."""
        dtype, (shift, scale, gate) = hidden_states.dtype, table
        keys_values = text_keys_values or self.cross_attn.project_text(encoder_hidden_states)
        hidden_states = hidden_states + self.cross_attn(hidden_states, keys_values, text_bias).to(dtype)
        return torch.addcmul(hidden_states, gate, self.mlp(modulate(hidden_states, shift, scale)).to(dtype))


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
        self,
        hidden_states: Tensor,
        embedding: Tensor,
        clean_embedding: Tensor | None = None,
        frame_mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens to patches.

        Args:
            hidden_states: (B, T, S, D).
            embedding: (B, D) of the timestep and what else conditions the model's last layer.
            clean_embedding: (1 or B, D), the same at timestep 0; with `frame_mask` only.
            frame_mask: (B, T) bool, True = generated.

        Returns:
            (B, T, S, out_features).
        """

        def modulated(tokens: Tensor, embedding: Tensor) -> Tensor:
            table = (self.scale_shift_table + embedding[:, None]).to(tokens.dtype)
            shift, scale = table[:, None, None].unbind(3)
            return modulate(tokens, shift, scale)

        tokens = modulated(hidden_states, embedding)
        if clean_embedding is not None and frame_mask is not None:
            # Conditioning frames are normed and modulated a second time, on top of the first: published weights were
            # trained so. What the network says about them is not used in sampling.
            tokens = torch.where(frame_mask[..., None, None], tokens, modulated(tokens, clean_embedding))
        return self.linear(tokens)


class SpaceTimeTransformer(VideoTransformer):
    """Text, checks, caches and the way in and out; subclasses build the layers and write `forward`.

    What of diffusers works with these models:

    - `enable_gradient_checkpointing` (also with a function of one's own), `compile_repeated_blocks`,
      `enable_layerwise_casting`, `set_attention_backend` (on a CPU for sequences of more than 128 keys), save and load.
    - Adapters through peft, where it is installed: `add_adapter`, `load_lora_adapter`, `save_lora_adapter`, ...
    - `enable_group_offload` (in memory and on disk) and the pipeline's offloading. While the weights are away,
      `encode_text` only stores the text and every step projects it anew.
    - `enable_cache` with FirstBlockCache, MagCache, PyramidAttentionBroadcast and TaylorSeer, the last two with the
      model's own identifiers where the configuration names none.

    What does not, and raises: FasterCache and TextKVCache look for module names of other models, and SeaCache for the
    inputs of two others. Diffusers' context parallelism has no plan for alternating axes; `enable_sequence_parallel`
    takes its place.

    Attributes:
        in_channels: C.
        out_channels: C, or 2 C with a learned variance.
        patch_size: latent frames, rows and columns of a patch.
    """

    _supports_gradient_checkpointing = True
    _supports_sequence_parallel = True
    # What is small and decides much is not stored in 8 bits: all embedders, the modulation and the last layer.
    _skip_layerwise_casting_patterns = ["embedder", "t_block", "final_layer"]

    t_block: nn.Module
    y_embedder: TextEmbedder
    final_layer: FinalLayer

    def _set_sizes(
        self, in_channels: int, pred_sigma: bool, patch_size: Sequence[int], hidden_size: int, *, multiple_of: int
    ) -> None:
        """Check what a configuration may say, and keep it."""
        if len(patch_size) != 3:
            raise OpenSoraError(f"patch_size is {list(patch_size)}; give frames, rows and columns, such as [1, 2, 2]")
        if hidden_size % multiple_of:
            raise OpenSoraError(f"hidden_size {hidden_size} must be a multiple of {multiple_of} with these heads")
        self.patch_size = (patch_size[0], patch_size[1], patch_size[2])
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if pred_sigma else in_channels
        self.gradient_checkpointing = False

    def _initialize(self, *last_layers: nn.Module) -> None:
        """For training from scratch: Xavier-uniform layers; every block starts as the identity, the output as zero.

        Args:
            last_layers: linear layers that begin at zero, besides the blocks' text attention and the final layer.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        zero = [self.final_layer.linear, *last_layers, *(block.cross_attn.proj for block in self.blocks)]
        for linear in zero:
            if isinstance(linear, nn.Linear):
                nn.init.zeros_(linear.weight)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers.

        Raises:
            OpenSoraError: a device map puts a fixed null text on disk, from where diffusers reads parameters only.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        places: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
        on_disk = [name for name, place in places.items() if place == "disk"]
        fixed = [name for name, _ in model.named_buffers() if name.startswith("y_embedder.")]
        if any(name.startswith(f"{place}." if place else "") for name in fixed for place in on_disk):
            raise OpenSoraError(
                "the device map puts y_embedder on disk, where its null text is not read; give it a device"
            )
        return loaded

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
        # Offloaded in groups, perhaps to disk, or one by one: only `forward` brings weights in.
        if _is_group_offload_enabled(self) or self.y_embedder.y_proj.fc1.weight.device != resident:
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
        if mask is not None and mask.shape != text_states.shape[:2]:
            raise OpenSoraError(
                f"encoder_attention_mask has shape {tuple(mask.shape)}; expected {tuple(text_states.shape[:2])}"
            )
        if mask is not None and mask.device.type == "cpu" and not torch.compiler.is_compiling():
            # Elsewhere a look would stall the device.
            if not mask.any(dim=1).all():
                raise OpenSoraError("encoder_attention_mask hides every token of a sample; give each at least one")
            length = tokens_in_use(mask)
            text_states, mask = text_states[:, :length], mask[:, :length]
            mask = None if mask.all() else mask
        states = self.y_embedder(text_states.to(get_parameter_dtype(self.t_block)), drop_text)
        return states, None if mask is None else text_bias(mask, states.dtype)

    def _split(self, tokens: Tensor, held: Tensor | None = None) -> tuple[Tensor, Shards | None]:
        """This rank's part of the tokens (B, T, S, D), if a group of ranks shares them; for `held` see `Shards`."""
        if self._sequence_group is None:
            return tokens, None
        shards = Shards(self._sequence_group, tokens.shape[2], held)
        return shards.split(tokens), shards

    def _output(
        self,
        tokens: Tensor,
        embedding: Tensor,
        clean_embedding: Tensor | None,
        frame_mask: Tensor | None,
        grid: tuple[int, int],
        latents: Tensor,
        return_dict: bool,
        shards: Shards | None,
        order: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Tokens of `grid` = (h, w) patches through the last layer to the size of `latents`.

        `order` (S,) holds the numbers of the patches where they are not kept row by row.
        """
        patches = self.final_layer(tokens, embedding, clean_embedding, frame_mask)
        if shards is not None:
            patches = shards.gather(patches)
        if order is not None:
            patches = patches.index_select(2, order.argsort())
        sample = unpatchify(
            patches.unflatten(2, grid), self.patch_size, (latents.shape[2], latents.shape[3], latents.shape[4])
        )
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


def values_per_sample(value: Tensor | float, batch: int, device: torch.device) -> Tensor:
    """One float32 number for all samples, (1,), or one for each, (B,)."""
    if not isinstance(value, Tensor):
        return torch.full((1,), float(value), device=device)
    value = value.to(device=device, dtype=torch.float32)
    if value.ndim == 0:
        return value[None]
    if value.shape not in ((1,), (batch,)):
        raise OpenSoraError(f"timestep, fps, height and width are numbers or ({batch},); one is {tuple(value.shape)}")
    return value
