"""docs/metrics.md says of every figure what the figure says of itself, and shows every way to move it."""

from pathlib import Path

from known_clips import DECEIVED, MOVES, WORSE

from opensora.evaluation.metrics.catalogue import METRICS
from opensora.evaluation.metrics.fidelity import FIGURES

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def rows(columns: int) -> list[list[str]]:
    """Cells of the rows of tables of so many columns, without their heads."""
    lines = (line for line in PAGE.read_text().splitlines() if line.startswith("| `"))
    return [cells for line in lines if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == columns]


def test_the_table_of_figures_is_that_of_the_code():
    figures = [*(figure for metric in METRICS for figure in metric.figures), *FIGURES]
    expected = [[f"`{f.name}`", f.unit, f.better or "", f.tells, f.blind_to] for f in figures]
    assert [cells[:5] for cells in rows(6)] == expected
    assert all(cells[5].count(" / ") == 1 for cells in rows(6))


def test_the_tables_of_moves_hold_every_move_and_go_its_way():
    found = rows(5)
    assert len(found) == len(MOVES) + len(DECEIVED)
    for cells, move in zip(found, (*MOVES, *DECEIVED), strict=True):
        worse = WORSE[move.worse]
        assert cells[:2] == [f"`{move.figure}`", f"{move.worse}, {worse.unit}"]
        assert [float(strength) for strength in cells[2].split(", ")] == list(worse.strengths)
        means = [float(mean) for mean in cells[3].split(", ")]
        assert means == sorted(means, reverse=move.way == "falls") and means[0] != means[-1]
