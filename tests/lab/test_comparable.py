"""Clips whose figures would differ whatever they show are refused before anything is measured."""

from pathlib import Path

import numpy as np
import pytest

from opensora.cli.main import main
from opensora.lab.comparable import Measures
from opensora.media.write import write_video


def write(path: Path, num_frames: int = 5, height: int = 32, width: int = 48, fps: float = 8.0) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (num_frames, height, width, 3), np.uint8)
    write_video(path, frames, fps)


def write_folder(folder: Path, **last: float) -> None:
    """Four clips, the last of them otherwise."""
    for number in range(4):
        write(folder / f"{number}.mkv", **(last if number == 3 else {}))  # type: ignore[arg-type]


def compare(*arguments: str) -> int:
    return main(["compare", *arguments, "--metrics", "colour", "--output", "out"])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


UNLIKE = [
    ({"width": 32}, "32x48 (height x width)", "32x32", "scale=48:32"),
    ({"height": 48}, "32x48 (height x width)", "48x48", "scale=48:32"),
    ({"num_frames": 4}, "5 frames", "4;", "-frames:v 4"),
    ({"fps": 24.0}, "8 frames per second", "24;", "fps=8"),
]


@pytest.mark.parametrize(("last", "first_has", "other_has", "remedy"), UNLIKE)
def test_clips_of_one_name_that_are_unlike(
    capsys: pytest.CaptureFixture[str], last: dict, first_has: str, other_has: str, remedy: str
) -> None:
    write_folder(Path("a"))
    write_folder(Path("b"), **last)
    assert compare("--clips", "a", "b") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and not Path("out").exists()
    file = "a/3.mkv" if "num_frames" in last else "a/0.mkv"
    assert said[0].startswith(f"opensora: {file} ") and f"but b/3.mkv {other_has}" in said[0]
    assert first_has in said[0] and f"ffmpeg -i IN -{'vf ' if '=' in remedy else ''}{remedy.lstrip('-')}" in said[0]


@pytest.mark.parametrize("last", [{"height": 48}, {"fps": 24.0}])
def test_sizes_and_rates_are_those_of_the_whole_column(capsys: pytest.CaptureFixture[str], last: dict) -> None:
    write_folder(Path("a"), **last)
    assert compare("--clips", "a") == 2
    assert "a/0.mkv" in (said := capsys.readouterr().err) and "but a/3.mkv" in said


def test_lengths_are_those_of_one_name_and_rates_may_be_rounded(capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        write_folder(Path(folder), num_frames=9, fps=8.0 if folder == "a" else 8.05)
    assert compare("--clips", "a", "b") == 0
    assert capsys.readouterr().out.strip().endswith("index.html")


def test_a_picture_has_no_rate_that_others_could_miss(capsys: pytest.CaptureFixture[str]) -> None:
    for folder, fps in (("a", 8.0), ("b", 24.0)):
        write(Path(folder) / "0.png", num_frames=1)
        write(Path(folder) / "1.mkv", fps=fps)
    assert compare("--clips", "a", "b") == 2
    assert "a/1.mkv has 8 frames per second, but b/1.mkv 24" in capsys.readouterr().err


@pytest.mark.parametrize(("last", "first_has", "other_has", "remedy"), UNLIKE)
def test_a_reference_is_like_what_is_held_against_it(
    capsys: pytest.CaptureFixture[str], last: dict, first_has: str, other_has: str, remedy: str
) -> None:
    write_folder(Path("a"))
    write_folder(Path("real"), **last)
    assert compare("--clips", "a", "--reference", "real") == 2
    said = capsys.readouterr().err
    assert f"a/0.mkv {'is' if 'x' in first_has else 'has'} {first_has}, but real/3.mkv {other_has}" in said
    assert remedy in said and not Path("out").exists()


def test_a_reference_is_like_what_is_going_to_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(Path("real"), height=64, width=64)
    given = ["--reference", "real", "--device", "cpu", "--prompts", "1"]
    assert compare(*given) == 2
    assert "a clip of toybox is 64x64 (height x width), but real/0.mkv 32x48" in capsys.readouterr().err
    for number in range(3):
        write(Path("real") / f"{number}.mkv", height=64, width=64)
    assert compare(*given, "--num-frames", "9") == 2
    assert "a clip of toybox has 9 frames, but real/0.mkv 5;" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_file_that_is_cut_short_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(Path("a"))
    whole = Path("a/2.mkv").read_bytes()
    Path("a/2.mkv").write_bytes(whole[: len(whole) // 2])
    assert compare("--clips", "a") == 2
    assert "a/2.mkv cannot be read: truncated" in capsys.readouterr().err and not Path("out").exists()


def test_measures_are_those_that_are_seen() -> None:
    write(Path("a.mkv"), num_frames=3, fps=12.5)
    assert Measures.of_file(Path("a.mkv")) == Measures("a.mkv", 3, 32, 48, 12.5)
    write(Path("b.png"), num_frames=1)
    assert Measures.of_file(Path("b.png")) == Measures("b.png", 1, 32, 48, None)
