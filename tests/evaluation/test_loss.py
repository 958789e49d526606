"""The held-out loss suite: fixed timesteps and noise, figures by hand, resuming, both kinds of diffusion."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipeline import make_pipeline

from opensora.cli.main import main
from opensora.data.batch import LatentBatch
from opensora.data.toybox import ToyboxClips
from opensora.errors import OpenSoraError
from opensora.evaluation.held_out import toybox_portions
from opensora.evaluation.loss import (
    LossResults,
    batch_losses,
    held_out_losses,
    loss_at,
    measure,
    new_results,
    with_text,
)
from opensora.evaluation.results import Results
from opensora.manifest import ClipRow, write_manifest
from opensora.media.write import write_video
from opensora.models.schedulers.base import process_of
from opensora.models.schedulers.iddpm import IDDPMScheduler
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler

CLIPS = ToyboxClips(num_frames=5, height=16, width=24)


def fresh(pipeline, num_timesteps: int = 3, seed: int = 0) -> LossResults:
    return new_results(pipeline, {"seed": seed}, num_timesteps)


def losses_of(path: Path) -> dict[str, list[list[float]]]:
    """Size -> losses of its clips, as a file tells them."""
    found: dict[str, list[list[float]]] = {}
    for sample in Results.read(path).samples:
        found.setdefault(sample["size"], []).append(sample["losses"])
    return found


def test_ten_timesteps_lie_evenly_between_clean_and_noise():
    flow = new_results(make_pipeline(), {}).timesteps
    assert len(flow) == 10 and flow[0] == 0 and flow[-1] == 1000
    assert flow[1] == pytest.approx(1000 / 9)
    pipeline = make_pipeline("iddpm")
    assert new_results(pipeline, {}).timesteps == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    with pytest.raises(OpenSoraError, match="1 timesteps"):
        new_results(pipeline, {}, 1)
    pipeline.use_sampler("dpm-solver++")
    with pytest.raises(OpenSoraError, match="DPMSolverScheduler"):
        new_results(pipeline, {})


def test_a_network_that_knows_the_answer_has_no_flow_loss_and_one_that_says_nothing_has_the_targets_power():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 5, 6, generator=generator), torch.randn(2, 3, 4, 5, 6, generator=generator)
    process, t = process_of(RectifiedFlowScheduler()), torch.tensor(250.0)
    told = []

    def oracle(noisy, timestep):
        told.append((noisy, timestep))
        return clean - noise

    assert loss_at(process, t, clean, noise, oracle).tolist() == [0, 0]
    torch.testing.assert_close(told[0][0], 0.75 * clean + 0.25 * noise)
    assert told[0][1].tolist() == [250, 250]
    silent = loss_at(process, t, clean, noise, lambda noisy, _: torch.zeros_like(noisy))
    torch.testing.assert_close(silent, (clean - noise).square().flatten(1).mean(dim=1))


def test_the_discrete_loss_is_squared_error_and_bound():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 5, 6, generator=generator), torch.randn(2, 3, 4, 5, 6, generator=generator)
    fixed, t = process_of(IDDPMScheduler(variance_type="fixed_small")), torch.tensor(500)
    torch.testing.assert_close(loss_at(fixed, t, clean, noise, lambda *_: noise + 0.5), torch.full((2,), 0.25))
    answer = torch.cat([noise + 0.5, -torch.ones_like(noise)], dim=1)
    found = loss_at(process_of(IDDPMScheduler()), t, clean, noise, lambda *_: answer)
    # The variance is right at -1 (the smaller bound), so that the bound holds what the mean misses and no more.
    assert ((found > 0.25) & (found < 0.26)).all()


@pytest.mark.parametrize("kind", ["flow", "iddpm"])
def test_a_clips_losses_depend_on_neither_batch_nor_chance(kind: str):
    pipeline = make_pipeline(kind)
    whole = measure(pipeline, toybox_portions(pipeline, CLIPS, 3, batch_size=3), fresh(pipeline))
    torch.manual_seed(99)
    parts = measure(pipeline, toybox_portions(pipeline, CLIPS, 3, batch_size=2), fresh(pipeline))
    (label,) = whole.losses
    assert label == "16x24 5f"
    torch.testing.assert_close(torch.tensor(whole.losses[label]), torch.tensor(parts.losses[label]))
    other = measure(pipeline, toybox_portions(pipeline, CLIPS, 3), fresh(pipeline), seed=1)
    assert other.losses != whole.losses


def test_the_table_is_the_mean_over_clips_and_then_over_timesteps():
    results = LossResults({}, [0.0, 500.0, 1000.0], {"small": [[1, 2, 3], [3, 4, 5]], "large": [[0, 0, 6]]})
    assert results.table() == {"small": [2, 3, 4, 3], "large": [0, 0, 6, 2]}


def test_sizes_are_kept_apart_and_watching_a_run_gives_the_tables_means():
    pipeline = make_pipeline()
    other = replace(CLIPS, num_frames=1)
    portions = [p for c in (CLIPS, other) for p in toybox_portions(pipeline, c, 3, batch_size=2)]
    results = measure(pipeline, portions, fresh(pipeline))
    means = held_out_losses(pipeline, (portion.load() for portion in portions), num_timesteps=3).means()
    assert list(means) == ["16x24 5f", "16x24 1f"]
    assert means == pytest.approx({label: row[-1] for label, row in results.table().items()}, rel=1e-5)


def test_the_weights_decide():
    pipeline = make_pipeline()
    before = held_out_losses(pipeline, [toybox_portions(pipeline, CLIPS, 2)[0].load()], num_timesteps=3).means()
    with torch.no_grad():
        pipeline.transformer.final_layer.linear.weight.mul_(2)
    after = held_out_losses(pipeline, [toybox_portions(pipeline, CLIPS, 2)[0].load()], num_timesteps=3).means()
    assert before != after


def test_text_states_that_a_batch_brings_are_used():
    pipeline = make_pipeline()
    batch: LatentBatch = toybox_portions(pipeline, CLIPS, 2)[0].load()
    encoded, num_cut = with_text(pipeline, batch)
    brought, _ = with_text(pipeline, replace(encoded, captions=["", ""]))
    assert num_cut == 0
    assert torch.equal(batch_losses(pipeline, brought, 3, 0, 0), batch_losses(pipeline, encoded, 3, 0, 0))


def test_captions_that_are_too_long_are_cut_and_counted():
    pipeline = make_pipeline()
    batch: LatentBatch = toybox_portions(pipeline, CLIPS, 2)[0].load()
    longer = replace(batch, captions=[" ".join([caption] * 9) for caption in batch.captions])
    results = held_out_losses(pipeline, [longer], num_timesteps=2)
    assert results.cut_captions == 2 and len(results.means()) == 1
    assert held_out_losses(pipeline, [batch], num_timesteps=2).cut_captions == 0


def test_clips_without_a_caption_are_measured_as_they_are_trained_on():
    pipeline = make_pipeline()
    batch: LatentBatch = toybox_portions(pipeline, CLIPS, 2)[0].load()
    losses = held_out_losses(pipeline, [replace(batch, captions=["", *batch.captions[1:]])], num_timesteps=2)
    assert len(losses.means()) == 1


def test_a_stopped_run_goes_on_and_measures_nothing_twice(tmp_path):
    pipeline, output = make_pipeline(), tmp_path / "losses.json"
    portions = toybox_portions(pipeline, CLIPS, 4, batch_size=2)
    measure(pipeline, portions[:1], fresh(pipeline), output)
    again, loaded = fresh(pipeline), []
    again.resume(output)
    counted = [replace(p, load=lambda p=p: (loaded.append(p.first), p.load())[1]) for p in portions]
    told = []
    measure(pipeline, counted, again, output, progress=lambda *step: told.append(step))
    assert loaded == [2] and told == [(2, 4), (4, 4)]
    assert again.losses == measure(pipeline, portions, fresh(pipeline)).losses
    assert losses_of(output) == again.losses


def test_other_settings_and_foreign_files_are_not_resumed(tmp_path):
    pipeline, output = make_pipeline(), tmp_path / "losses.json"
    measure(pipeline, toybox_portions(pipeline, CLIPS, 1), fresh(pipeline), output)
    with pytest.raises(OpenSoraError, match=r"seed = 0, this run has 1"):
        fresh(pipeline, seed=1).resume(output)
    with pytest.raises(OpenSoraError, match=r"made with timesteps"):
        fresh(pipeline, num_timesteps=4).resume(output)
    damaged = json.loads(output.read_text())
    del damaged["samples"][0]["losses"][0]
    for content, message in (("[]", "expected a JSON object"), ("{}", "no results"), (json.dumps(damaged), "damaged")):
        output.write_text(content)
        with pytest.raises(OpenSoraError, match=message):
            fresh(pipeline).resume(output)
    Results("toybox", {}, {}, []).save(output)
    with pytest.raises(OpenSoraError, match="results of toybox, not of loss"):
        fresh(pipeline).resume(output)


@pytest.mark.parametrize("kind", ["flow", "iddpm"])
def test_the_command_prints_a_row_for_every_size_and_length(kind: str, tmp_path, capsys):
    make_pipeline(kind).save_pretrained(tmp_path / "model")
    output = tmp_path / "losses.json"
    args = ["evaluate", "loss", str(tmp_path / "model"), "--num-clips", "2", "--output", str(output)]
    assert main([*args, "--sizes", "16x24", "16x16", "--lengths", "1", "5"]) == 0
    found = losses_of(output)
    assert list(found) == ["16x24 1f", "16x24 5f", "16x16 1f", "16x16 5f"]
    assert len(found["16x24 5f"]) == 2 and len(found["16x24 5f"][0]) == 10
    printed, results = capsys.readouterr().out, Results.read(output)
    assert list(results.figures) == ["loss_16x24_1f", "loss_16x24_5f", "loss_16x16_1f", "loss_16x16_5f"]
    assert all(f"{results.mean(name).value:.3f}" in printed for name in results.figures)


def test_clips_of_a_manifest_and_of_its_cache_have_the_same_losses(tmp_path, capsys):
    model, rng, rows = tmp_path / "model", np.random.default_rng(0), []
    make_pipeline().save_pretrained(model)
    for number, length in enumerate((6, 6, 1, 6)):
        path = tmp_path / f"{number}.{'png' if length == 1 else 'mp4'}"
        write_video(path, rng.integers(0, 256, (length, 4, 6, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2), fps=8)
        rows.append(ClipRow(path, "a small red ball", length, 32, 48, 8.0))
    write_manifest(tmp_path / "clips.csv", rows)
    buckets = {"32x48": {"5": [0.0, 2]}, "16x24": {"1": [0.5, 2], "3": [1.0, 2], "5": [1.0, 2]}}
    (tmp_path / "buckets.json").write_text(json.dumps(buckets))
    evaluate = ["evaluate", "loss", str(model)]
    said = [str(tmp_path / name) for name in ("clips.csv", "buckets.json", "clips.json", "cache", "cached.json")]
    assert main([*evaluate, "--manifest", said[0], "--buckets", said[1], "--output", said[2]]) == 0
    data = json.dumps({"type": "ManifestClips", "buckets": buckets, "manifest": said[0]})
    make = ["data", "precompute", "v1_2_debug", f"objective.data={data}", f"objective.autoencoder={model}"]
    assert main([*make, "--no-text", "--latents-dtype", "float32", "--output", said[3]]) == 0
    assert main([*evaluate, "--cache", said[3], "--output", said[4]]) == 0
    clips, cached = (losses_of(Path(said[i])) for i in (2, 4))
    # A clip is measured wherever it fits; the cache has those sizes alone that it would be trained at.
    assert {label: len(losses) for label, losses in clips.items()} == {
        "32x48 5f 32x48": 3,
        "16x24 5f 16x24": 3,
        "16x24 3f 16x24": 3,
        "16x24 1f 16x24": 1,
    }
    assert set(cached) == {"16x24 5f 16x24", "16x24 1f 16x24"}
    for label, losses in cached.items():
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(clips[label]))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sizes", "64"], "--sizes is '64'; give height and width in pixels, such as 64x64"),
        (["--lengths", "0"], "--lengths is 0; give 1 or more"),
        (["--manifest", "clips.csv", "--cache", "cache"], "--manifest and --cache both say which clips"),
        (["--manifest", "clips.csv"], "--manifest needs --buckets"),
        (["--num-clips", "0"], "--num-clips is 0; give 1 or more"),
        (["--output", "losses.csv"], "--output is losses.csv; give a file that ends in .json"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(args: list[str], message: str, capsys):
    assert main(["evaluate", "loss", "toybox", *args]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
