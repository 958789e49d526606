"""A run's figures: gathered between two log lines from all ranks, written as JSON lines and told to trackers."""

import contextlib
import dataclasses
import json
import math
import resource
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.contents import parse_json, read_text
from opensora.distributed.mesh import Mesh
from opensora.files import append_text, replacing
from opensora.planning.flops import CountedFlops
from opensora.training.trackers import TrackerName, open_trackers


class Means:
    """Means of what happens between two log lines, on all ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Counts each value once."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (total + value, count + 1)

    def take(self, mesh: Mesh) -> dict[str, float]:
        """The means since the last call, over all ranks, which call it together."""
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for of_rank in mesh.gather(self.sums):
            for name, (total, count) in of_rank.items():
                sums[name][0] += total
                sums[name][1] += count
        self.sums = {}
        return {name: total / count for name, (total, count) in sums.items()}


class Work:
    """Samples seen and operations done between two log lines, on all ranks.

    Args:
        peak_tflops: what one device can do, in 10^12 operations a second; None counts no operations.
    """

    def __init__(self, peak_tflops: float | None) -> None:
        self.peak_tflops = peak_tflops
        self.flops: dict[Hashable, int] = {}
        self.samples = self.done = self.seconds = 0.0

    @contextlib.contextmanager
    def counted(self, batch: Any) -> Iterator[None]:
        """Around the forward pass of a batch, whose operations are counted the first time that its shapes are met."""
        shapes = shapes_of(batch) if self.peak_tflops else ()
        counter = CountedFlops() if self.peak_tflops and shapes not in self.flops else None
        with counter or contextlib.nullcontext():
            yield
        if counter is not None:
            self.flops[shapes] = sum(counter.totals)
        self.done += self.flops.get(shapes, 0)

    def take(self, mesh: Mesh) -> dict[str, float]:
        """Samples a second since the last call, of all ranks; the share of their peak that they reached, if known."""
        per_rank = mesh.gather((self.samples, self.done, self.seconds))
        self.samples = self.done = self.seconds = 0.0
        samples, done = (sum(of_rank[i] for of_rank in per_rank) for i in (0, 1))
        seconds = max(of_rank[2] for of_rank in per_rank)
        figures = {"samples_per_s": samples / mesh.num_sequence_ranks / seconds}
        if self.peak_tflops:
            figures["mfu"] = done / seconds / (self.peak_tflops * 1e12 * mesh.num_ranks)
        return figures


def shapes_of(batch: Any) -> tuple[Hashable, ...]:
    """Shapes of the tensors that a batch, a dataclass (maybe of others) or a tensor, consists of."""
    if isinstance(batch, Tensor):
        return (tuple(batch.shape),)
    return tuple(map(shapes_of, vars(batch).values())) if dataclasses.is_dataclass(batch) else ()


def by_group(losses: Sequence[float], groups: Mapping[str, Sequence[str]]) -> Iterator[dict[str, float]]:
    """The loss of each sample under the names of its groups: {"loss/bucket/240p 51f": 0.3}, {"loss/t/0.9": ...}, ..."""
    for kind, labels in groups.items():
        for label, loss in zip(labels, losses, strict=True):
            yield {f"loss/{kind}/{label}": loss}


def peak_memory_gb(device: str) -> float:
    """The most memory that tensors took on an accelerator so far, or the whole process on the CPU; in GB of 1024^3."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class Metrics:
    """Appends one JSON object a logged step to `metrics.jsonl`, and tells trackers the same figures, and previews.

    Args:
        folder: the run's folder.
        first_step: the step a run starts or resumes at; lines of later steps, left by a run that died after them,
            are dropped, so that the file reads as one uninterrupted run.
        trackers: see `trackers.open_trackers`.
        config: the recipe, as plain data, for trackers that show it.
    """

    def __init__(
        self, folder: Path, first_step: int, trackers: Sequence[TrackerName] = ("tensorboard",), config: Any = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in read_text(self.path).splitlines() if _step_of(line) <= first_step]
            with replacing(self.path) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept))
        self.trackers = open_trackers(trackers, folder, first_step, config)

    def write(self, step: int, values: dict[str, float], previews: Sequence[Path] = ()) -> None:
        """Figures of a step, and files that it wrote to be looked at."""
        if values:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            append_text(self.path, json.dumps({"step": step, **finite}) + "\n")  # JSON has no NaN
        for tracker in self.trackers:
            if values:
                tracker.write(step, values)
            if previews:
                tracker.show(step, previews)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def _step_of(line: str) -> float:
    """Step of a line; infinity for one that was cut short."""
    try:
        return float(parse_json(line, "the line")["step"])
    except (KeyError, TypeError, ValueError):
        return float("inf")
