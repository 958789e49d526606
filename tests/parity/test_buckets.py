"""Which clip goes into which bucket, against the reference: every case is read from the fixture."""

import json

import numpy as np
import pytest

from opensora.data.buckets import Buckets
from opensora.geometry import num_pixels


@pytest.mark.parametrize("version", ["1_1", "1_2"])
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
