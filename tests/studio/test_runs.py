"""Training runs as the page tells of them."""

import json
import os
from pathlib import Path

import pytest

from opensora.studio.runs import MOST_POINTS, NoRun, describe_run, list_runs, preview_of


def write_run(folder: Path, num_steps: int, at: int = 0) -> None:
    (folder / "previews").mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 1 / step, "bad": None}) for step in range(1, num_steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9']))
    os.utime(folder / "metrics.jsonl", (at, at))


def test_runs_are_listed_by_when_they_were_written_to(tmp_path: Path) -> None:
    write_run(tmp_path / "old", 3, at=100)
    write_run(tmp_path / "deeper" / "new", 3, at=200)
    write_run(tmp_path / "a" / "b" / "c" / "too deep", 3)
    assert list_runs(tmp_path) == ["deeper/new", "old"]
    assert list_runs(tmp_path / "nothing") == []


def test_curves_are_read_as_far_as_they_are_written(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 4)
    assert describe_run(tmp_path, "run")["curves"] == {"loss": [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]}


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 10 * MOST_POINTS)
    curve = describe_run(tmp_path, "run")["curves"]["loss"]
    assert len(curve) == MOST_POINTS
    assert (curve[0][0], curve[-1][0]) == (1, 10 * MOST_POINTS)


def test_previews_are_the_newest_ones(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 1)
    for step in range(20):
        (tmp_path / "run" / "previews" / f"step-{step:08d}-0.mp4").touch()
    (tmp_path / "run" / "previews" / "step-00000099.txt").touch()
    names = describe_run(tmp_path, "run")["previews"]
    assert names[0] == "step-00000019-0.mp4" and len(names) == 12
    assert preview_of(tmp_path, "run", names[0]).name == names[0]


@pytest.mark.parametrize("name", ["..", "../secret", "/etc", "", "run/../../secret", "other", "run\0"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / "runs" / "run", 1)
    write_run(tmp_path / "secret", 1)
    with pytest.raises(NoRun):
        describe_run(tmp_path / "runs", name)


@pytest.mark.parametrize("file", ["../metrics.jsonl", "metrics.jsonl", "nothing.mp4", ""])
def test_nothing_but_previews_is_handed_out(tmp_path: Path, file: str) -> None:
    write_run(tmp_path / "run", 1)
    with pytest.raises(NoRun):
        preview_of(tmp_path, "run", file)
