"""Training a video autoencoder in stages, each a run that starts from the one before.

- `frames`: the spatial autoencoder on single frames, for those who start without one.
- `latents`: the temporal autoencoder on scaled frame latents, the spatial one frozen. With `identity_weight` it also
  learns to leave the latents of images as they are (stage 1 of Open-Sora 1.2); without, it is stage 2.
- `pixels`: the temporal autoencoder and the spatial one together, on pixels, clips of any length in chunks (stage 3).
- `whole`: an autoencoder that is one network (of Open-Sora 1.3 and 2.0), on pixels.
- `decoders`: both decoders on pixels. The latent space stays what it is, so models that were trained on it stay usable.

The scaling factor between the two autoencoders belongs to their weights: see `latent_space.py`. Shift and scale of
every latent channel are measured at the end and written into the checkpoint.

Objects are a small part of a frame: where they are known, errors on them can be weighted up, because overall error
hides a lost shape.

Letters: B clips, C channels, T frames, H, W pixels, h, w latent cells.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from opensora.data.clips import ManifestClips
from opensora.data.toybox import ToyboxVideos
from opensora.errors import OpenSoraError
from opensora.training.vae.clips import Cut
from opensora.training.vae.discriminator import DiscriminatorConfig
from opensora.training.vae.losses import Reduction
from opensora.training.vae.perceptual import PerceptualNetwork


@dataclass(frozen=True)
class VAESettings:
    """One stage of autoencoder training.

    Attributes:
        stage: what is trained; see the module's introduction.
        data: where clips come from.
        held_out: clips that are never trained on, for previews; those of the toybox have their own.
        cut: what of them is trained on.
        autoencoder: configuration of the autoencoder, for a run that starts from nothing; others take the one of
            `init_from`, and this one only to be planned before that exists.
        architecture: its class; None for `VideoAutoencoder`.
        spatial_from: folder or file of a spatial autoencoder (diffusers' AutoencoderKL) to begin with.
        init_from: model's name, folder or file of the video autoencoder to start from.
        scaling_factor: what frame latents are multiplied by; None for that of `init_from`, or of `spatial_from`, or
            1 / std of the frame latents.
        train_encoder: stage `pixels` also trains the spatial encoder.
        sample_frames: draw frame latents from their posterior; otherwise take its mean.
        frames_per_clip: frames of each clip, drawn at random, that are decoded to pixels; None for all.
        micro_batch_size: frames that go through the spatial part at once; None for all.
        reduction: over what errors are averaged, see `Reduction`.
        mse_weight: of squared errors beside absolute ones.
        kl_weight: of the divergence to a standard normal.
        identity_weight: stage `latents`, of the difference between an image's video latent and its frame latent.
        object_weight: extra weight of errors on objects, where they are known.
        perceptual: network that compares how pictures look.
        perceptual_weight: of its distance; 0 for none.
        discriminator: critic that the decoded clips are to deceive; None for none.
        num_clips: clips of the data that the latent space is measured on.
        cache_latents: stage `latents`, encode `num_clips` clips of one size once and train on those alone.
        preview_batches: held-out batches that previews are measured on.
    """

    stage: Literal["frames", "latents", "pixels", "decoders", "whole"]
    data: ToyboxVideos | ManifestClips = field(default_factory=ToyboxVideos)
    held_out: ManifestClips | None = None
    cut: Cut = field(default_factory=Cut)
    autoencoder: dict[str, Any] | None = None
    architecture: str | None = None
    spatial_from: str | None = None
    init_from: str | None = None
    scaling_factor: float | None = None
    train_encoder: bool = False
    sample_frames: bool = False
    frames_per_clip: int | None = None
    micro_batch_size: int | None = None
    reduction: Reduction = "mean"
    mse_weight: float = 0.0
    kl_weight: float = 1e-6
    identity_weight: float = 0.0
    object_weight: float = 0.0
    perceptual: PerceptualNetwork = "efficientnet"
    perceptual_weight: float = 0.0
    discriminator: DiscriminatorConfig | None = None
    num_clips: int = 200
    cache_latents: bool = False
    preview_batches: int = 4

    def __post_init__(self) -> None:
        in_pixels = {"perceptual_weight": self.perceptual_weight, "discriminator": self.discriminator}
        for name, value in in_pixels.items():
            if value and self.stage == "latents":
                raise OpenSoraError(f"objective.{name} compares pictures, but stage latents makes none; leave it out")
        if self.cache_latents and self.stage != "latents":
            raise OpenSoraError(
                f"objective.cache_latents given, but stage {self.stage} learns from pixels; leave it out"
            )
        if self.stage == "whole":
            for name in ("spatial_from", "scaling_factor", "frames_per_clip"):
                if getattr(self, name) is not None:
                    raise OpenSoraError(
                        f"objective.{name} is for autoencoders in parts, not for stage whole; leave it out"
                    )
            if self.cut.random_lengths:
                raise OpenSoraError("cut.random_lengths draws lengths that stage whole cannot encode; leave it out")
        if self.discriminator is not None and self.stage != "frames" and self.frames_per_clip is not None:
            raise OpenSoraError("objective.discriminator looks at whole clips; set objective.frames_per_clip=none")

    def idle(self) -> dict[str, str]:
        """Settings that change nothing, and why; see `overrides.apply_overrides`."""
        idle = {}
        if self.stage != "latents":
            idle["identity_weight"] = f"only stage latents compares latents of images, and this one is {self.stage}"
        if self.stage == "whole":
            idle["sample_frames"] = "stage whole draws from the only posterior there is"
        if self.stage != "pixels":
            idle["train_encoder"] = f"only stage pixels can train the encoder, and this one is {self.stage}"
        if not self.perceptual_weight:
            idle["perceptual"] = "objective.perceptual_weight is 0"
        if isinstance(self.data, ManifestClips):
            idle["object_weight"] = "objects are known of the toybox's clips alone"
        else:
            idle["held_out"] = "the toybox has held-out clips of its own"
        return idle
