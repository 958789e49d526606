"""The stages of an autoencoder's training; `settings.py` says what they are for.

Letters: B clips, C channels, T frames, F frames that are decoded, H, W pixels, h, w latent cells.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from opensora.data.batch import ClipBatch
from opensora.distributed.seeding import BatchKey
from opensora.models.autoencoders.posterior import Posterior
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.training.task import Critic
from opensora.training.vae.clips import pick_frames, random_frames
from opensora.training.vae.data import AutoencoderData
from opensora.training.vae.discriminator import PatchDiscriminator, PatchGAN
from opensora.training.vae.frame_latents import FrameLatents, draw_latents, encode_frames, frame_latents
from opensora.training.vae.latent_space import measure_scaling_factor
from opensora.training.vae.losses import adaptive_weight, adversarial_loss, critic_hinge_loss, per_clip
from opensora.training.vae.settings import VAESettings
from opensora.training.vae.task import VAETask, boundary_layers, require_temporal, temporal_boundary_layers


class LatentsTask(VAETask):
    """The temporal autoencoder on scaled frame latents."""

    def __init__(self, settings: VAESettings, autoencoder: VideoAutoencoder, data: AutoencoderData) -> None:
        super().__init__(settings, autoencoder, data)
        autoencoder.spatial_vae.requires_grad_(False)
        require_temporal(autoencoder)
        self.not_matrices = temporal_boundary_layers(autoencoder)

    def prepare(self, key: BatchKey) -> ClipBatch | FrameLatents:
        """Clips to be encoded, or what of the cached latents this step learns from."""
        return self.data.cached_latents(key) if self.settings.cache_latents else super().prepare(key)

    def groups(self, batch: ClipBatch | FrameLatents) -> dict[str, list[str]]:
        if isinstance(batch, ClipBatch):
            return super().groups(batch)
        return {"frames": [str(batch.latents.shape[2])] * len(batch.latents)}

    def loss(self, batch: ClipBatch | FrameLatents, key: BatchKey) -> dict[str, Tensor]:
        if isinstance(batch, ClipBatch):
            batch = frame_latents(self.autoencoder, batch, key if self.settings.sample_frames else None)
        target, space, num_frames = batch.latents, self.autoencoder.latent_space, batch.latents.shape[2]
        posterior = self.autoencoder.encode_time(space.unscale_frames(target))
        latents = draw_latents(posterior, key, "posterior")
        decoded = space.scale_frames(self.autoencoder.decode_time(latents, num_frames))
        terms = {
            "reconstruction": self.reconstruction_loss(decoded, target, batch.object_mask),
            "kl": self.kl_loss(posterior),
        }
        if self.settings.identity_weight:
            identity = target.new_zeros(len(target))
            if num_frames == 1:
                identity = per_clip((latents - target).abs(), self.settings.reduction)
            terms["identity"] = self.settings.identity_weight * identity
        return terms


@dataclass
class Decoded:
    """What a step decoded: pictures (B, 3, F, H, W), what they should be, masks of objects, and the posterior."""

    pictures: Tensor
    target: Tensor
    object_mask: Tensor | None
    posterior: Posterior


class PictureTask(VAETask):
    """What the stages that decode to pixels share: how pictures are compared.

    Args:
        settings, autoencoder, data: see `VAETask`.
        perceptual: compares how pictures look; None for none.
        discriminator: the critic that decoded clips are to deceive; None for none.
    """

    def __init__(
        self,
        settings: VAESettings,
        autoencoder: VideoAutoencoder,
        data: AutoencoderData,
        perceptual: nn.Module | None = None,
        discriminator: PatchDiscriminator | PatchGAN | None = None,
    ) -> None:
        super().__init__(settings, autoencoder, data)
        self.perceptual, self.discriminator = perceptual, discriminator

    @property
    def last_layer(self) -> nn.Module:
        """What makes pixels, at the end of the decoder."""
        return self.autoencoder.spatial_vae.module.decoder.conv_out

    @abstractmethod
    def decoded(self, batch: ClipBatch, key: BatchKey) -> Decoded:
        """A batch, encoded and decoded."""

    def decoded_from(self, posterior: Posterior, batch: ClipBatch, key: BatchKey) -> Decoded:
        """Latents drawn from the posterior of a batch, decoded: all frames, or some drawn at random."""
        video, mask, autoencoder = batch.video, batch.object_mask, self.autoencoder
        frame_latents = autoencoder.decode_time(draw_latents(posterior, key, "posterior"), video.shape[2])
        if self.settings.frames_per_clip is not None:
            rows, frames = random_frames(video, self.settings.frames_per_clip, key)
            frame_latents, video = pick_frames(frame_latents, rows, frames), pick_frames(video, rows, frames)
            mask = None if mask is None else pick_frames(mask, rows, frames)
        return Decoded(autoencoder.decode_frames(frame_latents), video, mask, posterior)

    def loss(self, batch: ClipBatch, key: BatchKey) -> dict[str, Tensor]:
        settings, made = self.settings, self.decoded(batch, key)
        terms = {"reconstruction": self.reconstruction_loss(made.pictures, made.target, made.object_mask)}
        if self.perceptual is not None:
            distance = self.perceptual(made.pictures, made.target)
            # As published, the distance of a frame is added to the error of every one of its values.
            values = 1 if settings.reduction == "mean" else made.target[0, :, 0].numel()
            terms["perceptual"] = settings.perceptual_weight * values * distance
        compared = torch.stack(list(terms.values())).sum(dim=0)
        if settings.discriminator is not None:
            terms["adversarial"] = self.adversarial_loss(made.pictures, compared, key)
        return {**terms, "kl": self.kl_loss(made.posterior)}

    def adversarial_loss(self, pictures: Tensor, compared: Tensor, key: BatchKey) -> Tensor:
        """What the critic says, weighted to pull at the last layer as hard as the comparison does; (B,)."""
        assert self.discriminator is not None and self.settings.discriminator is not None
        if key.step < self.settings.discriminator.start:
            return pictures.new_zeros(len(pictures))
        self.discriminator.requires_grad_(False)  # it learns from its own loss alone
        deceived = adversarial_loss(self.discriminator(pictures))
        self.discriminator.requires_grad_(True)
        weight = adaptive_weight(compared.mean(), deceived.mean(), cast(Tensor, self.last_layer.weight))
        return self.settings.discriminator.weight * weight * deceived


class PictureCritic(Critic):
    """Learns to tell real clips from those that the autoencoder now makes of them."""

    def __init__(self, task: PictureTask, discriminator: PatchDiscriminator | PatchGAN, start: int) -> None:
        self.task, self.start = task, start
        self.module = self.discriminator = discriminator

    def loss(self, batch: ClipBatch, key: BatchKey) -> dict[str, Tensor]:
        if key.step < self.start:  # nothing is learnt yet, and all gradients are 0
            nothing = sum((parameter.sum() * 0 for parameter in self.discriminator.parameters()), torch.tensor(0.0))
            return {"critic": nothing.expand(len(batch.video))}
        with torch.no_grad():
            made = self.task.decoded(batch, key)
        return {"critic": critic_hinge_loss(self.discriminator(made.target), self.discriminator(made.pictures))}


class FramesTask(PictureTask):
    """The spatial autoencoder on single frames."""

    def __init__(self, settings: VAESettings, autoencoder: VideoAutoencoder, *others: Any) -> None:
        super().__init__(settings, autoencoder, *others)
        if autoencoder.temporal_vae is not None:
            autoencoder.temporal_vae.requires_grad_(False)
        self.not_matrices = boundary_layers(autoencoder)

    def prepare(self, key: BatchKey) -> ClipBatch:
        """Clips of which only the frames that are trained on are left."""
        clips = super().prepare(key)
        if self.settings.frames_per_clip is None:
            return clips
        rows, frames = random_frames(clips.video, self.settings.frames_per_clip, key)
        mask = None if clips.object_mask is None else pick_frames(clips.object_mask, rows, frames)
        return replace(clips, video=pick_frames(clips.video, rows, frames), object_mask=mask)

    def decoded(self, batch: ClipBatch, key: BatchKey) -> Decoded:
        posterior = self.autoencoder.encode_frames(batch.video)
        pictures = self.autoencoder.decode_frames(draw_latents(posterior, key, "posterior"))
        return Decoded(pictures, batch.video, batch.object_mask, posterior)

    def export(self, module: Any, folder: Path) -> None:
        """Writes the weights, with the scaling factor 1 / std of their latents where none belongs to them."""
        if not self.data.factor_is_known:
            measure_scaling_factor(module, self.data.measured_videos(), self.data.measured_on())
        module.save_pretrained(folder)


class DecodersTask(PictureTask):
    """Both decoders on pixels; the encoders stay as they are, and with them the latent space and every model of it."""

    def __init__(self, settings: VAESettings, autoencoder: VideoAutoencoder, *others: Any) -> None:
        super().__init__(settings, autoencoder, *others)
        require_temporal(autoencoder)
        encoders = ("spatial_vae.module.encoder.", "spatial_vae.module.quant_conv.", "temporal_vae.encoder")
        for name, parameter in autoencoder.named_parameters():
            parameter.requires_grad_(not name.startswith(encoders))
        self.not_matrices = boundary_layers(autoencoder)

    def decoded(self, batch: ClipBatch, key: BatchKey) -> Decoded:
        with torch.no_grad():
            posterior = self.autoencoder.encode_time(encode_frames(self.autoencoder, batch.video))
        return self.decoded_from(posterior, batch, key)

    def kl_loss(self, posterior: Posterior) -> Tensor:
        """None: what it would pull at does not learn."""
        return posterior.mean.new_zeros(len(posterior.mean))

    def export(self, module: Any, folder: Path) -> None:
        """Writes the weights; shift and scale of the latents are what they were."""
        module.save_pretrained(folder)


class PixelsTask(PictureTask):
    """The temporal autoencoder and the spatial one, on pixels."""

    def __init__(self, settings: VAESettings, autoencoder: VideoAutoencoder, *others: Any) -> None:
        super().__init__(settings, autoencoder, *others)
        spatial = autoencoder.spatial_vae.module
        if not settings.train_encoder:
            spatial.encoder.requires_grad_(False)
            if spatial.quant_conv is not None:
                spatial.quant_conv.requires_grad_(False)
        require_temporal(autoencoder)
        spatial_names = {n for n, _ in autoencoder.named_parameters() if n.startswith("spatial_vae.")}
        self.not_matrices = spatial_names | temporal_boundary_layers(autoencoder)

    def decoded(self, batch: ClipBatch, key: BatchKey) -> Decoded:
        video, autoencoder = batch.video, self.autoencoder
        with torch.set_grad_enabled(self.settings.train_encoder and torch.is_grad_enabled()):
            frame_latents = encode_frames(autoencoder, video, key if self.settings.sample_frames else None)
        return self.decoded_from(autoencoder.encode_time(frame_latents), batch, key)
