"""`opensora generate --max-memory`: the plan chooses what makes a clip fit, and the clip stays the same."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_pipeline import make_pipeline

from opensora.cli.main import main
from opensora.media.read import read_video

PROMPT, SIZE = "a small red ball", ["--height", "64", "--width", "96", "--num-frames", "17", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return str(folder)


def generate(model: str, *args: str) -> int:
    return main(["generate", PROMPT, "--model", model, *SIZE, "--num-inference-steps", "2", *args])


def needed_mb(model: str, capsys: pytest.CaptureFixture) -> list[float]:
    """Of the ways that a plan lists: as it is, and with less and less."""
    assert main(["plan", "--model", model, *SIZE, "--dtype", "float32", "--json"]) == 0
    ways = json.loads(capsys.readouterr().out)["ways"]
    return [way["needed_bytes"] / 2**20 for way in ways]


@pytest.mark.slow
def test_choices_are_made_where_memory_is_short_and_change_no_pixel(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    needed = needed_mb(model, capsys)
    assert max(needed) > min(needed)
    assert generate(model, "--output", "usual.mkv") == 0
    assert "predicted" not in capsys.readouterr().err
    assert generate(model, "--output", "roomy.mkv", "--max-memory", "64GB") == 0
    assert "to fit into 64.0 GB: as it is" in capsys.readouterr().err
    memory = f"{min(needed) + 0.001:.4f}MB"
    assert generate(model, "--output", "fitted.mkv", "--max-memory", memory, "--dtype", "float32") == 0
    assert "--offload" in capsys.readouterr().err
    usual, *others = (read_video(f"{name}.mkv")[0] for name in ("usual", "roomy", "fitted"))
    assert all(np.array_equal(usual, other) for other in others)


def test_a_clip_is_made_again_in_less_memory(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    again = ["--max-memory", f"{min(needed_mb(model, capsys)) + 0.001:.4f}MB"]
    assert generate(model, "--output", "one.mkv") == 0
    assert main(["generate", "--from", "one.mkv", "--model", model, "--output", "two.mkv", *again]) == 0
    assert np.array_equal(read_video("one.mkv")[0], read_video("two.mkv")[0])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-memory", "lots"], "--max-memory is 'lots', expected a size such as 24GB"),
        (["--max-memory", "1MB"], "does not fit into 1 MB"),
        (["--max-memory", "8GB", "--offload", "blocks"], "leave out --offload"),
        (["--max-memory", "8GB", "--micro-batch-size", "2"], "leave out --micro-batch-size"),
    ],
)
def test_what_cannot_be_is_one_line(
    model: str, args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert generate(model, "--output", str(tmp_path / "clip.mp4"), *args) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
