"""Which clip goes into which bucket, and why others go into none. Numbers against the reference: tests/parity."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.data.buckets import Buckets, Dropped
from opensora.data.seeded_draws import first_uniforms
from opensora.errors import OpenSoraError


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.integers(1, 4))
def test_draws_are_numpys(seeds, count):
    expected = [np.random.default_rng(seed).random(count) for seed in seeds]
    np.testing.assert_array_equal(first_uniforms(np.array(seeds, np.uint64), count), np.transpose(expected))


def assign(config, num_frames, height, width, seed=0, frame_interval=1):
    found = Buckets(config).assign(*(np.array([value]) for value in (num_frames, height, width, seed)), frame_interval)
    if found.bucket[0] < 0:
        (reason,) = found.dropped()
        return reason
    assert found.dropped() == {}
    bucket = Buckets(config).buckets[found.bucket[0]]
    return bucket.resolution, bucket.num_frames, bucket.height, bucket.width


def test_why_a_clip_is_dropped():
    config = {"480p": {"1": (1.0, 4)}, "240p": {"16": (1.0, 2), "51": (0.0, None)}}
    assert assign(config, 100, 100, 100) is Dropped.TOO_SMALL
    assert assign(config, 16, 240, 426) is Dropped.TOO_SHORT  # as many frames are not more frames
    assert assign(config, 17, 240, 426) == ("240p", 16, 240, 426)
    assert assign(config, 60, 240, 426) is Dropped.NOT_KEPT
    assert assign(config, 1, 240, 426) is Dropped.NO_IMAGES
    assert assign(config, 1, 480, 854) == ("480p", 1, 480, 854)
    assert assign({"480p": {"1": (1.0, 4)}}, 60, 480, 854) is Dropped.NO_VIDEOS
    assert assign(config, 17, 480, 854) == ("240p", 16, 240, 426)


def test_frames_are_counted_at_the_interval():
    config = {"240p": {"16": (1.0, 2)}}
    assert assign(config, 48, 240, 426, frame_interval=3) is Dropped.TOO_SHORT
    assert assign(config, 49, 240, 426, frame_interval=3) == ("240p", 16, 240, 426)
    assert assign({"240p": {"1": (1.0, 2)}}, 1, 240, 426, frame_interval=3) == ("240p", 1, 240, 426)


def test_a_single_size():
    config = {"64x96": {"9": (1.0, 4)}, "32x32": {"9": (1.0, 4)}}
    assert assign(config, 10, 200, 300) == ("64x96", 9, 64, 96)
    assert assign(config, 10, 300, 200) == ("64x96", 9, 64, 96)  # it has no other
    assert assign(config, 10, 40, 40) == ("32x32", 9, 32, 32)
    assert assign(config, 10, 20, 20) is Dropped.TOO_SMALL


def test_chances_are_kept_on_average():
    """Half of the images stay at 256, half of the rest at 144p; a pair decides lengths first."""
    buckets = Buckets({"256": {"1": (0.5, 4)}, "144p": {"1": (0.5, 4), "16": (1.0, 2), "32": ((0.25, 0.4), 2)}})
    n = 20_000
    sizes = np.full(n, 256)
    images = buckets.assign(np.ones(n, int), sizes, sizes, np.arange(n) * len(buckets))
    labels = np.array([buckets.buckets[b].label if b >= 0 else "" for b in images.bucket])
    assert [np.mean(labels == name) for name in ("256 1f", "144p 1f", "")] == pytest.approx([0.5, 0.25, 0.25], abs=0.01)
    videos = buckets.assign(np.full(n, 60), sizes, sizes, np.arange(n) * len(buckets))
    labels = np.array([buckets.buckets[b].label if b >= 0 else "" for b in videos.bucket])
    # 0.4 consider 32 frames, of whom 0.25 stay and the others, at the last resolution, are dropped.
    shares = [np.mean(labels == name) for name in ("144p 32f", "144p 16f", "")]
    assert shares == pytest.approx([0.1, 0.6, 0.3], abs=0.01)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no buckets"),
        ({"240": {"51": (1.0, 2)}}, "240.*240p"),
        ({"240p": {}}, "240p"),
        ({"240p": [1.0, 2]}, "240p"),
        ({"240p": {"0": (1.0, 2)}}, "frames"),
        ({"240p": {"many": (1.0, 2)}}, "many"),
        ({"240p": {"51": 2}}, "expected .keep, batch size"),
        ({"240p": {"51": (1.5, 2)}}, "from 0 to 1"),
        ({"240p": {"51": ("often", 2)}}, "from 0 to 1"),
        ({"240p": {"1": ((1.0, 0.5), 2)}}, "one chance"),
        ({"240p": {"51": ((1.0, 0.5, 0.1), 2)}}, "one chance or two"),
        ({"240p": {"51": (1.0, None)}}, "batch size None"),
        ({"240p": {"51": (1.0, 0)}}, "batch size 0"),
        ({"240p": {"51": (1.0, 2), 51: (1.0, 2)}}, "twice"),
        ({"240p": {"51": (0.0, None)}}, "keep nothing"),
    ],
)
def test_configurations_that_mean_nothing(config, message):
    with pytest.raises(OpenSoraError, match=message) as caught:
        Buckets(config)
    assert "\n" not in str(caught.value)


def test_shapes_without_clips():
    """By chance, landscape; what is never kept is no shape."""
    config = {"240p": {"1": (0.5, 8), "51": ((1.0, 0.25), 2), "102": (0.0, None)}, "64x32": {"9": (0.25, 3)}}
    shapes = Buckets(config).shapes()
    assert [(s.label, s.batch_size, s.num_frames, s.height, s.width, s.share) for s in shapes] == [
        ("240p 51f", 2, 51, 240, 426, 0.25),
        ("240p 1f", 8, 1, 240, 426, 0.5),
        ("64x32 9f", 3, 9, 64, 32, 0.25),
    ]
