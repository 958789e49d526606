"""Clips of which a part is forecast: by rule, by a calibration, recorded, and made again."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_pipeline import make_pipeline

from opensora.cli.main import main
from opensora.errors import OpenSoraError
from opensora.generation.engine import Engine
from opensora.generation.fast import FOLDER, Calibration
from opensora.generation.record import read_record, request_of
from opensora.generation.request import ClipRequest
from opensora.sampling.forecast_plan import FAST, ForecastPlan, RatedPlan
from opensora.settings import save_settings

PROMPT = "a small red ball rolls left"
PLANS = (
    RatedPlan(4, 0.5, ForecastPlan("all none none none all", 0, 0)),
    RatedPlan(6, 0.2, ForecastPlan("all all none none all", 1, 0)),
    RatedPlan(10, 0.0, ForecastPlan("all all all all all")),
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline(num_inference_steps=5).save_pretrained(folder)
    return Engine.load(ClipRequest("", model=str(folder), device="cpu"))


@pytest.fixture
def asked(engine: Engine) -> ClipRequest:
    assert engine.model is not None
    return ClipRequest(PROMPT, model=str(engine.model.folder), seed=3, device="cpu")


def calibration(engine: Engine, **other: object) -> Calibration:
    assert engine.model is not None
    known = Calibration("model", engine.model.sha256, engine.pipeline.describe()["scheduler"], 5, 2, 10, PLANS)
    return dataclasses.replace(known, **other)  # type: ignore[arg-type]


def test_without_a_calibration_steps_are_spread_evenly(engine: Engine, asked: ClipRequest) -> None:
    (clip,) = engine.prepare([dataclasses.replace(asked, fast="quality")])
    assert (
        clip.sampling.forecast == ForecastPlan.even(5, FAST["quality"]) == ForecastPlan("all none all none all", 1, 1)
    )
    assert any("no calibration of this model fits 5 steps" in note for note in clip.notes)
    made, exact = engine.make(clip), engine.generate(asked)
    assert (made.num_evaluations, made.num_forecast) == (6, 4)
    assert (exact.num_evaluations, exact.num_forecast) == (10, 0)
    assert not np.array_equal(made.frames, exact.frames)


@pytest.mark.parametrize(("fast", "evaluations"), [("quality", 6), ("balanced", 4), ("draft", 4)])
def test_a_calibration_s_best_plan_is_taken(
    engine: Engine, asked: ClipRequest, tmp_path: Path, fast: str, evaluations: int
) -> None:
    save_settings(calibration(engine), tmp_path / "found.json")
    request = dataclasses.replace(asked, fast=fast, calibration=tmp_path / "found.json")
    (clip,) = engine.prepare([request])
    assert clip.notes == () and engine.make(clip).num_evaluations == evaluations


def test_a_model_s_own_calibration_is_found(engine: Engine, asked: ClipRequest, tmp_path: Path) -> None:
    assert engine.model is not None and engine.model.folder is not None
    for name, other in {"a": {"num_steps": 4}, "b": {"model_hash": "0" * 64}, "c": {}}.items():
        plans = PLANS if name != "a" else (RatedPlan(4, 0.1, ForecastPlan("all none none all")),)
        save_settings(calibration(engine, plans=plans, **other), tmp_path / FOLDER / f"{name}.json")
    beside = Engine(engine.pipeline, dataclasses.replace(engine.model, folder=tmp_path), asked)
    four, five, three = (
        beside.prepare([dataclasses.replace(asked, fast="quality", num_inference_steps=steps)])[0]
        for steps in (4, 5, 3)
    )
    assert four.sampling.forecast == ForecastPlan("all none none all") and not four.notes
    assert five.sampling.forecast == PLANS[1].plan and not five.notes
    assert three.sampling.forecast == ForecastPlan.even(3, FAST["quality"]) and three.notes


def test_a_clip_is_made_again_from_its_record(engine: Engine, asked: ClipRequest, tmp_path: Path) -> None:
    """Whatever calibrations there are then: the plan itself is recorded."""
    save_settings(calibration(engine), tmp_path / "found.json")
    request = dataclasses.replace(asked, fast="quality", calibration=tmp_path / "found.json")
    clip = engine.generate(request)
    path = clip.save(tmp_path / "clip.mp4")
    (tmp_path / "found.json").unlink()
    again = request_of(read_record(path), {})
    assert again.fast == "quality" and again.forecast == PLANS[1].plan
    again = dataclasses.replace(again, model=asked.model, dtype=None)
    assert np.array_equal(engine.generate(again).frames, clip.frames)
    assert json.loads(path.with_name("clip.mp4.json").read_text())["sampling"]["forecast"]["steps"]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"model_hash": "0" * 64}, "is for another model \\(model, hash 000000000000; this one has"),
        ({"scheduler": {"class": "IDDPMScheduler"}}, "another way to sample \\(class 'IDDPMScheduler' there"),
        (
            {"num_steps": 4, "plans": (RatedPlan(4, 0.1, ForecastPlan("all none none all")),)},
            "is for 4 steps \\(this clip takes 5\\)",
        ),
        ({"num_steps": 4}, "forecast plan is for 5 steps, this run has 4"),
        ({"plans": ()}, "holds no plans"),
    ],
)
def test_calibrations_that_do_not_fit(
    engine: Engine, asked: ClipRequest, tmp_path: Path, other: dict, words: str
) -> None:
    save_settings(calibration(engine, **other), tmp_path / "found.json")
    with pytest.raises(OpenSoraError, match=words) as error:
        engine.prepare([dataclasses.replace(asked, fast="draft", calibration=tmp_path / "found.json")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"fast": "qualty"}, "unknown `fast` 'qualty'; did you mean quality"),
        ({"calibration": Path("found.json")}, "give `fast`, or leave out `calibration`"),
        ({"fast": "draft", "calibration": Path("nowhere.json")}, "nowhere.json"),
        ({"forecast": ForecastPlan("all none all")}, "is for 3 steps, this run has 5"),
    ],
)
def test_wishes_that_cannot_be_granted(engine: Engine, asked: ClipRequest, wish: dict, words: str) -> None:
    with pytest.raises(OpenSoraError, match=words):
        engine.prepare([dataclasses.replace(asked, **wish)])


def test_calibrated_and_generated(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way: a model in a folder, its calibration beside it, clips that say what they cost."""
    model, clip = tmp_path / "model", str(tmp_path / "clip.mp4")
    make_pipeline("iddpm", num_inference_steps=6).save_pretrained(model)
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\na large blue ring spins\n")
    asked = ["calibrate", str(model), "--prompts", "2", "--device", "cpu"]
    assert main(asked) == 2
    assert "which prompts is" in capsys.readouterr().err and not (model / FOLDER).exists()
    assert main([*asked, "--prompt-path", str(tmp_path / "prompts.txt")]) == 0
    written = model / FOLDER / "default.json"
    assert capsys.readouterr().out.splitlines()[-1] == str(written)
    found = Calibration.read(written)
    assert (found.num_steps, found.num_prompts, found.evaluations) == (6, 2, 12)
    assert found.plans[-1].evaluations == 12 and found.plans[-1].error == 0
    assert main(["generate", PROMPT, "--model", str(model), "--fast", "balanced", "--output", clip]) == 0
    told = capsys.readouterr().err
    assert "made with 4 of 12 evaluations of the network, fast balanced" in told and "note" not in told
    given = ["--fast", "balanced", "--calibration", str(written), "--num-inference-steps", "7", "--output", clip]
    assert main(["generate", PROMPT, "--model", str(model), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--calibration" in line and "is for 6 steps (this clip takes 7)" in line


def test_ways_of_fast_are_an_axis_of_a_comparison(asked: ClipRequest, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n")
    given = ["--model", asked.model_name, "--suite", str(tmp_path / "prompts.txt"), "--prompts", "1", "--device", "cpu"]
    given += ["--metrics", "colour", "--output", str(tmp_path / "found")]
    assert main(["compare", *given, "--fast", "none", "quality"]) == 0
    exact, fast = (read_record(tmp_path / "found" / "clips" / f"00{column}-0000-000.mp4") for column in range(2))
    assert exact.sampling.forecast is None and fast.sampling.fast == "quality"
    assert fast.sampling.forecast == ForecastPlan.even(5, FAST["quality"]) and fast.seed == exact.seed


def test_bundled_models_bring_a_calibration_of_their_default_steps() -> None:
    from opensora.checkpoints.source import ModelSource

    for name, steps in (("toybox", 20), ("toybox-iddpm", 50)):
        source = ModelSource.find(name)
        assert source.folder is not None
        found = Calibration.read(source.folder / FOLDER / "default.json")
        assert found.model_hash == source.hash() and found.num_steps == steps
        for fast, share in FAST.items():
            assert 0.9 * share < found.rated(fast).evaluations / (2 * steps) <= share
