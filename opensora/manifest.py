"""The manifest: a table of clips that tells where each lies, what it shows and how large it is; or several tables.

The columns are those of Open-Sora's own tables, so theirs can be used: `path`, `text`, `num_frames`, `height`, `width`,
`aspect_ratio` (height / width), `resolution` (height * width) and `fps`. The last but one and the one before it may be
left out, for they follow from the others. An image is a clip of one frame, whose `fps` may be empty. Paths are relative
to the manifest's folder unless they are absolute. A table may also hold scores, as Open-Sora's tools name them: `aes`
(how beautiful), `flow` (how much moves), `cmotion` (how the camera moves, in words), `score_vmafmotion` (how much
moves, as 2.0 is told). Other columns are ignored.

Tables are CSV, Parquet, JSON lines or a JSON list of objects (see `tables`). Where there is no `path` it may be called
`file_name`, `file_path`, `video_path` or `image_path`, and `text` may be called `caption`. Wherever a manifest is asked
for, several may be named, separated by commas, each with how often its rows come: `mine.csv*3,theirs.parquet`.

Every row is checked, and one that cannot be used is set aside with its number, its line and the reason.
"""

import csv
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.clip_rows import ClipRow, ClipRows
from opensora.contents import shown
from opensora.errors import OpenSoraError
from opensora.files import check_writable, replacing
from opensora.limits import check_count
from opensora.tables import OnProgress, TableRow, columns_of, import_pyarrow, is_empty, rows_of

COLUMNS: tuple[str, ...] = ("path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps")
SCORES: dict[str, str] = {
    "aes": "aesthetic",
    "flow": "flow",
    "cmotion": "camera_motion",
    "score_vmafmotion": "motion",
}
"""Columns of scores -> what models call them."""
ALSO_CALLED: dict[str, tuple[str, ...]] = {
    "path": ("file_name", "file_path", "video_path", "image_path"),
    "text": ("caption",),
}
"""Columns -> what other people's tables call them."""
_DERIVED = ("aspect_ratio", "resolution")

# A ratio may be rounded to two digits; more than that, and the table means another ratio.
_RATIO_TOLERANCE = 0.011
# More than a clip of a day at 1000 frames a second, or the sides of a picture of 4 gigapixels, is a mistake.
_MOST = {"num_frames": 10**8, "height": 2**16, "width": 2**16}
_FPS = (1e-4, 1e5)
_MOST_REPEATS = 10_000
_ROWS_OF_A_GROUP = 65_536  # of a Parquet file, written at once


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used.

    Attributes:
        row: its number, 1 for the first after the header.
        path: as the table has it; "" where it has none.
        reason: what is wrong with it.
        line: on which it begins; None in a table that has no lines.
        table: which has it, where there are several; "" otherwise.
    """

    row: int
    path: str
    reason: str
    line: int | None = None
    table: str = ""

    def __str__(self) -> str:
        line = "" if self.line is None else f", line {self.line}"
        table = f" of {self.table}" if self.table else ""
        return f"row {self.row}{line}{table}{f' ({shown(self.path)})' if self.path else ''}: {self.reason}"


@dataclass(frozen=True)
class Manifest:
    """What one or several tables hold.

    Attributes:
        rows: those that can be used, in the order of the tables; rows that come more than once by their table's number
            of repeats stand once more at the end.
        rejected: those that cannot.
        num_duplicates: rows about a file that an earlier row is about, repeats not counted.
        duplicate: one of these files; "" without.
    """

    rows: ClipRows
    rejected: list[Rejected]
    num_duplicates: int = 0
    duplicate: str = ""


def tables_of(manifest: str | Path) -> list[tuple[Path, int]]:
    """The tables that a manifest names, and how often their rows come, such as of `a.csv*3,b.csv`.

    Raises:
        OpenSoraError: a number of repeats that is none.
    """
    if Path(manifest).exists():  # whatever is in its name
        return [(Path(manifest), 1)]
    found = []
    for part in str(manifest).split(","):
        name, star, repeats = part.strip().rpartition("*")
        if not star:
            name, repeats = repeats, "1"
        if not name or not re.fullmatch(r"[0-9]{1,9}", repeats):
            raise OpenSoraError(
                f"manifest {manifest} holds {part!r}, expected a table, or a table and repeats (a.csv*3)"
            )
        found.append((Path(name), check_count(f"repeats of manifest {name}", int(repeats), _MOST_REPEATS)))
    return found


def read_manifest(
    path: str | Path, *, text_required: bool = True, on_progress: OnProgress = lambda done, total: None
) -> Manifest:
    """Reads a table of clips, or several.

    Args:
        path: a `.csv` (UTF-8), `.parquet`, `.jsonl` or `.json` file; or several, see the top of the file.
        text_required: set rows without a caption aside; otherwise the column may be missing, too.
        on_progress: told now and then how much of a table is read, of how much.

    Raises:
        OpenSoraError: no such file, not a table, or a missing column (names it).
    """
    rows, rejected = ClipRows(), list[Rejected]()
    spans: list[tuple[range, int]] = []
    tables = tables_of(path)
    for table, repeats in tables:
        before = len(rows)
        for row in rows_of_clips(table, "manifest", _required(text_required), on_progress):
            try:
                if row.problem:
                    raise OpenSoraError(row.problem)
                rows.append(_check_row(row.cells, table.parent, text_required))
            except OpenSoraError as error:
                name = table.name if len(tables) > 1 else ""
                told = row.cells.get("path")
                told = told if isinstance(told, str) else ""
                rejected.append(Rejected(row.number, told, str(error), row.line, name))
        spans.append((range(before, len(rows)), repeats))
    duplicates = rows.repeated_paths()
    for span, repeats in spans:
        for index in list(span) * (repeats - 1):
            rows.append(rows[index])
    return Manifest(rows, rejected, len(duplicates), str(rows[duplicates[0]].path) if duplicates else "")


def _required(text_required: bool) -> list[str]:
    free = _DERIVED if text_required else (*_DERIVED, "text")
    return [name for name in COLUMNS if name not in free]


def rows_of_clips(
    path: Path, what: str, required: Sequence[str], on_progress: OnProgress = lambda done, total: None
) -> Iterator[TableRow]:
    """The rows of a table about clips, with its columns called as ours.

    Args:
        path: of the table.
        what: its role, for messages.
        required: columns that it must have, by our names or those of `ALSO_CALLED`.
        on_progress: told now and then how much is read, of how much.

    Raises:
        OpenSoraError: no table, a column that is missing, or two that both may be meant.
    """
    found = columns_of(path, what)
    ours: dict[str, str] = {name: name for name in (*COLUMNS, *SCORES) if name in found}
    for name, others in ALSO_CALLED.items():
        there = [other for other in others if other in found]
        if name not in found and len(there) > 1:
            raise OpenSoraError(
                f"{what} {path} has the columns {' and '.join(there)}; call the one that is meant {name}"
            )
        if name not in found and there:
            ours[there[0]] = name
    if missing := [name for name in required if name not in ours.values()]:
        has = shown(", ".join(map(repr, found)), 200) or "none"
        raise OpenSoraError(f"{what} {path} has no column {' and no '.join(missing)}; it has {has}")
    renamed = {theirs: name for theirs, name in ours.items() if theirs != name}
    for row in rows_of(path, what, list(ours), on_progress):
        for theirs, name in renamed.items():
            if theirs in row.cells:
                row.cells[name] = row.cells[theirs]
        yield row


def write_manifest(
    path: str | Path, rows: Iterable[ClipRow], *, relative: bool = False, folder: Path | None = None
) -> None:
    """Writes a table of clips with all columns, whole or not at all.

    Paths below the table's folder are written relative to it, so that both can move together; others are absolute.

    Args:
        path: a `.csv` or `.parquet` file.
        rows: the clips.
        relative: write all paths relative to the table's folder, those that lead out of it (`../`) as well.
        folder: that the table is going to lie in, where it is another than the one it is written to.

    Raises:
        OpenSoraError: another ending, or a place that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise OpenSoraError(f"manifest {path} must end in .csv or .parquet")
    check_writable(path)
    folder = (folder or path.parent).absolute()
    table = (_cells(row, folder, relative) for row in rows)
    with replacing(path) as temporary:
        if path.suffix.lower() == ".csv":
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(table)
        else:
            _write_parquet(temporary, table)


def _write_parquet(path: Path, table: Iterator[dict[str, Any]]) -> None:
    pyarrow, parquet = import_pyarrow()
    types = [pyarrow.string()] * 2 + [pyarrow.int64()] * 3
    types += [pyarrow.float64(), pyarrow.int64(), pyarrow.float64()]
    schema = pyarrow.schema(list(zip(COLUMNS, types, strict=True)))
    with parquet.ParquetWriter(path, schema) as writer:
        while part := list(itertools.islice(table, _ROWS_OF_A_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(part, schema))


# --- cells to rows and back -------------------------------------------------------------------------------------------


def _check_row(cells: Mapping[str, Any], folder: Path, text_required: bool) -> ClipRow:
    """A row, or an `OpenSoraError` with the reason why it is none."""
    path = check_path(cells.get("path"))
    text = check_text(cells.get("text"))
    if text_required and not text:
        raise OpenSoraError("no text; caption the clip, or leave it out")
    num_frames, height, width = [_count(name, cells.get(name)) for name in ("num_frames", "height", "width")]
    fps = None if is_empty(cells.get("fps")) else _number("fps", cells["fps"])
    if num_frames == 1 and fps is not None and fps <= 0:
        fps = None  # some tables have 0 for images
    if num_frames > 1 and fps is None:
        raise OpenSoraError("fps is missing, expected a positive number")
    if fps is not None and not _FPS[0] <= fps <= _FPS[1]:
        raise OpenSoraError(f"fps is {fps:g}, expected a positive number, {_FPS[1]:,.0f} at most")
    aesthetic, flow, motion = (
        None if is_empty(cells.get(name)) else _number(name, cells[name])
        for name in ("aes", "flow", "score_vmafmotion")
    )
    camera_motion = None if is_empty(cells.get("cmotion")) else str(cells["cmotion"]).strip()
    row = ClipRow(Path(folder, path), text, num_frames, height, width, fps, aesthetic, flow, camera_motion, motion)
    ratio, resolution = cells.get("aspect_ratio"), cells.get("resolution")
    if not is_empty(ratio):
        told = _number("aspect_ratio", ratio)
        if abs(told - row.aspect_ratio) > _RATIO_TOLERANCE * max(1.0, row.aspect_ratio):
            raise OpenSoraError(f"aspect_ratio is {told:g}, but height / width is {row.aspect_ratio:.4g}")
    if not is_empty(resolution) and _number("resolution", resolution) != row.resolution:
        raise OpenSoraError(f"resolution is {resolution}, but height * width is {row.resolution}")
    return row


def check_path(value: Any) -> str:
    """The path of a row.

    Raises:
        OpenSoraError: there is none, or it is none.
    """
    if is_empty(value):
        raise OpenSoraError("no path")
    if not isinstance(value, str):
        raise OpenSoraError(f"path is {value!r}, expected text")
    if "\0" in value:
        raise OpenSoraError("path holds a character that no file name can have")
    return value


def check_text(value: Any) -> str:
    """The caption of a row; "" where there is none.

    Raises:
        OpenSoraError: something that is no text.
    """
    if is_empty(value):
        return ""
    if not isinstance(value, str):
        raise OpenSoraError(f"text is {shown(repr(value))}, expected text")
    return value


def _cells(row: ClipRow, folder: Path, relative: bool) -> dict[str, Any]:
    path = row.path.absolute()
    if relative:
        path = Path(os.path.relpath(path, folder))
    elif path.is_relative_to(folder):
        path = path.relative_to(folder)
    return {
        "path": path.as_posix(),
        "text": row.text,
        "num_frames": row.num_frames,
        "height": row.height,
        "width": row.width,
        "aspect_ratio": row.aspect_ratio,
        "resolution": row.resolution,
        "fps": row.fps,
    }


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        comma = re.fullmatch(r"\s*([-+]?\d+),(\d+)\s*", value) if isinstance(value, str) else None
        point = f" with a point, {comma[1]}.{comma[2]}" if comma else ""
        raise OpenSoraError(f"{name} is {shown(repr(value))}, expected a number{point}")
    return number


def _count(name: str, value: Any) -> int:
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:  # by far the most common
        number: float = int(value)
    elif is_empty(value):
        raise OpenSoraError(f"{name} is missing")
    else:
        number = _number(name, value)
    if number != int(number) or not 1 <= number <= _MOST[name]:
        raise OpenSoraError(f"{name} is {shown(str(value))}, expected a whole number from 1 to {_MOST[name]:,}")
    return int(number)
