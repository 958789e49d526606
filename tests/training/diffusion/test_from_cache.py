"""Training from a cache is training from the clips: losses and weights, from the command line to the exported model."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opensora.cli.main import main
from opensora.manifest import ClipRow, write_manifest
from opensora.media.write import write_video
from opensora.recipes import find_recipe
from opensora.settings import to_dict

CAPTIONS = ("a red ball", "a blue square on sand", "nothing moves at all", "a city by night, seen from above")
BUCKETS = {"64x64": {"1": [1.0, 2], "17": [1.0, 2]}}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Clips of one frame more than is trained on, which leaves one window of each; and an image."""
    folder, rng, rows = tmp_path_factory.mktemp("clips"), np.random.default_rng(0), []
    for number, caption in enumerate(CAPTIONS):
        length = 1 if number == 2 else 18
        path = folder / f"{number}.{'png' if length == 1 else 'mp4'}"
        write_video(path, rng.integers(0, 256, (length, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2), fps=8)
        rows.append(ClipRow(path, caption, length, 64, 64, 8.0))
    write_manifest(folder / "clips.csv", rows)
    return folder / "clips.csv"


def run(capsys, *args: object) -> str:
    code = main([str(arg) for arg in args])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def on_clips(manifest: Path) -> str:
    return "objective.data=" + json.dumps(
        {"type": "ManifestClips", "manifest": str(manifest), "buckets": BUCKETS, "batches_in_a_row": 2}
    )


def figures(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["v1_0_debug", "v1_2_debug", "v2_0_debug"])
def test_losses_and_weights_equal_those_of_training_on_the_clips(recipe: str, manifest, tmp_path, capsys):
    common = ["loop.steps=6", "loop.log_every=1", "objective.export_dtype=float32", "--device", "cpu"]
    run(capsys, "train", recipe, on_clips(manifest), *common, "--output", tmp_path / "clips")
    said = run(
        capsys,
        *("data", "precompute", recipe, on_clips(manifest), "--output", tmp_path / "cache", "--device", "cpu"),
        *("--latents-dtype", "float32", "--text-dtype", "float32", "--shard-mb", "1"),
    )
    captions = 5 if recipe == "v2_0_debug" else 4  # no text is one, too
    assert f"4 clips, {captions} captions" in said
    _, printed = said.split("train on it with: ")
    run(capsys, "train", recipe, *shlex.split(printed), *common, "--output", tmp_path / "cached")
    wanted, found = figures(tmp_path / "clips"), figures(tmp_path / "cached")
    assert len(wanted) == len(found) >= 6
    for before, after in zip(wanted, found, strict=True):
        for name in ("loss", "grad_norm"):
            assert after[name] == pytest.approx(before[name], rel=1e-4)
    names = {p.relative_to(tmp_path / "clips") for p in (tmp_path / "clips" / "model").rglob("*.safetensors")}
    assert any(name.match("transformer/*") for name in names)
    for name in names:
        weights, others = load_file(tmp_path / "clips" / name), load_file(tmp_path / "cached" / name)
        assert weights.keys() == others.keys()
        for tensor in weights:
            torch.testing.assert_close(others[tensor], weights[tensor], rtol=1e-3, atol=1e-5)


def test_held_out_losses_are_logged_at_set_steps(manifest, tmp_path, capsys):
    preview = {"type": "HeldOutLosses", "manifest": str(manifest), "buckets": BUCKETS, "num_clips": 2}
    settings = ["loop.steps=2", "loop.preview_every=1", "objective.data.num_clips=4"]
    settings += ["objective.data.num_clips_of_other_lengths=2", f"objective.preview={json.dumps(preview)}"]
    run(capsys, "train", "v1_1_debug", *settings, "--output", tmp_path / "run", "--device", "cpu")
    logged = [row for row in figures(tmp_path / "run") if any(name.startswith("held_out/") for name in row)]
    assert [row["step"] for row in logged] == [1, 2]
    for row in logged:
        assert row["held_out/64x64 17f 64x64"] > 0 and row["held_out/64x64 1f 64x64"] > 0


def test_held_out_clips_that_are_not_there_are_told_before_the_first_step(manifest, tmp_path, capsys):
    table = tmp_path / "held_out.csv"
    write_manifest(table, [ClipRow(tmp_path / "gone.mp4", "gone", 18, 64, 64, 8.0)])
    for path, message in ((table, "gone.mp4 does not exist; leave it out of"), (tmp_path / "no.csv", "does not exist")):
        preview = json.dumps({"type": "HeldOutLosses", "manifest": str(path), "buckets": BUCKETS})
        settings = [on_clips(manifest), f"objective.preview={preview}", "loop.preview_every=1"]
        settings += ["--output", str(tmp_path / "run")]
        assert main(["train", "v1_2_debug", *settings, "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("objective.autoencoder.seed=1", "was made with another autoencoder: its weights are"),
        ("objective.text={text}", "was made with another text encoder: its weights are"),
        ("objective.transformer.model_max_length=7", "max_tokens is 120 in the cache but 7 in this run"),
    ],
)
def test_a_cache_made_otherwise_is_refused_in_one_line(change: str, message: str, manifest, tmp_path, capsys):
    run(capsys, "data", "precompute", "v1_2_debug", on_clips(manifest), "--output", tmp_path / "cache")
    text = to_dict(find_recipe("v1_2_debug"))["objective"]["text"] | {"type": "CachedText"}
    other = {**text, "origin": {**text["origin"], "seed": 1}}
    data = ["objective.data.type=CachedLatents", f"objective.data.folder={tmp_path / 'cache'}"]
    changes = [f"objective.text={json.dumps(text)}", change.replace("{text}", json.dumps(other))]
    assert main(["train", "v1_2_debug", *data, *changes, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and "opensora data precompute" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["toybox_judge"], "recipe toybox_judge trains no diffusion transformer"),
        (["toybox"], "recipe toybox trains on ToyboxLatents, not on the clips of a manifest"),
        (["v1_2_stage1"], "no manifest; name the table of your clips by --manifest"),
        (["v1_2_stage1", "--shard-mb", "0"], "--shard-mb is 0; give more than 0"),
        (["v1_2_stage1", "--windows-per-clip", "0"], "--windows-per-clip is 0; give 1 or more"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(args: list[str], message: str, capsys):
    assert main(["data", "precompute", *args, "--output", "nowhere/cache"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("nowhere").exists()
