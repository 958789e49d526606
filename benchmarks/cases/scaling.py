"""Whether time grows with work and nothing else: a layer pair on more and more frames and patches, time over FLOPs."""

import statistics
from collections.abc import Iterator

import torch

from benchmarks.cases import layers
from benchmarks.cases.layers import LayerSize, Pair, at_places
from benchmarks.comparison import Comparison, Conclusion, Measured, Setting

SIZES: dict[str, tuple[LayerSize, tuple[tuple[int, int], ...]]] = {
    "released": (
        layers.SIZES["240p"],
        ((5, 144), (10, 144), (5, 405), (15, 144), (10, 405), (15, 405), (30, 405)),
    ),
    "bundled": (layers.SIZES["bundled"], ((5, 64), (10, 64), (5, 256), (10, 256), (20, 256))),
    "tiny": (layers.SIZES["tiny"], ((2, 4), (3, 6), (8, 16))),
}
"""Width and text, and latent frames x patches of a frame: more than sixteen times as many tokens at the end."""


def comparisons(setting: Setting) -> Iterator[Comparison]:
    size, places = SIZES[setting.size]
    pairs = {f"{t} x {s}": Pair(at_places(size, t, s), getattr(torch, setting.dtype)) for t, s in places}
    ways = {name: pair.run_ours for name, pair in pairs.items()}
    yield Comparison("a layer pair, frames x patches", ways, counted=tuple(ways), conclude=straight_line)


def straight_line(measured: Measured) -> Conclusion:
    """The line with the least squares of relative deviations through work and median time of all ways."""
    ways = measured.ways.values()
    work = torch.tensor([way.counts["flops"] / 1e12 for way in ways], dtype=torch.float64)
    seconds = torch.tensor([statistics.median(way.seconds) for way in ways], dtype=torch.float64)
    relative = torch.stack([torch.ones_like(work), work], dim=1) / seconds[:, None]
    line = torch.linalg.lstsq(relative, torch.ones(len(work), 1, dtype=torch.float64)).solution[:, 0]
    deviations = seconds / (line[0] + line[1] * work) - 1
    worst = int(deviations.abs().argmax())
    where = list(measured.ways)[worst]
    return Conclusion(
        f"over {float(work.max() / work.min()):.0f} times the work the time is at most {float(deviations[worst]):+.1%} "
        f"off a straight line ({where}): {float(line[0]):.3g} s and {float(line[1]):.3g} s per TFLOP",
        {
            "line": {"seconds": float(line[0]), "seconds per TFLOP": float(line[1])},
            "largest deviation": float(deviations[worst]),
            "where": where,
        },
    )
