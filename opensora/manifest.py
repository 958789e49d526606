"""The manifest: a table of clips, CSV or Parquet, that tells where each lies, what it shows and how large it is.

The columns are those of Open-Sora's own tables, so theirs can be used: `path`, `text`, `num_frames`, `height`, `width`,
`aspect_ratio` (height / width), `resolution` (height * width) and `fps`. The last but one and the one before it may be
left out, for they follow from the others. An image is a clip of one frame, whose `fps` may be empty. Paths are relative
to the manifest's folder unless they are absolute. A table may also hold scores, as Open-Sora's tools name them: `aes`
(how beautiful), `flow` (how much moves), `cmotion` (how the camera moves, in words). Other columns are ignored.

Every row is checked, and one that cannot be used is set aside with its number and the reason.
"""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.errors import OpenSoraError
from opensora.files import check_writable, replacing

COLUMNS: tuple[str, ...] = ("path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps")
SCORES: dict[str, str] = {"aes": "aesthetic", "flow": "flow", "cmotion": "camera_motion"}
"""Columns of scores -> what models call them."""
_DERIVED = ("aspect_ratio", "resolution")

# A ratio may be rounded to two digits; more than that, and the table means another ratio.
_RATIO_TOLERANCE = 0.011
# Captions longer than Python's own limit of 128 KiB a field are no captions, but must not stop the others.
_LONGEST_FIELD = 2**24


@dataclass(frozen=True, slots=True)
class ClipRow:
    """One clip.

    Attributes:
        path: of the file, absolute or relative to the working directory.
        text: what it shows; "" where nobody said.
        num_frames: 1 for an image.
        height, width: in pixels, as it is seen (a rotation noted in the file is applied).
        fps: frames per second; None for an image that has none.
        aesthetic, flow, camera_motion: scores, where the table has them; they are read and not written.
    """

    path: Path
    text: str
    num_frames: int
    height: int
    width: int
    fps: float | None
    aesthetic: float | None = None
    flow: float | None = None
    camera_motion: str | None = None

    @property
    def aspect_ratio(self) -> float:
        """Height / width."""
        return self.height / self.width

    @property
    def resolution(self) -> int:
        """Pixels of a frame."""
        return self.height * self.width


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used.

    Attributes:
        row: its number, 1 for the first after the header.
        path: as the table has it; "" where it has none.
        reason: what is wrong with it.
    """

    row: int
    path: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}{f' ({self.path})' if self.path else ''}: {self.reason}"


@dataclass(frozen=True)
class Manifest:
    """What a table holds: the rows that can be used, in its order, and those that cannot."""

    rows: list[ClipRow]
    rejected: list[Rejected]


def read_manifest(path: str | Path, *, text_required: bool = True) -> Manifest:
    """Reads a table of clips.

    Args:
        path: a `.csv` (UTF-8) or `.parquet` file.
        text_required: set rows without a caption aside; otherwise the column may be missing, too.

    Raises:
        OpenSoraError: no such file, not a table, or a missing column (names it).
    """
    path = Path(path)
    reader = {".csv": _read_csv, ".parquet": _read_parquet}.get(path.suffix.lower())
    if reader is None:
        raise OpenSoraError(f"manifest {path} must end in .csv or .parquet")
    if not path.is_file():
        raise OpenSoraError(f"manifest {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    rows, rejected = [], []
    for number, cells in enumerate(reader(path, text_required), 1):
        try:
            rows.append(_check_row(cells, path.parent, text_required))
        except OpenSoraError as error:
            rejected.append(Rejected(number, str(cells.get("path") or ""), str(error)))
    return Manifest(rows, rejected)


def write_manifest(path: str | Path, rows: Iterable[ClipRow]) -> None:
    """Writes a table of clips with all columns, whole or not at all.

    Paths below the table's folder are written relative to it, so that both can move together; others are absolute.

    Args:
        path: a `.csv` or `.parquet` file.
        rows: the clips.

    Raises:
        OpenSoraError: another ending, or a place that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise OpenSoraError(f"manifest {path} must end in .csv or .parquet")
    check_writable(path)
    folder = path.parent.absolute()
    table = [_cells(row, folder) for row in rows]
    with replacing(path) as temporary:
        if path.suffix.lower() == ".csv":
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(table)
        else:
            pyarrow, parquet = _pyarrow()
            types = [pyarrow.string()] * 2 + [pyarrow.int64()] * 3
            types += [pyarrow.float64(), pyarrow.int64(), pyarrow.float64()]
            schema = pyarrow.schema(list(zip(COLUMNS, types, strict=True)))
            parquet.write_table(pyarrow.Table.from_pylist(table, schema), temporary)


# --- cells to rows and back -------------------------------------------------------------------------------------------


def _check_row(cells: Mapping[str, Any], folder: Path, text_required: bool) -> ClipRow:
    """A row, or an `OpenSoraError` with the reason why it is none."""
    name = cells.get("path")
    if not isinstance(name, str) or not name.strip():
        raise OpenSoraError("no path")
    if "\0" in name:
        raise OpenSoraError("path holds a character that no file name can have")
    text = cells.get("text")
    text = "" if _is_empty(text) else str(text)
    if text_required and not text.strip():
        raise OpenSoraError("no text; caption the clip, or leave it out")
    num_frames, height, width = [_count(name, cells.get(name)) for name in ("num_frames", "height", "width")]
    fps = None if _is_empty(cells.get("fps")) else _number("fps", cells["fps"])
    if num_frames == 1 and fps is not None and fps <= 0:
        fps = None  # some tables have 0 for images
    if num_frames > 1 and (fps is None or fps <= 0):
        raise OpenSoraError(f"fps is {'missing' if fps is None else format(fps, 'g')}, expected a positive number")
    aesthetic, flow = (None if _is_empty(cells.get(n)) else _number(n, cells[n]) for n in ("aes", "flow"))
    camera_motion = None if _is_empty(cells.get("cmotion")) else str(cells["cmotion"]).strip()
    row = ClipRow(Path(folder, name), text, num_frames, height, width, fps, aesthetic, flow, camera_motion)
    ratio, resolution = cells.get("aspect_ratio"), cells.get("resolution")
    if not _is_empty(ratio):
        told = _number("aspect_ratio", ratio)
        if abs(told - row.aspect_ratio) > _RATIO_TOLERANCE * max(1.0, row.aspect_ratio):
            raise OpenSoraError(f"aspect_ratio is {told:g}, but height / width is {row.aspect_ratio:.4g}")
    if not _is_empty(resolution) and _number("resolution", resolution) != row.resolution:
        raise OpenSoraError(f"resolution is {resolution}, but height * width is {row.resolution}")
    return row


def _cells(row: ClipRow, folder: Path) -> dict[str, Any]:
    path = row.path.absolute()
    path = path.relative_to(folder) if path.is_relative_to(folder) else path
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


def _is_empty(value: Any) -> bool:
    """None, NaN, or text that says as much."""
    return value is None or value != value or (isinstance(value, str) and value.strip().lower() in ("", "nan"))


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise OpenSoraError(f"{name} is {value!r}, expected a number")
    return number


def _count(name: str, value: Any) -> int:
    if isinstance(value, str) and value.isdecimal():  # by far the most common
        value = int(value)
    if _is_empty(value):
        raise OpenSoraError(f"{name} is missing")
    number = _number(name, value)
    if number != int(number) or number < 1:
        raise OpenSoraError(f"{name} is {value}, expected a whole number, 1 or more")
    return int(number)


# --- the two formats --------------------------------------------------------------------------------------------------


def _read_csv(path: Path, text_required: bool) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets put a byte order mark first
        reader = csv.DictReader(file)
        try:
            _check_columns(path, reader.fieldnames or (), text_required)
            yield from reader
        except csv.Error as error:
            raise OpenSoraError(f"manifest {path} cannot be read at line {reader.line_num}: {error}") from None
        except UnicodeDecodeError:
            raise OpenSoraError(
                f"manifest {path} is not UTF-8 after line {reader.line_num}; save it as UTF-8"
            ) from None


def _read_parquet(path: Path, text_required: bool) -> Iterator[dict[str, Any]]:
    pyarrow, parquet = _pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, text_required)
            columns = [name for name in (*COLUMNS, *SCORES) if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise OpenSoraError(f"manifest {path} cannot be read as Parquet: {error}") from None


def _check_columns(path: Path, found: Sequence[str], text_required: bool) -> None:
    free = _DERIVED if text_required else (*_DERIVED, "text")
    missing = [name for name in COLUMNS if name not in found and name not in free]
    if missing:
        raise OpenSoraError(
            f"manifest {path} has no column {' and no '.join(missing)}; it has {', '.join(map(repr, found)) or 'none'}"
        )


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise OpenSoraError('Parquet needs pyarrow: pip install "opensora[train]", or use a .csv') from None
    return pyarrow, parquet
