"""The released models at full size on an accelerator: `python -m benchmarks accelerator [--models opensora-1.2 ...]`.

Weights are random numbers in bfloat16, so nothing has to be downloaded; shapes, kernels and memory are those of the
released ones. A step is the network on all branches of guidance in one batch; decoding turns the clip's latents into
pixels. Operations are counted by shape (additions and multiplications apart) in the run that warms up, and their number
over the time of the others, each waited for, is what the device reached. Sizes are those the models are released with.
"""

import argparse
import functools
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.tables.full_size_step import pipeline_of
from opensora.checkpoints.source import Part
from opensora.geometry import VideoSize
from opensora.pipeline import OpenSoraPipeline
from opensora.planning.stages import COMPONENT_OF, Choices, Clip, run_stage
from opensora.weights import cast_weights

SIZES = {
    "opensora-1.0": [(16, 512, 512)],
    "opensora-1.2": [(51, 240, 424), (102, 480, 848), (102, 720, 1280)],
    "opensora-1.3": [(49, 352, 640), (113, 720, 1280)],
    "opensora-2.0": [(129, 192, 336), (129, 576, 1024)],
    "opensora-2.0-dc-ae": [(128, 576, 1024)],
}
"""Model -> frames, height and width of clips; for Open-Sora 2.0 those of 256 and 768 px."""


def build(name: str, device: str) -> OpenSoraPipeline:
    """The pipeline; what denoises and decodes is filled with random numbers, what reads text has shapes alone."""

    def network(part: Part) -> Any:
        with torch.device(device):
            return cast_weights(part.build(), torch.bfloat16).eval().requires_grad_(False)

    return pipeline_of(name, {COMPONENT_OF[stage]: network for stage in ("denoise", "decode")})


def measure(work: Callable[[], None], device: str, repeats: int) -> tuple[float, float, float]:
    """Seconds of one run, the fastest of `repeats`; 10^12 operations in it; most bytes / 10^9 taken."""
    is_cuda = device == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    with FlopCounterMode(display=False) as counter:
        work()
    seconds = []
    for _ in range(repeats):
        if is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 1e9 if is_cuda else float("nan")
    return min(seconds), counter.get_total_flops() / 1e12, peak


def measure_model(name: str, sizes: list[tuple[int, int, int]], device: str, stages: list[str], repeats: int) -> None:
    """Prints a row for every size and stage; nothing of the model is left in memory."""
    pipeline, choices = build(name, device), Choices(torch.bfloat16)
    for size in sizes:
        clip = Clip(VideoSize(*size))
        for stage in stages:
            work = functools.partial(run_stage, pipeline, stage, clip, choices)
            try:
                with torch.device(device):
                    seconds, operations, peak = measure(work, device, repeats)
                figures = f"{seconds:.3f} | {operations:.1f} | {operations / seconds:.0f} | {peak:.1f}"
            except torch.OutOfMemoryError:
                figures = "out of memory | | |"
            print(f"| {name} | {'x'.join(map(str, size))} | {stage} | {figures} |", flush=True)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks accelerator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--stages", nargs="+", default=["denoise", "decode"], choices=["denoise", "decode"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, nargs=3, metavar=("T", "H", "W"), help="in place of the released sizes")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    print("| model | frames x height x width | stage | s | TFLOP | TFLOP/s | peak memory, GB |")
    print("|---|---|---|---|---|---|---|")
    for name in args.models:
        sizes = SIZES[name] if args.size is None else [tuple(args.size)]
        measure_model(name, sizes, args.device, args.stages, args.repeats)
        gc.collect()  # pipelines hold themselves in circles
