"""Training an autoencoder that is one network, all of it, on pixels: those of Open-Sora 1.3 and 2.0."""

from typing import Any, cast

from torch import nn

from opensora.data.batch import ClipBatch
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.joint import JointCodec
from opensora.training.vae.frame_latents import draw_latents
from opensora.training.vae.settings import VAESettings
from opensora.training.vae.stages import Decoded, PictureTask

_BOUNDARIES = ("conv_in.", "conv_out.", "project_in.", "project_out.", "quant_conv.")


class WholeTask(PictureTask):
    """Encoder and decoder at once. What is drawn and what diverges are the network's own latents.

    Args:
        settings: of the training.
        autoencoder: what is trained.
        others: see `PictureTask`.
    """

    def __init__(self, settings: VAESettings, autoencoder: JointCodec, *others: Any) -> None:
        super().__init__(settings, cast(Any, autoencoder), *others)
        self.codec = autoencoder
        names = [name for name, _ in autoencoder.named_parameters()]
        self.not_matrices = {name for name in names if any(end in name for end in _BOUNDARIES)}

    @property
    def last_layer(self) -> nn.Module:
        return self.codec.last_layer

    def decoded(self, batch: ClipBatch, key: BatchKey) -> Decoded:
        num_frames, height, width = batch.video.shape[2:]
        self.codec.latent_size((num_frames, height, width))
        posterior = self.codec.encode_raw(batch.video)
        pictures = self.codec.decode_raw(draw_latents(posterior, key, "posterior"), num_frames)
        return Decoded(pictures, batch.video, batch.object_mask, posterior)


def check_kind(settings: VAESettings, autoencoder: Any) -> None:
    """Refuses an autoencoder that a stage cannot train.

    Raises:
        OpenSoraError: naming the stages that can.
    """
    kind = type(autoencoder).__name__
    if settings.stage == "whole" and not isinstance(autoencoder, JointCodec):
        raise OpenSoraError(f"stage whole trains a single network, but a {kind} has parts; use stage pixels")
    if settings.stage != "whole" and isinstance(autoencoder, JointCodec):
        raise OpenSoraError(f"stage {settings.stage} trains parts, but a {kind} is a single network; use stage whole")


def blocks_of_network(autoencoder: JointCodec) -> list[nn.Module]:
    """What must not be divided among devices: the outermost of such modules."""
    kinds = autoencoder._get_no_split_modules("auto")
    found: list[nn.Module] = []

    def look_into(module: nn.Module) -> None:
        for child in module.children():
            if type(child).__name__ in kinds:
                found.append(child)
            else:
                look_into(child)

    look_into(autoencoder)
    return found
