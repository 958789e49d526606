"""What both studies make of their rows: intervals over seeds and the clips of each, tables, sentences.

Letters: S seeds, N clips of each, R draws.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensora.evaluation.intervals import DRAWS, LEVEL, Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SEED = 20_261_126


def nested_interval(
    of_seeds: Sequence[Sequence[float]],
    figure: Callable[[np.ndarray], float] | None = None,
    draws: int = DRAWS,
) -> Interval:
    """A figure of clips of several trainings with its 95 % interval: seeds are drawn again, then clips of each.

    Of one seed it is the uncertainty of the clips alone: it says nothing of another training.

    Args:
        of_seeds: S times (N,), or (N, K) where the figure is made of K values of a clip; differences, where arms share
            seeds and clips. NaN do not count.
        figure: means (K,) -> the figure, NaN for draws in which there is none; None where clips have one value, which
            is the figure.
        draws: R.
    """
    values = np.asarray(of_seeds, dtype=np.float64)
    values = values.reshape(*values.shape[:2], -1)
    make = figure or (lambda means: float(means[0]))
    num_seeds, num_clips = values.shape[:2]
    value = float(make(np.nanmean(values, axis=1).mean(axis=0)))
    rng = np.random.default_rng(_SEED)
    seeds = rng.integers(num_seeds, size=(draws, num_seeds, 1))
    clips = rng.integers(num_clips, size=(draws, num_seeds, num_clips))
    means = np.nanmean(values[seeds, clips], axis=2).mean(axis=1)
    found = np.array([make(draw) for draw in means])
    found = found[np.isfinite(found)]
    if not len(found):
        return Interval(value, np.nan, np.nan, num_seeds * num_clips)
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, min(float(low), value), max(float(high), value), num_seeds * num_clips)


def minus(ones: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> list[list[float]]:
    """Clip by clip, seed by seed; both in the same order."""
    return [(np.asarray(a, float) - np.asarray(b, float)).tolist() for a, b in zip(ones, others, strict=True)]


def marks(text: str) -> list[float]:
    """ "0110" -> 0, 1, 1, 0."""
    return [float(mark) for mark in text]


def shown(interval: Interval, digits: int = 1, times: float = 1.0) -> str:
    """`81.2 [75.0, 87.5]`."""
    value, low, high = (f"{number * times:.{digits}f}" for number in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def options_of(description: str | None) -> argparse.ArgumentParser:
    """The options that every study's command has; each adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="make nothing but the page, of the rows there are")
    return parser


def save_picture(figure: "Figure", picture: Path) -> None:
    """Writes a plot, and closes it."""
    import matplotlib.pyplot as plt

    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=90)
    plt.close(figure)


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Puts tables into a page between `<!-- NAME -->` and `<!-- end -->`; the words around them stay."""
    text = page.read_text(encoding="utf-8")
    for name, content in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not mark or not end:
            raise SystemExit(f"{page} has no place for the table {name}")
        text = f"{before}{mark}{content}\n{end}{after}"
    page.write_text(text, encoding="utf-8")
