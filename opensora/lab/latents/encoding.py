"""Clips through an autoencoder, and the figures of what comes out, at every place where a latent space is declared.

An autoencoder of one part has one such place: its own latents, then factor, shift and scale. One of two parts has two:
the factor between the 2D part and the temporal part, and shift and scale after the latter. What the temporal part makes
of another factor cannot be calculated, so it is tried: encoded with it, and decoded again to pixels. The factor that it
was trained with gives back most.

Letters: B clips, C channels of a frame latent, Z channels of a latent, T frames, N latent frames, h, w latent cells.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.evaluation.psnr import frame_psnr
from opensora.lab.latents.spectrum import PowerSpectrum
from opensora.lab.latents.statistics import ChannelFigures, ChannelStatistics, Histogram
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.video import VideoAutoencoder

_NUM_TRIED = 8
"""Clips that factors are tried on, the first chunk of each; they are kept."""


@dataclass(frozen=True)
class Measured:
    """Figures of the latents of some clips.

    Attributes:
        normalised: of what a diffusion model sees, as declared.
        own: of the same before shift and scale, and before the factor unless it lies between two parts.
        frames: of two parts: of frame latents before the factor; None of one part.
        histogram, spectrum: of `normalised`.
        kept: of two parts: the first chunks of a few clips, videos (B, 3, T, H, W).
    """

    normalised: ChannelFigures
    own: ChannelFigures
    frames: ChannelFigures | None
    histogram: Histogram
    spectrum: PowerSpectrum
    kept: list[Tensor]


@dataclass(frozen=True)
class FactorTrial:
    """What a temporal part does with frame latents times a factor.

    Attributes:
        name: where the factor comes from.
        factor: what frame latents are multiplied by.
        deviation_in: of what the temporal part reads.
        deviation_out: of what it makes of that, after the declared shift and scale.
        clips_db: PSNR of each video encoded with it and decoded again.
    """

    name: str
    factor: float
    deviation_in: float
    deviation_out: float
    clips_db: tuple[float, ...]

    @property
    def decibels(self) -> float:
        """Mean PSNR."""
        return sum(self.clips_db) / len(self.clips_db)


def two_parts(codec: VideoCodec) -> VideoAutoencoder | None:
    """The codec, if its factor lies between a 2D part and a temporal part."""
    return codec if isinstance(codec, VideoAutoencoder) and codec.temporal_vae is not None else None


@torch.no_grad()
def measure_latents(
    codec: VideoCodec, videos: Iterable[Tensor], on_clip: Callable[[int], None] = lambda number: None
) -> Measured:
    """Encodes clips one by one; modes of posteriors are taken, as where a latent space is measured for training.

    Args:
        codec: the autoencoder.
        videos: (B, 3, T, H, W) in [-1, 1], of one size.
        on_clip: told how many clips are done.

    Raises:
        OpenSoraError: a size that cannot be encoded, no clips, or latents that never change.
    """
    parts, space = two_parts(codec), codec.latent_space
    normalised, own = ChannelStatistics(codec.latent_channels), ChannelStatistics(codec.latent_channels)
    histogram = Histogram(codec.latent_channels)
    frames = None if parts is None else ChannelStatistics(parts.spatial_vae.latent_channels)
    spectrum, kept = None, list[Tensor]()
    for number, video in enumerate(videos, start=1):
        video = video.to(next(codec.parameters()).device)
        if parts is None or frames is None:
            latents = codec.encode_video(video)
            own.add(space.unscale_frames(space.denormalise(latents)))
        else:
            frame_latents = parts.encode_frames(video).mode()
            frames.add(frame_latents)
            kept += [video[:, :, : codec.micro_frame_size].cpu()] if len(kept) < _NUM_TRIED else []
            before = parts.encode_time(frame_latents).mode()
            own.add(before)
            latents = space.normalise(before)
        normalised.add(latents)
        histogram.add(latents)
        spectrum = spectrum or PowerSpectrum((latents.shape[2], latents.shape[3], latents.shape[4]), latents.shape[1])
        spectrum.add(latents)
        on_clip(number)
    found, before = normalised.figures(), None if frames is None else frames.figures()
    assert spectrum is not None
    if not found.deviation or (before is not None and not before.deviation):
        raise OpenSoraError("all latents are one number; the clips are blank, or the autoencoder is damaged")
    return Measured(found, own.figures(), before, histogram, spectrum, kept)


@torch.no_grad()
def try_factors(codec: VideoAutoencoder, kept: list[Tensor], factors: Mapping[str, float]) -> list[FactorTrial]:
    """What a temporal part does with each factor.

    Args:
        codec: of two parts.
        kept: videos (B, 3, T, H, W) in [-1, 1].
        factors: name -> factor.
    """
    device, declared = next(codec.parameters()).device, codec.latent_space.factor  # which the codec multiplies by
    read = {name: ChannelStatistics(codec.spatial_vae.latent_channels) for name in factors}
    made = {name: ChannelStatistics(codec.latent_channels) for name in factors}
    clips_db: dict[str, list[float]] = {name: [] for name in factors}
    for video in kept:
        frames = codec.encode_frames(video.to(device)).mode()
        for name, factor in factors.items():
            encoded = codec.encode_time(frames * (factor / declared)).mode()
            decoded = codec.decode_time(encoded, frames.shape[2]) * (declared / factor)
            read[name].add(frames * factor)
            made[name].add(codec.latent_space.normalise(encoded))
            clips_db[name].append(float(frame_psnr(codec.decode_frames(decoded).cpu(), video).mean()))
    return [
        FactorTrial(name, factor, read[name].figures().deviation, made[name].figures().deviation, tuple(clips_db[name]))
        for name, factor in factors.items()
    ]
