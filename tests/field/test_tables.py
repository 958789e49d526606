"""Tables as people have them: read strictly, or refused in a line that says what was found and how to convert it."""

import json
import re
import subprocess
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opensora.errors import OpenSoraError
from opensora.manifest import read_manifest
from opensora.overrides import apply_overrides
from opensora.recipes import find_recipe
from opensora.tables import rows_of
from opensora.training.record import record_frozen

HEADER = "path,text,num_frames,height,width,fps"
ROW = "a.mp4,a ball,51,240,426,24"


def table(folder: Path, content: str | bytes, name: str = "clips.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet(folder: Path, rows: list[dict], name: str = "clips.parquet") -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return folder / name


def clip(name: str = "a.mp4", **changes) -> dict:
    return {"path": name, "text": "a ball", "num_frames": 51, "height": 240, "width": 426, "fps": 24.0, **changes}


def refused(path: Path) -> str:
    with pytest.raises(OpenSoraError) as caught:
        read_manifest(path)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


# --- rows and cells ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("b.mp4,a dog, running,51,240,426,24", "7 cells, but the header has 6; put cells that hold commas in quotes"),
        ("b.mp4,a dog,51,240,426", "5 cells, but the header has 6"),
        ("b.mp4,a dog,51,240,426,24,", "7 cells"),
        ("b.mp4", "1 cells"),
    ],
)
def test_a_row_of_another_length_is_set_aside_with_its_line(tmp_path, row, reason):
    """Today a caption with a comma is cut there, and the numbers after it move."""
    text = '"two\nlines"'
    path = table(tmp_path, f"{HEADER}\n{ROW.replace('a ball', text)}\n\n{row}\n{ROW}\n")
    found = read_manifest(path)
    assert [kept.text for kept in found.rows] == ["two\nlines", "a ball"]
    (rejected,) = found.rejected
    assert (rejected.row, rejected.line) == (2, 5) and reason in rejected.reason
    assert str(rejected).startswith("row 2, line 5 (b.mp4): ")


@pytest.mark.parametrize(
    "row",
    ['b.mp4,"a dog,51,240,426,24', 'b.mp4,"a \\"red\\" dog",51,240,426,24', 'b.mp4,"a" dog,51,240,426,24'],
)
def test_a_quote_that_does_not_close_is_an_error_with_the_line_where_its_row_begins(tmp_path, row):
    message = refused(table(tmp_path, f"{HEADER}\n{ROW}\n{row}\n{ROW}\n{ROW}\n"))
    assert "line 3" in message and "quote" in message


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (HEADER + ",text", "column 'text' more than once"),
        ("," + HEADER, "no name for column 1 of 7"),
        (HEADER + ",", "no name for column 7 of 7"),
        ("Path" + HEADER[4:], "no column path; it has 'Path'"),
    ],
)
def test_columns_that_cannot_be_told_apart_are_an_error(tmp_path, header, message):
    assert message in refused(table(tmp_path, f"{header}\n{ROW},x\n"))


@pytest.mark.parametrize("word", ["", " ", "None", "null", "N/A", "nan", "NaN", "<NA>", "#N/A", "NULL"])
def test_words_for_nothing_are_alike_in_every_column(tmp_path, word):
    lines = [",".join(str(cell) for cell in clip(**{name: word}).values()) for name in clip()]
    found = read_manifest(table(tmp_path, "\n".join([HEADER, *lines, f"i.png,x,1,8,8,{word}"])))
    reasons = ["no path", "no text", "num_frames is missing", "height is missing", "width is missing", "fps is missing"]
    assert [re.split("[;,]", rejected.reason)[0] for rejected in found.rejected] == reasons
    assert [row.fps for row in found.rows] == [None]
    as_parquet = read_manifest(parquet(tmp_path, [clip(text=word), clip(text=None), clip(text="None of them")]))
    assert [row.text for row in as_parquet.rows] == ["None of them"] and len(as_parquet.rejected) == 2


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"fps": "23,976"}, "expected a number with a point, 23.976"),
        ({"fps": "inf"}, "expected a number"),
        ({"fps": "-24"}, "fps is -24, expected a positive number"),
        ({"fps": "1e300"}, "fps is 1e+300, expected a positive number, 100,000 at most"),
        ({"fps": "30000/1001"}, "expected a number"),
        ({"num_frames": "1_000"}, "expected a number"),
        ({"num_frames": "-51"}, "num_frames is -51, expected a whole number from 1"),
        ({"num_frames": "9" * 5000}, "expected a number"),
        ({"num_frames": "1e30"}, "from 1 to 100,000,000"),
        ({"height": "1000000000"}, "from 1 to 65,536"),
        ({"width": "0"}, "expected a whole number from 1"),
    ],
)
def test_numbers_that_are_none_are_set_aside_in_a_short_line(tmp_path, cells, reason):
    quoted = ",".join(f'"{cell}"' for cell in clip(**cells).values())
    (rejected,) = read_manifest(table(tmp_path, f"{HEADER}\n{quoted}\n")).rejected
    assert reason in rejected.reason and len(str(rejected)) < 200


@pytest.mark.parametrize("value", [5, b"a ball", ["a ball", "a dog"]])
def test_a_caption_that_is_no_text_is_set_aside(tmp_path, value):
    (rejected,) = read_manifest(parquet(tmp_path, [clip(text=value)])).rejected
    assert "expected text" in rejected.reason


# --- what is no table of ours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_other_separators_are_named_with_a_command_that_converts(tmp_path, monkeypatch, separator, name):

    path = table(tmp_path, f"{HEADER}\nb.mp4,a dog; running,51,240,426,24\n".replace(",", separator))
    if separator == ";":
        path.write_text(path.read_text().replace("a dog; running", '"a dog, running"'))
    message = refused(path)
    assert f"is separated by {name}, expected commas" in message
    command = message[message.index("python -c") :]
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
    (row,) = read_manifest(tmp_path / "commas.csv").rows
    assert row.text.startswith("a dog") and row.text.endswith("running")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{HEADER}\n{ROW}\nété.mp4{ROW[5:]}\n".encode("latin-1"), "not UTF-8 in line 3; .*iconv -f latin1"),
        (f"{HEADER}\n{ROW.replace('a ball', '一个红球')}\n".encode("gb18030"), "not UTF-8 in line 2; .*gb18030"),
        (f"{HEADER}\n{ROW}\n".encode("utf-16"), "UTF-16, expected UTF-8; .*iconv -f utf-16"),
        (f"{HEADER}\n{ROW}\n".encode("utf-16-le"), "UTF-16, expected UTF-8"),
        (f"{HEADER}\n{ROW}\n".encode("utf-32"), "UTF-32, expected UTF-8; .*iconv -f utf-32"),
        (b"PK\x03\x04 a spreadsheet", "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PAR1\x15\x04\x15\x00PAR1", "Parquet table"),
        (b'{"path": "a.mp4"}\n', "a JSON file"),
    ],
)
def test_other_encodings_and_kinds_of_files_are_named(tmp_path, content, message):

    assert re.search(message, refused(table(tmp_path, content)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("clips.tsv", f"{HEADER}\n{ROW}\n".replace(",", "\t"), "separated by tabs, expected commas"),
        ("clips.jsonl", f"{HEADER}\n{ROW}\n", "no object .* line 1: this line is not valid JSON"),
        (
            "clips.jsonl",
            '{"path": "été.mp4"}'.encode("latin-1"),
            "line 1: .* it is not UTF-8",
        ),
        ("clips.jsonl", "[" * 100_000, "line 1: this line is not valid JSON: objects lie within each other"),
        ("clips.json", '{"path": "a.mp4"}', "an object of 1, expected a list of objects"),
        ("clips.parquet", f"{HEADER}\n{ROW}\n", "cannot be read as Parquet: it is a text file"),
        ("clips.xlsx", b"PK\x03\x04", "must end in .csv, .parquet, .jsonl or .json"),
    ],
)
def test_tables_of_other_endings_are_held_to_them(tmp_path, name, content, message):
    assert re.search(message, refused(table(tmp_path, content, name)))


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path):
    assert len(read_manifest(table(tmp_path, f"\ufeff{HEADER}\r\n{ROW}\r\n")).rows) == 1
    lines = table(tmp_path, "\ufeff" + json.dumps(clip()), "clips.jsonl")
    assert len(read_manifest(lines).rows) == 1


# --- other forms ------------------------------------------------------------------------------------------------------


def test_json_lines_and_other_names_of_columns(tmp_path):
    other = {"file_name": "b.mp4", "caption": "a dog", "num_frames": 9, "height": 8, "width": 8, "fps": 8, "more": {}}
    lines = [json.dumps(other), "", '{"file_name": "c.mp4"', "[1]", '{"file_name": "d.mp4", "file_name": "e.mp4"}']
    found = read_manifest(table(tmp_path, "\n".join(lines), "metadata.jsonl"))
    assert [(row.path, row.text) for row in found.rows] == [(tmp_path / "b.mp4", "a dog")]
    assert [(rejected.row, rejected.line) for rejected in found.rejected] == [(2, 3), (3, 4), (4, 5)]
    assert "twice" in found.rejected[2].reason
    listed = read_manifest(table(tmp_path, json.dumps([other, other]), "clips.json"))
    assert len(listed.rows) == 2


def test_two_columns_that_may_both_be_meant_are_an_error(tmp_path):
    header = HEADER.replace("path", "file_name") + ",video_path"
    assert "file_name and video_path" in refused(table(tmp_path, f"{header}\n{ROW},b.mp4\n"))


def test_several_tables_with_repeats_and_duplicates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more").mkdir()
    table(tmp_path, f"{HEADER}\n{ROW}\nb.mp4{ROW[5:]}\n", "a.csv")
    parquet(tmp_path / "more", [clip("c.mp4"), clip("../a.mp4"), clip("x.mp4", fps=None)], "b.parquet")
    found = read_manifest("a.csv*3,more/b.parquet")
    names = [row.path.as_posix() for row in found.rows]
    assert names == ["a.mp4", "b.mp4", "more/c.mp4", "more/../a.mp4", *["a.mp4", "b.mp4"] * 2]
    assert str(found.rejected[0]).startswith("row 3 of b.parquet (x.mp4)")
    again = read_manifest("a.csv*2, a.csv")
    assert (len(again.rows), again.num_duplicates, again.duplicate) == (6, 2, "a.mp4")
    table(tmp_path, f"{HEADER}\n{ROW}\n", "a,b*3.csv")
    assert len(read_manifest("a,b*3.csv").rows) == 1, "a file of that name is one"
    for wrong in ("a.csv*", "a.csv*0", "a.csv*99999999", "a.csv,", "a.csv,nowhere.csv"):
        with pytest.raises(OpenSoraError, match=r"expected|does not exist"):
            read_manifest(wrong)


def test_progress_is_told_to_the_end(tmp_path):
    path, told = table(tmp_path, "\n".join([HEADER, *[ROW] * 10_000])), []
    read_manifest(path, on_progress=lambda done, total: told.append((done, total)))
    assert len(told) >= 3 and told == sorted(told) and told[-1] == (path.stat().st_size,) * 2
    assert next(rows_of(path, "table", ["path"])).line == 2


def test_a_run_is_bound_to_each_of_its_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "b.csv"):
        table(tmp_path, f"{HEADER}\n{ROW}\n", name)
    recipe = apply_overrides(find_recipe("overfit"), ["objective.data.manifest=a.csv*3,b.csv"])
    setup: Any = SimpleNamespace(task=SimpleNamespace(module=torch.nn.Identity()), frozen={})
    one_process: Any = SimpleNamespace(is_first=True)
    for _ in range(2):
        record_frozen(recipe, setup, tmp_path / "frozen.json", one_process)
    table(tmp_path, f"{HEADER}\n{ROW.replace('ball', 'dog')}\n", "b.csv")
    with pytest.raises(OpenSoraError, match=r"other contents of: objective\.data\.manifest b\.csv;"):
        record_frozen(recipe, setup, tmp_path / "frozen.json", one_process)


def test_rows_take_about_as_much_memory_as_their_table(tmp_path):
    text = "a small red ball rolls to the left over the grass while a blue cube turns"
    lines = [f"clips/part {i // 100}/clip {i:05d}.mp4,{text} {i},51,240,426,24" for i in range(4000)]
    path = table(tmp_path, "\n".join([HEADER, *lines]))
    read_manifest(path)  # what is imported and compiled at first is not of the table
    tracemalloc.start()
    found = read_manifest(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.rows) == 4000 and held < 3 * path.stat().st_size  # with the folder before each path
    assert found.rows[3999].text == f"{text} 3999" and found.rows[-1] == found.rows[3999]
    assert [row.num_frames for row in found.rows[:2]] == [51, 51]
