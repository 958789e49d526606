"""Folders as people have them: every file is accounted for, links are followed, captions found or nearly found."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from opensora.cli.main import main
from opensora.data.folder import look_into
from opensora.data.scan import Scan, make_manifest
from opensora.errors import OpenSoraError


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    return folder


def picture(path: Path, caption: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def scanned(folder: Path, **options) -> Scan:
    return make_manifest(folder, folder.parent / "clips.csv", num_workers=2, **options)


def texts(scan: Scan) -> dict[str, str]:
    return {row.path.name: row.text for row in scan.rows}


def test_linked_folders_are_followed_once_and_loops_end(clips, tmp_path):
    picture(clips / "b" / "one.png", "one")
    picture(tmp_path / "elsewhere" / "two.png", "two")
    (clips / "a link").symlink_to(clips / "b")  # the same folder, met before it by its name
    (clips / "elsewhere").symlink_to(tmp_path / "elsewhere")
    (clips / "b" / "up").symlink_to(clips)
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    (clips / "itself").symlink_to(clips / "itself")
    scan = scanned(clips)
    assert [str(row.path.relative_to(clips)) for row in scan.rows] == ["b/one.png", "elsewhere/two.png"]
    assert scan.folder.seen_before.count == 3
    assert scan.folder.others["no file"].count == 1, "a link to itself"
    assert any("3 links lead to folders that were seen already" in line for line in scan.account_lines())


def test_every_file_is_accounted_for(clips, capsys):
    picture(clips / "good.png", "a picture")
    picture(clips / "no caption.png")
    picture(clips / "deep" / ".hidden" / "x.png")
    picture(clips / "clip.dat"), picture(clips / "no_ending")
    (clips / "empty.mp4").touch()
    (clips / ".DS_Store").write_text("x")
    (clips / "notes.docx").write_text("x")
    (clips / "more.docx").write_text("x")
    (clips / "gone.docx").symlink_to(clips / "nowhere")
    (clips / "orphan.txt").write_text("of no clip")
    (clips / "facts.json").write_text("{}")
    os.mkfifo(clips / "pipe.raw")
    scan = scanned(clips)
    account = scan.account()
    assert account == {
        "in the manifest": 1,
        "left out": 2,
        "captions of clips": 1,
        "captions without a clip": 1,
        ".json without a caption": 1,
        ".dat": 1,
        ".docx": 2,
        "no ending": 1,
        "no file": 2,
        "hidden": 1,
    }
    hidden = sum(len(files) for folder, _, files in os.walk(clips) if ".hidden" in folder)
    seen = sum(len(files) for _, _, files in os.walk(clips)) - hidden
    assert sum(account.values()) == scan.folder.num_files == seen
    said = "\n".join(scan.account_lines())
    for expected in (
        f"files seen: {seen}; 1 in the manifest, 2 left out",
        f"captions without a clip, such as {clips}/orphan.txt",
        f".docx, such as {clips}/more.docx",
        "2 are videos or pictures by their content; give them their ending",
        "1 hidden folders were not looked into",
    ):
        assert expected in said
    assert scan.left_out[str(clips / "empty.mp4")] == "an empty file, not a video"
    assert main(["data", "manifest", str(clips), "--output", str(clips.parent / "b.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == account


@pytest.mark.parametrize(
    ("clip", "caption"),
    [
        ("Clip One.png", "clip one.txt"),
        ("a clip.png", "a_clip.caption"),
        ("a.png", "a.png.txt"),
        ("a.png", "a.en.txt"),
        ("a.png", "a..txt"),
        ("a.png", "a .txt"),
        (unicodedata.normalize("NFD", "été.png"), unicodedata.normalize("NFC", "été.txt")),
    ],
)
def test_captions_whose_name_nearly_matches_are_named(clips, clip, caption):
    picture(clips / "another.png", "another")
    picture(clips / clip)
    (clips / caption).write_text("a caption")
    scan = scanned(clips)
    assert scan.near == {str(clips / clip): str(clips / caption)}
    assert any(f"{caption} has nearly the name of" in line for line in scan.account_lines())


def test_captions_lie_beside_clips_in_several_forms(clips):
    picture(clips / "txt.png", "\ufeffone \n")
    picture(clips / "caption.png"), (clips / "caption.caption").write_text("two")
    picture(clips / "json.png"), (clips / "json.json").write_text('{"width": 4, "caption": "three"}')
    picture(clips / "facts.png"), (clips / "facts.json").write_text('{"width": 4}')
    lines = [{"file_name": "hf.png", "text": "four"}, {"file_name": "deep/x.png", "text": "no clip"}]
    picture(clips / "sub" / "hf.png")
    (clips / "sub" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    picture(clips / "both.png", "same"), (clips / "both.caption").write_text("same")
    picture(clips / "two.png", "one"), (clips / "two.caption").write_text("other")
    picture(clips / "none.png", "None")
    picture(clips / "broken.png"), (clips / "broken.json").write_text("{")
    (clips / "txt.json").write_text('{"text": null}')
    scan = scanned(clips)
    assert texts(scan) == {
        "txt.png": "one",
        "caption.png": "two",
        "json.png": "three",
        "hf.png": "four",
        "both.png": "same",
    }
    reasons = {Path(path).name: reason for path, reason in scan.left_out.items()}
    assert reasons.keys() == {"facts.png", "two.png", "none.png", "broken.png"}
    assert reasons["two.png"] == "two captions that differ, in two.txt and two.caption; keep one"
    assert reasons["none.png"] == "its caption in none.txt is empty"
    assert "broken.json is not valid JSON" in reasons["broken.png"]
    assert scan.captions.unknown.count == 1
    assert sum(scan.account().values()) == scan.folder.num_files


def test_captions_from_several_tables_are_read_strictly(clips, tmp_path):
    for name in "abcde":
        picture(clips / f"{name}.png")
    first = tmp_path / "first.csv"
    first.write_text("path,text\na.png,a ball, red\nb.png,one\nc.png,None\nx.png,elsewhere\n")
    second = tmp_path / "second.jsonl"
    second.write_text('{"file_name": "clips/d.png", "caption": "two"}\n{"file_name": "e.png", "caption": 5}\n')
    scan = scanned(clips, captions=[first, second])
    assert texts(scan) == {"b.png": "one", "d.png": "two"}
    assert scan.captions.set_aside == [
        f"{first}, line 2: 3 cells, but the header has 2; put cells that hold commas in quotes",
        f"{second}, line 2: text is 5, expected text",
    ]
    assert scan.captions.unknown.example == "x.png (first.csv, line 5)"
    second.write_text('{"file_name": "b.png", "caption": "another"}\n')
    with pytest.raises(OpenSoraError, match=r"have two for b\.png, the second one in line 1"):
        scanned(clips, captions=[first, second])
    first.write_text("path;text\na.png;one\n")
    with pytest.raises(OpenSoraError, match="separated by semicolons"):
        scanned(clips, captions=[first])


def test_a_folder_that_cannot_be_entered_is_named(clips, monkeypatch):
    picture(clips / "a.png", "one")
    picture(clips / "closed" / "b.png")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert look_into(clips).unreadable == {str(clips / "closed"): "Permission denied"}
    assert any("closed cannot be read: Permission denied" in line for line in scanned(clips).account_lines())


def test_many_left_out_are_told_by_reason(clips):
    picture(clips / "good.png", "good")
    for number in range(120):
        (clips / f"{number}.mp4").touch()
    lines = list(scanned(clips).left_out_lines())
    assert lines[0] == "left out: 120" and len(lines) == 103
    assert lines[-2:] == ["  and 20 more (--json names all); in all", "  120: an empty file, not a video"]
