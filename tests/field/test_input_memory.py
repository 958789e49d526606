"""Of a long clip only the frames that are used are decoded, and no more than those are in memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numbered_clips import encode, number_of, numbered

from opensora.generation.inputs import InputFiles
from opensora.generation.record import Sampling
from opensora.generation.request import ClipRequest
from opensora.media import video

ROOT = Path(__file__).parents[2]


def sampling(num_frames: int) -> Sampling:
    return Sampling(num_frames, 48, 64, 10, 1, 1.0, None)


@pytest.mark.parametrize(("chosen", "most"), [(slice(-9, None), 19), (slice(9), 10)])
def test_no_other_frames_are_decoded(tmp_path, monkeypatch, chosen, most):
    """Those of the clip's end begin at the keyframe before them."""
    decoded, real = [], video._decoded

    def counting(container, stream):
        for frame in real(container, stream):
            decoded.append(frame.pts)
            yield frame

    path = encode(tmp_path / "a.mp4", np.tile(numbered(50), (6, 1, 1, 1)), bf="0", sc_threshold="0")
    files = InputFiles()
    clip = files[files.read(ClipRequest("a cat", extend=path)).extend]
    monkeypatch.setattr(video, "_decoded", counting)
    frames = clip.fill(sampling(9), chosen)
    shown = ((frames.permute(1, 2, 3, 0) + 1) * 127.5).round().numpy()
    assert [number_of(frame) for frame in shown] == [*range(50)][chosen]
    assert len(decoded) <= most


@pytest.mark.slow
def test_long_clips_take_no_more_memory_than_the_frames_used():
    """2,000 frames of 1280x720 have 5.5 GB."""
    command = [sys.executable, "-m", "benchmarks", "input-memory"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, cwd=ROOT)
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| --")]
    more = {row[1].strip(): float(row[3].strip().removesuffix(" MB").replace(",", "")) for row in rows}
    assert set(more) == {"--extend", "--edit"}
    assert max(more.values()) < 350
