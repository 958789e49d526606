"""Columns as sets of clips: near clips of their own kind, far from others, and told so by name."""

from pathlib import Path

import numpy as np
import pytest

from opensora.cli.main import main
from opensora.generation.clip import Clip, to_uint8
from opensora.lab.sets import features_of, keep_features, read_features
from opensora.media.write import write_video
from opensora.tables import import_pyarrow
from opensora.toybox.specs import EASY_WORLD, sample_specs
from opensora.toybox.world import render

NUM_CLIPS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of the toy world, the same in another order of frames, and other ones of the toy world."""
    folder = tmp_path_factory.mktemp("sets")
    order = np.random.default_rng(0).permutation(9)
    for name, seed in (("own", 2), ("others", 3)):
        for number, spec in enumerate(sample_specs(NUM_CLIPS, seed, EASY_WORLD, "train")):
            video, _ = render([spec], 9)
            frames = to_uint8((video[0].transpose(0, 1) + 1) / 2)
            write_video(folder / name / f"{number}.mkv", frames, 8)
            if name == "own":
                write_video(folder / "shuffled" / f"{number}.mkv", frames[order], 8)
    return folder


@pytest.mark.slow
def test_what_is_out_of_order_is_far_in_time_and_near_in_look(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--clips", str(folder / "own"), str(folder / "shuffled"), "--reference", str(folder / "others")]
    assert main(["compare", *given, "--metrics", "colour", "--output", str(folder / "out")]) == 0
    said = {line.split("\u2502")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "\u2502" in line}

    def values(name: str) -> list[float]:
        return [float(cell.split()[0]) for cell in said[name].split("\u2502")[2:4]]

    own, shuffled = values("motion_frechet")
    assert shuffled > 1.2 * own
    own, shuffled = values("look_frechet")
    assert shuffled == pytest.approx(own, rel=0.05)
    page = (folder / "out" / "index.html").read_text()
    assert "look_kernel" in page and "Grows as there are fewer clips" in page
    names = import_pyarrow()[1].read_table(folder / "out" / "rows.parquet").column_names
    assert "look_kernel" not in names, "a row is a clip"


def test_features_are_kept_and_read_as_they_were(tmp_path: Path) -> None:
    clip = Clip(np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8), 8)
    keep_features(tmp_path / "a.npz", clip)
    read = read_features([tmp_path / "a.npz"] * 2)
    assert {kind: tuple(rows.shape) for kind, rows in read.items()} == {"look": (2, 1280), "motion": (2, 64)}
    assert np.array_equal(read["motion"][1].numpy(), features_of(clip)["motion"].astype(np.float32))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--reference", "nowhere"], "nowhere is no folder"),
        (["--reference", "one"], "has 1 clips; give 4 or more"),
    ],
)
def test_a_reference_that_is_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "one" / "a.mkv", np.zeros((4, 16, 16, 3), np.uint8), 8)
    assert main(["compare", "--clips", "one", "--metrics", "colour", "--output", "out", *given]) == 2
    assert words in capsys.readouterr().err
