"""`opensora data`: manifests of folders as labs have them, and the plan before training."""

import json
import os
import re

import pytest
from broken_clips import BUCKETS, NUM_FRAMES, make_broken_clips, moving_square

from opensora.cli.main import main
from opensora.data import scan
from opensora.manifest import read_manifest
from opensora.media.write import write_video


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return make_broken_clips(tmp_path_factory.mktemp("broken") / "clips", num_good=6)


@pytest.fixture
def buckets(tmp_path):
    path = tmp_path / "buckets.json"
    path.write_text(json.dumps(BUCKETS))
    return path


def error_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("opensora: ") and error.count("\n") == 1
    return error


# --- manifest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["count", "decode"])
def test_a_manifest_holds_what_can_be_read_and_names_the_rest(broken, tmp_path, capsys, verify):
    output = tmp_path / "new folder" / "clips.csv"
    assert main(["data", "manifest", str(broken.folder), "--output", str(output), "--verify", verify]) == 0
    found = read_manifest(output)
    assert {row.path.name for row in found.rows} == {*broken.usable, *broken.dropped} and not found.rejected
    for row in found.rows:
        assert row.path.exists() and row.text == f'what "{row.path.name}" shows,\nin two lines'
    by_name = {row.path.name: row for row in found.rows}
    assert (by_name["another video.jpg"].num_frames, by_name["another video.jpg"].fps) == (NUM_FRAMES, 8.0)
    assert (by_name["a picture.mp4"].num_frames, by_name["a picture.mp4"].fps) == (1, None)
    printed = capsys.readouterr().out
    assert f"left out: {len(broken.broken)}" in printed
    for name, reason in broken.broken.items():
        (line,) = [line for line in printed.splitlines() if f"/{name}: " in line]
        assert reason in line
    assert list(output.parent.iterdir()) == [output], "no journal is left"


def test_json_for_programs(broken, tmp_path, capsys):
    assert main(["data", "manifest", str(broken.folder), "--output", str(tmp_path / "a.parquet"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == len(read_manifest(tmp_path / "a.parquet").rows)
    assert {path.rpartition("/")[2] for path in told["left_out"]} == set(broken.broken)


def test_captions_from_a_table(tmp_path, capsys):
    for name in ("a b.mp4", "été.mp4", "c.mp4"):
        write_video(tmp_path / "clips" / name, moving_square(3), 8)
    table = tmp_path / "captions.csv"
    table.write_text('\ufeffid,path,text\n1,a b.mp4,"one, ""two"""\n2,clips/été.mp4,drei\n', encoding="utf-8")
    args = ["data", "manifest", str(tmp_path / "clips"), "--output", str(tmp_path / "m.csv"), "--captions", str(table)]
    assert main(args) == 0
    assert {row.path.name: row.text for row in read_manifest(tmp_path / "m.csv").rows} == {
        "a b.mp4": 'one, "two"',
        "été.mp4": "drei",
    }
    assert "c.mp4: no caption" in capsys.readouterr().out
    assert main([*args, "--uncaptioned"]) == 0
    assert len(read_manifest(tmp_path / "m.csv", text_required=False).rows) == 3
    capsys.readouterr()
    table.write_text("path,text\nelsewhere.mp4,one\n")
    assert main(args) == 2
    assert "name none of the clips" in error_line(capsys)
    table.write_text("file,text\na.mp4,one\n")
    assert main(args) == 2
    assert "no column path" in error_line(capsys)


def test_two_captions_for_one_clip_are_refused(tmp_path, capsys):
    write_video(tmp_path / "clips" / "a.mp4", moving_square(3), 8)
    table = tmp_path / "captions.csv"
    table.write_text("path,text\na.mp4,one\na.mp4,one\nclips/a.mp4,two\n")
    args = ["data", "manifest", str(tmp_path / "clips"), "--output", str(tmp_path / "m.csv"), "--captions", str(table)]
    assert main(args) == 2
    assert "two for clips/a.mp4, the second one in line 4" in error_line(capsys)
    assert not (tmp_path / "m.csv").exists()


def test_what_is_no_file_and_captions_that_are_no_text_are_named(tmp_path, capsys):
    for name in ("good", "latin"):
        write_video(tmp_path / "clips" / f"{name}.mp4", moving_square(3), 8)
    (tmp_path / "clips" / "good.txt").write_text("a square")
    (tmp_path / "clips" / "latin.txt").write_bytes("un carré".encode("latin-1"))
    (tmp_path / "clips" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    os.mkfifo(tmp_path / "clips" / "pipe.mp4")
    assert main(["data", "manifest", str(tmp_path / "clips"), "--output", str(tmp_path / "m.csv")]) == 0
    printed = capsys.readouterr().out
    assert [row.path.name for row in read_manifest(tmp_path / "m.csv").rows] == ["good.mp4"]
    assert "left out: 3" in printed
    for line in ("gone.mp4: no file, but a link to nothing", "pipe.mp4: no file\n", "latin.txt is not UTF-8"):
        assert line in printed


def test_an_interrupted_scan_goes_on_where_it_was(broken, tmp_path, monkeypatch, capsys):
    probed = []
    real = scan.probe

    def probe(path, verify):
        if len(probed) == 7:
            raise KeyboardInterrupt
        probed.append(path.name)
        return real(path, verify)

    monkeypatch.setattr(scan, "probe", probe)
    args = ["data", "manifest", str(broken.folder), "--output", str(tmp_path / "m.csv"), "--workers", "1"]
    assert main(args) == 130
    assert not (tmp_path / "m.csv").exists()
    first = list(probed)
    os.utime(broken.folder / first[0])  # this one has changed since
    monkeypatch.setattr(scan, "probe", lambda path, verify: probed.append(path.name) or real(path, verify))
    assert main(args) == 0
    again = probed[len(first) :]
    assert set(again) & set(first) <= {first[0], first[-1]} and first[0] in again  # the last may not be noted yet
    assert len(read_manifest(tmp_path / "m.csv").rows) == len(broken.usable) + len(broken.dropped)
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["FOLDER/nowhere", "--output", "FOLDER/m.csv"], "does not exist"),
        (["FOLDER/file.txt", "--output", "FOLDER/m.csv"], "is a file, expected a folder"),
        (["FOLDER", "--output", "FOLDER/m.csv"], "no clips in .* files of other kinds .*.txt"),
        (["FOLDER", "--output", "FOLDER/m.json"], "ends in .csv or .parquet"),
        (["FOLDER", "--output", "FOLDER/m.csv", "--workers", "0"], "--workers is 0"),
        (["FOLDER", "--output", "FOLDER/m.csv", "--verify", "all"], "count"),
        (["FOLDER"], "--output"),
    ],
)
def test_mistakes_with_manifests(tmp_path, capsys, args, message):
    (tmp_path / "file.txt").write_text("a")
    assert main(["data", "manifest", *[arg.replace("FOLDER", str(tmp_path)) for arg in args]]) == 2
    line = error_line(capsys)
    assert re.search(message, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_a_folder_of_broken_clips_makes_no_manifest(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    assert main(["data", "manifest", str(tmp_path), "--output", str(tmp_path / "m.csv")]) == 2
    told = capsys.readouterr()
    assert "a.mp4: not a video" in told.out and "no manifest was written" in told.err
    assert not (tmp_path / "m.csv").exists()


# --- plan -------------------------------------------------------------------------------------------------------------


def test_the_plan_names_everything_that_is_dropped(broken, buckets, capsys):
    assert main(["data", "plan", str(broken.manifest), "--buckets", str(buckets), "--verify"]) == 0
    printed = capsys.readouterr().out
    for name, reason in broken.broken.items():
        (line,) = [line for line in printed.splitlines() if f"/{name}: " in line]
        assert reason in line
    for name, reason in broken.dropped.items():
        assert f"dropped: 1 {reason}" in printed and f"/{name} (" in printed
    assert "48x64 9f" in printed and "48x64 1f" in printed
    assert f"{len(broken.usable)} of {len(broken.usable) + len(broken.dropped)} clips" in printed


def test_the_plan_in_numbers(broken, buckets, capsys):
    args = ["data", "plan", str(broken.manifest), "--buckets", str(buckets), "--verify", "--json"]
    assert main([*args, "--ranks", "2", "--microbatches", "2", "--batches-in-a-row", "4"]) == 0
    plan = json.loads(capsys.readouterr().out)
    # 9 videos make 5 batches of 2, 2 images make 1; a run of 4 and one of what is left, filled evenly.
    assert [(b["label"], b["clips"], b["batches"], b["repeats"]) for b in plan["buckets"]] == [
        ("48x64 9f", 9, 6, 3),
        ("48x64 1f", 2, 2, 2),
    ]
    assert (plan["rows"], plan["clips"], plan["batches"], plan["steps"], plan["by_chance"]) == (13, 11, 8, 2.0, False)
    assert plan["mixed_steps"] == 0
    assert {d["reason"]: d["clips"] for d in plan["dropped"]} == {"too small": 1, "too short": 1}
    assert len(plan["broken"]) == len(broken.broken) and plan["rejected"] == []


def test_a_plan_of_nothing_is_refused(broken, tmp_path, capsys):
    (tmp_path / "b.json").write_text('{"720p": {"51": [1.0, 2]}}')
    assert main(["data", "plan", str(broken.manifest), "--buckets", str(tmp_path / "b.json")]) == 2
    told = capsys.readouterr()
    assert "dropped: 18 too small" in told.out and "nothing to train on: 18 too small" in told.err


def test_rows_set_aside_are_told(tmp_path, buckets, capsys):
    table = tmp_path / "m.csv"
    table.write_text(
        "path,text,num_frames,height,width,fps\na.mp4,a,20,48,64,8\nb.mp4,,20,48,64,8\nc.mp4,c,x,48,64,8\n"
    )
    args = ["data", "plan", str(table), "--buckets", str(buckets)]
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert "rows set aside: 2" in printed
    assert "row 2, line 3 (b.mp4): no text" in printed and "row 3, line 4 (c.mp4): num_frames is 'x'" in printed
    assert main([*args, "--uncaptioned"]) == 0
    assert "rows set aside: 1" in capsys.readouterr().out


def test_a_recipe_says_its_buckets(broken, capsys):
    assert main(["data", "plan", str(broken.manifest), "--recipe", "v1_2_stage1"]) == 2
    assert "too small" in error_line_after_table(capsys)
    assert main(["data", "plan", str(broken.manifest), "--recipe", "toybox"]) == 2
    assert "does not train on the clips of a manifest" in error_line(capsys)


def error_line_after_table(capsys) -> str:
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    return told.err


@pytest.mark.parametrize(
    ("manifest", "buckets", "more", "message"),
    [
        (None, '{"240p": {"51": [1, 2]}}', [], "does not exist"),
        ("path,text\n", '{"240p": {"51": [1, 2]}}', [], "no column num_frames and no height and no width and no fps"),
        ("path,text,num_frames,height,width,fps\n", '{"240p": {"51": [1, 2]}}', [], "the manifest has no rows"),
        ("path,text,num_frames,height,width,fps\n", "{}", [], "no buckets"),
        ("path,text,num_frames,height,width,fps\n", "[]", [], "expected a JSON object"),
        ("path,text,num_frames,height,width,fps\n", '{"240": {"51": [1, 2]}}', [], "did you mean 240p"),
        ("path,text,num_frames,height,width,fps\n", '{"240p": {"51": [1, 2]}}', ["--ranks", "0"], "--ranks is 0"),
        ("path,text,num_frames,height,width,fps\n", '{"240p": {"51": [1, 2]', [], "not valid JSON"),
    ],
)
def test_mistakes_with_plans(tmp_path, capsys, manifest, buckets, more, message):
    if manifest is not None:
        (tmp_path / "m.csv").write_text(manifest)
    (tmp_path / "b.json").write_text(buckets)
    args = ["data", "plan", str(tmp_path / "m.csv"), "--buckets", str(tmp_path / "b.json"), *more]
    assert main(args) == 2
    assert message in error_line_after_table(capsys)


def test_sizes_come_from_one_place(broken, buckets, capsys):
    assert main(["data", "plan", str(broken.manifest)]) == 2
    assert "--recipe NAME or --buckets" in error_line(capsys)
    args = ["data", "plan", str(broken.manifest), "--buckets", str(buckets), "--recipe", "v1_2_stage1"]
    assert main(args) == 2
    assert "give one of them" in error_line(capsys)
    assert main(["data", "plan", str(broken.manifest), "--recipe", "v1_2_stage_1"]) == 2
    assert "v1_2_stage1" in error_line(capsys)


@pytest.mark.parametrize("recipe", ["v2_0_image", "v2_0_stage1_i2v", "v2_0_stage2", "v2_0_high_compression"])
def test_plans_of_recipes_with_resolutions_by_pixels(recipe, tmp_path, capsys):
    """Clips of 60 frames a second are counted at 20, which is what at most 24 leaves of them."""
    table = tmp_path / "clips.csv"
    rows = [f"{k}.png,a picture,1,1200,1200," for k in range(40)]
    rows += [f"slow{k}.mp4,a walk,300,720,1280,24" for k in range(20)]
    rows += [f"fast{k}.mp4,a race,301,720,1280,60" for k in range(20)]
    table.write_text("\n".join(["path,text,num_frames,height,width,fps", *rows]))
    assert main(["data", "plan", str(table), "--recipe", recipe, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    clips = {bucket["label"]: bucket["clips"] for bucket in plan["buckets"]}
    if recipe == "v2_0_image":
        assert sum(clips.values()) == 40 and {bucket.split()[0] for bucket in clips} == {"256px", "768px", "1024px"}
        return
    side = {"v2_0_stage1_i2v": "256px", "v2_0_stage2": "768px"}.get(recipe, "768px_32d")
    longest, shorter = ("128f", "100f") if side.endswith("d") else ("129f", "97f")
    assert clips[f"{side} {longest}"] == 20 and clips[f"{side} {shorter}"] == 20
    assert sum(count for label, count in clips.items() if label.endswith(" 1f")) == 40
