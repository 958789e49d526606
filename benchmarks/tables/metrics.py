"""The tables of docs/metrics.md: what metrics of clips cost, and how they move when real clips are made worse.

    python -m benchmarks metrics figures
    PYTHONPATH=tests python -m benchmarks metrics moves [CLIP ...]       without clips: those that `make clips` fetches

`figures` measures seconds of one core (of the process, so other work on the machine hardly counts) for one clip of
noise that pans, of 17 frames of 64x64 and of 51 of 240x424; the better of two runs. `moves` takes 17 frames of each
clip at 144x176, makes them worse in steps (tests/known_clips.py), and prints the mean over clips of what each figure
makes of it.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from opensora.evaluation.metrics.catalogue import METRICS, measure_all
from opensora.evaluation.metrics.fidelity import FIGURES, fidelity
from opensora.evaluation.metrics.metric import Figure

SIZES = ((17, 64, 64), (51, 240, 424))
REAL_CLIPS = Path(".venv/real-clips")


def panning_noise(num_frames: int, height: int, width: int) -> Tensor:
    """(1, 3, T, H, W), 3 px a frame to the right."""
    noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.stack([noise.roll(3 * t, dims=3) for t in range(num_frames)], dim=2)


def seconds(work: Callable[[Tensor], object]) -> str:
    """Of one clip of each size."""
    found = []
    work(panning_noise(3, 64, 64))  # what is loaded once
    for size in SIZES:
        clip, runs = panning_noise(*size), []
        for _ in range(2):
            start = time.process_time()
            work(clip)
            runs.append(time.process_time() - start)
        found.append(f"{min(runs):.2g}")
    return " / ".join(found)


def row(figure: Figure, cost: str) -> str:
    """One of the table of figures."""
    better = figure.better or ""
    return f"| `{figure.name}` | {figure.unit} | {better} | {figure.tells} | {figure.blind_to} | {cost} |"


def print_figures() -> None:
    print("| figure | unit | better | tells | blind to | s per clip |")
    print("|---|---|---|---|---|---|")
    for metric in METRICS:
        cost = seconds(lambda clip, metric=metric: measure_all(clip, 24.0, [metric]))
        for figure in metric.figures:
            print(row(figure, cost), flush=True)
    cost = seconds(lambda clip: fidelity(clip * 0.9, clip))
    for figure in FIGURES:
        print(row(figure, cost))
    print(f"\nall metrics of single clips together: {seconds(lambda clip: measure_all(clip, 24.0))} s")


def print_moves(paths: list[Path]) -> None:
    from known_clips import DECEIVED, MOVES, WORSE, real_clip

    clips = {path.name: real_clip(path) for path in paths}
    for title, moves in (("moves as it should", MOVES), ("is deceived", DECEIVED)):
        print(f"| {title} | by | strengths | figure | clips |\n|---|---|---|---|---|")
        for move in moves:
            worse, names = WORSE[move.worse], move.names(clips)
            found = torch.tensor(
                [[figure_of(move.figure, made, clips[name]) for made in worse.clips(clips[name])] for name in names]
            )
            strengths = ", ".join(f"{strength:g}" for strength in worse.strengths)
            means = ", ".join(f"{mean:.3g}" for mean in found.mean(dim=0).tolist())
            print(
                f"| `{move.figure}` | {move.worse}, {worse.unit} | {strengths} | {means} | {len(names)} |", flush=True
            )
        print()


def figure_of(name: str, made: Tensor, reference: Tensor) -> float:
    for metric in METRICS:
        if name in [figure.name for figure in metric.figures]:
            return float(measure_all(made, 25.0, [metric])[name])
    return float(fidelity(made, reference)[name]) if made.shape == reference.shape else math.nan


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=["figures", "moves"])
    parser.add_argument("clips", nargs="*", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.table == "figures":
        print_figures()
        return
    fetched = (path for suffix in ("mp4", "mpg") for path in REAL_CLIPS.rglob(f"*.{suffix}"))
    print_moves(arguments.clips or sorted(path for path in fetched if "distorted" not in path.name))
