"""What a comparison found: the mean of every figure in every column, and what differs from the first one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opensora.evaluation.intervals import Interval, difference_interval, mean_interval
from opensora.evaluation.metrics.catalogue import metrics_of
from opensora.evaluation.metrics.metric import Figure
from opensora.evaluation.results import Results
from opensora.lab.compare import Comparison
from opensora.lab.measuring import RIGHT
from opensora.lab.rows import Row
from opensora.lab.sets import DIVERSITY
from opensora.lab.sets import FIGURES as SET_FIGURES


@dataclass(frozen=True)
class Found:
    """One figure in one column.

    Attributes:
        mean: over its clips.
        difference: how much more than in the first column, clip by clip; None for the first.
    """

    mean: Interval
    difference: Interval | None


def figures_of(comparison: Comparison) -> list[Figure]:
    """What is measured, with what it tells."""
    known = {figure.name: figure for metric in metrics_of(comparison.metrics) for figure in metric.figures}
    return [known.get(name) or _right(name) for name in comparison.figures]


def summarise(comparison: Comparison, rows: Sequence[Row]) -> list[dict[str, Found]]:
    """Of each column: name of a figure -> what was found. Rows of one prompt are drawn together."""
    columns = [[row for row in rows if row["column"] == column.name] for column in comparison.columns]
    return [
        {name: _found(name, columns[0], own, is_first=own is columns[0]) for name in comparison.figures}
        for own in columns
    ]


def results_of(
    comparison: Comparison, suite: str, rows: Sequence[Row], sets: Mapping[str, Interval] | None = None
) -> Results:
    """What was found of a comparison's only column, as results of an evaluation; a clip's id is that of its noise.

    Args:
        comparison: of one column.
        suite: whose prompts they are.
        rows: of all cells, in order.
        sets: figures of the column as a set.
    """
    figures = {figure.name: figure for figure in figures_of(comparison)}
    known_sets = {figure.name: figure for figure in (*SET_FIGURES, *DIVERSITY)}
    samples = [
        {"id": f"{row['prompt_id']}/{row['seed']}", "group": row["prompt_id"]}
        | {name: row[name] for name in ("prompt", "seed", "num_frames", "fps", *figures)}
        for row in rows
    ]
    found = {name: (known_sets[name], interval) for name, interval in (sets or {}).items()}
    return Results(suite, comparison.settings(), figures, samples, found)


def as_json(found: Sequence[dict[str, Found]]) -> list[dict[str, Any]]:
    """The same as plain values; numbers that are NaN become None."""
    return [{name: _plain(asdict(one)) for name, one in column.items()} for column in found]


def _found(name: str, first: Sequence[Row], own: Sequence[Row], is_first: bool) -> Found:
    prompts = [row["prompt_id"] for row in own]
    values = [_number(row[name]) for row in own]
    difference = None if is_first else difference_interval(values, [_number(row[name]) for row in first], prompts)
    return Found(mean_interval(values, prompts), difference)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _right(name: str) -> Figure:
    attribute = name.removeprefix(RIGHT)
    which = "every attribute" if attribute == "all" else f"the {attribute}"
    return Figure(name, "", f"Share of clips of which the judge reads {which} as the prompt says.", better="higher")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return None if isinstance(value, float) and value != value else value
