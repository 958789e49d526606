"""Frame latents, which temporal autoencoders are trained on, and draws from posteriors.

Letters: B clips, C channels, T frames, h, w latent cells.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.data.batch import ClipBatch
from opensora.distributed.seeding import BatchKey
from opensora.models.autoencoders.posterior import Posterior
from opensora.models.autoencoders.video import VideoAutoencoder


@dataclass(frozen=True)
class FrameLatents:
    """Scaled frame latents (B, C, T, h, w) and masks of objects (B, 1, T, h, w) or None."""

    latents: Tensor
    object_mask: Tensor | None


def encode_frames(autoencoder: VideoAutoencoder, video: Tensor, key: BatchKey | None = None) -> Tensor:
    """Frame latents (B, C, T, h, w) before the scaling factor: drawn from their posterior by a key, or its mean."""
    posterior = autoencoder.encode_frames(video)
    return posterior.mode() if key is None else draw_latents(posterior, key, "frame posterior")


@torch.no_grad()
def frame_latents(autoencoder: VideoAutoencoder, clips: ClipBatch, key: BatchKey | None = None) -> FrameLatents:
    """Clips as scaled frame latents, see `encode_frames`."""
    latents = encode_frames(autoencoder, clips.video, key)
    mask, factor = clips.object_mask, autoencoder.spatial_factor
    mask = None if mask is None else F.max_pool3d(mask, (1, factor, factor))
    return FrameLatents(autoencoder.latent_space.scale_frames(latents), mask)


def draw_latents(posterior: Posterior, key: BatchKey, purpose: str) -> Tensor:
    """Latents drawn from a posterior; the noise is drawn on the CPU, so that it is the same on every device."""
    return posterior.sample(noise=torch.randn(posterior.mean.shape, generator=key.generator(purpose)))
