"""Studies that compare settings of a model: blocks of columns, made by `opensora.lab.compare`, whose rows are kept.

The rows of a block lie in `docs/studies/data/NAME.parquet`. A study that was stopped, here or on another machine, goes
on from them, and its page can be made again without making a clip.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora.cli.progress import Progress
from opensora.evaluation.intervals import Interval, difference_interval, mean_interval
from opensora.evaluation.suites import read_suite
from opensora.generation.request import ClipRequest
from opensora.lab.compare import Comparison, run
from opensora.lab.grid import column_name, columns_of
from opensora.lab.rows import Row, read_rows, write_table
from opensora.lab.sets import Reference, reference_features, set_figures
from opensora.tables import import_pyarrow

STUDIES = Path(__file__).parent
METRICS = ("flicker", "motion", "sharpness", "colour")


@dataclass(frozen=True)
class Block:
    """Columns on the same prompts and the same noise.

    Attributes:
        name: of its file of rows.
        base: what all clips have in common.
        axes: what varies.
        num_prompts, num_seeds: clips of a column.
        sets: whether columns are compared with real clips as sets, too.
    """

    name: str
    base: ClipRequest
    axes: dict[str, list[Any]]
    num_prompts: int
    num_seeds: int = 1
    sets: bool = False

    @property
    def comparison(self) -> Comparison:
        columns = columns_of(self.base, self.axes)
        prompts = read_suite("toybox", self.num_prompts)
        return Comparison(tuple(columns), tuple(prompts), self.num_seeds, METRICS, batch_size=20)

    def column(self, **settings: Any) -> str:
        """The name of the column of these settings, in the order of the axes."""
        return column_name({name: settings[name] for name in self.axes if name in settings})


@dataclass
class Found:
    """Rows of blocks.

    Attributes:
        rows: name of a block -> name of a column -> its rows, in order.
        sets: name of a block -> name of a column -> figures of sets.
    """

    rows: dict[str, dict[str, list[Row]]] = field(default_factory=dict)
    sets: dict[str, dict[str, dict[str, Interval]]] = field(default_factory=dict)

    def values(self, block: str, column: str, figure: str) -> list[float]:
        """Of each clip; NaN where it had nothing to be measured on."""
        return [float("nan") if row[figure] is None else row[figure] for row in self.rows[block][column]]

    def prompts(self, block: str, column: str) -> list[str]:
        return [row["prompt_id"] for row in self.rows[block][column]]

    def mean(self, block: str, column: str, figure: str) -> Interval:
        """Over the clips of a column."""
        return mean_interval(self.values(block, column, figure), self.prompts(block, column))

    def difference(self, block: str, column: str, other: str, figure: str) -> Interval:
        """How much more one column has than another, clip by clip."""
        pairs = (self.values(block, column, figure), self.values(block, other, figure))
        return difference_interval(*pairs, self.prompts(block, column))


def carry_out(blocks: list[Block], folder: Path, num_workers: int, *, make: bool = True) -> Found:
    """Makes what is missing of all blocks, one after the other, and keeps their rows.

    Args:
        blocks: of the study.
        folder: for what is not kept: rows one by one, features.
        num_workers: processes.
        make: false takes the blocks that are whole, and makes no clip.
    """
    found = Found()
    for block in blocks:
        kept, comparison = STUDIES / "data" / f"{block.name}.parquet", block.comparison
        rows = list(_read(kept).values())
        if len(rows) < len(comparison.cells) or (block.sets and not _sets_file(block).exists()):
            if not make:
                continue
            rows = _made(block, comparison, folder / block.name, kept, num_workers)
        columns: dict[str, list[Row]] = {column.name: [] for column in comparison.columns}
        for row in rows:
            columns[row["column"]].append(row)
        found.rows[block.name] = columns
        if block.sets:
            found.sets[block.name] = _sets(block, comparison, folder / block.name)
    return found


def _made(block: Block, comparison: Comparison, folder: Path, kept: Path, num_workers: int) -> list[Row]:
    known = _read(kept)
    with Progress(block.name) as progress:
        try:
            run(
                comparison,
                folder,
                num_workers=num_workers,
                keep_clips=False,
                keep_features=block.sets,
                known=known.values(),
                on_progress=progress.update,
            )
        finally:
            rows = known | read_rows(folder / "rows.jsonl")
            ordered = [rows[cell.name] for cell in comparison.cells if cell.name in rows]
            names = ["cell", "column", "prompt_id", *comparison.figures]
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_table(kept, ordered, names, {})
    return ordered


def _read(path: Path) -> dict[str, Row]:
    if not path.exists():
        return {}
    return {row["cell"]: row for row in import_pyarrow()[1].read_table(path).to_pylist()}


def _sets_file(block: Block) -> Path:
    return STUDIES / "data" / f"{block.name}-sets.json"


def _sets(block: Block, comparison: Comparison, folder: Path) -> dict[str, dict[str, Interval]]:
    """Kept as well, because the features they are made of are not."""
    path, clips = _sets_file(block), block.num_prompts * block.num_seeds
    if not path.exists():
        num_frames = block.base.num_frames if isinstance(block.base.num_frames, int) else 17
        reference = reference_features(Reference("toybox", clips), folder / "features", num_frames)
        figures = set_figures(comparison.cells, folder / "features", reference)
        content = {
            column.name: {name: [one.value, one.low, one.high] for name, one in own.items()}
            for column, own in zip(comparison.columns, figures, strict=True)
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
    content = json.loads(path.read_text())
    return {column: {name: Interval(*values, clips) for name, values in own.items()} for column, own in content.items()}
