"""Open-Sora 1.3 and 2.0 by their published names: every subcommand does its job on files in the published layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_published
import tiny_two_encoders
from huggingface_hub import constants

from opensora.checkpoints.published import PUBLISHED
from opensora.cli.main import main
from opensora.media.read import read_video

# Of each model the recipe that ends in it, and one that begins with it.
RECIPES = {
    "opensora-1.3": ("v1_3_stage2", "v1_3_adapt_i2v"),
    "opensora-1.3-360p": ("v1_3_stage1_hq", "v1_3_stage2"),
    "opensora-1.3-i2v": ("v1_3_adapt_i2v", "v1_3_adapt_i2v"),
    "opensora-2.0": ("v2_0_stage2_i2v", "v2_0_adapt_i2v"),
    "opensora-2.0-dc-ae": ("v2_0_high_compression", "v2_0_high_compression"),
}


def run(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the parameter's name, in miniature, where the Hub's client keeps it."""
    name, cache = request.param, tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    made_by = tiny_two_encoders if name in tiny_two_encoders.NAMES else tiny_published
    monkeypatch.setitem(PUBLISHED, name, made_by.tiny(name, scores=None))  # whose words are longer than it reads
    made_by.write_published(cache, PUBLISHED[name])
    return name


# Those of 2.0: tests/checkpoints/test_published_two_encoders.py
@pytest.mark.parametrize(
    "model",
    [pytest.param(f"opensora-1.3{which}", marks=pytest.mark.slow) for which in ("", "-360p", "-i2v")],
    indirect=True,
)
def test_listed_inspected_planned_converted_and_generated_with(model, capsys, tmp_path):
    assert {entry["name"]: entry for entry in json.loads(run(capsys, "models", "--json"))}[model]["where"] == "cache"
    assert "STDiT4" in run(capsys, "models", model)
    inspected = run(capsys, "inspect", model)
    assert "STDiT4" in inspected and "CausalVideoAutoencoder" in inspected
    plan = json.loads(run(capsys, "plan", "--model", model, "--json"))
    assert {stage["network"] for stage in plan["stages"]} == {"transformer", "autoencoder", "text_encoder"}
    clip, converted, folder = tmp_path / "clip.mkv", tmp_path / "converted.mkv", tmp_path / "folder"
    wishes = ["--device", "cpu", "--dtype", "float32"]
    run(capsys, "generate", "a small red ball", "--model", model, *wishes, "--output", clip)
    run(capsys, "convert", model, folder)
    run(capsys, "generate", "a small red ball", "--model", folder, *wishes, "--output", converted)
    assert np.array_equal(read_video(clip)[0], read_video(converted)[0])


@pytest.mark.parametrize("model", RECIPES, indirect=True)
def test_training_goes_on_from_it(model, capsys):
    """Names and shapes of its files are those that a dry run wants."""
    buckets = {"144p": {"17": [1.0, 1]}} if "1.3" in model else {"256px": {"5": [1.0, 1]}}
    buckets = {"256px_32d": {"8": [1.0, 1]}} if model.endswith("dc-ae") else buckets
    changes = [f"objective.{place}={model}" for place in ("autoencoder", "text.origin", "init_from")]
    changes += [f"objective.transformer={json.dumps(PUBLISHED[model].transformer.config)}", "objective.new_parts=[]"]
    changes += [f"objective.data.buckets={json.dumps(buckets)}", "loop.sequence_parallel=1"]
    dry = json.loads(run(capsys, "train", RECIPES[model][1], "--dry-run", "--json", *changes))
    transformer = next(network for network in dry["parameters"] if network["name"] == "transformer")
    assert transformer["trained"] > 0 and dry["step"]["flops"] > 0


@pytest.mark.parametrize("name", RECIPES)
def test_clips_are_counted_for_the_recipe_it_comes_from(name, capsys, tmp_path):
    table = tmp_path / "clips.csv"
    rows = [f"{k}.mp4,a walk,301,1080,1920,24" for k in range(200)]
    table.write_text("\n".join(["path,text,num_frames,height,width,fps", *rows]))
    planned = json.loads(run(capsys, "data", "plan", table, "--recipe", RECIPES[name][0], "--json"))
    assert sum(bucket["clips"] for bucket in planned["buckets"]) > 0
