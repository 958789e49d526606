"""Every bucket a clip may be in: what chance can reach, and nothing else."""

import numpy as np
import pytest

from opensora.data.buckets import Buckets

CONFIGS = [
    {"144p": {"1": (1.0, 4), "16": (1.0, 2)}},
    {"240p": {"1": (0.5, 4), "16": (0.4, 2)}, "144p": {"16": (1.0, 2), "51": (0.5, 1)}},
    {"360p": {"51": ((1.0, 0.5), 1), "16": (0.5, 2)}, "240p": {"51": ((0.5, 0.5), 1), "16": ((0.5, 1.0), 1)}},
    {"360p": {"51": (0.0, 1), "16": ((0.3, 0.3), 2)}, "144p": {"1": (0.1, 4), "16": ((0.0, 1.0), 1), "8": (1.0, 2)}},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("frame_interval", [1, 3])
def test_chance_reaches_all_of_them_and_no_other(config, frame_interval: int):
    buckets = Buckets(config)
    for num_frames in (1, 9, 16, 17, 49, 60, 200):
        for height, width in ((144, 256), (256, 144), (240, 426), (480, 480), (60, 80)):
            seeds = np.arange(0, 600 * 100, 100)
            many = [np.full(len(seeds), value) for value in (num_frames, height, width)]
            drawn = set(buckets.assign(*many, seeds, frame_interval).bucket.tolist()) - {-1}
            assert set(buckets.possible(num_frames, height, width, frame_interval)) == drawn
