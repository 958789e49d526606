"""Memory that a long clip takes as an input: `python -m benchmarks input-memory` prints the table of docs/memory.md.

A clip of 2,000 frames of 1280x720 is made once; then `opensora generate` runs in a process of its own with and without
it, and the peaks of resident memory are compared (Linux).
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

GENERATE = ["generate", "a small red ball rolls left over the grass", "--num-inference-steps", "1"]
WAYS = {"nothing": [], "--extend": ["--extend", "{clip}"], "--edit": ["--edit", "{clip}", "--strength", "0.5"]}


def make_clip(path: Path, num_frames: int, height: int = 720, width: int = 1280) -> None:
    """A grey ramp that moves."""
    ramp = np.broadcast_to(np.arange(width + num_frames) % 200, (height, width + num_frames)).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(ramp[:, index : index + width]), format="gray")
            frame.pts, frame.time_base = index, Fraction(1, 24)
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode(None))


def peak_mb(way: list[str], clip: Path, folder: Path) -> float:
    """Peak resident memory of a run."""
    code = (
        "import resource, sys; from opensora.cli.main import main; code = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    args = [*GENERATE, *(part.format(clip=clip) for part in way), "--output", str(folder / "out.mp4")]
    done = subprocess.run([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks input-memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-frames", type=int, default=2000)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        clip = Path(name) / "long.mp4"
        make_clip(clip, args.num_frames)
        peaks = {way: peak_mb(options, clip, Path(name)) for way, options in WAYS.items()}
    print("| input | peak | more than without |\n|---|---:|---:|")
    for way, peak in peaks.items():
        print(f"| {way} | {peak:,.0f} MB | {peak - peaks['nothing']:,.0f} MB |")
