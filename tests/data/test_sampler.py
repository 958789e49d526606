"""The order of clips: each once an epoch, the same for any number of ranks, from any position on."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.data.buckets import Buckets
from opensora.data.sampler import BucketSampler
from opensora.errors import OpenSoraError
from opensora.manifest import ClipRow

CERTAIN = {"64x64": {"1": (1.0, 4), "9": (1.0, 2)}, "32x32": {"1": (1.0, 3), "5": (1.0, 3), "9": (1.0, 1)}}
BY_CHANCE = {"64x64": {"1": (0.5, 4), "9": ((0.5, 0.5), 2)}, "32x32": {"1": (0.7, 3), "5": (0.6, 3)}}

clips = st.lists(
    st.builds(
        lambda frames, side: ClipRow(Path("a"), "", frames, side, side, 8.0),
        st.sampled_from([1, 3, 6, 10, 30]),
        st.sampled_from([16, 32, 64, 100]),
    ),
    min_size=1,
    max_size=40,
)
sizes = st.sampled_from([CERTAIN, BY_CHANCE])


def some_clips(n: int) -> list[ClipRow]:
    return [ClipRow(Path(str(i)), "", [1, 6, 10][i % 3], [32, 64][i % 2], 64, 8.0) for i in range(n)]


def stream(sampler: BucketSampler, start: int, count: int) -> list[tuple[int, list[int]]]:
    batches = [sampler.batch(position) for position in range(start, start + count)]
    return [(batch.bucket, batch.rows.tolist()) for batch in batches]


@given(clips, sizes, st.integers(0, 2**40), st.integers(0, 3), st.integers(1, 5))
def test_every_clip_of_a_bucket_comes_once_and_repeats_are_few(rows, config, seed, number, in_a_row):
    buckets = Buckets(config)
    epoch = BucketSampler(rows, buckets, seed, batches_in_a_row=in_a_row).epoch(number)
    seen = {}
    for bucket, start in zip(epoch.batch_bucket, epoch.batch_start, strict=True):
        batch = epoch.rows[start : start + buckets.buckets[bucket].batch_size]
        assert len(batch) == buckets.buckets[bucket].batch_size
        seen.setdefault(int(bucket), []).extend(batch.tolist())
    assigned = epoch.assignment.bucket
    assert set(seen) == set(assigned[assigned >= 0].tolist())
    for bucket, drawn in seen.items():
        counts = Counter(drawn)
        assert set(counts) == set(np.flatnonzero(assigned == bucket).tolist())
        assert max(counts.values()) - min(counts.values()) <= 1, "repeats are spread evenly"
    # A bucket's last batch is filled, and an epoch's last run.
    wanted = sum(-(-int(np.sum(assigned == b)) // buckets.buckets[b].batch_size) for b in seen)
    assert wanted <= len(epoch.batch_bucket) < wanted + in_a_row
    assert len(epoch.batch_bucket) % in_a_row == 0


@settings(max_examples=30)
@given(clips, sizes, st.integers(0, 100), st.integers(1, 4), st.data())
def test_any_ranks_from_anywhere_read_one_stream(rows, config, seed, in_a_row, data):
    """A run is stopped at some step and goes on, by a new process, with other ranks: nothing lost, nothing repeated."""

    def sampler():
        return BucketSampler(rows, Buckets(config), seed, batches_in_a_row=in_a_row)

    try:
        uninterrupted = stream(sampler(), 0, 24)
    except OpenSoraError:
        assert all(assigned < 0 for assigned in sampler().epoch(0).assignment.bucket)
        return
    position, read = 0, {}
    while position < 24:
        ranks = data.draw(st.integers(1, 5), "ranks")
        fresh = sampler()  # knows the position alone
        for _ in range(data.draw(st.integers(1, 3), "steps")):
            for rank in range(ranks):
                batch = fresh.batch(position + rank)
                read[position + rank] = (batch.bucket, batch.rows.tolist())
            position += ranks
    assert sorted(read) == list(range(position))
    assert [read[p] for p in range(24)] == uninterrupted


@given(clips, st.integers(0, 100), st.integers(1, 6))
def test_runs_have_one_bucket_as_far_as_it_reaches(rows, seed, in_a_row):
    epoch = BucketSampler(rows, Buckets(CERTAIN), seed, batches_in_a_row=in_a_row).epoch(0)
    runs = epoch.batch_bucket.reshape(-1, in_a_row)
    pure = (runs == runs[:, :1]).all(axis=1)
    for bucket, count in zip(*np.unique(epoch.batch_bucket, return_counts=True), strict=True):
        assert np.sum(pure & (runs[:, 0] == bucket)) >= count // in_a_row


def test_ranks_of_a_step_work_on_one_size():
    """200 clips of one bucket and runs of 8: steps of 2, 4 and 8 ranks never mix sizes but in the leftovers."""
    rows = some_clips(1200)
    epoch = BucketSampler(rows, Buckets(CERTAIN), 0, batches_in_a_row=8).epoch(0)
    for ranks in (2, 4, 8):
        steps = epoch.batch_bucket.reshape(-1, ranks)
        mixed = np.sum((steps != steps[:, :1]).any(axis=1))
        assert mixed <= len(set(epoch.batch_bucket.tolist())) - 1


def test_order_depends_on_seed_and_epoch():
    sampler = BucketSampler(some_clips(60), Buckets(CERTAIN), 0, batches_in_a_row=2)
    length = len(sampler.epoch(0).batch_bucket)
    first, second = stream(sampler, 0, length), stream(sampler, length, length)
    assert sampler.locate(length) == (1, 0) and sampler.batch(length).epoch == 1
    assert first != second
    assert first != stream(BucketSampler(some_clips(60), Buckets(CERTAIN), 1, batches_in_a_row=2), 0, length)
    assert first == stream(BucketSampler(some_clips(60), Buckets(CERTAIN), 0, batches_in_a_row=2), 0, length)


def test_others_stay_by_chance_in_every_epoch():
    sampler = BucketSampler(some_clips(200), Buckets(BY_CHANCE), 0)
    kept = [set(np.flatnonzero(sampler.epoch(number).assignment.bucket >= 0).tolist()) for number in range(3)]
    assert kept[0] != kept[1] != kept[2]


def test_a_clips_chance_is_its_own():
    """Draws as the reference's: a clip's seed is the run's, the epoch and its number times the number of buckets."""
    rows, buckets = some_clips(50), Buckets({"32x32": {"1": (0.5, 2)}})
    sampler = BucketSampler([r for r in rows if r.num_frames == 1], buckets, 7)
    for epoch in range(2):
        kept = [np.random.default_rng(7 + epoch + clip * len(buckets)).random() < 0.5 for clip in range(17)]
        assert (sampler.epoch(epoch).assignment.bucket >= 0).tolist() == kept


def test_an_epoch_without_clips_is_passed_over():
    """One clip that stays every tenth epoch or so still trains."""
    sampler = BucketSampler(
        [ClipRow(Path("a"), "", 1, 64, 64, None)], Buckets({"64x64": {"1": (0.1, 2)}}), 0, batches_in_a_row=1
    )
    epochs = [sampler.batch(position).epoch for position in range(5)]
    assert epochs == sorted(set(epochs)) and epochs[-1] > 4
    assert all(sampler.batch(position).rows.tolist() == [0, 0] for position in range(5))


def test_nothing_to_train_on_says_why():
    rows = [ClipRow(Path("a"), "", 9, 64, 64, 8.0), ClipRow(Path("b"), "", 30, 8, 8, 8.0)]
    BucketSampler(rows, Buckets(CERTAIN), 0).check()  # nine frames are more than five
    sampler = BucketSampler(rows, Buckets({"64x64": {"16": (1.0, 1)}}), 0)
    with pytest.raises(OpenSoraError, match=r"1 too small, 1 too short"):
        sampler.check()
    with pytest.raises(OpenSoraError, match="nothing to train on"):
        sampler.batch(0)
    with pytest.raises(OpenSoraError, match="kept in 1000 epochs"):
        BucketSampler(rows[:1], Buckets({"64x64": {"5": (1e-9, 1)}}), 0).batch(0)
    with pytest.raises(OpenSoraError, match="batches_in_a_row is 0"):
        BucketSampler(rows, Buckets(CERTAIN), 0, batches_in_a_row=0)
