"""Measures a comparison on a machine that may be shared: all ways in every round, and ratios within a round."""

import gc
import os
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.comparison import FLOOR, OURS, Comparison, Figures, Measured, Run, Way
from benchmarks.counting import Counted, counted_in, floor

PROBE_SIDE = 1024


def measure(case: str, size: str, comparison: Comparison, rounds: int, dtype: torch.dtype) -> Measured:
    """Counts, warms up and measures.

    Args:
        case, size: what is measured, for the record.
        comparison: the ways.
        rounds: how often each way runs; every second round in the opposite order.
        dtype: of the probe and of the floor.
    """
    with torch.set_grad_enabled(comparison.gradients):
        ways, runs = {name: Way() for name in comparison.ways}, dict(comparison.ways)
        for name in comparison.counted:
            counted = counted_in(runs[name])
            ways[name].counts = {"flops": counted.flops, **counted.traffic()}
            if name == OURS:
                ways[FLOOR], runs[FLOOR] = Way(counts={"flops": counted.flops}), _floor(counted, dtype)
        for name in [name for name in runs if name not in comparison.counted]:
            runs[name]()  # what is found ready later
        gc.collect()
        before = probe(dtype)
        for number in range(rounds):
            for name in list(runs)[:: -1 if number % 2 else 1]:
                _time(runs[name], ways[name])
        after = probe(dtype)
    pairs = [*comparison.ratios, *([(OURS, FLOOR)] if FLOOR in ways else [])]
    measured = Measured(
        case,
        size,
        comparison.name,
        ways,
        {f"{a} / {b}": ratios(ways[a].seconds, ways[b].seconds) for a, b in pairs},
        {f"{a} / {b}": ratios(ways[a].cpu_seconds, ways[b].cpu_seconds) for a, b in pairs},
        (before, after),
        comparison.note,
    )
    if comparison.conclude is not None:
        measured.conclusion = comparison.conclude(measured)
    return measured


def ratios(first: list[float], second: list[float]) -> list[float]:
    """Seconds of one way over those of another, round by round."""
    return [a / b for a, b in zip(first, second, strict=True)]


def probe(dtype: torch.dtype, runs: int = 8) -> float:
    """What a product of square matrices reaches here and now, the best of several, 10^12 operations a second."""
    first, second = torch.randn(2, PROBE_SIDE, PROBE_SIDE).to(dtype)
    seconds = []
    with torch.no_grad():
        for _ in range(runs):
            started = time.perf_counter()
            torch.mm(first, second)
            seconds.append(time.perf_counter() - started)
    return 2 * PROBE_SIDE**3 / min(seconds) / 1e12


def median_and_range(values: list[float], digits: int = 3) -> str:
    """Such as "1.31 (1.25 to 1.40)", to so many significant digits."""
    middle, least, most = (f"{value:.{digits}g}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


def _floor(counted: Counted, dtype: torch.dtype) -> Callable[[], None]:
    compute = floor(counted.products, dtype)

    def run() -> None:
        with torch.no_grad():
            compute()

    return run


def _time(run: Run, way: Way) -> None:
    cpu_started, started = _cpu_seconds(), time.perf_counter()
    made = run()
    way.seconds.append(time.perf_counter() - started)
    way.cpu_seconds.append(_cpu_seconds() - cpu_started)
    for name, value in made.items() if isinstance(made, Figures) else ():
        way.figures.setdefault(name, []).append(value)


def _cpu_seconds() -> float:
    """Of this process and of those it started that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system
