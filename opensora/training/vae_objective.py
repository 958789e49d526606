"""Training a video autoencoder in three stages, each a short run that starts from the one before.

1. `frames`: the spatial autoencoder on single frames. Its scaling factor, 1 / std of its latents, is measured at the
   end.
2. `latents`: the temporal autoencoder on the scaled frame latents, the spatial one frozen.
3. `pixels`: the temporal autoencoder and the spatial decoder together, on pixels. The per-channel shift and scale of
   the latent space are measured at the end and written into the checkpoint.

Objects are a small part of a frame: errors on them are weighted up, because overall error hides a lost shape.

Letters: B clips, C channels, T frames, H, W pixels, h, w latent cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.checkpoints.loading import load_component
from opensora.data.toybox import ToyboxClips
from opensora.distributed.seeding import Draw, generator
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.video import TemporalPart, VideoAutoencoder
from opensora.training.objective import Objective


@dataclass(frozen=True)
class VAEObjectiveConfig:
    """One stage of autoencoder training.

    Attributes:
        stage: what is trained; see the module's introduction.
        clips: where clips come from.
        autoencoder: configuration of the `VideoAutoencoder`, for the first stage.
        init_from: exported folder of the stage before, for the later ones.
        batch_size: B, clips a step.
        frames_per_clip: frames of each clip that stages `frames` and `pixels` decode.
        object_weight: extra weight of errors on objects.
        kl_weight: weight of the KL divergence to a standard normal, per latent element.
        num_clips: clips encoded once for stage `latents`, and measured for the latent space.
    """

    stage: Literal["frames", "latents", "pixels"]
    clips: ToyboxClips = field(default_factory=ToyboxClips)
    autoencoder: dict[str, Any] | None = None
    init_from: Path | None = None
    batch_size: int = 8
    frames_per_clip: int = 4
    object_weight: float = 20.0
    kl_weight: float = 2e-4
    num_clips: int = 1200

    def build(self, device: str) -> "VAEObjective":
        stages = {"frames": FramesObjective, "latents": LatentsObjective, "pixels": PixelsObjective}
        return stages[self.stage](self, device)


class VAEObjective(Objective):
    """What the stages share: the autoencoder, the reconstruction loss, the export."""

    def __init__(self, config: VAEObjectiveConfig, device: str) -> None:
        self.config, self.device = config, device
        self.autoencoder = self.load()
        self.autoencoder.micro_batch_size = None  # small frames: all at once
        self.module = self.autoencoder.to(device)

    def load(self) -> VideoAutoencoder:
        if self.config.init_from is not None:
            if not self.config.init_from.exists():
                raise OpenSoraError(
                    f"stage {self.config.stage!r} starts from {self.config.init_from}, which is not there; "
                    "train the stage before, or set objective.init_from"
                )
            return load_component(self.config.init_from, VideoAutoencoder)
        if self.config.autoencoder is None:
            raise OpenSoraError(f"stage {self.config.stage!r} needs objective.autoencoder or objective.init_from")
        return VideoAutoencoder(**self.config.autoencoder)

    def reconstruction_loss(self, reconstruction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """(L1 + 2 MSE), objects weighted by 1 + `object_weight`; (B, ...) tensors -> (B,)."""
        error = (reconstruction.float() - target).abs()
        weighted = (error + 2 * error.square()) * (1 + self.config.object_weight * mask)
        return weighted.flatten(1).mean(dim=1)

    def kl_loss(self, mean: Tensor, logvar: Tensor) -> Tensor:
        """KL divergence to a standard normal, mean over elements, times its weight; (B,)."""
        mean, logvar = mean.float(), logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        return self.config.kl_weight * divergence.flatten(1).mean(dim=1)

    def random_frames(self, draw: Draw, video: Tensor) -> Tensor:
        """(B, frames_per_clip) indices of frames, without repetition within a clip."""
        scores = torch.rand(video.shape[0], video.shape[2], generator=draw.generator("frames"))
        return scores.argsort(dim=1)[:, : self.config.frames_per_clip].to(video.device)

    def preview(self, folder: Path, step: int) -> dict[str, float]:
        """Decibels on 32 clips the training never draws."""
        video, mask = self.config.clips.render(32, generator("preview"), self.device, split="held_out")
        reconstruction = self.reconstruct(video)
        error = (reconstruction.clamp(-1, 1) - video).square()
        objects = (error * mask).sum() / (3 * mask.sum())
        return {"psnr": _decibels(error.mean()), "object_psnr": _decibels(objects)}

    def reconstruct(self, video: Tensor) -> Tensor:
        return self.autoencoder.decode(self.autoencoder.encode(video), video.shape[2])

    def measured_clips(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The `num_clips` training clips that latents are measured on, 50 at a time, with their masks."""
        for start in range(0, self.config.num_clips, 50):
            number = min(50, self.config.num_clips - start)
            yield self.config.clips.render(number, generator("measure", start), self.device)

    def export(self, folder: Path) -> None:
        self.autoencoder.save_pretrained(folder)


class FramesObjective(VAEObjective):
    """Stage 1: the spatial autoencoder on single frames."""

    def __init__(self, config: VAEObjectiveConfig, device: str) -> None:
        super().__init__(config, device)
        if self.autoencoder.temporal_vae is not None:
            self.autoencoder.temporal_vae.requires_grad_(False)
        names = [n for n, _ in self.module.named_parameters()]
        self.not_matrices = {n for n in names if "conv_in" in n or "conv_out" in n or "quant_conv" in n}

    def prepare(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Frames (B, 3, T, H, W) and masks (B, 1, T, H, W), T = frames_per_clip."""
        video, mask = self.config.clips.render(self.config.batch_size, draw.generator("clips"), self.device)
        frames = self.random_frames(draw, video)
        rows = torch.arange(len(video), device=video.device)[:, None]
        return pick_frames(video, rows, frames), pick_frames(mask, rows, frames)

    def loss(self, batch: tuple[Tensor, Tensor], draw: Draw) -> dict[str, Tensor]:
        video, mask = batch
        posterior = self.autoencoder.encode_frames(video)
        noise = torch.randn(posterior.mean.shape, generator=draw.generator("posterior")).to(video.device)
        reconstruction = self.autoencoder.decode_frames(posterior.mean + posterior.std * noise)
        return {
            "reconstruction": self.reconstruction_loss(reconstruction, video, mask),
            "kl": self.kl_loss(posterior.mean, posterior.logvar),
        }

    def reconstruct(self, video: Tensor) -> Tensor:
        return self.autoencoder.decode_frames(self.autoencoder.encode_frames(video).mode())

    def export(self, folder: Path) -> None:
        """Writes the weights with the scaling factor 1 / std of the latents they make."""
        latents = torch.cat([self.autoencoder.encode_frames(video).mode() for video, _ in self.measured_clips()])
        latent_space = LatentSpace(scaling_factor=1 / float(latents.std()), trained_with="toybox frames")
        self.autoencoder.set_latent_space(latent_space)
        super().export(folder)


class LatentsObjective(VAEObjective):
    """Stage 2: the temporal autoencoder on scaled frame latents."""

    def __init__(self, config: VAEObjectiveConfig, device: str) -> None:
        super().__init__(config, device)
        self.autoencoder.spatial_vae.requires_grad_(False)
        self.temporal = require_temporal(self.autoencoder)
        self.not_matrices = temporal_boundary_layers(self.module)

    def set_up(self, cache: Path) -> None:
        factor = self.autoencoder.spatial_factor
        latents, masks = [], []
        with torch.no_grad():
            for video, mask in self.measured_clips():
                frame_latents = self.autoencoder.encode_frames(video).mode()
                latents.append(self.autoencoder.latent_space.scale_frames(frame_latents))
                masks.append(F.max_pool3d(mask, (1, factor, factor)))
        self.latents, self.masks = torch.cat(latents), torch.cat(masks)

    def prepare(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Scaled frame latents (B, C, T, h, w) and masks (B, 1, T, h, w)."""
        rows = torch.randint(len(self.latents), (self.config.batch_size,), generator=draw.generator("clips"))
        return self.latents[rows], self.masks[rows]

    def loss(self, batch: tuple[Tensor, Tensor], draw: Draw) -> dict[str, Tensor]:
        latents, mask = batch
        posterior = self.temporal.encode(latents)
        noise = torch.randn(posterior.mean.shape, generator=draw.generator("posterior")).to(latents.device)
        reconstruction = self.temporal.decode(posterior.mean + posterior.std * noise, latents.shape[2])
        return {
            "reconstruction": self.reconstruction_loss(reconstruction, latents, mask),
            "kl": self.kl_loss(posterior.mean, posterior.logvar),
        }


class PixelsObjective(VAEObjective):
    """Stage 3: the temporal autoencoder and the spatial decoder, on pixels."""

    def __init__(self, config: VAEObjectiveConfig, device: str) -> None:
        super().__init__(config, device)
        spatial = self.autoencoder.spatial_vae.module
        spatial.encoder.requires_grad_(False)
        if spatial.quant_conv is not None:
            spatial.quant_conv.requires_grad_(False)
        self.temporal = require_temporal(self.autoencoder)
        spatial_names = {n for n, _ in self.module.named_parameters() if n.startswith("spatial_vae.")}
        self.not_matrices = spatial_names | temporal_boundary_layers(self.module)

    def prepare(self, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """Clips (B, 3, T, H, W), masks (B, 1, T, H, W), and the frames to decode (B, frames_per_clip)."""
        video, mask = self.config.clips.render(self.config.batch_size, draw.generator("clips"), self.device)
        return video, mask, self.random_frames(draw, video)

    def loss(self, batch: tuple[Tensor, Tensor, Tensor], draw: Draw) -> dict[str, Tensor]:
        video, mask, frames = batch
        latent_space = self.autoencoder.latent_space
        with torch.no_grad():
            latents = latent_space.scale_frames(self.autoencoder.encode_frames(video).mode())
        posterior = self.temporal.encode(latents)
        noise = torch.randn(posterior.mean.shape, generator=draw.generator("posterior")).to(video.device)
        decoded = self.temporal.decode(posterior.mean + posterior.std * noise, video.shape[2])
        rows = torch.arange(len(video), device=video.device)[:, None]
        chosen = latent_space.unscale_frames(pick_frames(decoded, rows, frames))
        reconstruction = self.autoencoder.decode_frames(chosen)
        return {
            "reconstruction": self.reconstruction_loss(
                reconstruction, pick_frames(video, rows, frames), pick_frames(mask, rows, frames)
            ),
            "kl": self.kl_loss(posterior.mean, posterior.logvar),
        }

    def export(self, folder: Path) -> None:
        """Writes the weights with the per-channel shift and scale of the latents they make."""
        videos = (video for video, _ in self.measured_clips())
        self.autoencoder.measure_latent_space(videos, trained_with="toybox clips")
        super().export(folder)


def require_temporal(autoencoder: VideoAutoencoder) -> TemporalPart:
    """The temporal part; an `OpenSoraError` where there is none."""
    if autoencoder.temporal_vae is None:
        raise OpenSoraError("this autoencoder has no temporal part to train; set objective.autoencoder.temporal")
    return autoencoder.temporal_vae


def pick_frames(x: Tensor, rows: Tensor, frames: Tensor) -> Tensor:
    """Frames (B, F) of a clip (B, C, T, H, W), each clip its own; (B, C, F, H, W)."""
    return x.transpose(1, 2)[rows, frames].transpose(1, 2)


def temporal_boundary_layers(module: torch.nn.Module) -> set[str]:
    """First and last layers of the temporal autoencoder's two halves."""
    return {n for n, _ in module.named_parameters() if n.startswith("temporal_vae.") and ("_in." in n or "_out." in n)}


def _decibels(mean_square: Tensor) -> float:
    """PSNR of pixels in [-1, 1]."""
    return float(10 * torch.log10(4 / mean_square))
