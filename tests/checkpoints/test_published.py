"""The table of released models, and loading them from a cache of the Hub with every part in its published format."""

import dataclasses
import hashlib
import importlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import tiny_published
import torch
from huggingface_hub import constants
from sentencepiece import SentencePieceProcessor
from tiny_pipeline import seeded

from opensora.checkpoints import hub
from opensora.checkpoints.loading import load_pipeline
from opensora.checkpoints.published import ALIASES, BUNDLED, PUBLISHED, published_name
from opensora.checkpoints.published_parts import PublishedPart
from opensora.checkpoints.source import ModelSource
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.guidance_rules import TextImageGuidance
from opensora.pipeline import OpenSoraPipeline

PROMPT = "a small red ball rolls left"
KEYS = {
    "opensora-1.0-16x256x256": "stdit_xl2_v1_0_16x256x256",
    "opensora-1.0-hq-16x256x256": "stdit_xl2_v1_0_16x256x256",
    "opensora-1.0-hq-16x512x512": "stdit_xl2_v1_0_16x512x512",
    "opensora-1.1-stage2": "stdit2_xl2_v1_1",
    "opensora-1.1-stage3": "stdit2_xl2_v1_1",
    "opensora-1.2": "stdit3_xl2_v1_2",
    "opensora-1.3": "stdit3_xl2_v1_3",
    "opensora-1.3-360p": "stdit3_xl2_v1_3",
    "opensora-1.3-i2v": "stdit3_xl2_v1_3",
    "opensora-2.0": "mmdit_11b_v2_0",
    "opensora-2.0-dc-ae": "mmdit_11b_v2_0_dcae",
}
FAMILY = {"1.0": "opensora-1.0-hq-16x256x256", "1.1": "opensora-1.1-stage3", "1.2": "opensora-1.2"}
RELEASES = [*FAMILY, "1.3"]


# --- the table --------------------------------------------------------------------------------------------------------


def on_meta(part: PublishedPart) -> torch.nn.Module:
    library, class_name = part.class_name.rsplit(".", 1)
    cls = getattr(importlib.import_module(library), class_name)
    with torch.device("meta"):
        config_class = getattr(cls, "config_class", None)
        return cls(**part.config) if config_class is None else cls(config_class(**part.config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_have_the_published_names_and_shapes(golden_json, name):
    published = golden_json(f"checkpoint_keys/{KEYS[name]}")
    network = on_meta(PUBLISHED[name].transformer)
    shapes = {key: shape for key, (shape, _dtype) in published["keys"].items()}
    length = PUBLISHED[name].transformer.config["model_max_length"]
    assert shapes.get("y_embedder.y_embedding", [length, 4096]) == [length, 4096]
    assert {key: list(tensor.shape) for key, tensor in network.state_dict().items()} == shapes
    assert sum(parameter.numel() for parameter in network.parameters()) == published["num_parameters"]


@pytest.mark.parametrize(
    ("name", "keys", "prefix"),
    [
        ("opensora-1.0", "sd_vae_autoencoderkl", "spatial_vae.module."),
        ("opensora-1.1", "sd_vae_autoencoderkl", "spatial_vae.module."),
        ("opensora-1.2", "opensora_vae_v1_2", ""),
        ("opensora-1.3", "opensora_vae_v1_3", ""),
    ],
)
def test_autoencoders_have_the_published_names_and_shapes(golden_json, name, keys, prefix):
    published = golden_json(f"checkpoint_keys/{keys}")
    network = on_meta(PUBLISHED[published_name(name)].autoencoder)
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    expected = {prefix + key: shape for key, (shape, _dtype) in published["keys"].items()}
    assert {key: shape for key, shape in shapes.items() if key not in {"scale", "shift"} - set(expected)} == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_files_are_those_of_the_networks(name):
    model = PUBLISHED[name]
    for part in (model.transformer, model.autoencoder, model.text_encoder):
        parameters = sum(tensor.numel() for tensor in {id(t): t for t in on_meta(part).state_dict().values()}.values())
        if part is model.text_encoder:
            parameters -= 32128 * 4096  # the embedding has two names
        in_half = part is model.transformer and "MMDiT" in part.class_name
        assert part.size_bytes == pytest.approx((2 if in_half else 4) * parameters, rel=0.01)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_default_is_one_of_the_pipeline_and_every_scheduler_can_be_made(name):
    model = PUBLISHED[name]
    assert set(model.defaults) <= set(inspect.signature(OpenSoraPipeline.__init__).parameters)
    library, class_name = model.scheduler_class.rsplit(".", 1)
    scheduler = getattr(importlib.import_module(library), class_name)(**model.scheduler_config)
    chunk = model.autoencoder.config.get("micro_frame_size")
    assert getattr(scheduler, "micro_frame_size", chunk) == chunk


def test_what_the_releases_sample_with():
    """Figures of the configurations that were published with each release."""
    first, second, third = (PUBLISHED[name].defaults for name in FAMILY.values())
    for defaults, steps, channels, frames in ((first, 100, 3, 16), (second, 100, 3, 16), (third, 30, None, 51)):
        assert defaults["guidance_scale"] == 7.0 and defaults["num_inference_steps"] == steps
        assert defaults["cfg_channels"] == channels and defaults["num_frames"] == frames
        assert defaults["clean_prompts"]
    assert first["fps"] / first["frame_interval"] == second["fps"] / second["frame_interval"] == 8
    assert second["nominal_size"] == third["nominal_size"] == [240, 426]
    assert (second["condition_frames"], third["condition_frames"], third["frame_alignment"]) == (4, 5, 5)
    assert third["scores"]["aesthetic"] == 6.5
    assert PUBLISHED[FAMILY["1.1"]].transformer.config["qk_norm_legacy"]
    for name in FAMILY.values():
        assert PUBLISHED[name].autoencoder.config["latent_space"]["scaling_factor"] == 0.18215


def test_what_1_3_samples_with():
    """Its own figures; the three of one size differ in their weights alone."""
    largest, small, from_images = (PUBLISHED[f"opensora-1.3{of}"] for of in ("", "-360p", "-i2v"))
    assert (largest.defaults["height"], largest.defaults["width"]) == (720, 1280)
    assert (small.defaults["height"], small.defaults["width"]) == (360, 640)
    for model in (largest, small, from_images):
        assert (model.defaults["num_frames"], model.defaults["num_inference_steps"]) == (113, 30)
        rule = TextImageGuidance(model.defaults["guidance_scale"], **model.defaults["guidance_options"])
        assert (rule.guidance_scale, rule.image_guidance_scale, rule.guidance_rescale) == (7.5, 5.0, 0.7)
        assert model.scheduler_config["transform_frames"] == "after_first"
    assert from_images.defaults["scores"]["aesthetic"] == 7.0 and small.defaults["scores"]["aesthetic"] is None
    assert {**small.defaults, "scores": None} == {**from_images.defaults, "scores": None}
    assert small.transformer.config == from_images.transformer.config
    assert len({model.transformer.repository for model in (largest, small, from_images)}) == 3


def test_short_names_stand_for_models():
    assert set(ALIASES.values()) <= set(PUBLISHED) and not set(ALIASES) & {*PUBLISHED, *BUNDLED}
    assert published_name("opensora-1.0") == "opensora-1.0-hq-16x256x256"
    assert published_name("opensora-1.2") == "opensora-1.2" and published_name("toybox") is None


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub; the network is an error."""

    def no_network(*_args, **_options):
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    return tmp_path / "cache"


@pytest.fixture
def released(cache, monkeypatch):
    """`released(name)` puts a small model of that name into table and cache, and returns its networks."""

    def put(name: str, **defaults):
        name = published_name(name) or name
        model = tiny_published.tiny(name, **defaults)
        monkeypatch.setitem(PUBLISHED, name, model)
        return tiny_published.write_published(cache, model)

    return put


def refusal(name, **options) -> str:
    with pytest.raises(OpenSoraError) as error:
        load_pipeline(name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_same_weights(network, original):
    ours, theirs = network.state_dict(), original.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("name", [f"opensora-{name}" for name in (*RELEASES, "1.0-hq-16x512x512")])
def test_a_release_loads_from_its_own_files(released, name):
    networks = released(name)
    pipe = load_pipeline(name)
    for part, network in networks.items():
        assert_same_weights(getattr(pipe, part), network)
        assert not getattr(pipe, part).training
    model = PUBLISHED[published_name(name)]
    for option, value in {**model.transformer.config, **model.autoencoder.config}.items():
        own = pipe.transformer.config if option in model.transformer.config else pipe.autoencoder.config
        assert own[option] == value
    assert all(pipe.config[option] == value for option, value in model.defaults.items())
    assert type(pipe.scheduler).__name__ == model.scheduler_class.rsplit(".", 1)[1]
    assert all(pipe.scheduler.config[option] == value for option, value in model.scheduler_config.items())


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_makes_frames(released, name):
    released(f"opensora-{name}")
    pipe = load_pipeline(f"opensora-{name}")
    pipe.set_progress_bar_config(disable=True)
    output = pipe(PROMPT, generator=seeded(1), output_type="pt")
    num_frames = 17 if name == "1.3" else 4  # a chunk of its autoencoder
    assert output.frames.shape == (1, num_frames, 3, 32, 48) and torch.isfinite(output.frames).all()
    channels = pipe.autoencoder.latent_channels if name in ("1.2", "1.3") else 3
    assert output.settings["cfg_channels"] == list(range(channels))


def test_the_tokenizer_is_the_sentencepiece_model(released):
    released("opensora-1.2")
    tokenizer = load_pipeline("opensora-1.2").tokenizer
    theirs = SentencePieceProcessor(model_proto=tiny_published.tokenizer_model())
    for text in (PROMPT, "Rain, in the GREEN hills 2.5"):
        assert tokenizer(text)["input_ids"] == [*theirs.encode(text), 1]  # 1 ends the text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


def test_nothing_is_fetched_without_being_asked_for(cache):
    message = refusal("opensora-1.2")
    assert "opensora-1.2 is not complete on this machine" in message
    for part in PUBLISHED["opensora-1.2"].parts.values():
        assert f"{part.repository}, {hub.gigabytes(part.size_bytes)}" in message
        assert f"hf download {part.repository}" in message
    assert "fetch about 25.5 GB with `download`" in message
    assert not cache.exists()


def test_only_what_is_missing_is_named(released, cache):
    released("opensora-1.2")
    shutil.rmtree(cache / "models--hpcai-tech--OpenSora-VAE-v1.2")
    message = refusal("opensora-1.2")
    assert "missing: autoencoder (hpcai-tech/OpenSora-VAE-v1.2, 1.6 GB);" in message
    assert "transformer (" not in message and "DeepFloyd" not in message


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        ("*STDiT-v3*/model.safetensors", "transformer"),
        ("*VAE-v1.2*/config.json", "autoencoder"),
        ("*t5*/pytorch_model-00002-of-00002.bin", "text_encoder"),
        ("*t5*/pytorch_model.bin.index.json", "text_encoder"),
        ("*t5*/spiece.model", "tokenizer"),
    ],
)
def test_half_a_download_is_not_a_model(released, cache, pattern, part):
    released("opensora-1.2")
    folder, file = pattern.split("/")
    [path] = cache.glob(f"{folder}/snapshots/*/{file}")
    path.unlink()
    assert f"missing: {part} (" in refusal("opensora-1.2")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("*STDiT-v3*/model.safetensors", "is damaged"),
        ("*t5*/pytorch_model-00002-of-00002.bin", "is damaged"),
        ("*t5*/pytorch_model.bin.index.json", "missing: text_encoder"),
        ("*t5*/spiece.model", "readable T5Tokenizer"),
    ],
)
def test_files_that_were_cut_off(released, cache, pattern, said):
    released("opensora-1.2")
    folder, file = pattern.split("/")
    [path] = cache.glob(f"{folder}/snapshots/*/{file}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert said in refusal("opensora-1.2")


def test_a_download_fetches_the_listed_files_and_no_others(released, cache, monkeypatch):
    networks = released("opensora-1.1")
    elsewhere = cache.with_name("elsewhere")
    cache.rename(elsewhere)
    for stored in elsewhere.iterdir():  # what else a repository may hold
        (stored / "snapshots" / tiny_published.COMMIT / "pytorch_model.safetensors.old").write_bytes(b"x")
    fetched = []

    def snapshot_download(repository, *, revision, allow_patterns, cache_dir):
        assert cache_dir is None
        folder = f"models--{repository.replace('/', '--')}"
        there = elsewhere / folder / "snapshots" / tiny_published.COMMIT
        here = cache / folder / "snapshots" / tiny_published.COMMIT
        here.mkdir(parents=True, exist_ok=True)
        shutil.copytree(elsewhere / folder / "refs", cache / folder / "refs", dirs_exist_ok=True)
        for pattern in allow_patterns:
            for path in there.glob(pattern):
                shutil.copy(path, here)
                fetched.append(path.name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    pipe = load_pipeline("opensora-1.1", download=True)
    assert_same_weights(pipe.transformer, networks["transformer"])
    assert len(fetched) == len(set(fetched)) + 2  # three parts have a config.json
    assert not list(cache.rglob("*.old"))
    load_pipeline("opensora-1.1", download=True)
    assert len(fetched) == len(set(fetched)) + 2, "what is there is not fetched again"


def test_a_download_that_fails_says_so(cache, monkeypatch):
    def unreachable(*_args, **_options):
        raise ConnectionError("the network is down\nand this is the second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refusal("opensora-1.2", download=True)
    assert "hpcai-tech/OpenSora-STDiT-v3 could not be fetched: the network is down" in message
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_options: None)
    assert "was fetched, but holds no config.json" in refusal("opensora-1.2", download=True)


# --- parts in the place of published ones -----------------------------------------------------------------------------


def test_a_part_of_ones_own(released, tmp_path):
    networks = released("opensora-1.1")
    model = PUBLISHED["opensora-1.1-stage3"]
    tuned = tiny_published.network(model.transformer, seed=9)
    tiny_published.write_transformer(tmp_path, model, tuned)
    pipe = load_pipeline("opensora-1.1", components={"transformer": tmp_path})
    assert_same_weights(pipe.transformer, tuned)
    assert_same_weights(pipe.text_encoder, networks["text_encoder"])
    assert pipe.transformer.config.qk_norm_legacy
    for components, message in (
        ({"transfomer": tmp_path}, "unknown component 'transfomer'; did you mean transformer?"),
        ({"transformer": tmp_path / "gone"}, "given as transformer, does not exist"),
        ({"autoencoder": tmp_path}, "another network than the VideoAutoencoder wanted here"),
    ):
        assert message in refusal("opensora-1.1", components=components)


def test_a_part_saved_by_us(released, tmp_path):
    networks = released("opensora-1.2")
    networks["transformer"].save_pretrained(tmp_path)
    pipe = load_pipeline("opensora-1.2", components={"transformer": tmp_path})
    assert_same_weights(pipe.transformer, networks["transformer"])


def test_all_parts_given_need_no_cache(released, cache, tmp_path):
    released("opensora-1.0")
    moved = cache.rename(tmp_path / "downloads")
    parts = {
        "transformer": next(moved.rglob("*.pth")),
        "autoencoder": next(moved.glob("*sd-vae*/snapshots/*")),
        "text_encoder": next(moved.glob("*t5*/snapshots/*")),  # and the tokenizer, which lies with it
    }
    found = ModelSource.find("opensora-1.0", parts).parts
    assert {name for name, part in found.items() if part.replaced} == {*parts, "tokenizer"}
    assert load_pipeline("opensora-1.0", components=parts).tokenizer(PROMPT)


def test_an_autoencoder_of_another_latent_space_is_refused(released, tmp_path):
    networks = released("opensora-1.1")
    vae: VideoAutoencoder = networks["autoencoder"]
    folder = Path(shutil.copytree(next(tmp_path.glob("cache/*sd-vae*/snapshots/*")), tmp_path / "sdxl"))
    tiny_published.write_json(folder / "config.json", tiny_published.frame_config(vae, scaling_factor=0.13025))
    message = refusal("opensora-1.1", components={"autoencoder": folder})
    assert "scaling_factor is 0.18215" in message and "0.13025" in message and "override_latent_space" in message
    for override in (LatentSpace(scaling_factor=0.18215), {"scaling_factor": 0.18215}):
        space = load_pipeline(
            "opensora-1.1", components={"autoencoder": folder}, override_latent_space=override
        ).autoencoder.latent_space
        assert space.scaling_factor == 0.18215 and space.replaces and space.replaces["scaling_factor"] == 0.13025
    tiny_published.write_json(folder / "config.json", tiny_published.frame_config(vae, scaling_factor=0.18215))
    load_pipeline("opensora-1.1", components={"autoencoder": folder})


def test_a_part_of_a_folder_can_be_replaced_too(released, tmp_path):
    released("opensora-1.2")
    load_pipeline("opensora-1.2").save_pretrained(tmp_path / "ours")
    model = PUBLISHED["opensora-1.2"]
    tuned = tiny_published.network(model.transformer, seed=5)
    torch.save({"epoch": 3, "state_dict": tuned.state_dict()}, tmp_path / "tuned.pt")
    pipe = load_pipeline(tmp_path / "ours", components={"transformer": tmp_path / "tuned.pt"})
    assert_same_weights(pipe.transformer, tuned)
    swapped = ModelSource.find(tmp_path / "ours", {"transformer": tmp_path / "tuned.pt"})
    assert swapped.hash() != ModelSource.find(tmp_path / "ours").hash()


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_saved_in_our_layout_makes_the_same_frames(released, tmp_path, name):
    released(f"opensora-{name}")
    first = load_pipeline(f"opensora-{name}")
    first.save_pretrained(tmp_path / "ours")
    frames = []
    for pipe in (first, load_pipeline(tmp_path / "ours")):
        pipe.set_progress_bar_config(disable=True)
        frames.append(pipe(PROMPT, generator=seeded(1), output_type="pt").frames)
    torch.testing.assert_close(*frames)


# --- the hash ---------------------------------------------------------------------------------------------------------


def test_the_hash_of_a_release_is_that_of_its_content(released, cache, tmp_path, monkeypatch):
    released("opensora-1.2")
    before = ModelSource.find("opensora-1.2").hash()
    assert len(before) == 64 == len(ModelSource.find("opensora-1.2").hash())
    (next(cache.glob("*t5*/snapshots/*")) / "README.md").write_text("not a part")
    moved = Path(shutil.copytree(cache, tmp_path / "moved", symlinks=True))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(moved))
    assert ModelSource.find("opensora-1.2").hash() == before
    model = PUBLISHED["opensora-1.2"]
    monkeypatch.setitem(PUBLISHED, "opensora-1.2", dataclasses.replace(model, scheduler_config={}))
    assert ModelSource.find("opensora-1.2").hash() != before
    monkeypatch.setitem(PUBLISHED, "opensora-1.2", model)
    tiny_published.write_transformer(
        next(moved.glob("*STDiT-v3*/snapshots/*")), model, tiny_published.network(model.transformer, seed=3)
    )
    assert ModelSource.find("opensora-1.2").hash() != before


def test_large_files_of_the_cache_are_not_read_for_the_hash(released, cache):
    """The cache names them by their hash and links to them."""
    released("opensora-1.2")
    before = ModelSource.find("opensora-1.2").hash()
    [file] = cache.glob("*STDiT-v3*/snapshots/*/model.safetensors")
    blob = file.parents[2] / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(blob)
    assert ModelSource.find("opensora-1.2").hash() == before
    blob.write_bytes(b"")
    assert ModelSource.find("opensora-1.2").hash() == before


def test_reading_the_table_imports_nothing_heavy():
    code = (
        "import sys, json, opensora.cli.models; "
        "print(json.dumps(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules))))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == []
