"""A codec that is one network over space and time: an encoder, a decoder, and a latent space.

Letters: B batch, T frames, H, W height and width in pixels, Z channels of a latent, N latent frames, h, w latent height
and width.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opensora.models.autoencoders.declared import DeclaredCodec
from opensora.models.autoencoders.posterior import Certain, Posterior
from opensora.models.format import Format
from opensora.models.offload_hooks import apply_offload_hooks


class JointCodec(DeclaredCodec):
    """Base of such a codec.

    A subclass sets `encoder` and `decoder`, names the last layer of the latter, and implements `encode_raw` and
    `decode_raw`, decorated with `apply_offload_hooks`: both deal in the network's own latents, before factor, shift and
    scale.
    """

    encoder: nn.Module
    decoder: nn.Module
    name_of_last_layer: str

    @abstractmethod
    def encode_raw(self, video: Tensor) -> Posterior:
        """Posterior of a video (B, 3, T, H, W): the network's own latents (B, Z, N, h, w), float32."""

    @abstractmethod
    def decode_raw(self, latents: Tensor, num_frames: int) -> Tensor:
        """Video (B, 3, num_frames, H, W), float32, of the network's own latents (B, Z, N, h, w)."""

    @property
    def last_layer(self) -> nn.Module:
        """What makes pixels, at the end of the decoder; losses are weighed against each other by their pull at it."""
        return self.decoder.get_submodule(self.name_of_last_layer)

    @apply_offload_hooks
    def posterior(self, video: Tensor) -> Posterior:
        """What is predicted of a video (B, 3, T, H, W): its normalised latents (B, Z, N, h, w) with their uncertainty.

        Raises:
            OpenSoraError: for a size that cannot be encoded, or pixels that are no floating point numbers.
        """
        self._check_video(video)
        clips = video.split(1) if self.use_slicing else (video,)
        return self._normalised(Posterior.cat([self.encode_raw(clip) for clip in clips], dim=0))

    @apply_offload_hooks
    def decode_latents(self, latents: Tensor, num_frames: int) -> Tensor:
        """Normalised latents (B, Z, N, h, w) -> video (B, 3, num_frames, H, W), nominally in [-1, 1], float32.

        Raises:
            OpenSoraError: if the latents are not those of a clip of `num_frames` frames.
        """
        self._check_latents(latents, num_frames)
        latents = self.latent_space.unscale_frames(self.latent_space.denormalise(latents.float()))
        clips = latents.split(1) if self.use_slicing else (latents,)
        return torch.cat([self.decode_raw(clip, num_frames) for clip in clips])

    def _normalised(self, posterior: Posterior) -> Posterior:
        space = self.latent_space
        mean = space.normalise(space.scale_frames(posterior.mean))
        if isinstance(posterior, Certain):
            return Certain(mean)
        _, scale = space.statistics_of(mean)
        return Posterior(mean, posterior.logvar + 2 * (math.log(space.factor) - scale.log()))

    def decoders(self) -> list[tuple[nn.Module, str]]:
        """The decoder, which takes one chunk or tile after the other."""
        return [(self.decoder, "forward")]

    def encoders(self) -> list[nn.Module]:
        """The encoder, which takes one chunk or tile after the other."""
        return [self.encoder]


class JointFormat(Format):
    """What is true of a family of such codecs, whose published weights tell all but their latent space."""

    kind = "autoencoder"

    def assumes_published(self, config: Mapping[str, Any]) -> bool:
        return True

    def difference(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
        channels = config.get("latent_channels")
        return None if channels == other.get("latent_channels") else f"its latents have {channels} channels"
