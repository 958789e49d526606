"""Settings compared on the same prompts and the same noise: clips, rows, a table and a page in one folder.

The folder holds `clips/`, one file a cell; `rows.jsonl`, which grows clip by clip; `comparison.json`, what is compared;
and at the end `rows.parquet` and `index.html`. An interrupted comparison is resumed clip by clip.
"""

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora import __version__
from opensora.contents import read_object
from opensora.errors import OpenSoraError
from opensora.evaluation.results import check_same_settings
from opensora.evaluation.suites import SuitePrompt
from opensora.files import replacing
from opensora.lab.grid import Cell, Column, cells_of
from opensora.lab.making import batches_of, make_clips
from opensora.lab.measuring import figure_names
from opensora.lab.rows import Row, keep_row, read_rows, write_table
from opensora.lab.workers import results_of
from opensora.settings import to_dict

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        columns: combinations of settings; the first is what the others are held against.
        prompts: of the clips of every column.
        num_seeds: clips of each prompt.
        metrics: names of those that clips are measured by.
        batch_size: clips that are made at once; 1 makes what `opensora generate` makes, to the bit.
    """

    columns: tuple[Column, ...]
    prompts: tuple[SuitePrompt, ...]
    num_seeds: int
    metrics: tuple[str, ...]
    batch_size: int = 1

    @property
    def cells(self) -> list[Cell]:
        """All clips, column after column."""
        return cells_of(self.columns, self.prompts, self.num_seeds)

    @property
    def figures(self) -> list[str]:
        """Names of what is measured."""
        return figure_names(self.metrics, self.prompts)

    def settings(self) -> dict[str, Any]:
        """All that decides the rows, as JSON; a folder is resumed only by a comparison of the same."""
        from opensora.checkpoints.source import ModelSource

        requests = [column.request for column in self.columns if column.request is not None]
        models = {request.model_name: request.components for request in requests}
        return {
            "opensora": __version__,
            "columns": {column.name: to_dict(column.request) for column in self.columns if column.request},
            "files": {column.name: sorted(path.name for path in column.files.values()) for column in self.columns},
            "models": {name: ModelSource.find(name, parts).hash() for name, parts in models.items()},
            "prompts": {prompt.id: prompt.text for prompt in self.prompts},
            "seeds": self.num_seeds,
            "metrics": list(self.metrics),
            "batch_size": self.batch_size,
        }


def run(
    comparison: Comparison,
    folder: Path,
    *,
    num_workers: int = 1,
    keep_clips: bool = True,
    keep_features: bool = False,
    known: Iterable[Row] = (),
    on_progress: Progress | None = None,
) -> list[Row]:
    """Makes and measures the clips that are not there yet.

    Args:
        comparison: what is compared.
        folder: what was there of the same comparison is kept.
        num_workers: processes that make clips.
        keep_clips: save them; otherwise there are rows alone.
        keep_features: keep what figures of sets need in `features/`.
        known: rows of cells that were made in another folder.
        on_progress: called with (clips done, clips in all).

    Returns:
        Rows of all cells, in order.

    Raises:
        OpenSoraError: another comparison's folder, or what any clip of it cannot be.
    """
    _claim(folder, comparison.settings())
    cells, clips = comparison.cells, folder / "clips" if keep_clips else None
    rows = read_rows(folder / "rows.jsonl")
    for row in known:
        if row["cell"] not in rows:
            rows[row["cell"]] = row
            keep_row(folder / "rows.jsonl", row)
    features = folder / "features" if keep_features else None
    done = {name for name in rows if clips is None or (clips / f"{name}.mp4").exists()}
    done = {name for name in done if features is None or (features / f"{name}.npz").exists()}
    batches = batches_of(cells, comparison.batch_size)
    todo = [batch for batch in batches if not all(cell.name in done for cell in batch)]
    start = functools.partial(make_clips, comparison.columns, comparison.prompts, clips, comparison.metrics, features)
    num_done = sum(cell.name in done for cell in cells)
    if on_progress is not None:
        on_progress(num_done, len(cells))
    for made in results_of(start, todo, min(num_workers, max(len(todo), 1))):
        for row in made:
            num_done += row["cell"] not in done
            rows[row["cell"]] = row
            keep_row(folder / "rows.jsonl", row)
        if on_progress is not None:
            on_progress(num_done, len(cells))
    rows = read_rows(folder / "rows.jsonl")  # as they are read after an interruption
    return [rows[cell.name] for cell in cells]


def save_table(comparison: Comparison, folder: Path, rows: Sequence[Row]) -> Path:
    """Writes `rows.parquet`."""
    varying = list(dict.fromkeys(name for column in comparison.columns for name in column.settings))
    names = ["cell", "column", *varying, "prompt_id", "prompt", "seed", "num_frames", "fps", *comparison.figures]
    write_table(folder / "rows.parquet", rows, names, {"comparison": json.dumps(comparison.settings())})
    return folder / "rows.parquet"


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Writes what is compared into a new folder, or holds it against what is there."""
    path = folder / "comparison.json"
    if path.exists():
        check_same_settings(path, settings, read_object(path, "comparison"))
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise OpenSoraError(f"{folder} holds something else than a comparison; name a folder that does not exist yet")
    with replacing(path) as partial:
        partial.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
