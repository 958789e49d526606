"""Folders on disk: saved and loaded again, and every way in which one can be wrong."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models import modeling_utils
from diffusers.pipelines import pipeline_utils
from diffusers.utils import dynamic_modules_utils
from exploit import Exploit
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_pipeline import make_pipeline, make_transformer, seeded
from transformers import T5EncoderModel

import opensora
from opensora.checkpoints import file_hashes, loading
from opensora.checkpoints.components import load_component
from opensora.checkpoints.fit import inspect_model
from opensora.checkpoints.loading import load_pipeline
from opensora.checkpoints.published import BUNDLED, BundledModel
from opensora.checkpoints.source import ModelSource
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3
from opensora.pipeline import OpenSoraPipeline

PROMPT = "a small red ball rolls left"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for kind in ("flow", "iddpm"):
        folders[kind] = tmp_path_factory.mktemp(kind) / "model"
        make_pipeline(kind).save_pretrained(folders[kind])
    return folders


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A model's folder to break."""
    return Path(shutil.copytree(saved["flow"], tmp_path / "model"))


def refusal(name_or_path, **options) -> str:
    with pytest.raises(OpenSoraError) as error:
        load_pipeline(name_or_path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(path: Path, change) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


# --- round trips ------------------------------------------------------------------------------------------------------


def quiet(pipe: OpenSoraPipeline) -> OpenSoraPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", ["flow", "iddpm"])
def test_a_saved_pipeline_makes_the_same_frames(saved, kind):
    made = make_pipeline(kind)
    loaded = quiet(load_pipeline(saved[kind]))
    assert loaded.config.cfg_channels == made.config.cfg_channels
    first, second = (
        made(PROMPT, generator=seeded(1), output_type="pt"),
        loaded(PROMPT, generator=seeded(1), output_type="pt"),
    )
    assert torch.equal(first.frames, second.frames)
    assert first.settings == second.settings


@pytest.mark.parametrize("kind", ["flow", "iddpm"])
@pytest.mark.parametrize("accelerate", [True, False])
def test_from_pretrained_reads_the_same_folder(saved, monkeypatch, accelerate, kind):
    if accelerate:
        pytest.importorskip("accelerate")
    else:  # what diffusers knows where it is not installed
        monkeypatch.setattr(modeling_utils, "is_accelerate_available", lambda: False)
        monkeypatch.setattr(pipeline_utils, "is_accelerate_available", lambda: False)
        monkeypatch.setattr(modeling_utils, "_LOW_CPU_MEM_USAGE_DEFAULT", False)
        monkeypatch.setattr(pipeline_utils, "_LOW_CPU_MEM_USAGE_DEFAULT", False)
    ours = quiet(load_pipeline(saved[kind]))
    theirs = quiet(OpenSoraPipeline.from_pretrained(saved[kind]))
    assert theirs.config.cfg_channels == ours.config.cfg_channels
    assert torch.equal(
        ours(PROMPT, generator=seeded(1), output_type="pt").frames,
        theirs(PROMPT, generator=seeded(1), output_type="pt").frames,
    )


@pytest.mark.parametrize("kind", ["flow", "iddpm"])
def test_diffusers_opens_a_saved_folder_by_itself(saved, tmp_path, monkeypatch, caplog, kind):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(saved[kind])
    pipe = DiffusionPipeline.from_pretrained(saved[kind], trust_remote_code=True)
    assert type(pipe) is OpenSoraPipeline
    assert "cannot get type annotation" not in caplog.text
    assert pipe.config.cfg_channels == load_pipeline(saved[kind]).config.cfg_channels


@pytest.mark.parametrize(
    "opened",
    ["OpenSoraPipeline.from_pretrained({!r})", "DiffusionPipeline.from_pretrained({!r}, trust_remote_code=True)"],
)
def test_a_process_that_knows_nothing_yet_opens_a_saved_folder(saved, tmp_path, opened):
    """diffusers takes components from modules alone that were imported before."""
    cls = opened.partition(".")[0]
    code = f"from {'opensora' if cls == 'OpenSoraPipeline' else 'diffusers'} import {cls}\n"
    code += f"print(type({opened.format(str(saved['iddpm']))}.transformer).__name__)"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert run.stdout.strip() == "STDiT3", run.stderr


def test_a_folder_saved_before_it_held_a_module(folder):
    (folder / "pipeline.py").unlink()
    change_json(folder / "model_index.json", _class_name="OpenSoraPipeline")
    assert isinstance(load_pipeline(folder), OpenSoraPipeline)
    assert isinstance(OpenSoraPipeline.from_pretrained(folder), OpenSoraPipeline)


def test_weights_of_another_precision_are_run_in_float32(saved, tmp_path):
    make_pipeline("flow").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    pipe = load_pipeline(tmp_path / "half")
    for component in (pipe.transformer, pipe.text_encoder, pipe.autoencoder):
        assert {parameter.dtype for parameter in component.parameters()} == {torch.float32}
    half = load_pipeline(tmp_path / "half", dtype=torch.bfloat16)
    assert half.transformer.dtype == half.text_encoder.dtype == half.autoencoder.dtype == torch.bfloat16
    # The published models compute rotary positions in float32 whatever the rest runs in.
    exact = make_transformer().rope(100)
    for loaded in (pipe, half):
        assert all(torch.equal(a, b) for a, b in zip(loaded.transformer.rope(100), exact, strict=True))


@pytest.mark.parametrize("network", [STDiT, STDiT2, STDiT3, VideoAutoencoder])
def test_diffusers_knows_a_component_by_the_base_class_beside_it(network):
    assert sys.modules[network.__module__].ModelMixin in network.__mro__


def test_saved_folders_hold_no_paths(saved, tmp_path):
    for name, load in (("ours", load_pipeline), ("theirs", OpenSoraPipeline.from_pretrained)):
        load(saved["flow"]).save_pretrained(tmp_path / name)
        here = str(saved["flow"].parent).encode()
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        assert files and not [
            path for path in files if here in path.read_bytes() or b"name_or_path" in path.read_bytes()
        ]


def test_shards_are_one_model(tmp_path):
    made = make_pipeline("flow")
    made.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    assert len(list((tmp_path / "model" / "transformer").glob("*.safetensors"))) > 1
    loaded = quiet(load_pipeline(tmp_path / "model"))
    assert torch.equal(
        made(PROMPT, generator=seeded(1), output_type="pt").frames,
        loaded(PROMPT, generator=seeded(1), output_type="pt").frames,
    )
    next((tmp_path / "model" / "transformer").glob("*00002*")).unlink()
    assert "is missing" in refusal(tmp_path / "model")


def test_loaded_models_are_ready_to_run(saved):
    pipe = load_pipeline(str(saved["flow"]))
    assert not any(part.training for part in (pipe.transformer, pipe.autoencoder, pipe.text_encoder))
    assert pipe.device.type == "cpu"


def test_loading_leaves_the_random_numbers_alone(saved):
    before = torch.get_rng_state()
    load_pipeline(saved["flow"])
    assert torch.equal(torch.get_rng_state(), before)


def test_an_override_of_the_latent_space_is_used_and_recorded(saved):
    pipe = load_pipeline(saved["flow"], override_latent_space=LatentSpace(scaling_factor=0.5))
    described = pipe.describe()["latent_space"]
    assert described["scaling_factor"] == 0.5
    assert described["replaces"]["shift"] == [pytest.approx(value) for value in (0.1, -0.2, 0.3, 0.0)]


def test_an_override_settles_a_quarrel_of_configuration_and_weights(folder):
    path = folder / "autoencoder" / WEIGHTS
    change_weights(path, lambda weights: weights["scale"].fill_(7.0))
    assert "two different latent spaces" in refusal(folder)
    space = load_pipeline(folder, override_latent_space=LatentSpace(scaling_factor=0.5)).describe()["latent_space"]
    assert space["scaling_factor"] == 0.5 and space["replaces"]["scale"] == [7.0] * 4


def test_an_override_excuses_no_damage(folder):
    path, override = folder / "autoencoder" / WEIGHTS, {"override_latent_space": LatentSpace()}
    name = next(name for name in load_file(path) if name.endswith("conv_in.weight"))
    change_weights(path, lambda weights: weights[name].fill_(torch.nan))
    assert f"NaN or infinite values in {name}" in refusal(folder, **override)
    change_weights(path, lambda weights: weights.pop(name))
    assert f"missing tensors ({name})" in refusal(folder, **override)


@pytest.mark.parametrize(
    ("name", "network"), [("transformer", STDiT3), ("autoencoder", VideoAutoencoder), ("text_encoder", T5EncoderModel)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_component_alone_is_what_from_pretrained_gives(saved, tmp_path, name, network, dtype):
    make_pipeline("flow").to(dtype).save_pretrained(tmp_path)
    ours, theirs = load_component(tmp_path / name, network), network.from_pretrained(tmp_path / name).float()
    assert not ours.training and {tensor.dtype for tensor in ours.parameters()} == {torch.float32}
    first, second = (dict(model.named_parameters()) for model in (ours, theirs))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert all(parameter.requires_grad == second[key].requires_grad for key, parameter in first.items())
    first, second = (dict(model.named_buffers()) for model in (ours, theirs))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_component_alone_is_checked_as_well(folder):
    path = folder / "transformer" / WEIGHTS
    for change, message in (
        (lambda weights: weights["t_block.1.bias"].fill_(torch.nan), "NaN or infinite values in t_block.1.bias"),
        (lambda weights: weights.pop("t_block.1.bias"), "missing tensors"),
    ):
        change_weights(path, change)
        with pytest.raises(OpenSoraError, match=message):
            load_component(folder / "transformer", STDiT3)
    with pytest.raises(OpenSoraError, match="is missing"):
        load_component(folder / "nowhere", STDiT3)


def test_a_bundled_model_shares_its_component_by_whatever_path(saved, tmp_path, monkeypatch):
    borrower = Path(shutil.copytree(saved["iddpm"], tmp_path / "borrower"))
    shutil.rmtree(borrower / "autoencoder")
    assert "autoencoder is missing" in refusal(borrower)
    monkeypatch.setitem(BUNDLED, "lender", BundledModel(saved["flow"], "a test"))
    monkeypatch.setitem(BUNDLED, "borrower", BundledModel(borrower, "a test", shared={"autoencoder": "lender"}))
    (tmp_path / "link").symlink_to(borrower)
    monkeypatch.chdir(tmp_path)
    for name in ("borrower", "./borrower", tmp_path / "link", borrower / ".." / "borrower"):
        quiet(load_pipeline(name))
    assert (
        ModelSource.find(tmp_path / "link").hash()
        == ModelSource.find(borrower).hash()
        == ModelSource.find(saved["iddpm"]).hash()
    )


def test_a_bundled_name_is_its_folder(saved, monkeypatch):
    monkeypatch.setitem(BUNDLED, "tiny", BundledModel(saved["iddpm"], "a test"))
    assert opensora.load_pipeline("tiny").config.cfg_channels == 3
    monkeypatch.setitem(BUNDLED, "tiny", BundledModel(saved["iddpm"] / "gone", "a test"))
    assert "not installed" in refusal("tiny")


# --- the hash ---------------------------------------------------------------------------------------------------------


def test_the_hash_tells_models_apart_and_nothing_else(folder, saved):
    before = ModelSource.find(folder).hash()
    assert len(before) == 64
    assert before == ModelSource.find(saved["flow"]).hash()
    assert before != ModelSource.find(saved["iddpm"]).hash()
    change_json(folder / "model_index.json", guidance_scale=1.0)
    (folder / "README.md").write_text("a note")
    shutil.copytree(folder / "transformer", folder / "old transformer")
    assert ModelSource.find(folder).hash() == before
    change_json(folder / "scheduler" / "scheduler_config.json", transform_scale=2.0)
    configured = ModelSource.find(folder).hash()
    change_weights(folder / "transformer" / WEIGHTS, lambda weights: weights["t_block.1.bias"].add_(1))
    assert len({before, configured, ModelSource.find(folder).hash()}) == 3


def test_no_weights_have_no_hash(folder):
    for path in folder.glob("*/*.safetensors"):
        path.unlink()
    with pytest.raises(OpenSoraError, match="holds no weights"):
        ModelSource.find(folder).hash()


def test_a_model_without_one_of_its_networks_has_no_hash(folder):
    shutil.rmtree(folder / "autoencoder")
    with pytest.raises(OpenSoraError, match="autoencoder is missing"):
        ModelSource.find(folder).hash()


def in_shards(folder: Path, shard: str) -> Path:
    """Moves a transformer's weights to where its index then says they are."""
    whole = folder / "transformer" / WEIGHTS
    weights = load_file(whole)
    whole.unlink()
    (folder / "transformer" / shard).parent.mkdir(exist_ok=True)
    save_file(weights, folder / "transformer" / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return folder / "transformer" / shard


def test_the_hash_covers_weights_in_folders_below(folder):
    shard = in_shards(folder, "parts/first.safetensors")
    before = ModelSource.find(folder).hash()
    change_weights(shard, lambda weights: weights["t_block.1.bias"].add_(1))
    assert ModelSource.find(folder).hash() != before


def test_the_hash_covers_the_configuration_that_weights_without_one_are_read_by(folder, tmp_path):
    """A lone file in place of a part has the keywords of the model's own, which decide the frames as well."""
    lone = Path(shutil.copy(folder / "transformer" / WEIGHTS, tmp_path / "lone.safetensors"))
    described = shutil.copytree(folder / "transformer", tmp_path / "described")
    hashes = [ModelSource.find(folder, {"transformer": path}).hash() for path in (lone, described)]
    change_json(folder / "transformer" / "config.json", input_sq_size=1024)
    assert load_pipeline(folder, components={"transformer": lone}).transformer.config.input_sq_size == 1024
    assert ModelSource.find(folder, {"transformer": lone}).hash() != hashes[0]
    assert ModelSource.find(folder, {"transformer": described}).hash() == hashes[1]


@pytest.mark.parametrize("average", [False, True])
def test_the_hash_covers_the_weights_of_a_training_run(folder, average):
    """Which keeps them in a folder `model`, and their moving average beside it."""
    run = folder / "transformer"
    weights = load_file(run / WEIGHTS)
    (run / "model").mkdir()
    (run / WEIGHTS).rename(run / "model" / WEIGHTS)
    if average:
        torch.save(weights, run / "ema.pt")
    before = ModelSource.find(folder).hash()
    weights["t_block.1.bias"].add_(1)
    if average:
        torch.save(weights, run / "ema.pt")
    else:
        save_file(weights, run / "model" / WEIGHTS)
    assert ModelSource.find(folder).hash() != before
    loaded = load_pipeline(folder).transformer.state_dict()
    assert torch.equal(loaded["t_block.1.bias"], weights["t_block.1.bias"])


@pytest.mark.parametrize("outside", ["../elsewhere.safetensors", "parts/../../elsewhere.safetensors", "/absolute"])
def test_shards_outside_of_the_folder_are_refused(folder, outside):
    in_shards(folder, "first.safetensors")
    index = folder / "transformer" / f"{WEIGHTS}.index.json"
    shard = str(folder / "elsewhere.safetensors") if outside == "/absolute" else outside
    shutil.copy(folder / "transformer" / "first.safetensors", folder / "elsewhere.safetensors")
    index.write_text(json.dumps({"weight_map": {"t_block.1.bias": shard}}))
    assert f"names {shard}, which is outside of its folder" in refusal(folder)
    with pytest.raises(OpenSoraError, match="outside of its folder"):
        ModelSource.find(folder).hash()


@pytest.mark.parametrize(
    "named", [None, [], "a", {"t_block.1.bias": 1}, {"t_block.1.bias": ["a"]}, {"t_block.1.bias": ""}]
)
def test_an_index_that_names_no_files_is_refused(folder, named):
    in_shards(folder, "first.safetensors")
    (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": named}))
    with pytest.raises(OpenSoraError, match="names no files of weights"):
        ModelSource.find(folder).hash()


def test_hashes_of_large_files_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(file_hashes, "REMEMBERED_BYTES", 4)
    monkeypatch.setattr(file_hashes, "cache_folder", lambda: tmp_path / "hashes")
    file = tmp_path / "large"
    file.write_bytes(b"first")
    first = file_hashes.file_hash(file)
    assert first == hashlib.sha256(b"first").hexdigest()
    read = []
    monkeypatch.setattr(file_hashes, "read_hash", lambda path: read.append(path) or "read again")
    assert file_hashes.file_hash(file) == first and not read
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert file_hashes.file_hash(file) == "read again"
    file.write_bytes(b"longer")
    file_hashes.file_hash(file)
    assert len(read) == 2


@pytest.mark.parametrize("note", [None, b"", b"{}", b"[1]", b"3"])
def test_hashes_that_cannot_be_remembered_are_taken_anew(tmp_path, monkeypatch, note):
    monkeypatch.setattr(file_hashes, "REMEMBERED_BYTES", 4)
    monkeypatch.setattr(file_hashes, "cache_folder", lambda: tmp_path / "hashes")
    file = tmp_path / "large"
    file.write_bytes(b"first")
    if note is None:
        (tmp_path / "hashes").write_text("no folder can be here")
    else:
        file_hashes.file_hash(file)
        next((tmp_path / "hashes").iterdir()).write_bytes(note)
    assert file_hashes.file_hash(file) == hashlib.sha256(b"first").hexdigest()


# --- repositories on the Hub ------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return cache


def put_on_the_hub(cache: Path, repository: str, folder: Path) -> None:
    stored = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, stored / "snapshots" / "0")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0")


def test_a_repository_in_the_cache_is_a_model(saved, hub_cache):
    put_on_the_hub(hub_cache, "somebody/model", saved["flow"])
    source = ModelSource.find("somebody/model")
    assert source.hash() == ModelSource.find(saved["flow"]).hash()
    assert load_pipeline("somebody/model").config.height == 16
    assert inspect_model("somebody/model").problems == []
    assert "unknown model 'somebody/other'" in refusal("somebody/other")


def test_a_repository_is_fetched_if_that_is_asked_for(saved, hub_cache, monkeypatch):
    def snapshot_download(repository, *, revision, allow_patterns, cache_dir):
        assert allow_patterns is None and revision is None
        put_on_the_hub(hub_cache, repository, saved["flow"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert isinstance(load_pipeline("somebody/model", download=True), OpenSoraPipeline)


def test_a_folder_goes_before_a_repository_of_its_name(saved, hub_cache, tmp_path):
    put_on_the_hub(hub_cache, "somebody/model", saved["flow"])
    shutil.copytree(saved["iddpm"], tmp_path / "somebody" / "model")
    assert ModelSource.find("somebody/model").hash() == ModelSource.find(saved["iddpm"]).hash()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_the_nearest(tmp_path):
    message = refusal("toybocks")
    assert "did you mean 'toybox'" in message
    assert "toybox-iddpm" in message
    assert "unknown model" in refusal(tmp_path / "nowhere")


def test_a_folder_without_a_pipeline(tmp_path):
    assert "holds no model_index.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["transformer", "scheduler", "autoencoder", "text_encoder", "tokenizer"])
def test_a_missing_component(folder, name):
    shutil.rmtree(folder / name)
    assert f"model/{name} is missing" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("transformer", "config.json"),
        ("transformer", WEIGHTS),
        ("scheduler", "scheduler_config.json"),
        ("autoencoder", "config.json"),
        ("autoencoder", WEIGHTS),
        ("text_encoder", "config.json"),
        ("text_encoder", "model.safetensors"),
        ("tokenizer", "tokenizer.json"),
    ],
)
def test_missing_and_damaged_files(folder, name, file):
    path = folder / name / file
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert f"model/{name}" in refusal(folder)
    path.unlink()
    assert f"model/{name}" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\xff" * 100])
def test_weights_that_are_rubbish(folder, content):
    (folder / "transformer" / WEIGHTS).write_bytes(content)
    assert "is damaged" in refusal(folder)


def test_an_index_that_is_no_json_or_no_pipeline_of_ours(folder):
    change_json(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    assert "describes a StableDiffusionPipeline" in refusal(folder)
    (folder / "model_index.json").write_text("[]")
    assert "expected a JSON object" in refusal(folder)
    (folder / "model_index.json").write_text("{")
    assert "not valid JSON" in refusal(folder)


def test_options_that_do_not_exist(folder):
    change_json(folder / "scheduler" / "scheduler_config.json", tranform_scale=2.0)
    assert "did you mean 'transform_scale'?" in refusal(folder)
    change_json(folder / "transformer" / "config.json", hiden_size=2)
    assert "did you mean 'hidden_size'?" in refusal(folder)
    change_json(folder / "model_index.json", guidance=2.0)
    assert "did you mean 'guidance_scale'?" in refusal(folder)


@pytest.mark.parametrize("size", [[], [240], [240, 0], [240, 426, 3]])
def test_a_nominal_size_is_a_height_and_a_width(folder, size):
    change_json(folder / "model_index.json", nominal_size=size)
    assert "nominal_size is" in refusal(folder)


def test_components_come_from_known_libraries_only(folder):
    change_json(folder / "model_index.json", scheduler=["subprocess", "Popen"])
    assert "come from opensora, diffusers and transformers only" in refusal(folder)
    change_json(folder / "model_index.json", scheduler=["opensora.diffusion.flow", "Nothing"])
    assert "which has none" in refusal(folder)
    change_json(folder / "model_index.json", scheduler=["opensora.diffusion.flow", "euler_step"])
    assert "which is no class" in refusal(folder)
    change_json(folder / "model_index.json", scheduler=None)
    assert "names no scheduler" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "cls", "kind"),
    [
        ("tokenizer", "AutoTokenizer", "PreTrainedTokenizerBase"),
        ("tokenizer", "T5EncoderModel", "PreTrainedTokenizerBase"),
        ("scheduler", "T5Config", "SchedulerMixin"),
        ("text_encoder", "AutoModel", "Module"),
        ("transformer", "TokenizersBackend", "Module"),
    ],
)
def test_every_place_wants_its_own_kind(folder, name, cls, kind):
    change_json(folder / "model_index.json", **{name: ["transformers", cls]})
    assert refusal(folder) == f"{name} is to be a {cls} of 'transformers', which is no {kind}"


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("transformer/config.json", {"hidden_size": "many"}),
        ("transformer/config.json", {"num_heads": 0}),
        ("transformer/config.json", {"patch_size": None}),
        ("transformer/config.json", {"depth": -1, "hidden_size": -48}),
        ("autoencoder/config.json", {"spatial": 3}),
        ("autoencoder/config.json", {"latent_space": [1]}),
        ("text_encoder/config.json", {"d_model": "wide"}),
        ("text_encoder/config.json", {"num_heads": None}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "all"}),
    ],
)
def test_configurations_of_nothing_name_their_file(folder, file, values):
    change_json(folder / file, **values)
    assert f"model/{file}" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    def spoil(weights):
        weights["t_block.1.bias"][3] = value

    change_weights(folder / "transformer" / WEIGHTS, spoil)
    message = refusal(folder)
    assert "NaN or infinite values in t_block.1.bias" in message
    assert "model/transformer" in message


def test_missing_unexpected_and_misshaped_tensors_are_named(folder):
    path = folder / "transformer" / WEIGHTS
    change_weights(path, lambda weights: weights.pop("t_block.1.bias"))
    assert "1 missing tensors (t_block.1.bias)" in refusal(folder)
    change_weights(path, lambda weights: weights.update({"t_block.1.bios": torch.zeros(2)}))
    assert "1 unexpected tensors (t_block.1.bios)" in refusal(folder)
    change_weights(path, lambda weights: weights.update({"final_layer.linear.bias": torch.zeros(5)}))
    assert "final_layer.linear.bias is (5,) but the model has (32,)" in refusal(folder)


def test_a_configuration_of_another_model(folder):
    change_json(folder / "transformer" / "config.json", hidden_size=96)
    assert "mis-shaped" in refusal(folder)
    change_json(folder / "transformer" / "config.json", hidden_size=47)
    assert "hidden_size 47" in refusal(folder)


def test_a_latent_space_that_is_not_that_of_the_weights(folder):
    config = json.loads((folder / "autoencoder" / "config.json").read_text())
    config["latent_space"]["scale"] = [1.0, 1.0, 1.0, 1.0]
    change_json(folder / "autoencoder" / "config.json", **config)
    assert "two different latent spaces" in refusal(folder)


def test_a_device_that_is_not_there(folder):
    assert "device 'nonsense' is not available" in refusal(folder, device="nonsense")
    if not torch.cuda.is_available():
        assert "device 'cuda' is not available; here there is: cpu" in refusal(folder, device="cuda")


# --- pickles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pth"])
@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(folder, tmp_path, suffix, write):
    trap = tmp_path / "executed"
    weights = {"weight": Exploit(trap)}
    path = folder / "transformer" / f"model{suffix}"
    (folder / "transformer" / WEIGHTS).unlink()
    torch.save(weights, path) if write == "torch" else path.write_bytes(pickle.dumps(weights))
    for place in (folder, path):
        message = refusal(place)
        assert "could run code when opened; refused" in message
        assert path.name in message
        assert not trap.exists()


def test_a_pickle_of_tensors_is_read(folder):
    path = folder / "transformer" / WEIGHTS
    torch.save(load_file(path), path.with_suffix(".pt"))
    path.unlink()
    made, loaded = make_pipeline("flow"), quiet(load_pipeline(folder))
    assert torch.equal(
        made(PROMPT, generator=seeded(1), output_type="pt").frames,
        loaded(PROMPT, generator=seeded(1), output_type="pt").frames,
    )
    assert "is a file; a model is a folder" in refusal(path.with_suffix(".pt"))


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x80\x02", b"PK\x03\x04" + b"\0" * 50])
def test_a_damaged_pickle(folder, content):
    (folder / "transformer" / WEIGHTS).unlink()
    (folder / "transformer" / "model.ckpt").write_bytes(content)
    assert "model.ckpt" in refusal(folder)


def test_a_pickle_of_something_else(folder):
    (folder / "transformer" / WEIGHTS).unlink()
    torch.save({"steps": 3}, folder / "transformer" / "model.pt")
    assert "something else than named tensors" in refusal(folder)


# --- imports ----------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, opensora; "
        "print(sorted({'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules))); "
        "print(hasattr(opensora, 'nothing'))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split("\n")[:2] == ["[]", "False"]


def test_the_public_names_are_there():
    assert opensora.load_pipeline is loading.load_pipeline
    assert opensora.OpenSoraPipeline is OpenSoraPipeline
