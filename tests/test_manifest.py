"""Tables of clips: what can be read, what is set aside with which reason, and that nothing is half written."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from opensora.errors import OpenSoraError
from opensora.manifest import COLUMNS, ClipRow, read_manifest, write_manifest

GOOD = {"path": "a.mp4", "text": "a ball", "num_frames": "51", "height": "240", "width": "426", "fps": "24"}


def write_csv(path: Path, rows: list[dict], encoding: str = "utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_in(folder: Path) -> list[ClipRow]:
    return [
        ClipRow(folder / "clips/红球 – été.mp4", 'a "red" ball,\nrolling – 一个红球', 51, 240, 426, 23.976),
        ClipRow(folder / "photo, of a cat.png", "a cat", 1, 720, 1280, None),
        ClipRow(Path("/elsewhere/b.mp4"), "a\tdog", 100, 426, 240, 30.0),
    ]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "CSV"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"clips.{suffix}"
    write_manifest(path, rows_in(tmp_path))
    found = read_manifest(path)
    assert found.rows == rows_in(tmp_path) and found.rejected == []
    assert found.rows[0].aspect_ratio == 240 / 426 and found.rows[0].resolution == 240 * 426
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_table_and_clips_move_together(tmp_path, suffix):
    """Paths are relative to the table's folder, wherever it is read from."""
    write_manifest(tmp_path / f"old/clips.{suffix}", [ClipRow(tmp_path / "old/a.mp4", "a", 9, 8, 8, 8.0)])
    (tmp_path / "old").rename(tmp_path / "new")
    assert read_manifest(tmp_path / f"new/clips.{suffix}").rows[0].path == tmp_path / "new/a.mp4"


def test_columns_of_the_reference(tmp_path):
    """A table as the reference's tools write it: counts with a point, a byte order mark, images without a rate."""
    row = {**GOOD, "num_frames": "51.0", "aspect_ratio": "0.5633802816901409", "resolution": "102240.0", "aes": "6.5"}
    image = {**row, "path": "b.png", "num_frames": "1", "fps": "nan", "aspect_ratio": "0.56"}
    path = write_csv(tmp_path / "clips.csv", [row, image], "utf-8-sig")
    assert read_manifest(path).rows == [
        ClipRow(tmp_path / "a.mp4", "a ball", 51, 240, 426, 24.0, aesthetic=6.5),
        ClipRow(tmp_path / "b.png", "a ball", 1, 240, 426, None, aesthetic=6.5),
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"path": " "}, "no path"),
        ({"path": "a\0.mp4"}, "no file name"),
        ({"text": "  "}, "no text"),
        ({"num_frames": ""}, "num_frames is missing"),
        ({"num_frames": "0"}, "num_frames is 0"),
        ({"num_frames": "12.5"}, "num_frames is 12.5"),
        ({"height": "tall"}, "height is 'tall'"),
        ({"width": "inf"}, "width is 'inf'"),
        ({"fps": ""}, "fps is missing"),
        ({"fps": "0"}, "fps is 0"),
        ({"aspect_ratio": "1.78"}, "aspect_ratio is 1.78, but height / width is 0.5634"),
        ({"resolution": "720"}, "resolution is 720, but height * width is 102240"),
    ],
)
def test_a_bad_row_is_set_aside_with_its_reason(tmp_path, change, reason):
    path = write_csv(tmp_path / "clips.csv", [GOOD, {**GOOD, **change}, GOOD])
    found = read_manifest(path)
    assert len(found.rows) == 2
    (rejected,) = found.rejected
    assert rejected.row == 2 and rejected.path == {**GOOD, **change}["path"] and reason in rejected.reason
    assert str(rejected).startswith("row 2") and "\n" not in str(rejected)


def test_a_row_that_is_cut_short(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_text(",".join(GOOD) + "\n" + ",".join(GOOD.values()) + "\nb.mp4,a dog,51\n")
    found = read_manifest(path)
    assert len(found.rows) == 1 and found.rejected[0].reason == "3 cells, but the header has 6"


def test_captions_only_where_they_are_needed(tmp_path):
    rows = [{name: cell for name, cell in GOOD.items() if name != "text"}]
    path = write_csv(tmp_path / "clips.csv", rows)
    assert read_manifest(path, text_required=False).rows[0].text == ""
    with pytest.raises(OpenSoraError, match="no column text"):
        read_manifest(path)


@pytest.mark.parametrize("column", ["path", "num_frames", "height", "width", "fps"])
def test_a_missing_column_is_named(tmp_path, column):
    rows = [{name: cell for name, cell in GOOD.items() if name != column}]
    with pytest.raises(OpenSoraError, match=f"no column {column}; it has") as caught:
        read_manifest(write_csv(tmp_path / "clips.csv", rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "does not exist"),
        ("clips.xlsx", b"{}", "must end in .csv, .parquet"),
        ("empty.csv", b"", "no column path"),
        ("latin.csv", ",".join(GOOD).encode() + b"\n\xe9t\xe9.mp4,a,9,8,8,8\n", "not UTF-8"),
        ("clips.parquet", b"PAR1 this is none", "cannot be read as Parquet"),
    ],
)
def test_what_is_no_table(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OpenSoraError, match=message) as caught:
        read_manifest(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_what_fails_leaves_the_old_table(tmp_path, suffix):
    path = tmp_path / f"clips.{suffix}"
    write_manifest(path, rows_in(tmp_path))
    before = path.read_bytes()

    def rows():
        yield rows_in(tmp_path)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_manifest(path, rows())
    unwritable = replace(rows_in(tmp_path)[0], text="\udcff")  # no text that UTF-8 could hold
    with pytest.raises(UnicodeEncodeError):
        write_manifest(path, [unwritable])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_parquet_says_which_extra_it_needs(tmp_path, monkeypatch):
    write_manifest(tmp_path / "clips.parquet", rows_in(tmp_path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OpenSoraError, match=r"opensora\[train\]"):
        read_manifest(tmp_path / "clips.parquet")


def test_all_columns_are_written(tmp_path):
    write_manifest(tmp_path / "clips.csv", rows_in(tmp_path))
    with (tmp_path / "clips.csv").open(encoding="utf-8", newline="") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_scores_are_read_where_there_are_some(ending, tmp_path):
    cells = {"path": "a.mp4", "text": "a", "num_frames": 8, "height": 4, "width": 6, "fps": 8.0}
    table = [
        {**cells, "aes": 5.25, "flow": None, "cmotion": "pan left"},
        {**cells, "aes": None, "flow": 0, "cmotion": ""},
    ]
    path = tmp_path / f"clips.{ending}"
    if ending == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(table), path)
    first, second = read_manifest(path).rows
    assert (first.aesthetic, first.flow, first.camera_motion) == (5.25, None, "pan left")
    assert (second.aesthetic, second.flow, second.camera_motion) == (None, 0.0, None)
    broken = tmp_path / "broken.csv"
    broken.write_text("path,text,num_frames,height,width,fps,aes\na.mp4,a,8,4,6,8,high\n")
    assert "aes is 'high'" in str(read_manifest(broken).rejected[0])
