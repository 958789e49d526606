"""Clips as latents: encoded when they are needed, by an autoencoder that is not trained.

Open-Sora 1.0 to 1.2 all draw training latents from the autoencoder's posterior, anew each time a clip is seen; the
means would be the same every time. `sample` chooses. It is the posterior of a whole clip that is drawn from, so that
one that was computed beforehand says the same (`data.cache`).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from opensora.data.batch import BatchShape, ClipBatch, LatentBatch, Source
from opensora.distributed.seeding import BatchKey
from opensora.geometry import VideoSize
from opensora.models.autoencoders.codec import VideoCodec


class EncodedClips(Source):
    """Latents of the clips of another source.

    Args:
        clips: gives `ClipBatch`es.
        autoencoder: encodes them, on its own device and in its own precision.
        sample: draw latents from the posterior, with the draw's generator "posterior"; otherwise take its mean.
        keep_video: hand the clips on beside their latents.

    Raises:
        OpenSoraError: clips of a length that the autoencoder cannot encode.
    """

    def __init__(self, clips: Source, autoencoder: VideoCodec, *, sample: bool, keep_video: bool = False) -> None:
        check_lengths(autoencoder, (shape.num_frames for shape in clips.shapes()))
        self.clips, self.autoencoder, self.sample, self.keep_video = clips, autoencoder, sample, keep_video

    def batch(self, key: BatchKey) -> LatentBatch:
        generator = key.generator("posterior") if self.sample else None
        return encode_clips(self.clips.batch(key), self.autoencoder, generator, keep_video=self.keep_video)

    def shapes(self) -> list[BatchShape]:
        return self.clips.shapes()

    def prefetch(self, keys: Sequence[BatchKey]) -> None:
        self.clips.prefetch(keys)

    def cancel_prefetch(self) -> None:
        self.clips.cancel_prefetch()

    def figures(self) -> dict[str, float]:
        return self.clips.figures()


@torch.no_grad()
def encode_clips(
    clips: ClipBatch,
    autoencoder: VideoCodec,
    generator: torch.Generator | None = None,
    *,
    keep_video: bool = False,
) -> LatentBatch:
    """Clips as latents.

    Rows and columns that do not fill a latent cell, at the bottom and at the right, are left out; the networks are told
    the size before, as in sampling.

    Args:
        clips: (B, 3, T, H, W) and what belongs to them.
        autoencoder: encodes them where it is.
        generator: draws from the posterior; None takes its mean.
        keep_video: hand the clips on beside their latents.
    """
    video = whole_cells(clips.video, autoencoder.spatial_factor).to(autoencoder.device)
    return LatentBatch(
        latents=encode_again(video, autoencoder, generator),
        captions=clips.captions,
        conditions=clips.conditions,
        label=clips.label,
        video=video if keep_video else None,
    )


@torch.no_grad()
def encode_ends(
    clips: LatentBatch,
    ends: Sequence[tuple[int, int]],
    autoencoder: VideoCodec,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents whose first and last frames were encoded by themselves, and know nothing of the frames beside them.

    So are frames encoded that a clip is generated from. A single latent frame is a picture: the clip's first or its
    last one.

    Args:
        clips: with their video.
        ends: latent frames at the beginning, and at the end, of each clip.
        autoencoder: encodes them.
        generator: draws from the posterior; None takes its mean.

    Returns:
        (B, C, T, h, w), those of the clips between the ends.
    """
    assert clips.video is not None, "ask for it: DataContext.keep_video"
    latents = clips.latents.clone()
    for row, video, (head, tail) in zip(latents, clips.video, ends, strict=True):
        if head:
            row[:, :head] = _encoded(video[:, : autoencoder.shortest_clip(head)], autoencoder, generator)
        if tail:
            row[:, -tail:] = _encoded(video[:, -autoencoder.shortest_clip(tail) :], autoencoder, generator)
    return latents


@torch.no_grad()
def encode_again(video: Tensor, autoencoder: VideoCodec, generator: torch.Generator | None = None) -> Tensor:
    """Latents (B, C, T, h, w) of clips (B, 3, frames, H, W) of whole cells; see `encode_clips`."""
    posterior = autoencoder.posterior(video)
    return posterior.mode() if generator is None else posterior.sample(generator)


def _encoded(video: Tensor, autoencoder: VideoCodec, generator: torch.Generator | None) -> Tensor:
    return encode_again(video[None], autoencoder, generator)[0]


def check_lengths(autoencoder: VideoCodec, lengths: Iterable[int]) -> None:
    """Whether an autoencoder can encode clips of so many frames.

    Raises:
        OpenSoraError: it cannot; names the nearest that it can.
    """
    side, rule = autoencoder.spatial_factor, autoencoder.size_rule()
    for num_frames in lengths:
        VideoSize(num_frames, side, side).check(rule)


def whole_cells(video: Tensor, spatial_factor: int) -> Tensor:
    """The video without the rows at its bottom and the columns at its right that do not fill a latent cell."""
    height, width = video.shape[-2:]
    return video[..., : height - height % spatial_factor, : width - width % spatial_factor]
