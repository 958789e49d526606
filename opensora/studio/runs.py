"""Training runs in a folder, as far as they have written: names, curves and previews. Nothing here changes them."""

import json
import re
from pathlib import Path
from typing import Any

from opensora.errors import OpenSoraError

METRICS = "metrics.jsonl"
PREVIEWS = "previews"
MOST_RUNS = 200
MOST_POINTS = 500
"""Of a curve; a longer one is thinned."""
MOST_PREVIEWS = 12
_SHOWN = (".png", ".mp4", ".webp", ".gif")
_DEEPEST = 3  # folders between the folder of runs and a run


class NoRun(OpenSoraError):
    """There is no such training run, or no such preview of it."""


def list_runs(folder: Path) -> list[str]:
    """Names of the runs in a folder and below, the one written to last first."""
    found: list[tuple[float, str]] = []
    for depth in range(1, _DEEPEST + 1):
        for path in folder.glob("/".join(["*"] * depth) + f"/{METRICS}"):
            found.append((path.stat().st_mtime, path.parent.relative_to(folder).as_posix()))
    return [name for _, name in sorted(found, reverse=True)[:MOST_RUNS]]


def describe_run(folder: Path, name: str) -> dict[str, Any]:
    """Curves, as `[step, value]` pairs by name, and the newest previews by file name.

    Raises:
        NoRun: there is none.
    """
    run = _run(folder, name)
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in (run / METRICS).read_text(errors="replace").splitlines():
        try:
            figures = json.loads(line)
            step = figures.pop("step")
        except (ValueError, AttributeError, KeyError):  # the last line of a run that is being written
            continue
        for figure, value in figures.items():
            if isinstance(value, int | float) and isinstance(step, int | float):
                curves.setdefault(figure, []).append((step, value))
    previews = sorted((path for path in (run / PREVIEWS).glob("*") if path.suffix in _SHOWN), reverse=True)
    return {
        "name": name,
        "curves": {figure: _thinned(points) for figure, points in curves.items()},
        "previews": [path.name for path in previews[:MOST_PREVIEWS]],
    }


def preview_of(folder: Path, name: str, file: str) -> Path:
    """A preview of a run.

    Raises:
        NoRun: there is none.
    """
    for path in (_run(folder, name) / PREVIEWS).glob("*"):
        if path.name == file and path.suffix in _SHOWN and path.is_file():
            return path
    raise NoRun("there is no such preview")


def _run(folder: Path, name: str) -> Path:
    """Only what is listed is a run: no name leads out of the folder."""
    if not re.fullmatch(r"[^\0]{1,1000}", name) or name not in list_runs(folder):
        raise NoRun("there is no such training run")
    return folder / name


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= MOST_POINTS:
        return points
    every = len(points) / MOST_POINTS
    return [points[int(number * every)] for number in range(MOST_POINTS - 1)] + [points[-1]]
