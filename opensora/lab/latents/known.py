"""Latent spaces that are known of autoencoders of a codec's kind: what its factor may have been meant to be."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opensora.checkpoints.published_parts import (
    DC_AE_2_0,
    DC_AE_2_0_DECLARED_IN_TRAINING,
    FLUX_AE,
    HUNYUAN_VAE,
    OPENSORA_VAE_1_3,
    SD_VAE,
    SDXL_LATENT_SPACE,
    PublishedPart,
)
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.video import VideoAutoencoder


@dataclass(frozen=True)
class KnownSpace:
    """The declaration that goes with some published weights.

    Attributes:
        name: of these.
        part: an autoencoder of the kind that it is for.
        space: the declaration.
    """

    name: str
    part: PublishedPart
    space: LatentSpace

    def may_be_meant(self, codec: VideoCodec) -> bool:
        """Whether a codec is of that kind, and has as many channels as are declared."""
        cls, config = type(codec), self.part.config
        if self.part.class_name != f"{cls.__module__}.{cls.__name__}":
            return False
        if isinstance(codec, VideoAutoencoder):
            return config["spatial"]["latent_channels"] == codec.spatial_vae.latent_channels
        return self.space.shift is None or len(self.space.shift) == codec.latent_channels


def known_spaces(codec: VideoCodec) -> list[KnownSpace]:
    """Those that may be meant where a codec, or the 2D part of one, is concerned."""
    return [known for known in _KNOWN if known.may_be_meant(codec)]


def nearest_known(factor: float, known: list[KnownSpace], within: float = 0.05) -> KnownSpace | None:
    """The one whose factor is nearest, if it is as near as that."""
    nearest = min(known, key=lambda one: abs(one.space.factor / factor - 1), default=None)
    return nearest if nearest is not None and abs(nearest.space.factor / factor - 1) <= within else None


def _known(name: str, part: PublishedPart, space: Mapping[str, Any] | None = None) -> KnownSpace:
    return KnownSpace(name, part, LatentSpace.from_dict(part.config["latent_space"] if space is None else space))


_KNOWN = (
    _known("Stable Diffusion 1.x", SD_VAE),
    _known("SDXL", SD_VAE, SDXL_LATENT_SPACE),
    _known("FLUX.1", FLUX_AE),
    _known("Open-Sora 1.3", OPENSORA_VAE_1_3),
    _known("HunyuanVideo", HUNYUAN_VAE),
    _known("DC-AE of 2.0, sampling", DC_AE_2_0),
    _known("DC-AE of 2.0, training", DC_AE_2_0, DC_AE_2_0_DECLARED_IN_TRAINING),
)
