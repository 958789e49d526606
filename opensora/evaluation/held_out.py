"""Clips that the held-out loss suite measures: of the toy world, of a manifest, or of a cache.

Every clip is measured in every size that it is large and long enough for, whatever chances training would give it. Of a
clip that is longer a fixed piece is taken.
"""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from opensora import limits
from opensora.data.batch import LatentBatch
from opensora.data.bucket_config import BucketConfig
from opensora.data.buckets import Bucket, Buckets
from opensora.data.cache import Cache
from opensora.data.cached import CachedLatents, CachedSource
from opensora.data.clips import ClipSource, ManifestClips, ManifestSource, read_clip
from opensora.data.encoding import encode_clips
from opensora.data.toybox import ToyboxClips
from opensora.distributed.seeding import derive_seed
from opensora.errors import OpenSoraError
from opensora.evaluation.loss import Portion
from opensora.limits import check_count, parse_count
from opensora.toybox.captions import plain_caption
from opensora.toybox.specs import ClipSpec, sample_specs
from opensora.weights import fingerprint

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline


def clips_of_model(
    model_interval: int,
    manifest: Path,
    buckets: BucketConfig,
    *,
    frame_interval: int | None = None,
    scores: bool = False,
) -> ManifestClips:
    """Clips of a table as a model is told of clips when it samples.

    Args:
        model_interval: `frame_interval` of the model; one whose clips play slower than it is told was told the rate of
            files.
        manifest: the table.
        buckets: the sizes, see `data.buckets`.
        frame_interval: every how manieth frame of a video is taken; None for the model's own.
        scores: see `ManifestClips`.
    """
    told_fps: Literal["taken", "file"] = "file" if model_interval > 1 else "taken"
    taken = model_interval if frame_interval is None else frame_interval
    return ManifestClips(buckets, manifest, taken, told_fps, scores=scores, num_workers=0)


def manifest_portions(pipeline: "OpenSoraPipeline", clips: ManifestClips, num_clips: int) -> list[Portion]:
    """Clips of a table.

    Args:
        pipeline: whose autoencoder encodes.
        clips: the table, the sizes, whose batch sizes are those of the portions, and what the model is told.
        num_clips: at most so many of each size, the first of the table.

    Raises:
        OpenSoraError: no clip has any of the sizes; later, when a portion is loaded, a clip that cannot be read.
    """
    source = ClipSource(replace(clips, buckets=everywhere(clips.buckets), num_workers=0))

    def load(bucket: Bucket, numbers: Sequence[int]) -> LatentBatch:
        videos = []
        for number in numbers:
            row = source.rows[number]
            rng = random.Random(derive_seed("held-out window", number, bucket.label))
            try:
                videos.append(read_clip(row, bucket, source.config.frame_interval, rng))
            except OpenSoraError as error:
                raise OpenSoraError(f"{row.path}: {error}; leave it out of {clips.manifest}") from None
        batch = replace(source.batch_of(videos, numbers, bucket), label=label_of(bucket))
        return encode_clips(batch, pipeline.autoencoder)

    return _portions(source, num_clips, load)


def cache_portions(pipeline: "OpenSoraPipeline", folder: Path, num_clips: int) -> list[Portion]:
    """Clips of a cache, in the sizes it was made for.

    Args:
        pipeline: whose autoencoder must be the one that made it; its captions are encoded anew.
        folder: of the cache.
        num_clips: at most so many of each size.

    Raises:
        OpenSoraError: there is none, or it is of another autoencoder.
    """
    cache = Cache(folder)
    autoencoder = pipeline.autoencoder
    cache.check_autoencoder(fingerprint(autoencoder.state_dict()), autoencoder.latent_space)
    buckets = everywhere(cache.index.made_from.buckets)
    source = CachedSource(CachedLatents(folder, buckets, num_workers=0), sample=False)

    def load(bucket: Bucket, numbers: Sequence[int]) -> LatentBatch:
        clips = [cache.windows(number, bucket)[0] for number in numbers]
        latents = torch.stack([cache.posterior(clip)[0] for clip in clips])
        batch = source.batch_of(latents, [clip.fps for clip in clips], numbers, bucket)
        return replace(batch, label=label_of(bucket), text=None)

    return _portions(source, num_clips, load, lambda number, bucket: bool(cache.windows(number, bucket)))


def _portions(
    source: ManifestSource,
    num_clips: int,
    load: Callable[[Bucket, Sequence[int]], LatentBatch],
    is_there: Callable[[int, Bucket], bool] = lambda number, bucket: True,
) -> list[Portion]:
    """Portions of one size each, of the batch sizes of the buckets."""
    found: dict[int, list[int]] = {}
    for number, row in enumerate(source.rows):
        for bucket in source.buckets.possible(row.num_frames, row.height, row.width, source.config.frame_interval):
            if is_there(number, source.buckets.buckets[bucket]):
                found.setdefault(bucket, []).append(number)
    portions: list[Portion] = []
    for index in sorted(found):
        bucket, numbers = source.buckets.buckets[index], found[index][:num_clips]
        for first in range(0, len(numbers), max(1, bucket.batch_size)):
            part = numbers[first : first + max(1, bucket.batch_size)]
            portions.append(Portion(label_of(bucket), first, len(part), functools.partial(load, bucket, part)))
    if not portions:
        raise OpenSoraError("no clip has any of the sizes, so there is nothing to measure; see opensora data plan")
    return portions


def everywhere(buckets: Mapping[str, Mapping[Any, Any]]) -> BucketConfig:
    """The same sizes, every one of them within the reach of all clips that fit: none keeps or stops any for certain."""
    Buckets(buckets)  # says what is wrong with them
    chance: dict[bool, Any] = {True: 0.5, False: (0.5, 0.5)}  # of images, and of clips of any length
    return {
        name: {frames: (chance[int(frames) == 1], batch_size) for frames, (_, batch_size) in lengths.items()}
        for name, lengths in buckets.items()
    }


def label_of(bucket: Bucket) -> str:
    """A size, its aspect ratio included."""
    return f"{bucket.label} {bucket.height}x{bucket.width}"


def toybox_portions(
    pipeline: "OpenSoraPipeline", clips: ToyboxClips, num_clips: int, batch_size: int = 20
) -> list[Portion]:
    """Held-out clips of the toy world in one size, plainly worded, encoded when they are loaded.

    Args:
        pipeline: whose autoencoder encodes.
        clips: their size and world.
        num_clips: how many; the first of them are the same for any number.
        batch_size: clips of a portion; changes a loss by no more than rounding.
    """
    specs = sample_specs(num_clips, 0, clips.world, "held_out")
    interval = pipeline.config.frame_interval
    label = f"{clips.height}x{clips.width} {clips.num_frames}f"

    def load(part: list[ClipSpec]) -> LatentBatch:
        captions = [plain_caption(spec) for spec in part]
        batch = clips.batch(part, captions, interval, device=str(pipeline.device))
        return encode_clips(replace(batch, label=label), pipeline.autoencoder)

    parts = {start: specs[start : start + batch_size] for start in range(0, num_clips, batch_size)}
    return [Portion(label, start, len(part), functools.partial(load, part)) for start, part in parts.items()]


def toybox_sizes(sizes: tuple[str, ...], lengths: tuple[int, ...]) -> list[ToyboxClips]:
    """Every size in every length.

    Raises:
        OpenSoraError: a size that is not HxW, or no frames.
    """
    for length in lengths:
        if length < 1:
            raise OpenSoraError(f"`lengths` is {length}; give 1 or more")
        check_count("`lengths`", length, limits.FRAMES)
    clips = []
    for size in sizes:
        height, x, width = size.partition("x")
        if not (x and height.isdecimal() and width.isdecimal()):
            raise OpenSoraError(f"`sizes` is {size!r}; give height and width in pixels, such as 64x64")
        rows, columns = (parse_count(f"a side of `sizes` {size}", side, limits.SIDE_PX) for side in (height, width))
        clips += [ToyboxClips(num_frames=n, height=rows, width=columns) for n in lengths]
    return clips


@dataclass(frozen=True)
class HeldOutClips:
    """Which clips are measured: those of a manifest, of a cache, or else of the toy world.

    Attributes:
        manifest: the table, with its `buckets`.
        buckets: sizes of the manifest's clips, see `data.buckets`.
        frame_interval: every how manieth frame of the manifest's videos is taken; None for the model's.
        scores: captions end in the scores of the manifest.
        cache: folder of the cache.
        toybox: sizes and lengths of toy clips.
    """

    manifest: Path | None = None
    buckets: dict[str, Any] | None = None
    frame_interval: int | None = None
    scores: bool = False
    cache: Path | None = None
    toybox: tuple[ToyboxClips, ...] = ()

    def __post_init__(self) -> None:
        if self.manifest is not None and self.cache is not None:
            raise OpenSoraError("`manifest` and `cache` both say which clips are measured; give one of them")
        if (self.manifest is None) != (self.buckets is None):
            raise OpenSoraError("`manifest` needs `buckets`, which says at what sizes, and the other way round")


def portions_of(
    pipeline: "OpenSoraPipeline", clips: HeldOutClips, num_clips: int, batch_size: int
) -> tuple[dict[str, Any], list[Portion]]:
    """What results say of the clips, and the clips in portions.

    Args:
        pipeline: whose autoencoder encodes.
        clips: which.
        num_clips: at most so many of every size.
        batch_size: toy clips of a portion.

    Raises:
        OpenSoraError: there are no such clips.
    """
    if clips.manifest is not None and clips.buckets is not None:
        table = clips_of_model(
            pipeline.config.frame_interval,
            clips.manifest,
            clips.buckets,
            frame_interval=clips.frame_interval,
            scores=clips.scores,
        )
        said = {"manifest": str(clips.manifest), "buckets": clips.buckets, "frame_interval": table.frame_interval}
        said |= {"scores": True} if clips.scores else {}
        return said, manifest_portions(pipeline, table, num_clips)
    if clips.cache is not None:
        return {"cache": str(clips.cache)}, cache_portions(pipeline, clips.cache, num_clips)
    portions = [portion for size in clips.toybox for portion in toybox_portions(pipeline, size, num_clips, batch_size)]
    return {"clips": "toybox"}, portions
