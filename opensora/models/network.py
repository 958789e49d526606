"""What the rest of the package asks of every diffusion transformer: the contract of a network, in one class.

A new family of networks is a subclass with blocks, an `encode_text` if keys and values of the text can be made once,
and a `forward`. The pipeline, training, held-out losses and plans call it through `denoiser.predict` alone.

Letters: B clips, C latent channels, T, H, W latent frames and cells, L text tokens, D_c width of the text states, P
width of a pooled text.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # diffusers looks for it beside the class
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from opensora.errors import OpenSoraError
from opensora.models.caching import CacheIdentifiers, apply_cache
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.clip_conditions import ClipConditions
from opensora.models.guidance import ChannelGuidance
from opensora.models.portable_config import PortableModelMixin
from opensora.models.text.conditioner import T5Conditioner, TextConditioner


class VideoTransformer(PortableModelMixin, CacheMixin, PeftAdapterMixin):
    """Base of the networks that predict velocity, noise or clean latents.

    Its configuration holds `in_channels` (C), `model_max_length` (the most text tokens) and `pred_sigma` (2 C channels
    come out, the second half of which is the learned variance) beside what else the family has.

    Attributes:
        text_conditioner: class that makes of prompts what the network reads, from a pipeline's components.
        reads_channels: whether `forward` takes `channel_conditioning`; known frames lie there then, beside the noise,
            and not in its place (`frame_mask`).
        reads_frame_mask: whether it takes a `frame_mask`, where known frames lie in place of the noise.
        known_frames_alone: whether those were encoded alone in its training, pictures and clips by themselves, and not
            in their place in the clip.
        carries_latents: whether a long video goes on from the latents of the clip before, and is decoded as a whole; of
            all others each clip is decoded, and its last frames are encoded again.
        reads_guidance: whether `forward` takes `guidance`, which was distilled into it.
        guidance_rule: what combines its branches in sampling, unless a call brings a rule of its own; called with a
            guider or a rule, the guided channels and the number of latent channels.
        blocks: all repeated blocks in the order in which they run: units of plans, sharding and recomputation.
    """

    text_conditioner: type[TextConditioner] = T5Conditioner
    reads_channels: bool = False
    reads_frame_mask: bool = True
    known_frames_alone: bool = False
    carries_latents: bool = False
    reads_guidance: bool = False
    guidance_rule: Any = ChannelGuidance

    blocks: Any
    config: Any
    _cache_identifiers = CacheIdentifiers()
    _supports_sequence_parallel = False
    _sequence_group: ProcessGroup | None = None

    @property
    def max_text_tokens(self) -> int:
        """The most tokens that a text may have."""
        return self.config.model_max_length

    def encode_text(self, **text: Tensor) -> Any:
        """What `forward` takes as `text_context` in every step of a run, made once; here the text as it is.

        Args:
            **text: `TextStates.inputs()`.
        """
        return text

    def without_known_frames(self, channels: ChannelConditioning) -> ChannelConditioning:
        """What the branch of guidance reads that knows of no frame; here that none is known."""
        return ChannelConditioning.none(channels.latents)

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
        text_context: Any = None,
        channel_conditioning: ChannelConditioning | None = None,
        guidance: Tensor | float | None = None,
        return_dict: bool = True,
        **text: Tensor,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict from noisy latents.

        Args:
            hidden_states: (B, C, T, H, W) latents of any size.
            timestep: (B,) or a number, 0 (clean) .. 1000 (noise).
            encoder_hidden_states: (B, L, D_c) text states; or give `text_context`.
            encoder_attention_mask: (B, L), 1 = token.
            clip_conditions: what is known of the clips; a network reads what it was trained to be told.
            frame_mask: (B, T) bool, True = generated, False = given clean; None = all are generated.
            drop_text: (B,) bool, True = the learned null text in place of this sample's.
            text_context: result of `encode_text`, instead of the text arguments.
            channel_conditioning: known frames in channels beside the noise, of networks that have `reads_channels`.
            guidance: (B,) or a number, the scale that networks with `reads_guidance` are told.
            return_dict: a tuple of one instead of an output object when False.
            **text: what else the family's text has, such as `pooled_projections` (B, P).

        Returns:
            `.sample`, (B, C or 2 C, T, H, W), in the model's dtype.
        """
        raise NotImplementedError

    def _run_block(self, block: nn.Module, *arguments: Any) -> Any:
        """One block, checkpointed where that is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing and self._gradient_checkpointing_func:
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)

    def enable_cache(self, config: Any) -> None:
        """Reuse what changes little between steps; see the class for which configurations work.

        Raises:
            OpenSoraError: a kind of cache that does not work with this model, identifiers that fit none of its modules,
                or a second cache at once.
        """
        if self.is_cache_enabled:
            raise OpenSoraError(f"{type(self._cache_config).__name__} is enabled already; call disable_cache() first")
        if isinstance(config, FirstBlockCacheConfig) and self._sequence_group is not None:
            raise OpenSoraError("FirstBlockCache does not work with sequence parallelism; use MagCacheConfig")
        apply_cache(self, self.blocks, config, self._cache_identifiers)
        HookRegistry.check_if_exists_or_initialize(self).invalidate_child_registries_cache()
        self._cache_config = config

    def enable_sequence_parallel(self, group: ProcessGroup) -> None:
        """Share every forward among the ranks of a group: each computes a part of the tokens, all return the whole.

        All ranks of the group call the model with the same arguments, at the same time. See
        `opensora.distributed.sequence_parallel` for how, and for what gradients mean then.

        Raises:
            OpenSoraError: the network cannot, or FirstBlockCache is enabled; ranks would not agree on which steps to
                skip.
        """
        if not self._supports_sequence_parallel:
            raise OpenSoraError(
                f"a {type(self).__name__} cannot share a clip's tokens among processes; use one process"
            )
        if self.is_cache_enabled and isinstance(self._cache_config, FirstBlockCacheConfig):
            raise OpenSoraError("FirstBlockCache does not work with sequence parallelism; call disable_cache() first")
        self._sequence_group = group

    def switched(self, tokens: Sequence[int]) -> tuple[int, int, int, int]:
        """What ranks that share a clip send each other before and after an attention, where `tokens` enter a block.

        Args:
            tokens: their shape.

        Returns:
            (B, T, S, D) as of `distributed.sequence_parallel.bytes_switched`.
        """
        batch, frames, patches, width = tokens
        return batch, frames, patches, width

    def disable_sequence_parallel(self) -> None:
        """Compute everything on this rank again."""
        self._sequence_group = None


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """Name -> repeated block, in the order in which they run; of networks of other libraries the longest list is."""
    if isinstance(network, VideoTransformer):
        blocks = list(network.blocks)
    else:
        lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
        blocks = list(max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=()))
    names = {module: name for name, module in network.named_modules()}
    return {names[block]: block for block in blocks}
