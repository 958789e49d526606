"""Clips made worse and references with noise in their pixels (1.3): drawn for each clip, and learnt from as meant."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_tasks import family_config, write_clips
from torch import Tensor

from opensora.data.degradation import Degradation, degrade, without_detail, without_frames
from opensora.data.toybox import ToyboxLatents
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.recipes import debug, find_recipe
from opensora.training.diffusion import precompute
from opensora.training.diffusion.noise import IDDPM
from opensora.training.diffusion.task import DiffusionTask

NOTHING = Degradation(spatial=0.0, temporal=0.0, noise=0.0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


def opened(manifest: Path, folder: Path, **changes: Any) -> DiffusionTask:
    torch.manual_seed(0)
    setup = family_config("1.3", manifest, sample_posterior=False, **changes).build("cpu")
    setup.data.open(folder)
    assert isinstance(setup.task, DiffusionTask)
    return setup.task


def video_key(task: DiffusionTask) -> BatchKey:
    """Of the first batch that is no image."""
    keys = (BatchKey(0, position) for position in range(20))
    return next(key for key in keys if task.data.batch(key).conditions.num_frames > 1)


# --- clips made worse -------------------------------------------------------------------------------------------------


def clips(count: int = 6) -> Tensor:
    return torch.rand(count, 3, 8, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def degraded(how: Degradation, seed: int = 0) -> Tensor:
    return degrade(clips(), how, torch.Generator().manual_seed(seed))


def test_each_way_alone():
    video = clips()
    assert torch.equal(degraded(NOTHING), video)
    detail, frames = (degraded(replace(NOTHING, **{name: 1.0})) for name in ("spatial", "temporal"))
    for k, clip in enumerate(video.split(1)):
        assert any(torch.equal(detail[k : k + 1], without_detail(clip, ratio)) for ratio in (2, 4, 8))
        assert any(torch.equal(frames[k : k + 1], without_frames(clip, ratio)) for ratio in (2, 4, 8))
    assert len({float(kept.std()) for kept in detail}) == len(video)
    shares = (degraded(replace(NOTHING, noise=1.0)) * video).flatten(1).sum(1) / video.square().flatten(1).sum(1)
    assert (shares > 0.55).all() and (shares < 1.05).all() and shares.std() > 0.03  # 1 - up to 0.4


def test_draws_are_of_the_generator_and_of_each_clip():
    how = Degradation(spatial=0.5, temporal=0.5)
    assert torch.equal(degraded(how), degraded(how)) and not torch.equal(degraded(how), degraded(how, seed=1))
    generator = torch.Generator().manual_seed(0)
    one_by_one = torch.cat([degrade(clip, how, generator) for clip in clips().split(1)])
    torch.testing.assert_close(degraded(how), one_by_one, rtol=0, atol=0)
    changed = [not torch.equal(worse, clip) for worse, clip in zip(degraded(Degradation()), clips(), strict=True)]
    assert 0 < sum(changed) < len(changed)
    assert torch.equal(without_frames(clips()[:, :, :1], 8), clips()[:, :, :1])  # an image has no frames to lose


def test_the_way_to_the_good_clip_is_learnt(manifest, tmp_path, monkeypatch):
    task = opened(manifest, tmp_path, degradation=replace(NOTHING, spatial=1.0))
    key = video_key(task)
    batch, seen = task.prepare(key), {}
    plain = opened(manifest, tmp_path, degradation=None).prepare(key)
    assert batch.worse is not None and plain.worse is None
    assert torch.equal(batch.clips.latents, plain.clips.latents)
    assert (batch.worse - batch.clips.latents).abs().flatten(1).amax(1).min() > 1e-3

    def predict(noisy: Tensor, timestep: Tensor, batch: Any) -> Tensor:
        seen["noisy"] = noisy
        return batch.clips.latents - batch.noise

    monkeypatch.setattr(task, "predict", predict)
    assert not task.loss(batch, key)["velocity"].any()
    expected = task.networks.noise_process.corrupt(batch.worse, batch.noise, batch.t)
    torch.testing.assert_close(seen["noisy"], expected)


# --- references -------------------------------------------------------------------------------------------------------


def test_noise_makes_up_a_tenth_to_three_tenths_of_the_pixels(manifest, tmp_path):
    task = opened(manifest, tmp_path, known_frames={"v2v_head_noisy": 1.0})
    key = video_key(task)
    shown = task.data.batch(key)
    video = torch.rand(200, 3, 4, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    noisy = torch.arange(200) % 2 == 0
    mixed = task.with_noise(replace(shown, video=video), noisy, key)
    assert torch.equal(mixed[~noisy], video[~noisy])
    shares = 1 - (mixed * video)[noisy].flatten(1).sum(1) / video[noisy].square().flatten(1).sum(1)
    assert 0.05 < shares.min() < 0.15 and 0.25 < shares.max() < 0.35
    rest = (mixed - (1 - shares.mean()) * video)[noisy].flatten(1).std(1)
    assert (rest > 0.08).all()  # as large as noise of standard deviation 1 makes it


def test_what_is_shown_has_noise_and_what_is_learnt_has_none(manifest, tmp_path):
    noisy, clean = (opened(manifest, tmp_path, known_frames={kind: 1.0}) for kind in ("other_noisy", "other"))
    key = video_key(clean)
    ours, theirs = noisy.prepare(key), clean.prepare(key)
    assert torch.equal(ours.clips.latents, theirs.clips.latents)
    assert ours.channels is not None and theirs.channels is not None
    assert torch.equal(ours.channels.mask, theirs.channels.mask)
    differs = (ours.channels.masked_latents - theirs.channels.masked_latents).abs().flatten(1).amax(1) > 1e-3
    assert torch.equal(differs, ours.channels.mask[:, 0] & ours.channels.masked_latents.flatten(1).any(1))
    positions = (BatchKey(0, position) for position in range(40))
    heads = {bool(mask[0]) for key in positions for mask in noisy.prepare(key).channels.mask if mask.any()}  # type: ignore[union-attr]
    assert heads == {True, False}


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"known_frames": {"v2v_head_noisy": 1.0}}, "noisy kinds of objective.known_frames encode clips"),
        ({"degradation": Degradation()}, "objective.degradation encodes clips that are made worse"),
    ],
)
def test_latents_cannot_be_made_worse(changes, message):
    data = ToyboxLatents(debug.CLIPS, 2)
    with pytest.raises(OpenSoraError, match=message) as error:
        family_config("1.3", None, data=data, **changes)
    assert "ToyboxLatents are latents" in str(error.value) and "\n" not in str(error.value)


def test_steps_of_noise_know_no_other_end(manifest):
    with pytest.raises(OpenSoraError, match="for rectified flow alone"):
        family_config("1.3", manifest, degradation=Degradation(), diffusion=IDDPM())


@pytest.mark.parametrize("wrong", [{"noise": 1.5}, {"spatial_ratios": ()}, {"temporal_ratios": (1,)}])
def test_impossible_degradations(wrong):
    with pytest.raises(OpenSoraError, match="expected"):
        Degradation(**wrong)


def test_what_lies_in_a_cache_is_shown_without_noise(monkeypatch, tmp_path, caplog):
    without_text = SimpleNamespace(index=SimpleNamespace(made_from=SimpleNamespace(text=None)))
    monkeypatch.setattr(precompute, "Cache", lambda folder: without_text)
    recipe = find_recipe("v1_3_adapt_i2v").objective
    task = precompute.on_cache("v1_3_adapt_i2v", recipe, tmp_path)
    assert task.known_frames["v2v_head"] == 3.0 and "v2v_head_noisy" not in task.known_frames
    assert "shown without" in caplog.text
