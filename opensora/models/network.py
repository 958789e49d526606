"""What the rest of the package asks of every diffusion transformer: the contract of a network, in one class.

A new family of networks is a subclass with blocks, an `encode_text` if keys and values of the text can be made once,
and a `forward`. The pipeline, training, held-out losses and plans call it through `denoiser.predict` alone.

Letters: B clips, C latent channels, T, H, W latent frames and cells, L text tokens, D_c width of the text states, P
width of a pooled text.
"""

from typing import Any

from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # diffusers looks for it beside the class
from torch import Tensor
from torch.distributed import ProcessGroup

from opensora.errors import OpenSoraError
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
        guidance_rule: what combines its branches in sampling, unless a call brings a rule of its own; called with a
            guider, the guided channels and the number of latent channels.
        blocks: all repeated blocks in the order in which they run: units of plans, sharding and recomputation.
    """

    text_conditioner: type[TextConditioner] = T5Conditioner
    guidance_rule: Any = ChannelGuidance

    blocks: Any
    config: Any

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
            return_dict: a tuple of one instead of an output object when False.
            **text: what else the family's text has, such as `pooled_projections` (B, P).

        Returns:
            `.sample`, (B, C or 2 C, T, H, W), in the model's dtype.
        """
        raise NotImplementedError

    def enable_sequence_parallel(self, group: ProcessGroup) -> None:
        """Share every forward among the ranks of a group, each with a part of the tokens.

        Raises:
            OpenSoraError: the network cannot.
        """
        raise OpenSoraError(f"a {type(self).__name__} cannot share a clip's tokens among processes; use one process")

    def disable_sequence_parallel(self) -> None:
        """Compute everything on this rank again."""
