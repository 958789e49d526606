"""`opensora evaluate`: suites become results, a page and clips; two evaluations are held against each other."""

import json
from pathlib import Path

import pytest
from tiny_pipeline import make_pipeline

from opensora.cli.main import main
from opensora.evaluation.results import Results
from opensora.evaluation.suites import read_suite

QUICK = ("--num-inference-steps", "1", "--device", "cpu")


def evaluate(*args: object) -> int:
    return main(["evaluate", *map(str, args)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_pipeline().save_pretrained(folder)
    return folder


def test_the_toy_world_is_read_by_its_judge(model: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    args = ("toybox", "--model", model, *QUICK, "--num-prompts", 3, "--seeds", 2, "--output", output)
    assert evaluate(*args) == 0
    first, said = (output / "results.json").read_bytes(), capsys.readouterr().out
    results, prompts = Results.read(output), read_suite("toybox", 3)
    assert "right_all" in said and str(output / "index.html") in said
    assert results.suite == "toybox" and list(results.figures)[-1] == "right_all"
    expected = [f"{prompt.id}/{prompt.seed(number)}" for prompt in prompts for number in range(2)]
    assert [sample["id"] for sample in results.samples] == expected
    assert results.groups == [prompt.id for prompt in prompts for _ in range(2)]
    assert len(list((output / "clips").glob("*.mp4"))) == 6
    (output / "rows.jsonl").write_text("\n".join((output / "rows.jsonl").read_text().split("\n")[:2]) + "\n")
    assert evaluate(*args) == 0  # stopped after two clips, as it were
    assert (output / "results.json").read_bytes() == first


def test_other_weights_or_settings_do_not_go_on(model: Path, tmp_path: Path, capsys) -> None:
    args = ("toybox", "--model", model, *QUICK, "--num-prompts", 1, "--output", tmp_path / "out")
    assert evaluate(*args) == 0
    assert evaluate(*args, "--guidance-scale", 2) == 2
    assert "was made with" in capsys.readouterr().err
    make_pipeline(guidance_scale=2.0).save_pretrained(model.parent / "other")
    assert evaluate(*args[:2], model.parent / "other", *args[3:]) == 2


def test_a_file_of_prompts_is_measured_by_metrics(model: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("cv2")
    prompts, vbench = tmp_path / "mine.txt", tmp_path / "all_dimension.json"
    prompts.write_text("a small red ball\na large blue square\n")
    vbench.write_text(json.dumps([{"prompt_en": "a small red ball", "dimension": ["color"]}]))
    args = ("--model", model, *QUICK, "--metrics", "flicker", "colour", "--output")
    assert evaluate("prompts", prompts, *args, tmp_path / "a") == 0
    assert evaluate("prompts", vbench, *args, tmp_path / "b") == 0
    found = Results.read(tmp_path / "a")
    assert found.suite == "mine.txt" and [sample["group"] for sample in found.samples] == ["mine-00000", "mine-00001"]
    assert list(found.figures) == ["flicker_levels", "still_share", "saturation", "clipped_share"]
    assert Results.read(tmp_path / "b").samples[0]["prompt"] == "a small red ball"


def test_nothing_is_left_without_an_output(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate("toybox", "--model", model, *QUICK, "--num-prompts", 1, "--language", "zh") == 0
    assert "right_motion" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_a_regression_is_told_and_ends_with_1(tmp_path: Path, capsys) -> None:
    before = Results.read(_results(tmp_path / "a.json", 0.9))
    assert evaluate("compare", tmp_path / "a.json", tmp_path / "a.json") == 0
    assert "settings that differ: none" in capsys.readouterr().err
    _results(tmp_path / "b.json", 0.5)
    assert evaluate("compare", tmp_path / "a.json", tmp_path / "b.json") == 1
    shown = capsys.readouterr()
    assert "worse than allowed: right_all" in shown.out and "20 clips are in both" in shown.err
    assert evaluate("compare", tmp_path / "a.json", tmp_path / "b.json", "--bound", "right_all=0.5") == 0
    assert evaluate("compare", tmp_path / "a.json", tmp_path / "b.json", "--bound", "0.9") == 0
    assert evaluate("compare", tmp_path / "b.json", tmp_path / "a.json") == 0
    assert "better" in capsys.readouterr().out
    assert before.mean("right_all").value == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("toybox", "--num-prompts", "0"), "`prompts`"),
        (("toybox", "--batch-size", "0"), "--batch-size"),
        (("toybox", "--seeds", "0"), "--seeds"),
        (("toybox", "--metrics", "colours"), "unknown metric 'colours'"),
        (("toybox", "--model", "nowhere"), "nowhere"),
        (("toybox", "--output", "/proc/nowhere"), "cannot be written"),
        (("prompts",), "FILE"),
        (("prompts", "nowhere.txt"), "nowhere.txt"),
        (("prompts", "toybox"), "write opensora evaluate toybox"),
        (("compare", "a.json"), "B.json"),
        (("compare", "a.json", "b.json"), "a.json"),
        (("compare", "a.json", "b.json", "--bound", "-1"), "--bound is '-1'"),
        (("compare", "a.json", "b.json", "--bound", "right=much"), "--bound is 'right=much'"),
    ],
)
def test_mistakes_are_one_line(args: tuple[str, ...], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate(*args) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def _results(path: Path, share: float) -> Path:
    """Twenty clips of which so many are right."""
    from opensora.evaluation.metrics.metric import Figure

    figure = Figure("right_all", "", "Share that is right.", "higher")
    rights = [float(number < 20 * share) for number in range(20)]
    samples = [{"id": str(n), "group": str(n), "right_all": right} for n, right in enumerate(rights)]
    Results("toybox", {"model": "toybox"}, {"right_all": figure}, samples).save(path)
    return path
