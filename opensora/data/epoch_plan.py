"""What training will make of a manifest: which clips go into which bucket, how many steps there are, what is lost."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensora.clip_rows import ClipRow, ClipRows
from opensora.data.sampler import BucketSampler

_NUM_EXAMPLES = 3
_MOST_REJECTED = 20
_FEW_FRAMES = 3  # that a clip may lack and still be told of


@dataclass(frozen=True)
class BucketPlan:
    """One resolution and number of frames.

    Attributes:
        label: such as "240p 51f".
        batch_size: B.
        clips: how many are in it.
        aspect_ratios: height / width -> how many of them, the most common first.
        batches: how many they make.
        repeats: clips that come once more to fill those.
        share: of all batches.
    """

    label: str
    batch_size: int
    clips: int
    aspect_ratios: dict[float, int]
    batches: int
    repeats: int
    share: float

    def cells(self) -> tuple[str, ...]:
        """A row of a table: label, clips, batch size, batches, share, repeats, and the commonest aspect ratios."""
        ratios = [f"{ratio:g}: {count:,}" for ratio, count in self.aspect_ratios.items()]
        more = f", {len(ratios) - 3} more" if len(ratios) > 3 else ""
        numbers = (f"{self.clips:,}", str(self.batch_size), f"{self.batches:,}", f"{self.share:.1%}")
        return self.label, *numbers, f"{self.repeats:,}", ", ".join(ratios[:3]) + more


@dataclass(frozen=True)
class DroppedClips:
    """Clips that are in no bucket.

    Attributes:
        reason: why.
        clips: how many.
        examples: a few of them, with their sizes.
    """

    reason: str
    clips: int
    examples: list[str]


@dataclass(frozen=True)
class NearMiss:
    """Clips that are a few frames too short for a length that they else would have.

    Attributes:
        num_frames: the length.
        needs: frames that a clip has to have for it.
        has: frames -> how many clips have so many, those that miss the least first.
        example: one of them.
    """

    num_frames: int
    needs: int
    has: dict[int, int]
    example: str


@dataclass(frozen=True)
class Enlarged:
    """Clips that are smaller than the size they are brought to.

    Attributes:
        clips: how many.
        factor: by which the smallest is enlarged.
        example: that one.
    """

    clips: int
    factor: float
    example: str


@dataclass(frozen=True)
class EpochPlan:
    """One epoch.

    Attributes:
        rows: clips of the manifest that can be read.
        clips: of them in buckets.
        by_chance: whether other epochs have other clips.
        batches: of all ranks.
        steps: optimiser steps; a last one may reach into the next epoch.
        mixed_steps: steps whose ranks work on different buckets, and wait for the largest.
        buckets: those that have clips.
        dropped: those that are in none.
        near_misses: those that would be in a longer one with a few frames more, by length.
        enlarged: those that are smaller than their bucket; None without.
    """

    rows: int
    clips: int
    by_chance: bool
    batches: int
    steps: float
    mixed_steps: int
    buckets: list[BucketPlan]
    dropped: list[DroppedClips]
    near_misses: list[NearMiss]
    enlarged: Enlarged | None


def plan_epoch(rows: Sequence[ClipRow], sampler: BucketSampler, *, ranks: int = 1, microbatches: int = 1) -> EpochPlan:
    """The plan of a run's first epoch.

    Args:
        rows: the clips, those of the sampler.
        sampler: their order.
        ranks: that each have batches of their own.
        microbatches: of a rank in a step.
    """
    epoch, known = sampler.epoch(0), sampler.buckets.buckets
    batches, clips = Counter[str](), Counter[str]()
    ratios: dict[str, Counter[float]] = {}
    sizes = {bucket.label: bucket.batch_size for bucket in known}
    for number, count in zip(*np.unique(epoch.batch_bucket, return_counts=True), strict=True):
        bucket, own = known[number], len(epoch.clips_of(int(number)))
        batches[bucket.label] += int(count)
        clips[bucket.label] += own
        ratios.setdefault(bucket.label, Counter())[bucket.aspect_ratio] += own
    total = len(epoch.batch_bucket)
    plans = [
        BucketPlan(
            label,
            sizes[label],
            clips[label],
            dict(ratios[label].most_common()),
            batches[label],
            batches[label] * sizes[label] - clips[label],
            batches[label] / total,
        )
        for label in batches
    ]
    whole = total - total % ranks
    at_once = epoch.batch_bucket[:whole].reshape(-1, ranks)
    dropped = [
        DroppedClips(reason.value, len(who), [_describe(rows[int(clip)]) for clip in who[:_NUM_EXAMPLES]])
        for reason, who in epoch.assignment.dropped().items()
    ]
    return EpochPlan(
        rows=len(rows),
        clips=sum(clips.values()),
        by_chance=sampler.buckets.by_chance,
        batches=total,
        steps=total / (ranks * microbatches),
        mixed_steps=int((at_once != at_once[:, :1]).any(axis=1).sum()),
        buckets=plans,
        dropped=dropped,
        near_misses=_near_misses(rows, sampler, epoch.assignment.bucket),
        enlarged=_enlarged(rows, sampler, epoch.assignment.bucket),
    )


def _near_misses(rows: Sequence[ClipRow], sampler: BucketSampler, bucket: np.ndarray) -> list[NearMiss]:
    own = np.array([0, *(each.num_frames for each in sampler.buckets.buckets)])[bucket + 1]
    pixels, few = sampler.height * sampler.width, max(_FEW_FRAMES, sampler.frame_interval)
    found = []
    for num_frames in sorted(
        {rule.num_frames for rule in sampler.buckets.rules if rule.chance and rule.num_frames > 1}
    ):
        needs = sampler.buckets.frames_needed(num_frames, sampler.frame_interval)
        missing = needs - sampler.num_frames
        near = (missing > 0) & (missing <= few) & (sampler.num_frames > 1) & (own < num_frames)
        near &= pixels >= sampler.buckets.least_pixels(num_frames)
        clips = np.flatnonzero(near)
        if len(clips):
            has = Counter(sampler.num_frames[clips].tolist())
            found.append(
                NearMiss(num_frames, needs, dict(sorted(has.items(), reverse=True)), _describe(rows[clips[0]]))
            )
    return found


def _enlarged(rows: Sequence[ClipRow], sampler: BucketSampler, bucket: np.ndarray) -> Enlarged | None:
    clips = np.flatnonzero(bucket >= 0)
    sizes = np.array([(each.height, each.width) for each in sampler.buckets.buckets]).reshape(-1, 2)[bucket[clips]]
    own = np.stack([sampler.height, sampler.width], axis=1)[clips]
    factors = (sizes / own).max(axis=1, initial=0)
    count = int((factors > 1).sum())
    if not count:
        return None
    smallest = int(factors.argmax())
    return Enlarged(count, float(factors[smallest]), _describe(rows[int(clips[smallest])]))


def _describe(row: ClipRow) -> str:
    frames = f"{row.num_frames} frame{'s' * (row.num_frames != 1)}"
    return f"{row.path} ({frames} of {row.height}x{row.width})"


def plan_lines(plan: EpochPlan, ranks: int, microbatches: int, batches_in_a_row: int) -> Iterator[str]:
    """What an epoch comes to, in words, but for its buckets."""
    epoch = "the first epoch (others keep other clips by chance)" if plan.by_chance else "an epoch"
    each = f" of {ranks} x {microbatches} batches" if ranks * microbatches > 1 else ""
    yield f"{epoch}: {plan.clips:,} of {plan.rows:,} clips, {plan.batches:,} batches, {plan.steps:,.1f} steps{each}"
    if plan.mixed_steps:
        yield f"in {plan.mixed_steps:,} of {plan.batches // ranks:,} steps the ranks work on different sizes" + (
            f"; `batches_in_a_row` {ranks} makes them fewer" if batches_in_a_row % ranks else ""
        )
    for dropped in plan.dropped:
        yield f"dropped: {dropped.clips:,} {dropped.reason}, such as"
        yield from (f"  {example}" for example in dropped.examples)
    for near in plan.near_misses:
        have = ", ".join(f"{clips:,} have {frames}" for frames, clips in near.has.items())
        yield f"{near.num_frames} frames are taken of clips that have {near.needs} at least: {have}, such as"
        yield f"  {near.example}"
    if plan.enlarged is not None:
        small = plan.enlarged
        yield f"enlarged to their size: {small.clips:,}, the smallest {small.factor:.2f} times:"
        yield f"  {small.example}"


def missing_lines(missing: Mapping[int, str], rows: ClipRows, max_share: float) -> Iterator[str]:
    """Clips whose files are not there, and whether a run would begin without them."""
    if missing:
        yield f"missing: {len(missing):,} of {len(rows):,} clips"
        told: dict[Path, str] = {}
        for number, reason in missing.items():  # rows may come several times
            if len(told) == _MOST_REJECTED:
                break
            told.setdefault(rows[number].path, reason)
        yield from (f"  {path}: {reason}" for path, reason in told.items())
        if len(missing) > len(told) == _MOST_REJECTED:
            yield "  and so on (--json names all)"
        if len(missing) > max_share * len(rows):
            yield f"  a run would not begin: more than `max_broken_share` {max_share:g} are missing"


def why_nothing(plan: EpochPlan, num_broken: int, num_rejected: int) -> str:
    """Why there is nothing to train on."""
    reasons = [f"{dropped.clips} {dropped.reason}" for dropped in plan.dropped]
    reasons += [f"{num_broken} broken"] * bool(num_broken) + [f"{num_rejected} set aside"] * bool(num_rejected)
    return ", ".join(reasons) or "the manifest has no rows"


def left_out_lines(
    broken: Mapping[Path, str], rejected: Sequence[object], num_duplicates: int = 0, duplicate: str = ""
) -> Iterator[str]:
    """Clips that are broken, the first rows of the manifest that were set aside, and files that several rows name."""
    if num_duplicates:
        yield f"rows about a file that another row is about: {num_duplicates:,}, such as {duplicate}"
    if broken:
        yield from [f"broken: {len(broken)}", *(f"  {path}: {reason}" for path, reason in broken.items())]
    if rejected:
        yield from [f"rows set aside: {len(rejected)}", *(f"  {row}" for row in rejected[:_MOST_REJECTED])]
    if len(rejected) > _MOST_REJECTED:
        yield f"  and {len(rejected) - _MOST_REJECTED} more"
