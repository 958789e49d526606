"""What makes a clip fit on a card: `python -m benchmarks cards` prints the table of docs/memory.md.

Plans of published models, as `opensora plan --device-memory` makes them; nothing is loaded or downloaded.
"""

import argparse
from collections.abc import Sequence

import torch

from opensora.generation.request import ClipRequest
from opensora.generation.resolve import resolve_size
from opensora.geometry import VideoSize
from opensora.planning.meta_pipeline import meta_pipeline
from opensora.planning.planner import ACCELERATOR, Planner
from opensora.planning.report import choices_in_words, differing_choices, gigabytes
from opensora.planning.stages import Clip
from opensora.planning.tracing import Tracer

CARDS_GB = (8, 12, 16, 24, 48, 80)
CLIPS = (
    ("opensora-2.0", "256px", 129),
    ("opensora-2.0", "768px", 129),
    ("opensora-1.3-360p", "360p", 113),
    ("opensora-1.2", "720p", 102),
)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks cards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="clips that hold this text")
    only = parser.parse_args(argv).only
    print("| model and clip | " + " | ".join(f"{size} GB" for size in CARDS_GB) + " |")
    print("|---|" + "---|" * len(CARDS_GB))
    for name, resolution, num_frames in CLIPS:
        if only in f"{name} {resolution}":
            print(
                f"| {name}, {resolution}, {num_frames} frames | {' | '.join(row(name, resolution, num_frames))} |",
                flush=True,
            )


def row(name: str, resolution: str, num_frames: int) -> list[str]:
    """For each card the options that make the clip fit, and what it takes then."""
    tracer = Tracer()
    pipeline = meta_pipeline(tracer, name).pipeline
    request = ClipRequest("a clip", model=name, resolution=resolution, num_frames=num_frames)
    made = resolve_size(request, pipeline.config, pipeline.size_rule())
    planner = Planner(tracer, pipeline, Clip(VideoSize(made.num_frames, made.height, made.width)), ACCELERATOR)
    default, cells = planner.default(torch.bfloat16), []
    for size in CARDS_GB:
        found = planner.find(size * 2**30, [torch.bfloat16, torch.int8])
        if found is None:
            cells.append(f"no: {gigabytes(planner.needed_bytes(planner.smallest(planner.default(torch.int8))))}")
            continue
        words = choices_in_words(differing_choices(found, default)).replace("`", "").replace("_", "-")
        cells.append(f"{words or 'as it is'}: {gigabytes(planner.needed_bytes(found))}")
    return cells
