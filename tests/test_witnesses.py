"""What was made before is made still: latents, saved models, clips and their records, runs, results.

See `witnesses/README.md`. On a processor and with libraries that compute as those did that the witnesses were made
with, the bits are the same; on any other, the numbers are very nearly.
"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from witnesses import cases
from witnesses.cases import CLIPS, HERE, LATENTS, LOOPS, LOSSES, LOSSES_OF, MODELS, RUNS, STOPPED_RUNS

from opensora.checkpoints.source import ModelSource
from opensora.cli.main import main as opensora
from opensora.generation.record import read_record
from opensora.media.read import read_video

MADE: dict[str, Any] = json.loads((HERE / "made.json").read_text())


@pytest.fixture(autouse=True)
def _one_thread():
    with cases.one_thread():
        yield


@functools.cache
def same_bits(kind: str, name: str) -> bool:
    """Whether the same bits can be expected here of that witness."""
    of_weights = name in cases.OF_WEIGHTS[kind]
    return cases.arithmetic() == MADE["arithmetic_of_weights" if of_weights else "arithmetic"]


@pytest.fixture(scope="module")
def latents() -> dict[str, Tensor]:
    return load_file(HERE / "latents.safetensors")


def test_every_case_has_its_witness(latents):
    """A table that is empty or that lacks a case would prove nothing."""
    assert latents.keys() == MADE["latents"].keys() == LATENTS.keys() and len(LATENTS) > 20
    assert {name: cases.sha256(tensor) for name, tensor in latents.items()} == MADE["latents"]
    assert MADE["loops"].keys() == LOOPS.keys() and LOOPS
    assert MADE["clips"].keys() == CLIPS.keys() and CLIPS
    assert MADE["runs"].keys() == RUNS.keys() and RUNS
    assert MADE["models"].keys() == MODELS.keys() and MODELS
    assert len(set(MADE["latents"].values())) == len(LATENTS), "no two cases are the same"


@pytest.mark.parametrize("name", LATENTS)
def test_latents(name, latents):
    made = cases.make_latents(LATENTS[name])
    torch.testing.assert_close(made, latents[name], rtol=0, atol=1e-4 * float(latents[name].abs().max()))
    if same_bits("latents", name):
        assert cases.sha256(made) == MADE["latents"][name]


@pytest.mark.parametrize("name", LOOPS)
def test_a_video_of_two_loops(name):
    made = cases.make_loops(*LOOPS[name])
    kept = load_file(HERE / "loops.safetensors")[name].float() / 255
    torch.testing.assert_close(made, kept, rtol=0, atol=1.01 / 255)
    if same_bits("loops", name):
        assert cases.sha256(made) == MADE["loops"][name]


@pytest.mark.parametrize("name", MODELS)
def test_the_hash_of_a_saved_model(name):
    assert ModelSource.find(MODELS[name]).hash() == MADE["models"][name]


# --- clips and their records ------------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A folder in which all lies under the names that the commands use."""
    for source in ("clips", "footage"):
        shutil.copytree(HERE / source, tmp_path, dirs_exist_ok=True)
    for source in ("models", "runs"):
        shutil.copytree(HERE / source, tmp_path / source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_is_made_again_from_its_record(name, desk):
    record = read_record(desk / name)
    assert record == read_record(desk / f"{name}.json") and record.versions["opensora"] == MADE["opensora"]
    found = cases.places(CLIPS[name])
    assert opensora(["generate", "--from", name, *found, "--output", f"again/{name}", "--device", "cpu"]) == 0
    (made, fps), (kept, kept_fps) = read_video(f"again/{name}"), read_video(name)
    assert fps == kept_fps and made.shape == kept.shape
    difference = torch.from_numpy(made).float() - torch.from_numpy(kept).float()
    # Of 255. Pictures keep every pixel; what H.264 keeps of the same pixels depends on the processor as well.
    assert difference.abs().mean() < (0.05 if name.endswith(".png") else 2)
    if same_bits("clips", name):
        assert cases.sha256(torch.from_numpy(made)) == MADE["clips"][name]
    again = json.loads(Path(f"again/{name}.json").read_text())
    before = json.loads(Path(f"{name}.json").read_text())
    assert_same_but_for_versions(again, before)


@pytest.mark.parametrize("name", ["plain.png", "references.png", "scores.png", "loops.png"])
def test_a_clip_is_made_again_from_its_command(name, desk):
    """What a command asks for resolves to the same settings."""
    assert opensora(["generate", *CLIPS[name], "--output", f"again/{name}", "--device", "cpu"]) == 0
    again = json.loads(Path(f"again/{name}.json").read_text())
    before = json.loads(Path(f"{name}.json").read_text())
    assert_same_but_for_versions(again, before)


def assert_same_but_for_versions(again: dict[str, Any], before: dict[str, Any]) -> None:
    """A record may have gained fields since; none that it had is lost or changed."""
    assert again["sampling"].items() >= before["sampling"].items()
    for now, was in zip(again["adapters"], before.get("adapters", again["adapters"]), strict=True):
        assert now.items() >= was.items()
    for name, was in before["pipeline"].items():
        assert (again["pipeline"][name] or {}).items() >= (was or {}).items()
    others = before.keys() - {"versions", "sampling", "adapters", "pipeline"}
    assert {name: again.get(name) for name in others} == {name: before[name] for name in others}


# --- runs and results -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_run_comes_to_the_same_weights(name, desk, capsys):
    if name == "autoencoder" and not same_bits("runs", name):
        pytest.skip("the part that stays as it is was drawn at random, and is to have the same bits")
    recipe, *settings = RUNS[name]
    assert opensora(["train", recipe, *settings, "--output", f"runs/{name}", "--device", "cpu", "--threads", "1"]) == 0
    assert (f"resuming runs/{name} at step 2" in capsys.readouterr().out) == (name in STOPPED_RUNS)
    logged = (desk / "runs" / name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in logged] == pytest.approx(MADE["runs"][name]["losses"], rel=1e-3)
    trained = load_file(cases.trained_weights(desk / "runs" / name))
    if name in STOPPED_RUNS:
        kept = load_file(HERE / "runs" / f"{name}.safetensors")
        assert trained.keys() == kept.keys()
        for weight, tensor in kept.items():
            torch.testing.assert_close(trained[weight], tensor, rtol=1e-3, atol=1e-4)
    if same_bits("runs", name):
        assert cases.sha256_of_all(trained) == MADE["runs"][name]["weights"]


@pytest.mark.parametrize("name", LOSSES_OF)
def test_losses_are_measured_as_before(name, desk):
    kept = (HERE / "losses" / name).read_text()
    command = ["evaluate", "loss", LOSSES_OF[name], *LOSSES, "--output"]
    assert opensora([*command, "anew.json"]) == 0
    anew, before = json.loads(Path("anew.json").read_text()), json.loads(kept)
    assert anew["settings"] == before["settings"]
    assert [sample["id"] for sample in anew["samples"]] == [sample["id"] for sample in before["samples"]]
    losses = [torch.tensor([sample["losses"] for sample in results["samples"]]) for results in (anew, before)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    Path("kept.json").write_text(kept)
    assert opensora([*command, "kept.json"]) == 0
    assert Path("kept.json").read_text() == kept, "what is there is not measured again"
