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

    Raises:
        OpenSoraError: clips of a length that the autoencoder cannot encode.
    """

    def __init__(self, clips: Source, autoencoder: VideoCodec, *, sample: bool) -> None:
        check_lengths(autoencoder, (shape.num_frames for shape in clips.shapes()))
        self.clips, self.autoencoder, self.sample = clips, autoencoder, sample

    def batch(self, key: BatchKey) -> LatentBatch:
        generator = key.generator("posterior") if self.sample else None
        return encode_clips(self.clips.batch(key), self.autoencoder, generator)

    def shapes(self) -> list[BatchShape]:
        return self.clips.shapes()

    def prefetch(self, keys: Sequence[BatchKey]) -> None:
        self.clips.prefetch(keys)

    def cancel_prefetch(self) -> None:
        self.clips.cancel_prefetch()

    def figures(self) -> dict[str, float]:
        return self.clips.figures()


@torch.no_grad()
def encode_clips(clips: ClipBatch, autoencoder: VideoCodec, generator: torch.Generator | None = None) -> LatentBatch:
    """Clips as latents.

    Rows and columns that do not fill a latent cell, at the bottom and at the right, are left out; the networks are told
    the size before, as in sampling.

    Args:
        clips: (B, 3, T, H, W) and what belongs to them.
        autoencoder: encodes them where it is.
        generator: draws from the posterior; None takes its mean.
    """
    video = whole_cells(clips.video, autoencoder.spatial_factor).to(autoencoder.device)
    posterior = autoencoder.posterior(video)
    return LatentBatch(
        latents=posterior.mode() if generator is None else posterior.sample(generator),
        captions=clips.captions,
        conditions=clips.conditions,
        label=clips.label,
    )


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
