"""Rows of a comparison: kept one by one while it runs, so that nothing is lost, and as one Parquet table at its end.

The table depends on the rows alone: an interrupted comparison that was resumed ends in the same file, byte for byte.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora.contents import check_regular, parse_json
from opensora.errors import OpenSoraError
from opensora.files import append_text, replacing
from opensora.tables import import_pyarrow

Row = dict[str, Any]
"""Column of the table -> text, number, or None where there is none; `cell` names the row."""


def read_rows(path: Path) -> dict[str, Row]:
    """Rows that were kept, by cell; a last line that was cut off is none.

    Raises:
        OpenSoraError: no file, or a line that is no row.
    """
    if not path.exists():
        return {}
    check_regular(path, "rows")
    rows = {}
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline there is nothing, or half a row
        row = parse_json(line, f"line {number} of {path}")
        if not isinstance(row, dict) or not isinstance(row.get("cell"), str):
            raise OpenSoraError(f"line {number} of {path} is no row of a comparison; choose another `output`")
        rows[row["cell"]] = row
    if lines[-1]:
        with replacing(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
    return rows


def keep_row(path: Path, row: Row) -> None:
    """Adds a row to the file; numbers that are NaN become None."""
    kept = {name: None if value != value else value for name, value in row.items()}
    append_text(path, json.dumps(kept, ensure_ascii=False) + "\n")


def write_table(path: Path, rows: Iterable[Row], names: Sequence[str], notes: Mapping[str, str]) -> None:
    """Writes rows as Parquet.

    Args:
        path: the file.
        rows: in the order of the table.
        names: of its columns, in order.
        notes: kept in the file besides.
    """
    pyarrow, parquet = import_pyarrow()
    rows = list(rows)
    arrays = [pyarrow.array([row.get(name) for row in rows]) for name in names]
    table = pyarrow.table(arrays, names=list(names))
    with replacing(path) as partial:
        parquet.write_table(table.replace_schema_metadata(dict(notes)), partial)
