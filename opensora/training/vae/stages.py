"""The stages of autoencoder training as objectives; `vae_objective.py` says what they are for.

Letters: B clips, C channels, T frames, F frames that are decoded, H, W pixels, h, w latent cells.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.data.batch import BatchShape, ClipBatch, DataContext, Source
from opensora.data.clips import ManifestClips
from opensora.distributed.seeding import BatchKey, derive_seed
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.folded import CausalMixer
from opensora.models.autoencoders.posterior import Posterior
from opensora.models.autoencoders.temporal import ResBlock
from opensora.models.autoencoders.video import TemporalPart, VideoAutoencoder
from opensora.training.task import TrainingTask
from opensora.training.vae.clips import Cut, CutClips, pick_frames, random_frames
from opensora.training.vae.discriminator import PatchDiscriminator
from opensora.training.vae.latent_space import build_autoencoder, measure_scaling_factor
from opensora.training.vae.losses import (
    adaptive_weight,
    adversarial_loss,
    bilinear_reconstruction,
    critic_hinge_loss,
    frame_psnr,
    kl_loss,
    per_clip,
    reconstruction_loss,
)
from opensora.training.vae.perceptual import build_perceptual

if TYPE_CHECKING:
    from opensora.training.vae.task import VAETaskConfig

TEMPORAL_BLOCKS = (ResBlock, CausalMixer)
SHIFT_AND_SCALE = "; shift and scale measured on "


@dataclass
class FrameLatents:
    """Scaled frame latents (B, C, T, h, w) and masks of objects (B, 1, T, h, w) or None."""

    latents: Tensor
    object_mask: Tensor | None


class VAETask(TrainingTask):
    """What the stages share: the autoencoder, its data, its measurement and its export."""

    def __init__(self, config: "VAETaskConfig", device: str) -> None:
        self.config, self.device = config, device
        self.autoencoder, self.factor_is_known = build_autoencoder(config, device)
        self.autoencoder.micro_batch_size = config.micro_batch_size
        self.module = self.autoencoder

    # ---- data

    @cached_property
    def source(self) -> Source:
        return CutClips(self.config.data.open(DataContext()), self.config.cut, self.autoencoder.spatial_factor)

    def prepare(self, key: BatchKey) -> Any:
        return self.source.batch(key).to(self.device)

    def prefetch(self, keys: Sequence[BatchKey]) -> None:
        self.source.prefetch(keys)

    def cancel_prefetch(self) -> None:
        self.source.cancel_prefetch()

    def figures(self) -> dict[str, float]:
        return self.source.figures()

    def sharded_parts(self) -> list[nn.Module]:
        """None but the whole: how often a block runs depends on a batch's length, which ranks draw each for itself."""
        return []

    def shapes(self) -> list[BatchShape]:
        return self.source.shapes()

    def meta_batch(self, shape: BatchShape) -> Any:
        return ClipBatch.meta(shape, self.device)

    def groups(self, batch: ClipBatch) -> dict[str, list[str]]:
        size, _, num_frames = batch.video.shape[:3]
        return {"bucket": [batch.label] * size, "frames": [str(num_frames)] * size}

    def blocks(self) -> list[nn.Module]:
        spatial, temporal = self.autoencoder.spatial_vae.module, self.autoencoder.temporal_vae
        levels = [*spatial.encoder.down_blocks, *spatial.decoder.up_blocks]
        return levels + [part for part in (temporal or nn.Identity()).modules() if isinstance(part, TEMPORAL_BLOCKS)]

    # ---- losses

    def weights(self, mask: Tensor | None) -> Tensor | None:
        """Weight of errors at every position."""
        return None if mask is None or not self.config.object_weight else 1 + self.config.object_weight * mask

    def reconstruction_loss(self, reconstruction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        config = self.config
        return reconstruction_loss(
            reconstruction,
            target,
            mse_weight=config.mse_weight,
            weights=self.weights(mask),
            reduction=config.reduction,
        )

    def kl_loss(self, posterior: Posterior) -> Tensor:
        return self.config.kl_weight * kl_loss(posterior, self.config.reduction)

    def frame_latents(self, video: Tensor, key: BatchKey) -> Tensor:
        """Frame latents (B, C, T, h, w) before the scaling factor."""
        posterior = self.autoencoder.encode_frames(video)
        return drawn(posterior, key, "frame posterior") if self.config.sample_frames else posterior.mode()

    # ---- before the first step, at previews and at the end

    def set_up(self, cache: Path) -> None:
        """Measures the scaling factor where none is known; stage `frames` makes its own at the end."""
        if not self.factor_is_known and self.config.stage != "frames":
            measure_scaling_factor(self.autoencoder, self.measured_videos(), self.measured_on(), cache)

    def measured_clips(self) -> Iterator[ClipBatch]:
        """Training clips, whole, batch by batch, `num_clips` at least."""
        whole = CutClips(
            self.config.data.open(DataContext()), Cut(crop=self.config.cut.crop), self.autoencoder.spatial_factor
        )
        seen, position = 0, 0
        while seen < self.config.num_clips:
            clips = whole.batch(BatchKey(derive_seed("measure"), position)).to(self.device)
            yield clips
            seen, position = seen + len(clips.video), position + 1

    def measured_videos(self) -> Iterator[Tensor]:
        return (clips.video for clips in self.measured_clips())

    def measured_on(self) -> str:
        """What the latent space is measured on, for whoever reads the checkpoint."""
        manifest = self.config.data.manifest if isinstance(self.config.data, ManifestClips) else None
        return f"{self.config.num_clips} clips of {manifest.name if manifest else 'the toybox'}"

    def preview(self, folder: Path, step: int) -> dict[str, float]:
        """Decibels on clips the training never draws, and those of bilinear pictures that are as small as latents."""
        source = self.held_out_source()
        if source is None:
            return {}
        sums: dict[str, list[Tensor]] = {"psnr": [], "bilinear_psnr": [], "object_psnr": []}
        for position in range(self.config.preview_batches):
            clips = source.batch(BatchKey(derive_seed("preview"), position)).to(self.device)
            made = self.reconstruct(clips.video)
            sums["psnr"].append(frame_psnr(made, clips.video).flatten())
            bilinear = bilinear_reconstruction(clips.video, self.autoencoder.spatial_factor)
            sums["bilinear_psnr"].append(frame_psnr(bilinear, clips.video).flatten())
            if clips.object_mask is not None:
                error = ((made.clamp(-1, 1) - clips.video).square() * clips.object_mask).sum()
                sums["object_psnr"].append(10 * torch.log10(12 * clips.object_mask.sum() / error)[None])
        return {name: float(torch.cat(values).detach().mean()) for name, values in sums.items() if values}

    def held_out_source(self) -> Source | None:
        data, held_out = self.config.data, self.config.held_out
        if held_out is not None:
            source = held_out.open(DataContext())
        elif isinstance(data, ManifestClips):
            return None
        else:
            source = data.open(DataContext(split="held_out"))
        return CutClips(source, Cut(crop=self.config.cut.crop), self.autoencoder.spatial_factor)

    def reconstruct(self, video: Tensor) -> Tensor:
        return self.autoencoder.decode_latents(self.autoencoder.encode_video(video), video.shape[2])

    def export(self, folder: Path) -> None:
        """Writes the weights with the per-channel shift and scale of the latents they make."""
        factor_from = self.autoencoder.latent_space.trained_with.partition(SHIFT_AND_SCALE)[0]
        trained_with = factor_from + SHIFT_AND_SCALE + self.measured_on()
        self.autoencoder.measure_latent_space(self.measured_videos(), trained_with)
        self.autoencoder.save_pretrained(folder)


class LatentsTask(VAETask):
    """The temporal autoencoder on scaled frame latents."""

    def __init__(self, config: "VAETaskConfig", device: str) -> None:
        super().__init__(config, device)
        self.autoencoder.spatial_vae.requires_grad_(False)
        require_temporal(self.autoencoder)
        self.not_matrices = temporal_boundary_layers(self.module)

    @torch.no_grad()
    def set_up(self, cache: Path) -> None:
        super().set_up(cache)
        if not self.config.cache_latents:
            return
        encoded = [self.encode(clips) for clips in self.measured_clips()]
        masks = [latents.object_mask for latents in encoded if latents.object_mask is not None]
        self.cached = FrameLatents(
            torch.cat([latents.latents for latents in encoded]), torch.cat(masks) if masks else None
        )

    def prefetch(self, keys: Sequence[BatchKey]) -> None:
        if not self.config.cache_latents:  # else nobody would ask for what is read
            super().prefetch(keys)

    def prepare(self, key: BatchKey) -> ClipBatch | FrameLatents:
        """Clips to be encoded, or what of the cached latents this step learns from."""
        if not self.config.cache_latents:
            return super().prepare(key)
        count, _, num_frames = self.cached.latents.shape[:3]
        rows = torch.randint(count, (self.shapes()[0].batch_size,), generator=key.generator("clips"))
        kept = self.config.cut.num_frames(num_frames, key.generator("length"))
        mask = self.cached.object_mask
        return FrameLatents(self.cached.latents[rows, :, :kept], None if mask is None else mask[rows, :, :kept])

    @torch.no_grad()
    def encode(self, clips: ClipBatch, key: BatchKey | None = None) -> FrameLatents:
        """Clips as frame latents; without a draw, always the posterior's mean."""
        if key is None:
            latents = self.autoencoder.encode_frames(clips.video).mode()
        else:
            latents = self.frame_latents(clips.video, key)
        mask, factor = clips.object_mask, self.autoencoder.spatial_factor
        mask = None if mask is None else F.max_pool3d(mask, (1, factor, factor))
        return FrameLatents(self.autoencoder.latent_space.scale_frames(latents), mask)

    def groups(self, batch: ClipBatch | FrameLatents) -> dict[str, list[str]]:
        if isinstance(batch, ClipBatch):
            return super().groups(batch)
        return {"frames": [str(batch.latents.shape[2])] * len(batch.latents)}

    def loss(self, batch: ClipBatch | FrameLatents, key: BatchKey) -> dict[str, Tensor]:
        batch = self.encode(batch, key) if isinstance(batch, ClipBatch) else batch
        target, space, num_frames = batch.latents, self.autoencoder.latent_space, batch.latents.shape[2]
        posterior = self.autoencoder.encode_time(space.unscale_frames(target))
        latents = drawn(posterior, key, "posterior")
        decoded = space.scale_frames(self.autoencoder.decode_time(latents, num_frames))
        terms = {
            "reconstruction": self.reconstruction_loss(decoded, target, batch.object_mask),
            "kl": self.kl_loss(posterior),
        }
        if self.config.identity_weight:
            identity = target.new_zeros(len(target))
            if num_frames == 1:
                identity = per_clip((latents - target).abs(), self.config.reduction)
            terms["identity"] = self.config.identity_weight * identity
        return terms


@dataclass
class Decoded:
    """What a step decoded: pictures (B, 3, F, H, W), what they should be, masks of objects, and the posterior."""

    pictures: Tensor
    target: Tensor
    object_mask: Tensor | None
    posterior: Posterior


class PictureTask(VAETask):
    """What the stages that decode to pixels share: how pictures are compared."""

    def __init__(self, config: "VAETaskConfig", device: str) -> None:
        super().__init__(config, device)
        self.perceptual = None
        if config.perceptual_weight:
            self.perceptual = build_perceptual(config.perceptual, device)
            self.frozen = {"perceptual": self.perceptual}
        if config.discriminator is not None:
            with torch.device(device):
                self.critic = PatchDiscriminator(config.discriminator.dim, config.discriminator.depth)

    @abstractmethod
    def decoded(self, batch: ClipBatch, key: BatchKey) -> Decoded:
        """A batch, encoded and decoded."""

    def loss(self, batch: ClipBatch, key: BatchKey) -> dict[str, Tensor]:
        config, made = self.config, self.decoded(batch, key)
        terms = {"reconstruction": self.reconstruction_loss(made.pictures, made.target, made.object_mask)}
        if self.perceptual is not None:
            distance = self.perceptual(made.pictures, made.target)
            # As published, the distance of a frame is added to the error of every one of its values.
            values = 1 if config.reduction == "mean" else made.target[0, :, 0].numel()
            terms["perceptual"] = config.perceptual_weight * values * distance
        compared = torch.stack(list(terms.values())).sum(dim=0)
        if config.discriminator is not None:
            terms["adversarial"] = self.adversarial_loss(made.pictures, compared, key)
        return {**terms, "kl": self.kl_loss(made.posterior)}

    def adversarial_loss(self, pictures: Tensor, compared: Tensor, key: BatchKey) -> Tensor:
        """What the critic says, weighted to pull at the last layer as hard as the comparison does; (B,)."""
        assert self.critic is not None and self.config.discriminator is not None
        if key.step < self.config.discriminator.start:
            return pictures.new_zeros(len(pictures))
        self.critic.requires_grad_(False)  # it learns from `critic_loss` alone
        deceived = adversarial_loss(self.critic(pictures))
        self.critic.requires_grad_(True)
        last_layer = self.autoencoder.spatial_vae.module.decoder.conv_out.weight
        return (
            self.config.discriminator.weight * adaptive_weight(compared.mean(), deceived.mean(), last_layer) * deceived
        )

    def critic_loss(self, batch: ClipBatch, key: BatchKey) -> dict[str, Tensor]:
        """Real clips against those that the autoencoder now makes of them."""
        assert self.critic is not None and self.config.discriminator is not None
        if key.step < self.config.discriminator.start:  # nothing is learnt yet, and all gradients are 0
            nothing = sum((parameter.sum() * 0 for parameter in self.critic.parameters()), torch.tensor(0.0))
            return {"critic": nothing.expand(len(batch.video))}
        with torch.no_grad():
            made = self.decoded(batch, key)
        return {"critic": critic_hinge_loss(self.critic(made.target), self.critic(made.pictures))}


class FramesTask(PictureTask):
    """The spatial autoencoder on single frames."""

    def __init__(self, config: "VAETaskConfig", device: str) -> None:
        super().__init__(config, device)
        if self.autoencoder.temporal_vae is not None:
            self.autoencoder.temporal_vae.requires_grad_(False)
        names = [n for n, _ in self.module.named_parameters()]
        self.not_matrices = {n for n in names if "conv_in" in n or "conv_out" in n or "quant_conv" in n}

    def prepare(self, key: BatchKey) -> ClipBatch:
        """Clips of which only the frames that are trained on are left."""
        clips = super().prepare(key)
        if self.config.frames_per_clip is None:
            return clips
        rows, frames = random_frames(clips.video, self.config.frames_per_clip, key)
        mask = None if clips.object_mask is None else pick_frames(clips.object_mask, rows, frames)
        return replace(clips, video=pick_frames(clips.video, rows, frames), object_mask=mask)

    def decoded(self, batch: ClipBatch, key: BatchKey) -> Decoded:
        posterior = self.autoencoder.encode_frames(batch.video)
        pictures = self.autoencoder.decode_frames(drawn(posterior, key, "posterior"))
        return Decoded(pictures, batch.video, batch.object_mask, posterior)

    def reconstruct(self, video: Tensor) -> Tensor:
        return self.autoencoder.decode_frames(self.autoencoder.encode_frames(video).mode())

    def export(self, folder: Path) -> None:
        """Writes the weights, with the scaling factor 1 / std of their latents where none belongs to them."""
        if not self.factor_is_known:
            measure_scaling_factor(self.autoencoder, self.measured_videos(), self.measured_on())
        self.autoencoder.save_pretrained(folder)


class PixelsTask(PictureTask):
    """The temporal autoencoder and the spatial one, on pixels."""

    def __init__(self, config: "VAETaskConfig", device: str) -> None:
        super().__init__(config, device)
        spatial = self.autoencoder.spatial_vae.module
        if not config.train_encoder:
            spatial.encoder.requires_grad_(False)
            if spatial.quant_conv is not None:
                spatial.quant_conv.requires_grad_(False)
        require_temporal(self.autoencoder)
        spatial_names = {n for n, _ in self.module.named_parameters() if n.startswith("spatial_vae.")}
        self.not_matrices = spatial_names | temporal_boundary_layers(self.module)

    def decoded(self, batch: ClipBatch, key: BatchKey) -> Decoded:
        video, mask, autoencoder = batch.video, batch.object_mask, self.autoencoder
        with torch.set_grad_enabled(self.config.train_encoder and torch.is_grad_enabled()):
            frame_latents = self.frame_latents(video, key)
        posterior = autoencoder.encode_time(frame_latents)
        frame_latents = autoencoder.decode_time(drawn(posterior, key, "posterior"), video.shape[2])
        if self.config.frames_per_clip is not None:
            rows, frames = random_frames(video, self.config.frames_per_clip, key)
            frame_latents, video = pick_frames(frame_latents, rows, frames), pick_frames(video, rows, frames)
            mask = None if mask is None else pick_frames(mask, rows, frames)
        return Decoded(autoencoder.decode_frames(frame_latents), video, mask, posterior)


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


def drawn(posterior: Posterior, key: BatchKey, purpose: str) -> Tensor:
    """Latents drawn from a posterior; the noise is drawn on the CPU, so that it is the same on every device."""
    return posterior.sample(noise=torch.randn(posterior.mean.shape, generator=key.generator(purpose)))
