"""What the stages of an autoencoder's training share.

Letters: B clips, C channels, T frames, H, W pixels, h, w latent cells.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.files import replacing_folder
from opensora.models.autoencoders.folded import CausalMixer
from opensora.models.autoencoders.posterior import Posterior
from opensora.models.autoencoders.temporal import ResBlock
from opensora.models.autoencoders.video import TemporalPart, VideoAutoencoder
from opensora.training.frozen_parts import save_frozen_part
from opensora.training.task import TrainingTask
from opensora.training.vae.data import AutoencoderData
from opensora.training.vae.losses import kl_loss, reconstruction_loss
from opensora.training.vae.settings import VAESettings

TEMPORAL_BLOCKS = (ResBlock, CausalMixer)
SHIFT_AND_SCALE = "; shift and scale measured on "


class VAETask(TrainingTask):
    """An autoencoder learns to give its clips back.

    Args:
        settings: of the training.
        autoencoder: what is trained.
        data: its clips.

    Attributes:
        not_matrices: names of the parameters that are no matrices between hidden layers.
    """

    not_matrices: set[str]

    def __init__(self, settings: VAESettings, autoencoder: VideoAutoencoder, data: AutoencoderData) -> None:
        self.settings, self.data = settings, data
        self.module = self.autoencoder = autoencoder

    def prepare(self, key: BatchKey) -> Any:
        return self.data.clips(key)

    def groups(self, batch: Any) -> dict[str, list[str]]:
        """Each clip's size and number of frames."""
        size, _, num_frames = batch.video.shape[:3]
        return {"bucket": [batch.label] * size, "frames": [str(num_frames)] * size}

    def weights(self, mask: Tensor | None) -> Tensor | None:
        """Weight of errors at every position."""
        return None if mask is None or not self.settings.object_weight else 1 + self.settings.object_weight * mask

    def reconstruction_loss(self, reconstruction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        settings = self.settings
        return reconstruction_loss(
            reconstruction,
            target,
            mse_weight=settings.mse_weight,
            weights=self.weights(mask),
            reduction=settings.reduction,
        )

    def kl_loss(self, posterior: Posterior) -> Tensor:
        return self.settings.kl_weight * kl_loss(posterior, self.settings.reduction)

    def export(self, module: Any, folder: Path) -> None:
        """Writes the weights with the per-channel shift and scale of the latents they make."""
        factor_from = module.latent_space.trained_with.partition(SHIFT_AND_SCALE)[0]
        trained_with = factor_from + SHIFT_AND_SCALE + self.data.measured_on()
        module.measure_latent_space(self.data.measured_videos(), trained_with)
        module.save_pretrained(folder)

    def export_frozen(self, folder: Path) -> None:
        """Configuration and frozen weights; shift and scale of the latents are measured at the end alone."""
        module: Any = self.module
        with replacing_folder(folder, overwrite=True) as temporary:
            module.save_config(temporary)
            save_frozen_part(module, temporary, trained=["autoencoder"])


def blocks_of(autoencoder: VideoAutoencoder) -> list[nn.Module]:
    """The levels of the spatial part and the blocks of the temporal one."""
    spatial, temporal = autoencoder.spatial_vae.module, autoencoder.temporal_vae
    levels = [*spatial.encoder.down_blocks, *spatial.decoder.up_blocks]
    return levels + [part for part in (temporal or nn.Identity()).modules() if isinstance(part, TEMPORAL_BLOCKS)]


def require_temporal(autoencoder: VideoAutoencoder) -> TemporalPart:
    """The temporal part; an `OpenSoraError` where there is none."""
    if autoencoder.temporal_vae is None:
        raise OpenSoraError("this autoencoder has no temporal part to train; set objective.autoencoder.temporal")
    return autoencoder.temporal_vae


def temporal_boundary_layers(module: nn.Module) -> set[str]:
    """First and last layers of the temporal autoencoder's two halves, of either kind."""
    ends = ("_in.", "_out.", "quant_conv.", "encoder.conv2.", "decoder.conv1.")
    names = {n for n, _ in module.named_parameters() if n.startswith("temporal_vae.")}
    return {n for n in names if any(end in n for end in ends)}


def boundary_layers(autoencoder: VideoAutoencoder) -> set[str]:
    """First and last layers of every half of an autoencoder, spatial and temporal."""
    names = [n for n, _ in autoencoder.named_parameters()]
    spatial = {n for n in names if any(end in n for end in ("conv_in", "conv_out", "quant_conv"))}
    return spatial | temporal_boundary_layers(autoencoder)
