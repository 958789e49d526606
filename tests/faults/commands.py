"""The commands that are disturbed, and what they work on: a tiny model, a few clips, a table of them."""

from dataclasses import dataclass
from pathlib import Path

PROMPT = "a small red ball rolls left over the grass"
DATA = (
    'objective.data={"type": "ManifestClips", "buckets": {"16x16": {"5": [1.0, 2]}}, "manifest": "../given/clips.csv"}'
)
SIZE = ["--num-frames", "5", "--height", "16", "--width", "24", "--num-inference-steps", "2"]
RUN = ["v1_2_debug", DATA, "loop.steps=4", "loop.checkpoint_every=1", "loop.log_every=1", "loop.microbatches=1"]


@dataclass(frozen=True)
class Command:
    """A command line, and what is there before it runs.

    Attributes:
        args: of `opensora`, in a folder of its own beside `given`.
        before: other command lines that run first.
        growing: endings of paths of files that change while the work goes on, and are read again by the next run.
    """

    args: list[str]
    before: tuple[list[str], ...] = ()
    growing: tuple[str, ...] = ()


GENERATE = ["generate", PROMPT, "--model", "../given/tiny", *SIZE, "--num-videos", "3", "--output"]
EVALUATE = ["evaluate", "loss", "../given/tiny", "--sizes", "64x64", "--lengths", "1", "5", "--num-clips", "3"]
COMMANDS = {
    "generate": Command([*GENERATE, "clips/clip.mp4"], ([*GENERATE, "clips/clip.mp4", "--seed", "7"],)),
    "generate frames": Command([*GENERATE, "clips/%02d.png"]),
    "convert": Command(["convert", "../given/tiny", "model", "--max-shard-size", "100KB"]),
    "precompute": Command(
        ["data", "precompute", "v1_2_debug", DATA, "--output", "cache", "--shard-mb", "0.001", "--device", "cpu"]
    ),
    "manifest": Command(
        ["data", "manifest", "../given/clips", "--output", "clips.csv", "--verify", "decode"],
        (["data", "manifest", "../given/one", "--output", "clips.csv"],),
    ),
    "train": Command(["train", *RUN, "--output", "run", "--device", "cpu"]),
    "train, finished": Command(
        ["train", *RUN, "--output", "run", "--device", "cpu"], (["train", *RUN, "--output", "run", "--device", "cpu"],)
    ),
    "evaluate": Command(
        [*EVALUATE, "--batch-size", "1", "--device", "cpu", "--output", "results.json"],
        growing=("results.json",),
    ),
}


def make_given(folder: Path) -> None:
    """A model, clips and a table of them; in a process of its own."""
    import numpy as np
    from tiny_pipeline import make_pipeline

    from opensora.manifest import ClipRow, write_manifest
    from opensora.media.write import write_video

    make_pipeline().save_pretrained(folder / "tiny")
    rng = np.random.default_rng(0)
    rows = []
    for where, count in (("clips", 6), ("one", 1)):
        for number in range(count):
            path = folder / where / f"{number}.mp4"
            write_video(path, rng.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8), fps=8)
            path.with_suffix(".txt").write_text(f"clip number {number}")
            rows.append(ClipRow(path, f"clip number {number}", 9, 16, 16, 8.0))
    write_manifest(folder / "clips.csv", rows[:6])
