"""Captions that a transformer reads by two encoders: a T5's states, padding and all, and a CLIP's pooled vector."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_two_encoders
import torch
from huggingface_hub import constants
from tiny_tasks import family_config, write_clips

import opensora
from opensora.checkpoints.published import PUBLISHED
from opensora.data.cache import Cache
from opensora.data.cached import CachedLatents
from opensora.data.clips import ManifestClips
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.models.text.conditioner import TextStates
from opensora.overrides import apply_overrides
from opensora.pipeline import OpenSoraPipeline
from opensora.recipes import find_recipe
from opensora.training.diffusion.precompute import CacheOptions, make_cache, on_cache, summary
from opensora.training.diffusion.task import DiffusionTask
from opensora.training.diffusion.text import CachedText, FrozenText, TrainedText
from opensora.training.parts import Untrained
from opensora.training.trainer import Trainer


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


def opened(manifest: Path, folder: Path, **changes: Any) -> DiffusionTask:
    setup = family_config("2.0", manifest, **changes).build("cpu")
    setup.data.open(folder)
    assert isinstance(setup.task, DiffusionTask)
    return setup.task


def text_of(task: DiffusionTask, position: int) -> tuple[list[str], TextStates]:
    batch = task.prepare(BatchKey(0, position))
    assert isinstance(batch.text, TextStates) and batch.drop_text is None
    return batch.clips.captions, batch.text


def read_by(task: DiffusionTask, captions: list[str]) -> TextStates:
    """What a pipeline of the run reads, without what its prompts end in."""
    pipeline = task.networks.pipeline(task.module)
    assert isinstance(pipeline, OpenSoraPipeline)
    return task.networks.captions.conditioner.encode(captions)


def test_captions_are_read_as_prompts_are(manifest: Path, tmp_path: Path) -> None:
    """All the tokens that the transformer reads, padding among them, and no mask that would hide it."""
    task = opened(manifest, tmp_path, drop_text=0.0, drop_pooled=None)
    captions, text = text_of(task, 0)
    wanted = read_by(task, captions)
    assert text.pooled is not None and wanted.pooled is not None
    assert text.states.shape[1] == task.networks.transformer.max_text_tokens > max(map(len, captions)) + 1
    assert text.mask is None or text.mask.all()
    assert torch.equal(text.states, wanted.states) and torch.equal(text.pooled, wanted.pooled)


@pytest.mark.parametrize(("drop_text", "drop_pooled"), [(0.5, 0.5), (0.5, None), (0.0, 1.0)])
def test_either_text_is_dropped_by_itself(
    manifest: Path, tmp_path: Path, drop_text: float, drop_pooled: float | None
) -> None:
    """What stands in its place is what the encoder makes of an empty prompt."""
    task = opened(manifest, tmp_path, drop_text=drop_text, drop_pooled=drop_pooled)
    null, dropped = read_by(task, [""]), []
    assert null.pooled is not None
    for position in range(40):
        captions, text = text_of(task, position)
        kept = read_by(task, captions)
        assert text.pooled is not None
        for row in range(len(captions)):
            for name in ("states", "pooled"):
                value, whole, empty = (getattr(one, name) for one in (text, kept, null))
                assert torch.equal(value[row], empty[0]) or torch.equal(value[row], whole[row])
            dropped.append(
                [torch.equal(text.states[row], null.states[0]), torch.equal(text.pooled[row], null.pooled[0])]
            )
    shares = torch.tensor(dropped).float()
    wanted = torch.tensor([drop_text, drop_text if drop_pooled is None else drop_pooled])
    assert ((shares.mean(0) - wanted).abs() < 0.2).all()
    both, either = shares.prod(dim=1).mean(), shares.amax(dim=1).mean()
    assert both == either if drop_pooled is None else both < either


def test_a_cache_holds_both_texts_and_that_of_no_text(manifest: Path, tmp_path: Path) -> None:
    config = family_config("2.0", manifest)
    assert isinstance(config.data, ManifestClips) and isinstance(config.text, FrozenText)
    make_cache(tmp_path / "cache", config, config.data, CacheOptions(text_dtype="float32"), device="cpu")
    assert "" in Cache(tmp_path / "cache")._captions
    cached = CachedText(config.text.origin, origin_2=config.text.origin_2)
    data = {"data": CachedLatents(tmp_path / "cache", batches_in_a_row=1), "known_frames": {}}
    task = opened(manifest, tmp_path, text=cached, **data)
    assert not task.networks.captions.encoders, "nothing is encoded, so nothing is loaded"
    on_clips = opened(manifest, tmp_path)
    for position in range(6):
        (captions, found), (same, wanted) = text_of(task, position), text_of(on_clips, position)
        assert captions == same and found.pooled is not None
        torch.testing.assert_close(found.states, wanted.states)
        torch.testing.assert_close(found.pooled, wanted.pooled)
    assert isinstance(config.text.origin_2, Untrained)
    other = Untrained(config.text.origin_2.options, seed=5, architecture="CLIPTextModel")
    with pytest.raises(OpenSoraError, match="was made with another text encoder: its weights are"):
        opened(manifest, tmp_path, text=CachedText(config.text.origin, origin_2=other), **data)


def test_encoders_that_do_not_belong_to_the_transformer_are_one_line(manifest: Path) -> None:
    text = family_config("2.0", manifest).text
    assert isinstance(text, FrozenText)
    for version, changes, words in (
        ("2.0", {"text": TrainedText({"d_model": 32})}, "a MMDiT reads 2; use objective.text.type=FrozenText"),
        ("2.0", {"text": FrozenText(text.origin)}, "describe the other by objective.text.origin_2"),
        ("2.0", {"text": FrozenText(text.origin, origin_2=text.origin)}, "by a T5 encoder and a CLIP encoder"),
        ("2.0", {"text": FrozenText("opensora-1.2")}, "opensora-1.2 has no text_encoder_2"),
        ("1.2", {"text": text}, "reads one text encoder; leave objective.text.origin_2 out"),
        ("1.2", {"drop_pooled": 0.1}, "learns one null text; leave objective.drop_pooled out"),
        ("2.0", {"drop_pooled": 1.5}, "objective.drop_pooled is 1.5"),
    ):
        with pytest.raises(OpenSoraError, match=words) as error:
            family_config(version, manifest, **changes).plan()
        assert "\n" not in str(error.value)


def test_frames_are_known_beside_the_noise_alone(manifest: Path) -> None:
    task = family_config("2.0", manifest)
    with pytest.raises(OpenSoraError, match=r"use objective\.known_frames"):
        type(task)(**{**vars(task), "frame_masks": {"head": 0.5}}).plan()


@pytest.mark.parametrize(("version", "kind"), [("2.0", "i2v_tail"), ("2.0", "i2v_loop"), ("2.0-dc", "i2v_head")])
def test_pictures_are_encoded_by_themselves(manifest: Path, tmp_path: Path, version: str, kind: str) -> None:
    """Where the clip's own latents would tell of the frames beside them."""
    known = {"known_frames": {kind: 1.0}, "sample_posterior": False}
    setup = family_config(version, manifest, **known).build("cpu")
    setup.data.open(tmp_path)
    task = setup.task
    assert isinstance(task, DiffusionTask)
    for position in range(20):
        key = BatchKey(0, position)
        video, batch = task.data.batch(key).video, task.prepare(key)
        assert video is not None and batch.channels is not None and batch.clips.video is None
        shown = batch.channels.masked_latents
        if shown.shape[2] == 1:
            assert not batch.channels.mask.any()
            continue
        for at, place in ((0, "head"), (-1, "tail")):
            alone = task.networks.autoencoder.encode_video(video[:, :, at][:, :, None])
            if kind in (f"i2v_{place}", "i2v_loop"):
                torch.testing.assert_close(shown[:, :, at], alone[:, :, 0])
                assert not torch.allclose(alone[:, :, 0], batch.clips.latents[:, :, at], atol=1e-3)
            else:
                assert not shown[:, :, at].any()
        return
    pytest.fail("no batch of clips came")


def test_latents_made_beforehand_hold_no_lone_pictures(manifest: Path, tmp_path: Path) -> None:
    """The network says how it is shown frames: to training and, in its configuration, to sampling."""
    config, folder = family_config("2.0", manifest), tmp_path / "cache"
    cached, change = on_cache("tiny", config, make(config, folder)), "objective.transformer.known_frames_alone=false"
    with pytest.raises(OpenSoraError, match=rf"a MMDiT is shown .* CachedLatents are latents; use {re.escape(change)}"):
        cached.plan()
    assert change in summary(folder, Cache(folder).index, config, config)[-1]
    in_place = replace(cached, transformer={**(cached.transformer or {}), "known_frames_alone": False})
    networks = in_place.plan().networks
    assert not networks.transformer.known_frames_alone and not networks.known_alone
    assert networks.transformer.config.known_frames_alone is False
    text_alone = replace(cached, known_frames={})
    assert text_alone.plan().networks.transformer.known_frames_alone


def make(config: Any, folder: Path) -> Path:
    make_cache(folder, config, config.data, CacheOptions(), device="cpu")
    return folder


# --- the published layout ---------------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Small models of both names, in the table and in a cache of the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    networks = {}
    for name in tiny_two_encoders.NAMES:
        model = tiny_two_encoders.tiny(name)
        monkeypatch.setitem(PUBLISHED, name, model)
        networks[name] = tiny_two_encoders.write_published(tmp_path / "hub", model)
    return networks


@pytest.mark.parametrize(
    ("name", "buckets"),
    [
        ("v2_0_adapt_i2v", {"64px": {"5": [1.0, 2]}}),
        ("v2_0_high_compression", {"64px_32d": {"1": [1.0, 1], "4": [1.0, 2]}}),
        ("v2_0_lora", {"64px": {"5": [1.0, 2]}}),
    ],
)
def test_recipes_go_on_from_released_files(
    name: str, buckets: dict[str, Any], manifest: Path, tmp_path: Path, released: dict[str, Any]
) -> None:
    """By a model's name: both encoders, both tokenizers, autoencoder and transformer in their published formats."""
    changes = [f"objective.data.manifest={manifest}", f"objective.data.buckets={json.dumps(buckets)}"]
    changes += ["loop.steps=2", "loop.checkpoint_every=0", "objective.data.num_workers=0"]
    trainer = Trainer(apply_overrides(find_recipe(name), changes), tmp_path / "run")
    model = "opensora-2.0-dc-ae" if name == "v2_0_high_compression" else "opensora-2.0"
    for part, network in trainer.setup.frozen.items():
        for key, weight in network.state_dict().items():
            wanted = released[model][part].state_dict()[key].bfloat16()
            torch.testing.assert_close(weight.bfloat16(), wanted, msg=f"{part} {key}")
    exported = trainer.run()
    components = {part: exported.parent / part for part in ("text_encoder", "text_encoder_2")}
    for part, folder in components.items():
        released[model][part].save_pretrained(folder)
    if name == "v2_0_lora":
        pipeline = opensora.load_pipeline(model, adapters={exported: 1.0})
    else:
        assert not list(exported.glob("text_encoder*/*.safetensors"))
        pipeline = opensora.load_pipeline(exported, components=components)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("a small red ball", num_inference_steps=2, generator=7, output_type="pt").frames
    assert torch.isfinite(made).all()
