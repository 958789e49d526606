"""The task of training diffusion transformers: latents, text, conditioning, times, groups, frozen networks, export."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_published
import torch
from huggingface_hub import constants
from tiny_pipeline import make_pipeline
from tiny_tasks import FAMILY, family_config, write_clips
from torch import Tensor

import opensora
from opensora.checkpoints.published import PUBLISHED
from opensora.data.batch import DataContext
from opensora.data.clips import ManifestClips
from opensora.data.encoding import encode_clips
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.media.read import read_video
from opensora.models.text.cleaning import clean_text
from opensora.models.text.conditioner import TextStates
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.noise import Flow
from opensora.training.diffusion.previews import Prompts
from opensora.training.diffusion.task import DiffusionTask
from opensora.training.diffusion.text import FrozenText
from opensora.training.optimizer import OptimizerConfig
from opensora.training.trainer import Trainer

LOOP = LoopConfig(
    steps=2, precision="fp32", log_every=1, checkpoint_every=0, optimizer=OptimizerConfig(matrices="adamw")
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


def opened(version: str, manifest: Path, folder: Path, **changes: Any) -> DiffusionTask:
    torch.manual_seed(0)
    setup = family_config(version, manifest, **changes).build("cpu")
    setup.data.open(folder)
    assert isinstance(setup.task, DiffusionTask)
    return setup.task


def video_batch(task: DiffusionTask) -> Any:
    """The first batch that is no image."""
    batches = (task.prepare(BatchKey(0, position)) for position in range(20))
    return next(batch for batch in batches if batch.clips.conditions.num_frames > 1)


# --- from clips to a model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", FAMILY)
def test_two_steps_on_mp4_files_make_a_model(version: str, manifest: Path, tmp_path: Path) -> None:
    """From files to a folder that generates; figures are told by size and by time, and of the clips."""
    prompts = Prompts(("a red ball",))
    config = family_config(version, manifest, frame_masks={"head": 0.5}, preview=prompts, export_dtype="float32")
    trainer = Trainer(Recipe("tiny", config, LOOP), tmp_path)
    before = {name: weight.clone() for name, weight in trainer.module.state_dict().items()}
    frozen = {n: w.clone() for part in trainer.setup.frozen.values() for n, w in part.state_dict().items()}
    model = trainer.run()
    changed = [name for name, weight in trainer.module.state_dict().items() if not torch.equal(weight, before[name])]
    assert changed
    after = {n: w for part in trainer.setup.frozen.values() for n, w in part.state_dict().items()}
    assert all(torch.equal(after[name], weight) for name, weight in frozen.items())

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line}
    assert any("64x64" in name for name in names) and any("0." in name for name in names), names
    assert {"clips_met", "broken_clips"} <= names

    trainer.preview()
    frames, _ = read_video(next((tmp_path / "previews").glob("*.mp4")))
    assert len(frames) == config.defaults["num_frames"]
    pipeline, length = opensora.load_pipeline(model), 8 if version == "2.0-dc" else 5
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    made = pipeline("a red ball", num_frames=length, generator=noise, num_inference_steps=2, output_type="pt").frames
    assert made.shape == (1, length, 3, 64, 64) and torch.isfinite(made).all()


@pytest.mark.parametrize("version", FAMILY)
def test_frozen_networks_stay_out_of_training(version: str, manifest: Path, tmp_path: Path) -> None:
    task = opened(version, manifest, tmp_path)
    second = {"text_encoder_2"} if version.startswith("2.0") else set()
    assert set(task.networks.frozen) == {"autoencoder", "text_encoder"} | second
    inside = {id(parameter) for parameter in task.module.parameters()}
    task.module.train()
    for network in task.networks.frozen.values():
        assert not network.training
        assert not any(parameter.requires_grad or id(parameter) in inside for parameter in network.parameters())
    batch = task.prepare(BatchKey(0, 0))
    assert isinstance(batch.text, TextStates)
    assert not batch.clips.latents.requires_grad and not batch.text.states.requires_grad


# --- latents ----------------------------------------------------------------------------------------------------------


def test_latents_are_drawn_from_the_posterior_or_are_its_mean(manifest: Path, tmp_path: Path) -> None:
    drawn, means = (opened("1.2", manifest, tmp_path, sample_posterior=sample) for sample in (True, False))
    assert isinstance(means.settings.data, ManifestClips)
    clips = means.settings.data.open(DataContext())
    for k in range(3):
        key = BatchKey(0, k)
        mean = encode_clips(clips.batch(key), means.networks.autoencoder)
        assert torch.equal(means.prepare(key).clips.latents, mean.latents)
        sampled = drawn.prepare(key).clips.latents
        assert torch.equal(sampled, drawn.prepare(key).clips.latents), "the same place draws the same"
        assert not torch.equal(sampled, mean.latents)


def test_networks_are_told_the_size_before_encoding(manifest: Path, tmp_path: Path) -> None:
    """Columns that fill no latent cell are cut before encoding, but the size told is that of the clip."""
    data = ManifestClips({"52x60": {"5": (1.0, 2)}}, manifest, num_workers=0)
    batch = opened("1.2", manifest, tmp_path, data=data).prepare(BatchKey(0, 0))
    assert batch.clips.latents.shape[-2:] == (6, 7)
    assert batch.clips.conditions.height.tolist() == [52.0] * 2 and batch.clips.conditions.width.tolist() == [60.0] * 2


# --- text -------------------------------------------------------------------------------------------------------------


def test_captions_are_spelled_as_the_model_was_trained(manifest: Path, tmp_path: Path) -> None:
    task = opened("1.2", manifest, tmp_path)
    caption = "A  Red Ball, https://example.org/ROLLS &amp; stops"
    tokens = task.networks.captions.tokens([caption]).ids["text_encoder"]
    assert clean_text(caption) in task.networks.captions.tokenizers["tokenizer"].decode(
        tokens[0], skip_special_tokens=True
    )
    defaults = {**task.settings.defaults, "clean_prompts": False}
    plain = opened("1.2", manifest, tmp_path, defaults=defaults).networks.captions
    assert caption in plain.tokenizers["tokenizer"].decode(
        plain.tokens([caption]).ids["text_encoder"][0], skip_special_tokens=True
    )


def test_captions_end_in_the_scores_of_the_table(manifest: Path, tmp_path: Path) -> None:
    """As prompts do in sampling; a score that is empty or told already is left out."""
    table = manifest.with_name("scored.csv")
    first, *rows = manifest.read_text().splitlines()
    scored = [f"{row},5.25,,pan left" for row in rows]
    table.write_text("\n".join([f"{first},aes,flow,cmotion", *scored]) + "\n")

    def captions(scores: bool) -> list[str]:
        data = ManifestClips({"64x64": {"5": (1.0, 2)}}, table, scores=scores, num_workers=0)
        source = opened("1.2", manifest, tmp_path, data=data).data.source
        assert source is not None
        return source.batch(BatchKey(0, 0)).captions

    for plain, told in zip(captions(False), captions(True), strict=True):
        assert told == f"{plain} aesthetic score: 5.2. camera motion: pan left."


def test_long_captions_are_cut_to_what_the_model_reads(manifest: Path, tmp_path: Path) -> None:
    captions = opened("1.0", manifest, tmp_path).networks.captions
    text = captions.tokens(["a ball " * 100, "a cube"])
    tokens, mask = text.ids["text_encoder"], text.masks["text_encoder"]
    assert tokens.shape == mask.shape == (2, 120)
    assert mask.sum(dim=1).tolist() == [120, len(b"a cube") + 1]


def test_a_dropped_caption_is_the_null_text(manifest: Path, tmp_path: Path) -> None:
    """With every caption dropped, what they say makes no difference, and otherwise it does."""
    with torch.no_grad():
        for share, same in ((1.0, True), (0.0, False)):
            task = opened("1.2", manifest, tmp_path, drop_text=share)
            for parameter in task.networks.transformer.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            batch = video_batch(task)
            first = task.loss(batch, BatchKey(0, 0))["velocity"]
            assert isinstance(batch.text, TextStates)
            batch = replace(batch, text=replace(batch.text, states=batch.text.states.flip(1) + 1))
            assert torch.allclose(first, task.loss(batch, BatchKey(0, 0))["velocity"]) == same


def test_text_of_a_pipelines_folder(manifest: Path, tmp_path: Path) -> None:
    """Any pipeline's text encoder and tokenizer serve, frozen."""
    source = make_pipeline()
    source.save_pretrained(tmp_path / "model")
    transformer = {**family_config("1.2", manifest).transformer, "caption_channels": 16, "model_max_length": 24}
    text = FrozenText((tmp_path / "model").as_posix())
    task = opened("1.2", manifest, tmp_path, text=text, transformer=transformer)
    batch = task.prepare(BatchKey(0, 0))
    assert isinstance(batch.text, TextStates)
    assert batch.text.states.shape[2] == 16 and torch.isfinite(batch.text.states).all()
    assert "text_encoder" in task.networks.frozen
    assert torch.isfinite(task.loss(batch, BatchKey(0, 0))["velocity"]).all()


# --- diffusion --------------------------------------------------------------------------------------------------------


def seen_by(task: DiffusionTask, batch: Any) -> Tensor:
    """What the transformer sees of a batch."""
    seen: list[Tensor] = []
    predict = task.predict

    def watching(noisy: Tensor, timestep: Tensor, batch: Any) -> Tensor:
        seen.append(noisy)
        return predict(noisy, timestep, batch)

    task.predict = watching
    task.loss(batch, BatchKey(0, 0))
    return seen[0]


@pytest.mark.parametrize(("version", "clean"), [("1.1", False), ("1.2", True)])
def test_conditioning_frames_are_shown_as_each_version_does(
    version: str, clean: bool, manifest: Path, tmp_path: Path
) -> None:
    """1.1 noises them to its first step, which is almost clean; 1.2 shows them clean."""
    task = opened(version, manifest, tmp_path, frame_masks={"head": 1.0})
    batch = video_batch(task)
    given = ~batch.frame_mask
    noisy = seen_by(task, batch)
    apart = (noisy - batch.clips.latents).abs().amax(dim=(1, 3, 4))
    assert (apart[given].max() == 0) == clean and apart[given].max() < 0.1
    assert apart[~given].min() > 0 and given.any()


def test_larger_clips_are_trained_with_more_noise(manifest: Path, tmp_path: Path) -> None:
    """The time shift of 1.2; without it the times are the same for all."""

    def mean_time(size: str, shift: bool) -> float:
        data = ManifestClips({size: {"5": (1.0, 8)}}, manifest, num_workers=0)
        task = opened("1.2", manifest, tmp_path, data=data, diffusion=Flow(time_shift=shift))
        return float(task.prepare(BatchKey(0, 0)).t.mean())

    small, large = mean_time("32x32", True), mean_time("64x64", True)
    assert small < large < mean_time("64x64", False) == mean_time("32x32", False)


def test_groups_tell_size_and_time(manifest: Path, tmp_path: Path) -> None:
    for version in FAMILY:
        task = opened(version, manifest, tmp_path)
        batch = task.prepare(BatchKey(0, 0))
        batch = replace(batch, t=batch.t.new_tensor([0, 999]))
        assert task.groups(batch) == {"bucket": [batch.clips.label] * 2, "t": ["0.0-0.1", "0.9-1.0"]}


# --- export -----------------------------------------------------------------------------------------------------------


def test_a_large_text_encoder_stays_where_it_is(manifest: Path, tmp_path: Path) -> None:
    """The exported folder holds its configuration and tokenizer; it loads with the encoder given, and not without."""
    config = family_config("1.2", manifest)
    encoder = config.build("cpu").task.networks.captions.load()["text_encoder"]
    assert isinstance(config.text, FrozenText)
    text = FrozenText(config.text.origin, exported=False)
    task = family_config("1.2", manifest, text=text, export_dtype="float32").build("cpu").task
    task.export(task.module, tmp_path / "model")
    assert not list((tmp_path / "model" / "text_encoder").glob("*.safetensors"))
    with pytest.raises(OpenSoraError, match="text_encoder"):
        opensora.load_pipeline(tmp_path / "model")
    encoder.save_pretrained(tmp_path / "t5")
    pipeline = opensora.load_pipeline(tmp_path / "model", components={"text_encoder": tmp_path / "t5"})
    for name, weight in pipeline.text_encoder.state_dict().items():
        assert torch.equal(weight, encoder.state_dict()[name]), name
    assert pipeline.config.scores == {"aesthetic": 6.5, "flow": None, "camera_motion": None}


# --- released parts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path, monkeypatch) -> Any:
    """`released(name)` puts a small model of that name into the table and into a cache of the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name: str) -> dict[str, Any]:
        model = tiny_published.tiny(name)
        monkeypatch.setitem(PUBLISHED, name, model)
        return tiny_published.write_published(tmp_path / "hub", model)

    return put


@pytest.mark.parametrize("name", ["opensora-1.0-hq-16x256x256", "opensora-1.1-stage3", "opensora-1.2"])
def test_training_goes_on_from_released_parts(name: str, manifest: Path, tmp_path: Path, released: Any) -> None:
    """By a model's name: transformer, autoencoder, text encoder and tokenizer in their published formats."""
    networks = released(name)
    version = {"STDiT": "1.0", "STDiT2": "1.1", "STDiT3": "1.2"}[type(networks["transformer"]).__name__]
    parts: dict[str, Any] = {"autoencoder": name, "text": FrozenText(name, exported=False), "init_from": name}
    task = opened(version, manifest, tmp_path, **parts, transformer=None)
    for part, network in (("transformer", task.networks.transformer), *task.networks.frozen.items()):
        for key, weight in network.state_dict().items():
            if not key.startswith("pos_embed"):  # derived anew
                torch.testing.assert_close(weight, networks[part].state_dict()[key], msg=f"{part} {key}")
    batch = task.prepare(BatchKey(0, 0))
    assert isinstance(batch.text, TextStates) and batch.text.states.shape[1] <= 40
    assert all(torch.isfinite(term).all() for term in task.loss(batch, BatchKey(0, 0)).values())


def test_a_released_part_that_is_not_here_is_named(manifest: Path, released: Any) -> None:
    with pytest.raises(
        OpenSoraError, match=r"autoencoder of opensora-1\.2 .*hf download hpcai-tech/OpenSora-VAE"
    ) as error:
        family_config("1.2", manifest, autoencoder="opensora-1.2").build("cpu")
    assert "\n" not in str(error.value)


# --- known frames beside the noise ------------------------------------------------------------------------------------


def test_frames_are_shown_beside_the_noise(manifest, tmp_path) -> None:
    """All frames are noised; of some clips the network sees what they show, and its loss knows of it."""
    task = opened("1.3", manifest, tmp_path, known_frames={"i2v_head": 1.0}, drop_of_known={}, drop_text=0.0)
    batch = video_batch(task)
    assert batch.channels is not None and batch.frame_mask is None
    assert batch.channels.mask.tolist() == [[True, False]] * len(batch.noise)
    assert batch.channels.latents.equal(batch.clips.latents)
    for embedder in (task.networks.transformer.x_embedder_cond, task.networks.transformer.x_embedder_cond_mask):
        torch.nn.init.normal_(embedder.proj.weight, std=0.2)
    key = BatchKey(0, 0)
    unseen = replace(batch, channels=task.networks.transformer.without_known_frames(batch.channels))
    assert not torch.allclose(task.loss(batch, key)["velocity"], task.loss(unseen, key)["velocity"])


def test_what_clips_with_known_frames_are_trained_without(manifest, tmp_path) -> None:
    for share, text, shown in (("text", True, True), ("frames", False, False), ("both", True, False)):
        task = opened("1.3", manifest, tmp_path, known_frames={"i2v_head": 1.0}, drop_of_known={share: 1.0})
        batch = video_batch(task)
        assert batch.channels is not None and batch.channels.mask[:, 0].all()  # the mask stays
        assert batch.drop_text.all() == text and batch.drop_text.any() == text
        assert batch.channels.masked_latents.any() == shown


def test_networks_that_do_not_read_known_frames_are_shown_none(manifest, tmp_path) -> None:
    assert video_batch(opened("1.2", manifest, tmp_path)).channels is None
    with pytest.raises(OpenSoraError, match="a STDiT3 does not read"):
        opened("1.2", manifest, tmp_path, known_frames={"i2v_head": 1.0})
    with_none = video_batch(opened("1.3", manifest, tmp_path, known_frames={}, drop_of_known={}))
    assert with_none.channels is not None and not with_none.channels.mask.any()
