"""The order in which clips are trained on: an endless stream of batches that any number of ranks can share.

The stream runs through epochs, and in an epoch every clip that has a bucket comes once. What a position of the stream
holds follows from the seed, the clips and the buckets alone. So the only state is the position: R ranks that read
positions p, p + 1, ..., p + R - 1 and then go on at p + R lose and repeat nothing, nor does a run that goes on with
another number of ranks.

Two things cost repeats, which are spread evenly and counted. A bucket's last batch is filled up. And batches come in
runs of `batches_in_a_row`, so that the ranks of a step work on equal sizes: runs of one bucket as far as it reaches,
then of neighbouring ones (as many pixels, another aspect ratio, wherever possible), and the last of an epoch is filled.

Letters: n clips, B clips of a batch.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opensora.clip_rows import ClipRow, ClipRows
from opensora.data.buckets import Assignment, Buckets, Dropped
from opensora.distributed.seeding import derive_seed
from opensora.errors import OpenSoraError

# With keep probabilities an epoch of a few clips may be empty by chance. So many in a row are no chance any more.
_MOST_EMPTY_EPOCHS = 1000


@dataclass(frozen=True)
class SampledBatch:
    """Which clips make a batch.

    Attributes:
        epoch: how many times all clips were gone through before.
        bucket: number of the bucket.
        rows: (B,) numbers of the clips.
    """

    epoch: int
    bucket: int
    rows: np.ndarray


@dataclass(frozen=True)
class Epoch:
    """One epoch's batches.

    Attributes:
        assignment: which clip is in which bucket, and why others are in none.
        batch_bucket: (batches,) number of each batch's bucket.
        batch_start: (batches,) where its clips begin in `rows`.
        rows: numbers of the clips, bucket after bucket, with repeats after a bucket's own clips.
        first: bucket -> where it begins in `rows`, and how many clips it has of its own.
    """

    assignment: Assignment
    batch_bucket: np.ndarray
    batch_start: np.ndarray
    rows: np.ndarray
    first: dict[int, tuple[int, int]]

    def clips_of(self, bucket: int) -> np.ndarray:
        """The clips of a bucket, in this epoch's order."""
        start, count = self.first[bucket]
        return self.rows[start : start + count]


class BucketSampler:
    """The stream of batches.

    Args:
        rows: the clips.
        buckets: the sizes.
        seed: of the order, and of who stays by chance.
        frame_interval: every how manieth frame of a video is taken.
        batches_in_a_row: length of a run, see above; a multiple of the number of ranks keeps their work equal.

    Raises:
        OpenSoraError: a number below 1.
    """

    def __init__(
        self,
        rows: Sequence[ClipRow],
        buckets: Buckets,
        seed: int,
        *,
        frame_interval: int = 1,
        batches_in_a_row: int = 8,
    ) -> None:
        for name, value in {"frame_interval": frame_interval, "batches_in_a_row": batches_in_a_row}.items():
            if value < 1:
                raise OpenSoraError(f"{name} is {value}, expected 1 or more")
        self.buckets, self.seed = buckets, seed
        self.frame_interval, self.batches_in_a_row = frame_interval, batches_in_a_row
        columns = rows if isinstance(rows, ClipRows) else ClipRows(rows)
        self.num_frames, self.height, self.width = columns.sizes().T
        self._ends: list[int] = []  # of the epochs so far, in batches
        self._recent: dict[int, Epoch] = {}
        self._assigned: dict[int, Assignment] = {}  # the last one

    def check(self) -> None:
        """Raises `OpenSoraError` if no clip can ever be in a bucket; says why."""
        dropped = self._assign(0).dropped()
        may_be_kept = self.buckets.by_chance and Dropped.NOT_KEPT in dropped
        if sum(map(len, dropped.values())) == len(self.num_frames) and not may_be_kept:
            reasons = ", ".join(f"{len(clips)} {reason.value}" for reason, clips in dropped.items())
            raise OpenSoraError(
                f"nothing to train on: none of {len(self.num_frames)} clips is in any bucket "
                f"({reasons or 'no clips'}); opensora data plan tells more"
            )

    def batch(self, position: int) -> SampledBatch:
        """The batch at a position of the stream, 0 or more.

        Raises:
            OpenSoraError: the stream is empty, for no clip is ever in a bucket.
        """
        number, index = self.locate(position)
        epoch = self.epoch(number)
        bucket, start = int(epoch.batch_bucket[index]), int(epoch.batch_start[index])
        return SampledBatch(number, bucket, epoch.rows[start : start + self.buckets.buckets[bucket].batch_size])

    def locate(self, position: int) -> tuple[int, int]:
        """The epoch that a position lies in, and how many batches of it come before."""
        if not self._ends:
            self.check()
            self._ends.append(self._num_batches(0))
        if not self.buckets.by_chance:  # all epochs are equally long
            return divmod(position, self._ends[0])
        while self._ends[-1] <= position:
            self._ends.append(self._ends[-1] + self._num_batches(len(self._ends)))
            if len(self._ends) >= _MOST_EMPTY_EPOCHS and self._ends[-_MOST_EMPTY_EPOCHS] == self._ends[-1]:
                raise OpenSoraError(
                    f"nothing to train on: by chance no clip was kept in {_MOST_EMPTY_EPOCHS} epochs; raise the keep "
                    "probabilities of the buckets"
                )
        number = int(np.searchsorted(self._ends, position, side="right"))
        return number, position - (self._ends[number - 1] if number else 0)

    def epoch(self, number: int) -> Epoch:
        """All batches of an epoch."""
        if number not in self._recent:
            self._recent = {k: v for k, v in self._recent.items() if abs(k - number) == 1}
            self._recent[number] = self._make_epoch(number)
        return self._recent[number]

    def _num_batches(self, number: int) -> int:
        """How many batches an epoch has, without making it."""
        bucket = self._assign(number).bucket
        counts = np.bincount(bucket[bucket >= 0], minlength=len(self.buckets))
        return sum(self._batches_of({b: int(n) for b, n in enumerate(counts) if n}).values())

    def _assign(self, number: int) -> Assignment:
        number = number if self.buckets.by_chance else 0  # without chance, all epochs are alike
        if number not in self._assigned:
            clips = np.arange(len(self.num_frames), dtype=np.uint64)
            seeds = clips * np.uint64(len(self.buckets)) + np.uint64((self.seed + number) % 2**64)
            found = self.buckets.assign(self.num_frames, self.height, self.width, seeds, self.frame_interval)
            self._assigned = {number: found}
        return self._assigned[number]

    def _batches_of(self, clips: dict[int, int]) -> dict[int, int]:
        """How many batches the buckets have, of how many clips they have; a multiple of `batches_in_a_row` in all."""
        batches = {bucket: -(-count // self.buckets.buckets[bucket].batch_size) for bucket, count in clips.items()}
        short = {bucket: count for bucket, count in batches.items() if count % self.batches_in_a_row}
        missing = -sum(short.values()) % self.batches_in_a_row
        for bucket in itertools.islice(itertools.cycle(short), missing):
            batches[bucket] += 1
        return batches

    def _make_epoch(self, number: int) -> Epoch:
        assignment = self._assign(number)
        # Raw bits, because numpy promises that these stay what they are; its shuffling may change.
        bits = np.random.PCG64(derive_seed(self.seed, "order of clips", number))
        clips = np.flatnonzero(assignment.bucket >= 0)
        clips = clips[np.argsort(bits.random_raw(len(clips)), kind="stable")]
        clips = clips[np.argsort(assignment.bucket[clips], kind="stable")]
        present, starts, counts = np.unique(assignment.bucket[clips], return_index=True, return_counts=True)
        own = {int(b): clips[start : start + n] for b, start, n in zip(present, starts, counts, strict=True)}
        parts, first, whole, rest = [], {}, [], []
        end = 0
        for bucket, num_batches in self._batches_of({b: len(of) for b, of in own.items()}).items():
            batch_size = self.buckets.buckets[bucket].batch_size
            parts.append(np.resize(own[bucket], num_batches * batch_size))  # goes round and round
            first[bucket] = (end, len(own[bucket]))
            batches = [(bucket, end + i * batch_size) for i in range(num_batches)]
            end += num_batches * batch_size
            in_runs = num_batches - num_batches % self.batches_in_a_row
            whole += batches[:in_runs]
            rest += batches[in_runs:]
        batches = np.array(whole + rest, np.int64).reshape(-1, self.batches_in_a_row, 2)
        order = np.argsort(bits.random_raw(len(batches)), kind="stable")
        batch_bucket, batch_start = batches[order].reshape(-1, 2).T
        rows = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return Epoch(assignment, batch_bucket, batch_start, rows, first)
