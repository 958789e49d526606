"""A run's measurements on the terminal, as JSON and as a picture."""

import dataclasses
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison import Measured, Way
from benchmarks.measuring import median_and_range
from opensora.lab.latents.picture import import_matplotlib
from opensora.tuning import TUNABLES

QUIET = 0.1
"""How far the two probes of a comparison may lie apart before its figures are doubted."""


def print_table(measured: Measured) -> None:
    """A table of the ways, then the ratios and what follows."""
    print(f"\n{measured.case} {measured.size}: {measured.name}")
    print("| way | s | s of a core | TFLOP | TFLOP/s | GB moved | operations | copies | tensors made |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, way in measured.ways.items():
        print(f"| {name} | {' | '.join(_cells(way))} |")
    for name, values in measured.ratios.items():
        print(f"{name}: {median_and_range(values)}; of a core {median_and_range(measured.cpu_ratios[name])}")
    for name, way in measured.ways.items():
        for figure, values in way.figures.items():
            print(f"{name}, {figure}: {median_and_range(values)}")
    before, after = measured.probe_tflops
    print(f"a product of matrices before and after: {before:.3g} and {after:.3g} TFLOP/s", end="")
    print("" if abs(after / before - 1) < QUIET else "; the machine was not quiet")
    if measured.note:
        print(measured.note)
    if measured.conclusion is not None:
        print(measured.conclusion.words, flush=True)


def document(found: Sequence[Measured], command: Sequence[str], dtype: str) -> dict[str, Any]:
    """What a run is written as: where and how it was made, and every figure of every round."""
    return {
        "command": list(command),
        "machine": machine(),
        "torch": torch.__version__,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "allocator": os.environ.get(TUNABLES, "as it is"),
        "comparisons": [dataclasses.asdict(measured) for measured in found],
    }


def machine() -> dict[str, Any]:
    """The processor, as far as it decides speed."""
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in names if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
    }


def draw(found: Sequence[Measured], path: Path) -> None:
    """A panel for each comparison: medians with the range of all rounds, or time over work where that was asked."""
    figure = import_matplotlib()(figsize=(8, 2.6 * len(found) + 0.4), layout="constrained")
    panels = figure.subplots(len(found), squeeze=False)
    for panel, measured in zip(panels[:, 0], found, strict=True):
        panel.set_title(f"{measured.case} {measured.size}: {measured.name}", fontsize=9, loc="left")
        line = (measured.conclusion.figures if measured.conclusion else {}).get("line")
        if line is None:
            _bars(panel, measured)
        else:
            _points(panel, measured, line)
    figure.savefig(path, dpi=110, format="png")


def _bars(panel: Any, measured: Measured) -> None:
    names = list(measured.ways)
    medians = [statistics.median(measured.ways[name].seconds) for name in names]
    below = [middle - min(measured.ways[name].seconds) for name, middle in zip(names, medians, strict=True)]
    above = [max(measured.ways[name].seconds) - middle for name, middle in zip(names, medians, strict=True)]
    panel.barh(names, medians, xerr=[below, above], color="tab:blue", ecolor="black", capsize=3)
    panel.invert_yaxis()
    panel.set_xlabel("s")


def _points(panel: Any, measured: Measured, line: dict[str, float]) -> None:
    """Seconds over counted work, and the straight line nearest to them."""
    work = [way.counts["flops"] / 1e12 for way in measured.ways.values()]
    for name, x, way in zip(measured.ways, work, measured.ways.values(), strict=True):
        panel.plot(x, statistics.median(way.seconds), "o", color="tab:blue")
        panel.annotate(
            name, (x, statistics.median(way.seconds)), fontsize=7, xytext=(4, -8), textcoords="offset points"
        )
    ends = [0.0, max(work)]
    panel.plot(ends, [line["seconds"] + line["seconds per TFLOP"] * x for x in ends], color="grey")
    panel.set_xlabel("TFLOP")
    panel.set_ylabel("s")


def _cells(way: Way) -> list[str]:
    counts, seconds = way.counts, statistics.median(way.seconds)
    rate = f"{counts['flops'] / 1e12 / seconds:.3g}" if counts.get("flops") else ""
    return [
        median_and_range(way.seconds),
        f"{statistics.median(way.cpu_seconds):.3g}",
        f"{counts['flops'] / 1e12:.3g}" if counts else "",
        rate,
        f"{counts['bytes'] / 1e9:.3g}" if "bytes" in counts else "",
        *(str(counts.get(name, "")) for name in ("operations", "copies", "tensors made")),
    ]
