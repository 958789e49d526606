"""A comparison makes what `opensora generate` makes, keeps every clip that is done, and ends in the same table."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from opensora.cli.main import main
from opensora.errors import OpenSoraError
from opensora.evaluation.suites import read_suite
from opensora.generation.engine import Engine
from opensora.generation.request import ClipRequest
from opensora.lab.compare import Comparison, run, save_table
from opensora.lab.grid import columns_of
from opensora.lab.page import write_page
from opensora.lab.rows import read_rows
from opensora.lab.summary import summarise
from opensora.media.read import read_video
from opensora.media.write import write_video
from opensora.tables import import_pyarrow

QUICK = ClipRequest("", num_inference_steps=1, num_frames=5, device="cpu")


def small(num_prompts: int = 2, num_seeds: int = 1, batch_size: int = 1) -> Comparison:
    columns = columns_of(QUICK, {"guidance_scale": [1.0, 4.0]})
    return Comparison(tuple(columns), tuple(read_suite("toybox", num_prompts)), num_seeds, ("colour",), batch_size)


def test_a_comparison_is_clips_rows_a_table_and_a_page(tmp_path: Path) -> None:
    comparison, seen = small(num_seeds=2), []
    rows = run(comparison, tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 8) for done in range(9)]
    assert [row["cell"] for row in rows] == [cell.name for cell in comparison.cells]
    table = save_table(comparison, tmp_path / "out", rows)
    kept = import_pyarrow()[1].read_table(table).to_pylist()
    assert [row["guidance_scale"] for row in kept] == ["1"] * 4 + ["4"] * 4
    assert kept[0]["right_all"] in (0, 1) and kept[0]["num_frames"] == 5
    page = write_page(comparison, tmp_path / "out", rows, summarise(comparison, rows), "opensora compare").read_text()
    assert page.count("data:video/mp4;base64,") == 8 and "{{" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page


def test_a_clip_is_the_one_that_generate_makes(tmp_path: Path) -> None:
    comparison = small(num_prompts=1)
    run(comparison, tmp_path)
    prompt = comparison.prompts[0]
    request = ClipRequest(prompt.text, seed=prompt.seed(0), num_inference_steps=1, num_frames=5, guidance_scale=4.0)
    alone = Engine.load(ClipRequest("", device="cpu")).generate(request).save(tmp_path / "alone.mkv")
    record = json.loads((tmp_path / "clips" / "001-0000-000.mp4.json").read_text())
    assert record["seed"] == prompt.seed(0) and record["sampling"]["guidance_scale"] == 4
    clip, again = tmp_path / "clips" / "001-0000-000.mp4", tmp_path / "again.mkv"
    assert main(["generate", "--from", str(clip), "--output", str(again)]) == 0
    assert np.array_equal(read_video(again)[0], read_video(alone)[0])


def test_what_latents_stand_for_may_vary(tmp_path: Path) -> None:
    columns = columns_of(QUICK, {"latent_space": [None, "0.5", '{"scale": null}']})
    assert [column.name for column in columns][:2] == ["latent_space default", "latent_space 0.5"]
    comparison = Comparison(tuple(columns), tuple(read_suite("toybox", 1)), 1, ("colour",))
    rows = run(comparison, tmp_path)
    assert [row["latent_space"] for row in rows] == ["default", "0.5", '{"scale": null}']
    clips = [tmp_path / "clips" / f"{number:03d}-0000-000.mp4" for number in range(3)]
    spaces = [json.loads(Path(f"{clip}.json").read_text())["pipeline"]["latent_space"] for clip in clips]
    assert spaces[0]["replaces"] is None and spaces[1]["scaling_factor"] == 0.5
    assert spaces[1]["scale"] == spaces[0]["scale"] and spaces[2]["scale"] is None
    frames = [read_video(clip)[0] for clip in clips]
    assert not np.array_equal(frames[0], frames[1]) and not np.array_equal(frames[0], frames[2])
    again = tmp_path / "again.mkv"
    assert main(["generate", "--from", str(clips[2]), "--output", str(again)]) == 0
    prompt = comparison.prompts[0]
    wanted = Engine.load(ClipRequest("", device="cpu", latent_space={"scale": None})).generate(
        ClipRequest(prompt.text, seed=prompt.seed(0), num_inference_steps=1, num_frames=5)
    )
    assert np.array_equal(read_video(again)[0], wanted.frames)


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    comparison = small()
    rows = run(comparison, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").glob("*.mp4")}
    lost = tmp_path / "clips" / "001-0000-000.mp4"
    lost.unlink()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"cell": "001-00')  # killed while it was written
    assert run(comparison, tmp_path) == rows
    assert {path for path in times if path.stat().st_mtime_ns != times[path]} == {lost}
    assert len(read_rows(tmp_path / "rows.jsonl")) == 4


def test_a_folder_belongs_to_one_comparison(tmp_path: Path) -> None:
    run(small(num_prompts=1), tmp_path / "out")
    with pytest.raises(OpenSoraError, match="was made with prompts"):
        run(small(num_prompts=2), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(OpenSoraError, match="something else than a comparison"):
        run(small(), tmp_path / "mine")


def test_rows_are_kept_in_a_file(tmp_path: Path) -> None:
    run(small(num_prompts=1), tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "rows.jsonl").symlink_to("/dev/null")
    with pytest.raises(OpenSoraError, match=r"rows\.jsonl is a device"):
        run(small(num_prompts=1), tmp_path)


def test_batches_change_a_clip_by_no_more_than_rounding(tmp_path: Path) -> None:
    run(small(), tmp_path / "one")
    run(small(batch_size=2), tmp_path / "two")
    for name in ("000-0001-000", "001-0001-000"):
        one, two = (read_video(tmp_path / which / "clips" / f"{name}.mp4")[0].astype(int) for which in ("one", "two"))
        assert np.abs(one - two).mean() < 0.5


COMMAND = ("compare", "--guidance-scale", "1", "4", "--prompts", "2", "--seeds", "2", "--num-frames", "5")
COMMAND += ("--num-inference-steps", "2", "--metrics", "colour", "--device", "cpu")


@pytest.mark.multi
def test_a_killed_comparison_ends_in_the_table_of_one_that_was_not(tmp_path: Path) -> None:
    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "opensora", *COMMAND, "--output", tmp_path / name, "--workers", "2"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    for least in (1, 4):
        process, rows = start("killed"), tmp_path / "killed" / "rows.jsonl"
        while not (rows.exists() and rows.read_bytes().count(b"\n") >= least):
            with pytest.raises(subprocess.TimeoutExpired):  # it is not done yet
                process.wait(timeout=0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("killed").wait() == 0
    tables = [(tmp_path / name / "rows.parquet").read_bytes() for name in ("whole", "killed")]
    assert tables[0] == tables[1]
    assert not [path for path in (tmp_path / "killed").rglob("*") if path.name.endswith(".part")]


def test_clips_of_other_programs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for folder, spread in (("sharp", 255), ("flat", 20)):
        for name in ("one", "two"):
            write_video(tmp_path / folder / f"{name}.mp4", (rng.random((4, 32, 32, 3)) * spread).astype(np.uint8), 8)
    arguments = [
        "compare",
        "--clips",
        str(tmp_path / "sharp"),
        str(tmp_path / "flat"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--metrics", "colour", "sharpness"]) == 0
    assert capsys.readouterr().out.strip().endswith("index.html")
    rows = import_pyarrow()[1].read_table(tmp_path / "out" / "rows.parquet").to_pylist()
    assert [Path(row["column"]).name for row in rows] == ["sharp", "sharp", "flat", "flat"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "0"], "--seeds is 0"),
        (["--prompts", "0"], "--prompts is 0"),
        (
            ["--guidance-scale", "1", "2", "--prompts", "100", "--seeds", "50"],
            "10,000 clips, more than 2,000; give --yes",
        ),
        (["--metrics", "flickr"], "flicker"),
        (["--cfg-channels", "three"], "--cfg-channels is 'three'"),
        (["--model", "toybx"], "toybox"),
        (["--guidence-scale", "2"], "--guidance-scale"),
        (["--suite", "nothing"], "unknown suite nothing"),
        (["--num-frames", "1", "--num-inference-steps", "1", "--prompts", "1", "--metrics", "flicker"], "frame"),
        (["--clips", "."], "holds no clip"),
        (["--clips", "nowhere"], "is no folder"),
        (["--clips", ".", "--seeds", "2"], "--seeds has no effect"),
        (["--workers", "0"], "--workers is 0"),
        (["--cfg-channels", "9", "--prompts", "1"], "9"),
        (["--latent-space", "declared", "0"], "scaling_factor 0.0 given"),
        (["--latent-space", "declared", "declared"], "--latent-space has a value twice"),
        (["--clips", ".", "--latent-space", "1"], "--latent-space has no effect"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments, "--output", "out"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("opensora: ") and words in said
