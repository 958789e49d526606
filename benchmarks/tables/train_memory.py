"""Predicted against measured memory of training: `python -m benchmarks train-memory [--only TEXT]`.

Every row is a short training run with random weights and empty batches on the CPU, in a process of its own (or one for
each rank): libraries are warmed up with a tiny run, and then the peak of resident memory is read that two steps of the
run add, building it included (VmHWM of /proc/self/status, which can be reset), so this needs Linux. It is held against
what `opensora train --dry-run` predicts without the process itself and without checkpoints, of which none is written.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.tables.resident import forget_peak, peak_bytes, settled_bytes

if TYPE_CHECKING:
    from opensora.training.config import Recipe
    from opensora.training.plan import TrainingPlan

# By default glibc keeps up to some ten megabytes of freed blocks for later, which hides what was really taken.
_RETURN_FREED_MEMORY = "glibc.malloc.mmap_threshold=131072"

TOYBOX = {"hidden_size": 192, "depth": 4, "num_heads": 4}
WIDE = {"hidden_size": 576, "depth": 8, "num_heads": 8}


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        transformer: sizes of an STDiT3.
        clips: clips of a batch, frames, height and width in pixels.
        loop: settings of the loop.
        ranks: processes.
    """

    transformer: dict[str, int]
    clips: tuple[int, int, int, int]
    loop: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1

    def __str__(self) -> str:
        size, frames, height, width = self.clips
        parts = [f"width {self.transformer['hidden_size']}", f"depth {self.transformer['depth']}"]
        parts += [f"{size} x {frames} x {height}x{width}"]
        parts += [f"{key} {value}" for key, value in self.loop.items()]
        return ", ".join(parts + ([f"{self.ranks} ranks"] if self.ranks > 1 else []))

    def recipe(self) -> "Recipe":
        """What is trained."""
        from opensora.data.toybox import ToyboxClips, ToyboxLatents
        from opensora.recipes import find_recipe

        recipe = find_recipe("v1_2_debug")
        size, frames, height, width = self.clips
        clips = ToyboxClips(num_frames=frames, height=height, width=width)
        transformer = {**recipe.objective.transformer, **self.transformer}  # type: ignore[attr-defined]
        objective = replace(
            recipe.objective,  # type: ignore[type-var]
            data=ToyboxLatents(clips, batch_size=size),
            transformer=transformer,
            frame_masks={},
        )
        loop = replace(recipe.loop, checkpoint_every=0, **{"precision": "bf16", **self.loop})
        return replace(recipe, objective=objective, loop=loop)


CLIPS = (8, 17, 128, 192)
ROWS = [
    Row(TOYBOX, (48, 17, 64, 64)),
    Row(WIDE, CLIPS),
    Row(WIDE, CLIPS, {"activation_checkpointing": "full"}),
    Row(WIDE, CLIPS, {"activation_checkpointing": "selective"}),
    Row(WIDE, CLIPS, {"precision": "fp32"}),
    Row(WIDE, CLIPS, {"microbatches": 2, "activation_checkpointing": "full"}),
    Row(WIDE, (4, 17, 128, 192), {"activation_checkpointing": "full"}, ranks=2),
    Row(WIDE, (4, 17, 128, 192), {"activation_checkpointing": "full", "sharding": "none"}, ranks=2),
    Row(WIDE, (4, 17, 128, 192), {"sequence_parallel": 2}, ranks=2),
]


def plan(row: Row) -> "TrainingPlan":
    from opensora.planning.devices import find_device
    from opensora.training.plan import TrainingPlan

    return TrainingPlan(row.recipe(), find_device("cpu"), row.ranks)


# --- measured, in processes of their own ------------------------------------------------------------------------------


def measure(row: Row) -> int:
    """Bytes that the run adds to this process, or to the largest of its ranks."""
    import torch
    import torch.distributed as dist

    if row.ranks > 1:
        dist.init_process_group("gloo")
    train(Row(TOYBOX | {"depth": 1}, (1, 5, 32, 32), row.loop, row.ranks))
    before = settled_bytes()
    forget_peak()
    train(row)
    added = torch.tensor(peak_bytes() - before)
    if row.ranks > 1:
        dist.all_reduce(added, dist.ReduceOp.MAX)
    return int(added)


def train(row: Row) -> None:
    """Two steps on batches without content."""
    from opensora.training.diffusion.plan import DiffusionPlan
    from opensora.training.diffusion.task import DiffusionTask
    from opensora.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(row.recipe(), Path(folder))
        task = trainer.task
        assert isinstance(task, DiffusionTask)
        plan = DiffusionPlan(task.settings, trainer.setup, task.networks)
        (shape,) = plan.shapes()
        task.prepare = lambda key: plan.meta_batch(shape)  # type: ignore[method-assign]
        for _ in range(2):
            if not math.isfinite(trainer.train_step()["grad_norm"]):
                sys.exit(f"{row}: the gradient is not finite, so nothing was updated")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks train-memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows that hold this text")
    parser.add_argument("--measure", type=int, metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure is not None:
        added = measure(ROWS[args.measure])
        if os.environ.get("RANK", "0") == "0":  # as torchrun counts
            print(json.dumps(added))
        return
    print(
        "| run | weights, optimiser, average | gradients | activations | predicted | measured | predicted / measured |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for number, row in enumerate(ROWS):
        if args.only not in str(row):
            continue
        memory = plan(row).memory
        predicted = memory.total - memory.surcharge
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={row.ranks}"]
        python = [sys.executable, *(several if row.ranks > 1 else [])]
        command = [*python, "-m", "benchmarks", "train-memory", "--measure", str(number)]
        environment = {**os.environ, "GLIBC_TUNABLES": _RETURN_FREED_MEMORY}
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if result.returncode:
            sys.exit(f"{row}: the measurement failed")
        measured = json.loads(result.stdout.splitlines()[-1])
        state = memory.weights + memory.optimizer + memory.average + memory.frozen
        sizes = (state, memory.gradients, memory.activations, predicted, measured)
        cells = " | ".join(f"{size / 2**20:,.0f} MB" for size in sizes)
        print(f"| {row} | {cells} | {predicted / measured:.2f} |", flush=True)
