"""The page of a comparison: one HTML file that holds all clips, plays them in step, and asks nobody for anything."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from opensora.evaluation.intervals import Interval
from opensora.files import replacing
from opensora.lab.compare import Comparison
from opensora.lab.rows import Row
from opensora.lab.sets import DIVERSITY, FIGURES
from opensora.lab.summary import Found, as_json, figures_of

MOST_INSIDE_BYTES = 64 * 2**20
"""Of clips that the page holds itself; more stay beside it."""


def write_page(
    comparison: Comparison,
    folder: Path,
    rows: Sequence[Row],
    found: Sequence[Mapping[str, Found]],
    command: str = "",
    sets: Sequence[Mapping[str, Interval]] = (),
) -> Path:
    """Writes `index.html`.

    Args:
        comparison: what was compared.
        folder: of its clips; the page is written there.
        rows: of all cells, in order.
        found: of each column, see `summary.summarise`.
        command: that made it, to be shown.
        sets: figures of each column as a set, see `sets.set_figures`.
    """
    clips = {row["cell"]: folder / "clips" / f"{row['cell']}.mp4" for row in rows}
    inside = sum(path.stat().st_size for path in clips.values()) <= MOST_INSIDE_BYTES
    content = {
        "command": command,
        "inside": inside,
        "fps": max(row["fps"] for row in rows),
        "columns": [{"name": column.name, "settings": _settings(column.request)} for column in comparison.columns],
        "figures": [asdict(figure) for figure in figures_of(comparison)],
        "found": as_json([dict(column) for column in found]),
        "set_figures": [asdict(figure) for figure in (*FIGURES, *DIVERSITY) if sets and figure.name in sets[0]],
        "sets": as_json([{name: Found(one, None) for name, one in column.items()} for column in sets]),
        "rows": _table(comparison, rows),
        "clips": {name: _video(path) if inside else f"clips/{path.name}" for name, path in clips.items()},
    }
    template = resources.files("opensora.lab").joinpath("page.html").read_text(encoding="utf-8")
    text = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    with replacing(folder / "index.html") as partial:
        partial.write_text(template.replace("{{content}}", text), encoding="utf-8")
    return folder / "index.html"


def _table(comparison: Comparison, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for each prompt and seed, with the cells of all columns."""
    of_cells = {row["cell"]: row for row in rows}
    table: dict[tuple[int, int], dict[str, Any]] = {}
    for cell in comparison.cells:
        row = of_cells[cell.name]
        told = {"prompt": row["prompt"], "seed": row["seed"], "cells": []}
        line = table.setdefault((cell.prompt, cell.seed), told)
        line["cells"].append({"name": cell.name, "figures": {name: row[name] for name in comparison.figures}})
    return list(table.values())


def _settings(request: Any) -> dict[str, Any]:
    """What was asked for and is not the request's own default."""
    if request is None:
        return {}
    from opensora.generation.request import ClipRequest
    from opensora.settings import to_dict

    defaults = to_dict(ClipRequest(""))
    return {name: value for name, value in to_dict(request).items() if value != defaults[name] and name != "prompt"}


def _video(path: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
