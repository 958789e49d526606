"""Which clip goes into which bucket, against the reference: every case is read from the fixture."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from opensora.clip_rows import ClipRow
from opensora.data.bucket_config import pixels_of
from opensora.data.buckets import Buckets
from opensora.data.clips import slowed
from opensora.errors import OpenSoraError
from opensora.geometry import num_pixels
from opensora.pixel_grid import height_to_width


@pytest.mark.parametrize("version", ["1_1", "1_2", "1_3"])
def test_buckets(version, golden_json):
    for name, case in golden_json(f"bucket_v{version}").items():
        # The fixture went through JSON, which turned pairs into lists.
        buckets = Buckets(case["config"])
        assert len(buckets) == case["len"]
        for resolution, lengths in case["bucket_id"].items():
            assert num_pixels(resolution) == case["hw"][resolution]
            for num_frames, number in lengths.items():
                assert buckets.index(resolution, int(num_frames)) == number
        for interval in {row[3] for row in case["results"]}:
            rows = [row for row in case["results"] if row[3] == interval]
            frames, height, width, seeds = (np.array([row[i] for row in rows]) for i in (0, 1, 2, 4))
            found = buckets.assign(frames, height, width, seeds, interval)
            for row, number in zip(rows, found.bucket, strict=True):
                expected, where = row[5], f"{name} {json.dumps(row[:5])}"
                assert (number < 0) == (expected is None), where
                if expected is not None:
                    bucket = buckets.buckets[number]
                    assert [bucket.resolution, bucket.num_frames] == expected[:2], where
                    assert bucket.aspect_ratio == float(expected[2]), where
                    assert [bucket.num_frames, bucket.height, bucket.width] == row[6], where
                    assert bucket.batch_size == row[7], where


def test_buckets_by_pixels(golden_json):
    """Of 2.0. Images are images whatever rate their table tells; the reference loses those of more than it takes."""
    compared = 0
    for name, case in golden_json("bucket_v2_0").items():
        buckets = Buckets(case["config"])
        assert len(buckets) == case["len"]
        for resolution, lengths in case["bucket_id"].items():
            assert pixels_of(resolution) == case["hw"][resolution]
            for num_frames, number in lengths.items():
                rule = buckets.rules[number]
                assert (rule.resolution, rule.num_frames) == (resolution, int(num_frames))
        rows = [row for row in case["results"] if row[0] > 1]
        assert all(row[5] is None for row in case["results"] if row[0] == 1), "lost: told 24 or 60, taken 16"
        rates = {1: 24.0, 3: 60.0}
        clips = [slowed(ClipRow(Path(), "", *row[:3], rates[row[3]]), 16.0, tell=False) for row in rows]
        frames, height, width = (np.array([getattr(c, n) for c in clips]) for n in ("num_frames", "height", "width"))
        found = buckets.assign(frames, height, width, np.array([row[4] for row in rows]))
        for row, clip, number in zip(rows, clips, found.bucket, strict=True):
            expected, where = row[5], f"{name} {json.dumps(row[:5])}"
            assert (number < 0) == (expected is None), where
            if expected is not None:
                bucket = buckets.buckets[number]
                assert number in buckets.possible(clip.num_frames, clip.height, clip.width), where
                assert [bucket.resolution, bucket.num_frames] == expected[:2], where
                assert bucket.aspect_ratio == height_to_width(expected[2]), where
                assert [bucket.num_frames, bucket.height, bucket.width, bucket.batch_size] == [*row[6], row[7]], where
                compared += 1
    assert compared


def test_images_of_a_resolution_by_pixels():
    buckets = Buckets({"256px": {"1": (1.0, 45)}, "768px": {"1": (0.5, 13)}, "1024px_32d": {"1": (0.5, 7)}})
    large = np.full(4000, 1024)
    found = buckets.assign(np.ones(4000, int), large, large, np.arange(4000))
    drawn = Counter(buckets.buckets[number].resolution for number in found.bucket)
    assert {name: count / 4000 for name, count in drawn.items()} == {
        "1024px_32d": pytest.approx(0.5, abs=0.03), "768px": pytest.approx(0.25, abs=0.03),
        "256px": pytest.approx(0.25, abs=0.03),
    }  # fmt: skip
    assert all(bucket.height % 32 == 0 for bucket in buckets.buckets if bucket.resolution == "1024px_32d")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"256px": {"1": (1.0, 1)}, "240p": {"1": (1.0, 1)}}, "give resolutions by pixels alone"),
        ({"256px_ar7:1": {"1": (1.0, 1)}}, "whose aspect ratio is none of 2.39:1"),
        ({"256pix": {"1": (1.0, 1)}}, "unknown resolution '256pix'.*such as 256x256 or 256px"),
    ],
)
def test_resolutions_by_pixels_that_are_none(config, message):
    with pytest.raises(OpenSoraError, match=message):
        Buckets(config)


def test_frames_left_out(golden):
    """How many, and what is told of it."""
    for case, (fps, interval) in golden("train_v2_0").meta["map_target_fps"].items():
        rate, most = map(float, case.split("|"))
        row = slowed(ClipRow(Path(), "a cat", 240, 8, 8, rate, motion=3.6), most, tell=True)
        assert row.num_frames == 240 // interval and row.fps == pytest.approx(rate / interval)
        assert row.text == f"a cat {fps:g} FPS, 4 motion score."
    image = ClipRow(Path(), "a cat", 1, 8, 8, 24.0)
    assert slowed(image, 12.0, tell=True) == image


@pytest.mark.parametrize(("resolution", "fewest"), [("256px", 33), ("256x256", 34)])
def test_how_many_frames_are_enough(resolution, fewest):
    """As many as are taken in 2.0, one more before; whatever may choose a bucket agrees."""
    buckets = Buckets({resolution: {"33": (1.0, 1)}})
    frames, side = np.array([fewest - 1, fewest]), np.full(2, 256)
    assert (buckets.assign(frames, side, side, np.arange(2)).bucket >= 0).tolist() == [False, True]
    assert [bool(buckets.possible(int(count), 256, 256)) for count in frames] == [False, True]
    assert buckets.frames_needed(33) == fewest
