"""What --fast saves of a released model at full size: `python -m benchmarks fast-full-size`, for docs/performance.md.

Open-Sora 1.2 as it is released, STDiT3-XL/2 with all its layers and its autoencoder, has random weights in a folder (3
GB in the system's folder for temporary files, removed afterwards); the text encoder has one small layer. A clip is made
exactly and with every way of --fast. Told are evaluations of the transformer, floating-point operations of the whole
clip as counted while it is made, and seconds. What its frames look like says nothing: weights are random.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.tables.full_size_step import size_of
from benchmarks.tables.max_memory import SMALL_TEXT, write_model
from benchmarks.tables.memory import PROMPT, Row
from opensora.generation.engine import Engine
from opensora.generation.request import ClipRequest
from opensora.planning.flops import CountedFlops
from opensora.sampling.forecast_plan import FAST


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks fast-full-size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size", type=size_of, default="17x144x256", metavar="FRAMESxHEIGHTxWIDTH")
    parser.add_argument("--depth", type=int, default=28, help="layer pairs; fewer for a quick look")
    args = parser.parse_args(argv)
    frames, height, width = args.size
    changes = {"transformer": {"depth": args.depth}, "text_encoder": SMALL_TEXT}
    row = Row("opensora-1.2", "clip", (frames, height, width), "bfloat16", changes=changes)
    with tempfile.TemporaryDirectory() as name:
        write_model(row, Path(name))
        size = {"num_frames": frames, "height": height, "width": width}
        request = ClipRequest(PROMPT, model=name, dtype="bfloat16", seed=0, num_inference_steps=args.steps, **size)
        engine = Engine.load(request)
        print("| | evaluations | TFLOP | of the exact clip | s |\n|---|---|---|---|---|", flush=True)
        exact = 0
        for fast in (None, *FAST):
            started, counted = time.perf_counter(), CountedFlops()
            with torch.no_grad(), counted:
                (clip,) = engine.make_batch(engine.prepare([dataclasses.replace(request, fast=fast)]))
            flops, seconds = counted.totals[0], time.perf_counter() - started
            exact = exact or flops
            cells = (
                fast or "exact",
                clip.num_evaluations,
                f"{flops / 1e12:.1f}",
                f"{flops / exact:.2f}",
                f"{seconds:.0f}",
            )
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
