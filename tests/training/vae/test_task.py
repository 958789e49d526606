"""Autoencoder training: lengths, what each stage trains, the latent space's figures, the critic."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_tasks import AUTOENCODER, CLIPS, vae_config
from torch import Tensor

from opensora.data.batch import DataContext
from opensora.data.clips import ManifestClips
from opensora.data.toybox import ToyboxClips, ToyboxVideos
from opensora.distributed.seeding import BatchKey, generator
from opensora.errors import OpenSoraError
from opensora.manifest import ClipRow, write_manifest
from opensora.media.write import write_video
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.training.config import LoopConfig, Recipe
from opensora.training.trainer import Trainer
from opensora.training.vae.clips import Cut, CutClips, crop_at_random
from opensora.training.vae.config import VAETaskConfig
from opensora.training.vae.discriminator import DiscriminatorConfig
from opensora.training.vae.frame_latents import frame_latents

CRITIC = DiscriminatorConfig(dim=8, depth=1)


def videos(num_frames: int, batch_size: int = 2) -> ToyboxVideos:
    return ToyboxVideos(ToyboxClips(num_frames=num_frames, height=16, width=24), batch_size)


def train(config: VAETaskConfig, folder: Path, steps: int = 2, stop_after: int | None = None) -> Trainer:
    loop = LoopConfig(steps=steps, precision="fp32", ema_decay=0.5, checkpoint_every=1, microbatches=2)
    trainer = Trainer(Recipe("tiny", config, loop), folder)
    trainer.on_step = lambda step, *_: setattr(trainer, "stop_requested", step == stop_after)
    if stop_after is None:
        trainer.run()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    return trainer


# --- lengths and places -----------------------------------------------------------------------------------------------


def test_a_fifth_are_images_and_the_rest_of_any_length():
    cut = Cut(image_share=0.2, random_lengths=True)
    lengths = Counter(cut.num_frames(34, generator("test", i)) for i in range(4000))
    assert lengths[1] / 4000 == pytest.approx(0.2 + 0.8 / 34, abs=0.02)
    assert set(lengths) == set(range(1, 35))
    assert max(lengths[n] for n in range(2, 35)) < 2 * min(lengths[n] for n in range(2, 35))
    whole = Counter(Cut(image_share=0.2).num_frames(17, generator("test", i)) for i in range(1000))
    assert set(whole) == {1, 17} and whole[1] / 1000 == pytest.approx(0.2, abs=0.04)


def test_plans_hear_of_every_length():
    source = CutClips(videos(34).open(DataContext()), Cut(0.2, True, crop=20), spatial_factor=8)
    shapes = source.shapes()
    assert [shape.num_frames for shape in shapes] == [1, 9, 17, 26, 34]
    assert sum(shape.share for shape in shapes) == pytest.approx(1)
    assert {(shape.height, shape.width) for shape in shapes} == {(16, 16)}
    assert source.batch(BatchKey(0, 0)).video.shape[-2:] == (16, 16)


def test_clips_are_cut_out_at_one_place_in_all_frames_and_masks():
    places = torch.arange(12 * 16.0).view(1, 1, 1, 12, 16).expand(5, 3, 4, 12, 16)
    video, mask = crop_at_random([places, places[:, :1]], 8, 8, generator("crop"))
    assert video.shape == (5, 3, 4, 8, 8) and mask.shape == (5, 1, 4, 8, 8)
    assert torch.equal(video[:, :1], mask) and torch.equal(video[:, :, 0], video[:, :, 3])
    assert len({float(clip[0, 0, 0, 0]) for clip in video}) > 1
    (whole,) = crop_at_random([places], 100, 8, generator("crop"))
    assert torch.equal(whole, places)


@pytest.mark.parametrize("num_frames", [1, 18, 20, 34])
@pytest.mark.parametrize("kind", ["folded", "causal3d"])
def test_pixels_are_learnt_at_any_length_in_chunks(num_frames, kind):
    temporal = AUTOENCODER["temporal"]
    if kind == "causal3d":
        temporal = {"type": kind, "filters": 4, "num_res_blocks": 1, "num_groups": 2}
    config = vae_config(
        "pixels", data=videos(num_frames), autoencoder=AUTOENCODER | {"temporal": temporal}, frames_per_clip=None
    )
    task = config.build("cpu").task
    batch, key = task.prepare(BatchKey(0, 0)), BatchKey(0, 0)
    made = task.decoded(batch, key)
    assert made.pictures.shape == batch.video.shape
    loss = torch.stack(list(task.loss(batch, key).values())).sum()
    loss.backward()
    assert all(p.grad is not None for p in task.autoencoder.temporal_vae.parameters())
    # Chunks of 17 frames know nothing of each other.
    batch.video[:, :, 17:] = 0
    changed = task.decoded(batch, key).pictures
    torch.testing.assert_close(changed[:, :, :17], made.pictures[:, :, :17])
    assert num_frames <= 17 or not torch.allclose(changed[:, :, 17:], made.pictures[:, :, 17:])


def test_clips_of_a_manifest_of_sizes_that_fill_no_whole_cells(tmp_path):
    """20 frames of 36 x 44 px, of which 32 x 40 are whole cells; others are held out."""
    rows = []
    for number in range(3):
        frames = render_frames(number)
        path = write_video(tmp_path / f"{number}.mp4", frames, fps=8)
        rows.append(ClipRow(path, "", len(frames), 36, 44, 8.0))
    write_manifest(tmp_path / "train.csv", rows[:2])
    write_manifest(tmp_path / "held_out.csv", rows[2:])

    def clips(name: str) -> ManifestClips:
        return ManifestClips({"36x44": {"18": (1.0, 2)}}, tmp_path / name, text_required=False, num_workers=0)

    config = vae_config("pixels", data=clips("train.csv"), held_out=clips("held_out.csv"), preview_batches=1)
    trainer = train(config, tmp_path / "run")
    assert trainer.task.prepare(BatchKey(0, 0)).video.shape == (2, 3, 18, 32, 40)
    figures = trainer.setup.preview.show(trainer.module, tmp_path, 0)
    assert set(figures) == {"psnr", "bilinear_psnr"}, "nobody knows where objects are"
    space = VideoAutoencoder.from_pretrained(tmp_path / "run" / "model").latent_space
    assert space.trained_with.endswith("4 clips of train.csv") and "1 / std" in space.trained_with
    unwatched = vae_config("pixels", data=clips("train.csv")).build("cpu")
    assert unwatched.preview.show(unwatched.task.module, tmp_path, 0) == {}


def render_frames(seed: int) -> np.ndarray:
    """uint8 (20, 36, 44, 3)."""
    clips = ToyboxClips(num_frames=20, height=36, width=44)
    video = clips.batch(clips.specs(1, generator("manifest", seed)), [""]).video
    return ((video[0] + 1) * 127.5).to(torch.uint8).permute(1, 2, 3, 0).numpy()


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "options", "trained"),
    [
        ("frames", {}, {"encoder", "decoder"}),
        ("latents", {}, {"temporal"}),
        ("pixels", {}, {"temporal", "decoder"}),
        ("pixels", {"train_encoder": True}, {"temporal", "encoder", "decoder"}),
        ("decoders", {}, {"temporal", "decoder"}),
    ],
)
def test_a_stage_moves_its_own_part_alone(stage, options, trained, tmp_path):
    config = vae_config(stage, **options)
    torch.manual_seed(0)
    before = {n: p.clone() for n, p in config.build("cpu").task.module.named_parameters()}
    after = dict(train(config, tmp_path).module.named_parameters())
    parts = {
        "encoder": "spatial_vae.module.encoder.",
        "decoder": "spatial_vae.module.decoder.",
        "temporal": "temporal_vae.",
    }
    for part, prefix in parts.items():
        names = [name for name in before if name.startswith(prefix)]
        moved = any(not torch.equal(before[name], after[name]) for name in names)
        assert names and moved == (part in trained), part


def test_decoders_learn_and_the_latent_space_stays(tmp_path):
    VideoAutoencoder(**AUTOENCODER).save_pretrained(tmp_path / "before")
    before = VideoAutoencoder.from_pretrained(tmp_path / "before")
    config = vae_config("decoders", autoencoder=None, init_from=str(tmp_path / "before"))
    train(config, tmp_path / "run")
    after = VideoAutoencoder.from_pretrained(tmp_path / "run" / "model")
    clips = config.data.open(DataContext()).batch(BatchKey(0, 0)).video
    with torch.no_grad():
        latents = before.encode_video(clips)
        assert torch.equal(after.encode_video(clips), latents)
        num_frames = clips.shape[2]
        assert not torch.equal(after.decode_latents(latents, num_frames), before.decode_latents(latents, num_frames))
    assert after.latent_space == before.latent_space


def test_latents_of_images_are_to_stay_as_they_are():
    config = vae_config("latents", identity_weight=3.0, kl_weight=0.0, sample_frames=False)
    task = config.build("cpu").task
    clips = task.prepare(BatchKey(0, 0))
    assert task.loss(clips, BatchKey(0, 0))["identity"].tolist() == [0.0, 0.0], "of clips nothing is asked"
    image = vae_config("latents", identity_weight=3.0, cut=Cut(image_share=1.0)).build("cpu").task
    image.module.load_state_dict(task.module.state_dict())
    key = BatchKey(0, 0)
    terms = image.loss(image.prepare(key), key)
    target = frame_latents(image.autoencoder, image.prepare(key)).latents
    posterior = image.autoencoder.encode_time(image.autoencoder.latent_space.unscale_frames(target))
    noise = torch.randn(posterior.mean.shape, generator=key.generator("posterior"))
    expected = 3.0 * (posterior.sample(noise=noise) - target).abs().flatten(1).mean(dim=1)
    torch.testing.assert_close(terms["identity"], expected)


def test_cached_latents_are_those_of_the_clips(tmp_path):
    setup = vae_config("latents", cache_latents=True, num_clips=6, object_weight=2.0).build("cpu")
    data = setup.data
    data.open(tmp_path)
    clips = [frame_latents(data.autoencoder, clips) for clips in data.measured_clips()]
    assert torch.equal(torch.cat([batch.latents for batch in clips]), data.cached.latents)
    batch = setup.task.prepare(BatchKey(0, 0))
    assert any(torch.equal(batch.latents[0], latents) for latents in data.cached.latents)
    assert batch.object_mask is not None and batch.object_mask.max() == 1


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("latents", {"perceptual_weight": 0.1}, "objective.perceptual_weight compares pictures"),
        ("latents", {"discriminator": CRITIC}, "objective.discriminator compares pictures"),
        ("pixels", {"discriminator": CRITIC}, "set objective.frames_per_clip=none"),
        ("pixels", {"cache_latents": True}, "leave it out"),
    ],
)
def test_what_excludes_itself_is_refused(stage, options, message):
    with pytest.raises(OpenSoraError, match=message):
        vae_config(stage, **options)


# --- the latent space -------------------------------------------------------------------------------------------------


def save_released(folder: Path) -> Path:
    """A video autoencoder that was trained with 0.18215, like the released one of Open-Sora 1.2."""
    torch.manual_seed(3)
    space = {"scaling_factor": 0.18215, "shift": [0.1, 0.2, 0.3, 0.4], "scale": [1.0, 2.0, 3.0, 4.0]}
    VideoAutoencoder(**AUTOENCODER, latent_space=space).save_pretrained(folder)
    return folder


def save_spatial(folder: Path, scaling_factor: float | None) -> Path:
    """A 2D autoencoder as diffusers saves it, with or without a factor of its own."""
    torch.manual_seed(4)
    VideoAutoencoder(**AUTOENCODER).spatial_vae.module.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("scaling_factor")
    path.write_text(json.dumps(config if scaling_factor is None else config | {"scaling_factor": scaling_factor}))
    return folder


def test_released_weights_keep_the_factor_they_were_trained_with(tmp_path):
    released = str(save_released(tmp_path / "released"))
    config = vae_config("pixels", autoencoder=None, init_from=released)
    space = VideoAutoencoder.from_pretrained(train(config, tmp_path / "run").folder / "model").latent_space
    assert space.scaling_factor == 0.18215
    assert space.shift != (0.1, 0.2, 0.3, 0.4), "but shift and scale are those of the new latents"
    with pytest.raises(OpenSoraError, match=r"0.13025, but .*released was trained with 0.18215"):
        vae_config("pixels", autoencoder=None, init_from=released, scaling_factor=0.13025).build("cpu")


def test_the_published_autoencoder_is_known_by_name():
    task = VAETaskConfig("pixels", init_from="opensora-1.2").build("meta").task
    assert task.autoencoder.latent_space.scaling_factor == 0.18215
    assert task.autoencoder.device.type == "meta"


@pytest.mark.parametrize(
    ("own", "chosen", "expected"), [(0.13025, None, 0.13025), (0.13025, 0.18215, 0.18215), (None, 0.5, 0.5)]
)
def test_from_scratch_the_factor_is_the_2d_autoencoders_own_or_the_users(own, chosen, expected, tmp_path):
    spatial = save_spatial(tmp_path / "spatial", own)
    config = vae_config("latents", spatial_from=str(spatial), scaling_factor=chosen)
    trainer = train(config, tmp_path / "run")
    saved = VideoAutoencoder.from_pretrained(trainer.folder / "model")
    assert saved.latent_space.scaling_factor == expected
    weights = load_file(spatial / "diffusion_pytorch_model.safetensors")
    for name, weight in saved.spatial_vae.module.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_a_factor_that_nobody_declares_is_measured_once(tmp_path):
    config = vae_config("latents", spatial_from=str(save_spatial(tmp_path / "spatial", None)), num_clips=8)
    whole = train(config, tmp_path / "whole", steps=2)
    space = whole.task.autoencoder.latent_space
    latents = [frame_latents(whole.task.autoencoder, clips).latents for clips in whole.setup.data.measured_clips()]
    assert float(torch.cat(latents).std()) == pytest.approx(1, abs=1e-3)
    assert space.scaling_factor != 1 and "1 / std of the frame latents of 8 clips" in space.trained_with
    # A run that is resumed goes on with the figure it began with.
    train(config, tmp_path / "halves", steps=2, stop_after=1)
    kept = tmp_path / "halves" / "cache" / "latent_space.json"
    kept.write_text(kept.read_text().replace(f'"scaling_factor": {space.scaling_factor}', '"scaling_factor": 7.0'))
    assert train(config, tmp_path / "halves", steps=2).task.autoencoder.latent_space.scaling_factor == 7.0


def test_a_spatial_autoencoder_of_another_size_is_named(tmp_path):
    spatial = AUTOENCODER["spatial"] | {"block_out_channels": [8, 16]}
    config = vae_config(
        "latents",
        spatial_from=str(save_spatial(tmp_path, 0.5)),
        autoencoder=AUTOENCODER | {"spatial": spatial},
    )
    with pytest.raises(OpenSoraError, match=r"mis-shaped tensors.*two different models"):
        config.build("cpu")


@pytest.mark.parametrize("stage", ["latents", "pixels"])
def test_latents_come_out_normalised(stage, tmp_path):
    trainer = train(vae_config(stage, num_clips=12), tmp_path)
    autoencoder = VideoAutoencoder.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode_video(video) for video in trainer.setup.data.measured_videos()])
    per_channel = latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(per_channel.mean(dim=1), torch.zeros(4), rtol=0, atol=2e-3)
    torch.testing.assert_close(per_channel.std(dim=1), torch.ones(4), rtol=0, atol=1e-2)
    assert "12 clips of the toybox" in autoencoder.latent_space.trained_with


# --- the critic -------------------------------------------------------------------------------------------------------


def gradient(loss: Tensor, parameter: Tensor) -> Tensor:
    return torch.autograd.grad(loss, parameter, retain_graph=True)[0]


def test_critic_and_comparison_pull_at_the_last_layer_as_hard():
    config = vae_config("pixels", frames_per_clip=None, discriminator=CRITIC, kl_weight=0.0)
    task = config.build("cpu").task
    key = BatchKey(0, 0)
    terms = task.loss(task.prepare(key), key)
    last = task.autoencoder.spatial_vae.module.decoder.conv_out.weight
    comparison = gradient(terms["reconstruction"].mean(), last).norm()
    adversarial = gradient(terms["adversarial"].mean(), last).norm()
    assert float(adversarial) == pytest.approx(0.5 * float(comparison), rel=0.05)


def test_either_side_learns_from_its_own_loss():
    setup = vae_config("pixels", frames_per_clip=None, discriminator=CRITIC).build("cpu")
    task, critic = setup.task, setup.critic
    key = BatchKey(0, 0)
    batch = task.prepare(key)
    sum(term.mean() for term in task.loss(batch, key).values()).backward()
    assert critic is not None
    assert all(parameter.grad is None for parameter in critic.module.parameters())
    task.module.zero_grad()
    critic.loss(batch, key)["critic"].mean().backward()
    assert all(parameter.grad is not None for parameter in critic.module.parameters())
    assert all(parameter.grad is None for parameter in task.module.parameters())


def test_the_critic_waits_for_its_step():
    setup = vae_config("frames", discriminator=DiscriminatorConfig(8, 1, start=5)).build("cpu")
    task, critic = setup.task, setup.critic
    batch = task.prepare(BatchKey(0, 0))
    assert critic is not None
    for step, waits in ((4, True), (5, False)):
        key = BatchKey(0, 0, step)
        adversarial = task.loss(batch, key)["adversarial"]
        critic.module.zero_grad()
        critic.loss(batch, key)["critic"].mean().backward()
        assert bool((adversarial == 0).all()) == waits
        assert all(bool((parameter.grad == 0).all()) == waits for parameter in critic.module.parameters())


def test_training_with_a_critic_resumes_bit_for_bit(tmp_path):
    options: dict[str, Any] = {"cut": Cut(image_share=0.3, random_lengths=True), "frames_per_clip": None}
    config = vae_config("pixels", data=videos(6), discriminator=CRITIC, **options)
    whole = train(config, tmp_path / "whole", steps=4)
    train(config, tmp_path / "halves", steps=4, stop_after=2)
    halves = train(config, tmp_path / "halves", steps=4)
    assert whole.critic is not None and halves.critic is not None
    for one, two in ((whole.module, halves.module), (whole.critic.module, halves.critic.module)):
        for name, weight in one.state_dict().items():
            assert torch.equal(weight, two.state_dict()[name]), name


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["frames", "latents", "pixels"])
def test_a_stage_is_planned_before_the_one_before_has_run(stage, tmp_path):
    config = vae_config(stage, init_from=str(tmp_path / "to come" / "model"), data=ToyboxVideos(CLIPS, 2))
    plan = config.plan()
    module = plan.setup.task.module
    for shape in plan.shapes():
        terms = plan.setup.task.loss(plan.meta_batch(shape), BatchKey(0, 0))
        assert all(term.is_meta and term.shape == (2,) for term in terms.values())
    blocks = plan.setup.partition.blocks
    assert blocks and all(any(block is part for part in module.modules()) for block in blocks)


def test_previews_measure_held_out_clips_against_bilinear_pictures(tmp_path):
    setup = vae_config("pixels", preview_batches=1).build("cpu")
    figures = setup.preview.show(setup.task.module, tmp_path, 0)
    assert set(figures) == {"psnr", "bilinear_psnr", "object_psnr"}
    assert 0 < figures["psnr"] < figures["bilinear_psnr"] < 60, "an untrained autoencoder is worse"
