"""Training from a cache: the batches that training from the clips themselves would have, read instead of encoded.

Order, batches, replacements of broken clips and every draw are the same, for they come from the same sampler and the
same keys. What differs is the piece of a long clip: a cache holds as many as it was made with (one by default), the
clip itself has all of them.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.data.batch import BatchShape, DataContext, LatentBatch
from opensora.data.bucket_config import BucketConfig
from opensora.data.buckets import Bucket, Buckets
from opensora.data.cache import MANIFEST, Cache, bucket_key
from opensora.data.clips import ManifestClips, ManifestSource, bucket_conditions
from opensora.data.sampler import SampledBatch
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.posterior import Posterior
from opensora.weights import fingerprint


@dataclass(frozen=True)
class CachedLatents:
    """Latents, and text states if there are any, that `opensora data precompute` made.

    Attributes:
        folder: of the cache; None where the user still has to name one, which is enough for plans if there are buckets.
        buckets: sizes, chances and batch sizes, see `data.buckets`; None for those that the cache was made for. Other
            chances and batch sizes need no new cache, other sizes do.
        batches_in_a_row, num_workers, max_broken_share: see `ManifestClips`.
    """

    folder: Path | None = None
    buckets: BucketConfig | None = None
    batches_in_a_row: int = 8
    num_workers: int = 2
    max_broken_share: float = 0.05

    def shapes(self) -> list[BatchShape]:
        """The sizes that batches have."""
        if self.folder is None and self.buckets is not None:
            return Buckets(self.buckets).shapes()
        source = CachedSource(self, sample=False)
        source.check_sizes()
        return source.shapes()

    def defaults(self) -> dict[str, Any]:
        """See `ManifestClips.defaults`."""
        return {} if self.folder is None else self.made_of().defaults()

    def made_of(self) -> ManifestClips:
        """How the clips of the cache were read, captioned and told."""
        assert self.folder is not None
        made_from = Cache(self.folder).index.made_from
        return ManifestClips(
            buckets=made_from.buckets if self.buckets is None else self.buckets,
            frame_interval=made_from.frame_interval,
            told_fps=made_from.told_fps,
            text_required=False,
            scores=made_from.scores,
            max_fps=made_from.max_fps,
            rate_told=made_from.rate_told,
            batches_in_a_row=self.batches_in_a_row,
            num_workers=self.num_workers,
            max_broken_share=self.max_broken_share,
        )

    def open(self, context: DataContext) -> "CachedSource":
        """The latents.

        Raises:
            OpenSoraError: no cache, one that is damaged, or one that is not for this run, such as one that another
                autoencoder made; says what to do.
        """
        source = CachedSource(self, sample=context.sample_posterior)
        source.check_sizes()
        source.cache.check_files()
        autoencoder = context.autoencoder
        if autoencoder is None:
            raise OpenSoraError(f"the cache {self.folder} holds latents, not clips; train on their manifest")
        source.cache.check_autoencoder(fingerprint(autoencoder.state_dict()), autoencoder.latent_space)
        if context.captions is not None:
            context.captions.use_cache(source.cache)
        return source


class CachedSource(ManifestSource):
    """Batches of cached latents (`LatentBatch`).

    Attributes:
        cache: where they lie.
    """

    def __init__(self, config: CachedLatents, *, sample: bool) -> None:
        if config.folder is None:
            raise OpenSoraError(
                "no cache: name its folder, objective.data.folder=...; opensora data precompute makes one"
            )
        self.cache = Cache(config.folder)
        made_from = self.cache.index.made_from
        if sample and made_from.latents.contents == "mean":
            raise OpenSoraError(
                f"the cache {config.folder} holds means alone, and this run draws from the posterior; make it again "
                "with posterior as `contents`, or train with objective.sample_posterior=false"
            )
        self.sample = sample
        self._failed = {(clip.row, clip.bucket): clip.reason for clip in self.cache.index.failed}
        # The clips of its table are as they were taken, and their captions have their scores already.
        as_taken = {"scores": False, "max_fps": None, "rate_told": None}
        super().__init__(replace(config.made_of(), manifest=config.folder / MANIFEST, **as_taken))

    def check_sizes(self) -> None:
        """Refuses buckets that clips may fall into and that the cache has not."""
        there = self.cache.bucket_keys() | {key for _, key in self._failed}
        for row in self.rows:
            for number in self.buckets.possible(row.num_frames, row.height, row.width, self.config.frame_interval):
                bucket = self.buckets.buckets[number]
                if bucket_key(bucket) not in there:
                    raise OpenSoraError(
                        f"the cache {self.cache.folder} has no clips of {bucket.label} at "
                        f"{bucket.height}x{bucket.width}; make it again with these buckets, or train with its own"
                    )

    def read(self, number: int, bucket: Bucket, rng: random.Random) -> tuple[Tensor, Tensor | None, float]:
        windows = self.cache.windows(number, bucket)
        if not windows:
            raise OpenSoraError(self._failed.get((number, bucket_key(bucket)), "not in the cache"))
        clip = windows[rng.randrange(len(windows))]
        return *self.cache.posterior(clip), clip.fps

    def collate(
        self,
        clips: list[tuple[Tensor, Tensor | None, float]],
        numbers: Sequence[int],
        bucket: Bucket,
        key: BatchKey,
    ) -> LatentBatch:
        latents = torch.stack([mean for mean, _, _ in clips])
        if self.sample:
            logvar = torch.stack([logvar for _, logvar, _ in clips if logvar is not None])
            latents = Posterior(latents, logvar).sample(key.generator("posterior"))
        return self.batch_of(latents, [fps for _, _, fps in clips], numbers, bucket)

    def batch_of(self, latents: Tensor, fps: list[float], numbers: Sequence[int], bucket: Bucket) -> LatentBatch:
        """Latents (B, C, T, h, w) of these rows, with the rates they are told, as a batch."""
        captions = [self.rows[number].text for number in numbers]
        text = self.cache.text(captions) if self.cache.index.text else None
        return LatentBatch(
            latents=latents,
            captions=captions,
            conditions=bucket_conditions(fps, bucket),
            label=bucket.label,
            text=text,
        )

    def _candidates(self, key: BatchKey, slot: int, sampled: SampledBatch) -> Iterator[int]:
        """As for the clips themselves, without those that would be cut to a size that the cache does not have."""
        bucket = self.buckets.buckets[sampled.bucket]
        for number in super()._candidates(key, slot, sampled):
            if self.cache.windows(number, bucket) or (number, bucket_key(bucket)) in self._failed:
                yield number
