"""What autoencoders in training make of clips that they never saw."""

from pathlib import Path

import torch
from torch import Tensor

from opensora.evaluation.psnr import frame_psnr
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.training.task import Preview
from opensora.training.vae.data import AutoencoderData
from opensora.training.vae.losses import bilinear_reconstruction


class Reconstructions(Preview):
    """Decibels on clips the training never draws, and those of bilinear pictures that are as small as latents.

    Args:
        data: has the clips.
        frames_alone: measure the spatial autoencoder alone.
    """

    def __init__(self, data: AutoencoderData, frames_alone: bool) -> None:
        self.data, self.frames_alone = data, frames_alone

    def show(self, module: VideoAutoencoder, folder: Path, step: int) -> dict[str, float]:
        sums: dict[str, list[Tensor]] = {"psnr": [], "bilinear_psnr": [], "object_psnr": []}
        for clips in self.data.held_out_clips():
            made = self.reconstruct(module, clips.video)
            sums["psnr"].append(frame_psnr(made, clips.video).flatten())
            bilinear = bilinear_reconstruction(clips.video, module.spatial_factor)
            sums["bilinear_psnr"].append(frame_psnr(bilinear, clips.video).flatten())
            if clips.object_mask is not None:
                error = ((made.clamp(-1, 1) - clips.video).square() * clips.object_mask).sum()
                sums["object_psnr"].append(10 * torch.log10(12 * clips.object_mask.sum() / error)[None])
        return {name: float(torch.cat(values).detach().mean()) for name, values in sums.items() if values}

    def reconstruct(self, autoencoder: VideoAutoencoder, video: Tensor) -> Tensor:
        if self.frames_alone:
            return autoencoder.decode_frames(autoencoder.encode_frames(video).mode())
        return autoencoder.decode_latents(autoencoder.encode_video(video), video.shape[2])
