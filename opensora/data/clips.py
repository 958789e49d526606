"""Clips of a manifest as training data: read, cut to a window of frames, and brought to their bucket's size.

What a place of the run gets is drawn from that place alone (`BatchKey`): which clips from the sampler, and of each
clip a window of frames. A clip that cannot be read is replaced by another of its bucket, drawn likewise, so that a
resumed run meets the same replacement. Every broken clip is named once, with the reason, and when too many of those met
so far are broken the run stops.

Letters: B clips, T frames, H, W pixels.
"""

import functools
import logging
import math
import random
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opensora.clip_rows import ClipRow, ClipRows
from opensora.data.batch import BatchShape, ClipBatch, DataContext, Source, batch_conditions
from opensora.data.bucket_config import BucketConfig
from opensora.data.buckets import Bucket, Buckets
from opensora.data.encoding import EncodedClips
from opensora.data.presence import check_presence, missing_files
from opensora.data.sampler import BucketSampler, SampledBatch
from opensora.distributed.seeding import BatchKey, derive_seed
from opensora.errors import OpenSoraError
from opensora.manifest import read_manifest
from opensora.media.frames import ClipFile, check_length
from opensora.media.transforms import fill_image, fill_video, random_window, spread_frames, to_video
from opensora.models.clip_conditions import ClipConditions
from opensora.models.text.prompts import append_scores, caption_of_2_0

logger = logging.getLogger(__name__)

# Before so many clips were met, or all there are, a few broken ones say nothing about the others.
_ENOUGH_CLIPS = 100
# How many replacements are tried in a bucket, and then among all clips that are long enough.
_MOST_REPLACEMENTS = 100


@dataclass(frozen=True)
class ManifestClips:
    """Clips of a table, in buckets.

    Attributes:
        buckets: sizes, chances and batch sizes, see `data.buckets`.
        manifest: the table, `.csv` or `.parquet`; None where the user still has to name one, which is enough for plans.
        frame_interval: every how manieth frame of a video is taken.
        told_fps: the rate that networks are told: that of the frames that are taken (1.2), or that of the file,
            whatever the interval (1.1). Images are told 120.
        text_required: set rows without a caption aside.
        scores: end captions in the scores of the table, for a model that is to know them; see `models.text.prompts`.
        max_fps: of a video of more frames a second than this, so many are left out between two that it has no more
            (2.0); None takes them as they are.
        rate_told: end captions in the rate of the frames that are taken and in the motion score of the table, as those
            of 2.0 do; None for not.
        batches_in_a_row: how many batches of one size follow each other; a multiple of the number of ranks keeps the
            work of a step equal.
        num_workers: threads that read clips; 0 reads when asked.
        max_broken_share: of the clips met so far; the run stops when more are broken, and does not start when the
            files of more are missing.
    """

    buckets: BucketConfig
    manifest: Path | None = None
    frame_interval: int = 1
    told_fps: Literal["taken", "file"] = "taken"
    text_required: bool = True
    scores: bool = False
    max_fps: float | None = None
    rate_told: bool | None = None
    batches_in_a_row: int = 8
    num_workers: int = 4
    max_broken_share: float = 0.05

    def __post_init__(self) -> None:
        Buckets(self.buckets)
        least = {"frame_interval": 1, "batches_in_a_row": 1, "num_workers": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise OpenSoraError(f"{name} is {getattr(self, name)}, expected {smallest} or more")
        if self.max_fps is not None and not self.max_fps > 0:
            raise OpenSoraError(f"max_fps is {self.max_fps:g}, expected a number above 0, such as 24")
        if not 0 <= self.max_broken_share <= 1:
            raise OpenSoraError(f"max_broken_share is {self.max_broken_share:g}, expected a share from 0 to 1")

    def shapes(self) -> list[BatchShape]:
        """The sizes that batches have; without a manifest, see `Buckets.shapes`."""
        return ClipSource(self).shapes()

    def defaults(self) -> dict[str, Any]:
        """How a model samples that is told the rate of files: its clips play as much slower."""
        return {"frame_interval": self.frame_interval} if self.told_fps == "file" else {}

    def open(self, context: DataContext) -> Source:
        """The clips, or their latents.

        Raises:
            OpenSoraError: a manifest that cannot be read, none of whose clips is in any bucket, of whose files too many
                are missing, or whose captions cannot be read.
        """
        source = ClipSource(self)
        check_presence(missing_files(source.rows), source.rows, self.max_broken_share)
        if context.captions is not None:
            context.captions.check_words(source.rows.texts())
        if context.autoencoder is None:
            return source
        return EncodedClips(source, context.autoencoder, sample=context.sample_posterior, keep_video=context.keep_video)


class ManifestSource(Source):
    """Batches of clips of a table, whatever is read of them.

    Attributes:
        config: what it was made of.
        rows: the clips; empty without a manifest.
        buckets: the sizes.
        broken: clips that could not be read so far, by their number in `rows`, with the reason.
    """

    def __init__(self, config: ManifestClips) -> None:
        self.config, self.buckets = config, Buckets(config.buckets)
        self.rows = ClipRows()
        self.broken: dict[int, str] = {}
        self._met: set[int] = set()
        self._lock = threading.RLock()
        self._samplers: dict[int, BucketSampler] = {}
        self._prefetched: dict[BatchKey, list[Future]] = {}
        self._readers = ThreadPoolExecutor(config.num_workers) if config.num_workers else None
        if config.manifest is not None:
            self._read_manifest(config.manifest)

    def sampler(self, seed: int) -> BucketSampler:
        """The order of the clips in a run of this seed."""
        if seed not in self._samplers:
            self._samplers[seed] = BucketSampler(
                self.rows,
                self.buckets,
                seed,
                frame_interval=self.config.frame_interval,
                batches_in_a_row=self.config.batches_in_a_row,
            )
        return self._samplers[seed]

    @abstractmethod
    def read(self, number: int, bucket: Bucket, rng: random.Random) -> Any:
        """A clip in a size; `rng` chooses its window.

        Raises:
            OpenSoraError: the reason why it cannot be read; the message does not name the file.
        """

    @abstractmethod
    def collate(self, clips: list[Any], numbers: Sequence[int], bucket: Bucket, key: BatchKey) -> Any:
        """A batch of what `read` returned, and of which clips."""

    def batch(self, key: BatchKey) -> Any:
        """The clips of a place in the run.

        Raises:
            OpenSoraError: there is no manifest, too many clips are broken, or none of a bucket can be read.
        """
        self._check_manifest()
        if (reads := self._prefetched.pop(key, None)) is not None:
            clips = [read.result() for read in reads]
        else:
            clips = [self._read(key, slot) for slot in range(len(self._sampled(key).rows))]
        self._check_share()
        bucket = self.buckets.buckets[self._sampled(key).bucket]
        return self.collate([clip for clip, _ in clips], [number for _, number in clips], bucket, key)

    def prefetch(self, keys: Sequence[BatchKey]) -> None:
        if self._readers is None or self.config.manifest is None:
            return
        for key in keys:
            if key not in self._prefetched:
                slots = range(len(self._sampled(key).rows))
                self._prefetched[key] = [self._readers.submit(self._read, key, slot) for slot in slots]

    def cancel_prefetch(self) -> None:
        while self._prefetched:
            for read in self._prefetched.popitem()[1]:
                read.cancel()

    def shapes(self) -> list[BatchShape]:
        """Shares are those of the first epoch of seed 0; without a manifest, see `Buckets.shapes`."""
        if not self.rows:
            return self.buckets.shapes()
        batches = self.sampler(0).epoch(0).batch_bucket
        return self.buckets.shapes(np.bincount(batches, minlength=len(self.buckets)) if len(batches) else None)

    def figures(self) -> dict[str, float]:
        return {"clips_met": float(len(self._met)), "broken_clips": float(len(self.broken))}

    def conditions(self, numbers: Sequence[int], bucket: Bucket) -> ClipConditions:
        """What networks are told of clips in a size."""
        interval = self.config.frame_interval if self.config.told_fps == "taken" else 1
        rates = (self.rows[number].fps for number in numbers)
        return bucket_conditions([None if rate is None else rate / interval for rate in rates], bucket)

    def _read_manifest(self, path: Path) -> None:
        manifest = read_manifest(path, text_required=self.config.text_required)
        self.rows = rows_as_taken(manifest.rows, self.config)
        if manifest.rejected:
            logger.warning(
                "%s: %d rows set aside, %s", path, len(manifest.rejected), "; ".join(map(str, manifest.rejected[:3]))
            )
        if not self.rows:
            first = f"; {manifest.rejected[0]}" if manifest.rejected else ""
            raise OpenSoraError(f"manifest {path} has no row that can be used{first}")
        self.sampler(0).check()

    def _check_manifest(self) -> None:
        if self.config.manifest is None:
            raise OpenSoraError(
                "no manifest: name the table of your clips; opensora data manifest makes one of a folder"
            )

    def _sampled(self, key: BatchKey) -> SampledBatch:
        with self._lock:
            return self.sampler(key.seed).batch(key.position)

    def _read(self, key: BatchKey, slot: int) -> tuple[Any, int]:
        """A clip of a batch, or its replacement, and the number of its row."""
        sampled = self._sampled(key)
        bucket = self.buckets.buckets[sampled.bucket]
        for attempt, number in enumerate(self._candidates(key, slot, sampled)):
            with self._lock:
                self._met.add(number)
                if number in self.broken:
                    continue
            try:
                rng = random.Random(derive_seed(key.seed, "window", key.position, slot, attempt))
                return self.read(number, bucket, rng), number
            except OpenSoraError as error:
                self._note_broken(number, str(error))
        last = f"{self.rows[number].path}: {self.broken[number]}"
        raise OpenSoraError(f"no clip for {bucket.label} can be read; the last one tried: {last}")

    def _candidates(self, key: BatchKey, slot: int, sampled: SampledBatch) -> Iterator[int]:
        """The clip itself, then others of its bucket, then any that are long enough for it."""
        yield int(sampled.rows[slot])
        rng = random.Random(derive_seed(key.seed, "replacement", key.position, slot))
        with self._lock:
            sampler = self.sampler(key.seed)
            same = sampler.epoch(sampled.epoch).clips_of(sampled.bucket)
        num_frames = self.buckets.buckets[sampled.bucket].num_frames
        needed = self.buckets.frames_needed(num_frames, self.config.frame_interval)
        for others in (same, np.flatnonzero(sampler.num_frames >= needed)):
            for index in rng.sample(range(len(others)), min(len(others), _MOST_REPLACEMENTS)):
                yield int(others[index])

    def _note_broken(self, number: int, reason: str) -> None:
        with self._lock:
            if number not in self.broken:
                self.broken[number] = reason
                logger.warning("broken clip %s: %s; another one takes its place", self.rows[number].path, reason)

    def _check_share(self) -> None:
        with self._lock:
            met, broken = len(self._met), dict(self.broken)
        enough = min(_ENOUGH_CLIPS, len(self.rows))
        if met >= enough and len(broken) > self.config.max_broken_share * met:
            number, reason = next(reversed(broken.items()))
            raise OpenSoraError(
                f"{len(broken)} of {met} clips are broken, more than max_broken_share {self.config.max_broken_share:g} "
                f"allows; the last one: {self.rows[number].path}: {reason}"
            )


class ClipSource(ManifestSource):
    """Batches of clips (`ClipBatch`), read from their files."""

    def read(self, number: int, bucket: Bucket, rng: random.Random) -> Tensor:
        return read_clip(self.rows[number], bucket, self.config.frame_interval, rng)

    def collate(self, clips: list[Tensor], numbers: Sequence[int], bucket: Bucket, key: BatchKey) -> ClipBatch:
        return self.batch_of(clips, numbers, bucket)

    def batch_of(self, clips: list[Tensor], numbers: Sequence[int], bucket: Bucket) -> ClipBatch:
        """Videos (3, T, H, W) of these rows as a batch."""
        return ClipBatch(
            video=torch.stack(clips),
            captions=[self.rows[number].text for number in numbers],
            conditions=self.conditions(numbers, bucket),
            label=bucket.label,
        )


def bucket_conditions(fps: Sequence[float | None], bucket: Bucket) -> ClipConditions:
    """What networks are told of clips of a bucket, each at a rate of its own."""
    return batch_conditions(fps, num_frames=bucket.num_frames, height=bucket.height, width=bucket.width)


def rows_as_taken(rows: ClipRows, config: ManifestClips) -> ClipRows:
    """Clips with what their captions end in, at the rates at which their frames are taken."""
    changes: list[Callable[[ClipRow], ClipRow]] = [told_scores] if config.scores else []
    if config.max_fps is not None or config.rate_told:
        changes.append(lambda row: slowed(row, config.max_fps or math.inf, tell=bool(config.rate_told)))
    return (
        ClipRows(functools.reduce(lambda row, change: change(row), changes, row) for row in rows) if changes else rows
    )


def told_scores(row: ClipRow) -> ClipRow:
    """The clip with its scores at the end of its caption."""
    scores = {name: getattr(row, name) for name in ("aesthetic", "flow", "camera_motion")}
    return replace(row, text=append_scores(row.text, **scores))


def slowed(row: ClipRow, max_fps: float, *, tell: bool) -> ClipRow:
    """The clip of every frame, every second one or every third one, and so on, so that it has at most so many a second.

    Args:
        row: the clip; images stay as they are.
        max_fps: frames a second.
        tell: whether its caption ends in its rate and its motion score, see `caption_of_2_0`.
    """
    fps = None if row.num_frames == 1 else row.fps
    interval = 1 if fps is None else math.ceil(fps / max_fps)
    if tell:
        told = fps if fps is None or interval == 1 else fps // interval
        row = replace(row, text=caption_of_2_0(row.text, fps=told, motion=row.motion))
    if fps is None or interval == 1:
        return row
    return replace(row, num_frames=max(1, row.num_frames // interval), fps=fps / interval)


def read_clip(row: ClipRow, bucket: Bucket, frame_interval: int, rng: random.Random) -> Tensor:
    """A clip, or a window of one, at a bucket's size.

    Where the file's rate varies, or is not the table's, frames are those that are seen at the times of the table's.

    Args:
        row: the clip.
        bucket: its size; a single frame is an image.
        frame_interval: every how manieth frame is taken.
        rng: chooses the window.

    Returns:
        video (3, T, H, W) in [-1, 1].

    Raises:
        OpenSoraError: the reason why it cannot be read; the message does not name the file.
    """
    clip = ClipFile(row.path)
    if clip.is_picture:
        if bucket.num_frames > 1:
            raise OpenSoraError(f"a picture, but the manifest says {row.num_frames} frames")
        (picture,) = clip.frames([0])
        _check_size(row, *picture.shape[:2])
        return to_video(np.asarray(fill_image(Image.fromarray(picture), bucket.height, bucket.width))[None])
    check_length(clip.timeline, row.num_frames, row.fps)
    first, end = random_window(
        bucket.num_frames * (frame_interval if bucket.num_frames > 1 else 1), row.num_frames, rng
    )
    indices = spread_frames(first, end, bucket.num_frames).tolist()
    frames = []
    for frame in clip.frames(indices, row.fps):
        _check_size(row, *frame.shape[:2])
        # One by one and resized first, because a clip at its full size may be far larger than what is left of it.
        pixels = torch.tensor(frame).permute(2, 0, 1).float()
        frames.append(fill_video(pixels, bucket.height, bucket.width))
    return torch.stack(frames, dim=1).div_(255).sub_(0.5).div_(0.5)


def _check_size(row: ClipRow, height: int, width: int) -> None:
    if (height, width) != (row.height, row.width):
        raise OpenSoraError(f"{height}x{width} pixels, but the manifest says {row.height}x{row.width}")
