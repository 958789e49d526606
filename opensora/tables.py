"""Tables as people have them, read strictly and row by row: CSV, Parquet, JSON lines, a JSON list of objects.

What is ambiguous is never guessed at: a column twice or without a name, quotes that do not close, separators other than
commas and encodings other than UTF-8 are errors that say what was found and how to convert it. A single row that is
none (too many cells, too few, no JSON object) is handed on with what is wrong with it.
"""

import codecs
import csv
import io
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.contents import check_regular, describe_kind, describe_value, kind_of, parse_json, read_json, shown
from opensora.errors import OpenSoraError

ENDINGS: tuple[str, ...] = (".csv", ".parquet", ".jsonl", ".json")

# What pandas, JSON, SQL and people write where they have no value.
_EMPTY = frozenset(
    ("", "none", "null", "nil", "nan", "-nan", "na", "n/a", "<na>", "#n/a", "#na", "#n/a n/a", "1.#qnan", "-1.#ind")
)
# Captions longer than Python's own limit of 128 KiB a cell are no captions, but must not stop the others.
_LONGEST_CELL = 2**24
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_ROWS_BETWEEN_REPORTS = 4096

OnProgress = Callable[[int, int], None]
"""Called with how much of a file is read, of how much."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row.

    Attributes:
        number: 1 for the first.
        line: of the file on which it begins; None where the file has no lines.
        cells: column -> what stands there.
        problem: why it is no row of this table; "" where it is one.
    """

    number: int
    line: int | None
    cells: dict[str, Any]
    problem: str = ""


def is_empty(value: Any) -> bool:
    """Whether a cell holds no value: None, NaN, nothing but spaces, or a word that says as much, such as `N/A`."""
    return value is None or value != value or (isinstance(value, str) and value.strip().lower() in _EMPTY)


def columns_of(path: Path, what: str) -> list[str]:
    """The names of a table's columns; of JSON those of the first object.

    Args:
        path: of the table.
        what: its role, for messages, such as "manifest".

    Raises:
        OpenSoraError: no table, or one whose columns are not told apart by their names.
    """
    columns = _FORMATS[_format_of(path, what)][0](path, what)
    if nameless := [str(number) for number, name in enumerate(columns, 1) if not name.strip()]:
        raise OpenSoraError(
            f"{what} {path} has no name for column {', '.join(nameless)} of {len(columns)}; "
            "name it in the header, or leave it out (pandas: to_csv(..., index=False))"
        )
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise OpenSoraError(f"{what} {path} has the column {shown(twice[0])!r} more than once; keep one of them")
    return columns


def rows_of(
    path: Path, what: str, columns: Sequence[str], on_progress: OnProgress = lambda done, total: None
) -> Iterator[TableRow]:
    """The rows of a table, one after the other.

    Args:
        path: of the table.
        what: its role, for messages.
        columns: those that `columns_of` found and that are wanted.
        on_progress: told now and then how far it is.

    Raises:
        OpenSoraError: the table cannot be read on from a line (names it).
    """
    return _FORMATS[_format_of(path, what)][1](path, what, columns, on_progress)


def _format_of(path: Path, what: str) -> str:
    ending = path.suffix.lower()
    if ending in (".tsv", ".tab"):
        raise OpenSoraError(_separated_by(path, what, "\t"))
    if ending not in ENDINGS:
        raise OpenSoraError(f"{what} {path} must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    check_regular(path, what)
    kind = kind_of(path)
    expected = {".csv": ("text", "empty", "unknown"), ".parquet": ("parquet",)}.get(
        ending, ("json", "text", "empty", "unknown")
    )
    if kind not in expected:
        form = {".csv": "CSV", ".parquet": "Parquet"}.get(ending, "JSON")
        raise OpenSoraError(f"{what} {path} cannot be read as {form}: it is {describe_kind(kind)}")
    return ending


# --- CSV --------------------------------------------------------------------------------------------------------------


def _csv_columns(path: Path, what: str) -> list[str]:
    with path.open("rb") as raw:
        head = raw.read(2**16)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or head.count(0) > len(head) // 4:
        wide = "utf-32" if head.count(0) > len(head) // 2 + 2 else "utf-16"
        raise OpenSoraError(
            f"{what} {path} seems to be {wide.upper()}, expected UTF-8; {_convert_encoding(path, wide)}"
        )
    first = head.decode("utf-8-sig", errors="replace").partition("\n")[0]
    separator = max(_SEPARATORS, key=first.count)
    if first.count(separator) > first.count(","):
        raise OpenSoraError(_separated_by(path, what, separator))
    for _, cells in _csv_lines(path, what, lambda done, total: None):
        return cells
    return []


def _separated_by(path: Path, what: str, separator: str) -> str:
    script = "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter=sys.argv[1]))"
    shown_separator = "$'\\t'" if separator == "\t" else shlex.quote(separator)
    return (
        f"{what} {path} is separated by {_SEPARATORS[separator]}, expected commas; convert it: python -c "
        f"{shlex.quote(script)} {shown_separator} < {shlex.quote(path.name)} > commas.csv"
    )


def _csv_rows(path: Path, what: str, columns: Sequence[str], on_progress: OnProgress) -> Iterator[TableRow]:
    lines = _csv_lines(path, what, on_progress)
    header = next(lines, (0, []))[1]
    for number, (line, cells) in enumerate(lines, 1):
        problem = ""
        if len(cells) != len(header):
            cause = "; put cells that hold commas in quotes" if len(cells) > len(header) else ""
            problem = f"{len(cells)} cells, but the header has {len(header)}{cause}"
        yield TableRow(number, line, dict(zip(header, cells, strict=False)), problem)


def _csv_lines(path: Path, what: str, on_progress: OnProgress) -> Iterator[tuple[int, list[str]]]:
    """Lines that are not blank, as cells, with the number of the line on which they begin."""
    csv.field_size_limit(_LONGEST_CELL)
    size = path.stat().st_size
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        while True:
            begins = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                on_progress(size, size)
                return
            except csv.Error as error:
                closed = "a quote is opened and not closed where the cell ends; quotes within a cell are written twice"
                long = "a cell has more than 16 MiB; is a quote not closed?"
                why = long if "field larger" in str(error) else closed
                raise OpenSoraError(f"{what} {path} cannot be read at line {begins}: {why}") from None
            except UnicodeDecodeError:
                raise OpenSoraError(
                    f"{what} {path} is not UTF-8 in line {_undecodable_line(path)}; "
                    + _convert_encoding(path, "latin1", " (gb18030 instead of latin1 for a Chinese spreadsheet)")
                ) from None
            if reader.line_num % _ROWS_BETWEEN_REPORTS == 0:
                on_progress(raw.tell(), size)
            if cells:
                yield begins, cells


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as raw:
        for number, line in enumerate(raw, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _convert_encoding(path: Path, encoding: str, note: str = "") -> str:
    name = shlex.quote(path.name)
    return f"save it as UTF-8, or convert it: iconv -f {encoding} -t utf-8 {name} > utf8.csv{note}"


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet_columns(path: Path, what: str) -> list[str]:
    with _parquet(path, what) as file:
        return list(file.schema_arrow.names)


def _parquet_rows(path: Path, what: str, columns: Sequence[str], on_progress: OnProgress) -> Iterator[TableRow]:
    pyarrow, _ = import_pyarrow()
    number = 0
    with _parquet(path, what) as file:
        total = file.metadata.num_rows
        try:
            for batch in file.iter_batches(batch_size=_ROWS_BETWEEN_REPORTS, columns=list(columns)):
                for cells in batch.to_pylist():
                    number += 1
                    yield TableRow(number, None, cells)
                on_progress(number, total)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise OpenSoraError(f"{what} {path} cannot be read after row {number}: {_one_line(error)}") from None


def _parquet(path: Path, what: str) -> Any:
    pyarrow, parquet = import_pyarrow()
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise OpenSoraError(f"{what} {path} cannot be read as Parquet: {_one_line(error)}") from None


def import_pyarrow() -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`.

    Raises:
        OpenSoraError: they are not installed; names the extra.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise OpenSoraError('Parquet needs pyarrow: pip install "opensora[train]", or use a .csv') from None
    return pyarrow, parquet


def _one_line(error: Exception) -> str:
    return shown(" ".join(str(error).split()), 200)


# --- JSON -------------------------------------------------------------------------------------------------------------


def _json_columns(path: Path, what: str) -> list[str]:
    bad: TableRow | None = None
    for row in _json_rows(path, what, (), lambda done, total: None):
        if not row.problem:
            return list(row.cells)
        bad = bad or row
    if bad is None:
        return []
    where = f"row {bad.number}" if bad.line is None else f"line {bad.line}"
    raise OpenSoraError(f"{what} {path} holds no object {{...}} in any row; {where}: {bad.problem}")


def _json_rows(path: Path, what: str, columns: Sequence[str], on_progress: OnProgress) -> Iterator[TableRow]:
    """One object a line, or a list of objects."""
    if path.suffix.lower() == ".json":
        objects = read_json(path, what)
        if not isinstance(objects, list):
            raise OpenSoraError(f"{what} {path} holds {describe_value(objects)}, expected a list of objects")
        for number, cells in enumerate(objects, 1):
            yield _json_row(number, None, cells)
        return
    size, number = path.stat().st_size, 0
    with path.open("rb") as file:
        for line, text in enumerate(file, 1):
            if line == 1:
                if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise OpenSoraError(f"{what} {path} is UTF-16, expected UTF-8; save it as UTF-8")
                text = text.removeprefix(codecs.BOM_UTF8)
            if line % _ROWS_BETWEEN_REPORTS == 0:
                on_progress(file.tell(), size)
            if not text.strip():
                continue
            number += 1
            try:
                yield _json_row(number, line, parse_json(text, "this line"))
            except OpenSoraError as error:
                yield TableRow(number, line, {}, str(error).replace(" at line 1", ""))
    on_progress(size, size)


def _json_row(number: int, line: int | None, cells: Any) -> TableRow:
    if isinstance(cells, dict):
        return TableRow(number, line, cells)
    return TableRow(number, line, {}, f"{describe_value(cells)}, expected an object {{...}}")


_FORMATS: dict[str, tuple[Callable[..., list[str]], Callable[..., Iterator[TableRow]]]] = {
    ".csv": (_csv_columns, _csv_rows),
    ".parquet": (_parquet_columns, _parquet_rows),
    ".jsonl": (_json_columns, _json_rows),
    ".json": (_json_columns, _json_rows),
}
