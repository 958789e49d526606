"""What is known of a model before anything of it is loaded, and what is said of one that is broken."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from exploit import Exploit
from safetensors.torch import save_file
from tiny_pipeline import make_pipeline, make_transformer

from opensora.checkpoints.components import load_component
from opensora.checkpoints.loading import load_pipeline
from opensora.errors import OpenSoraError
from opensora.models.stdit3 import STDiT3
from opensora.planning.meta_pipeline import meta_pipeline
from opensora.planning.tracing import Tracer, weight_bytes

NETWORKS = ("text_encoder", "transformer", "autoencoder")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    make_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_a_folder_as_it_would_be_loaded(saved):
    ours, loaded = meta_pipeline(Tracer(), saved).pipeline, load_pipeline(saved)
    for name in NETWORKS:
        described = {key: tensor.shape for key, tensor in getattr(ours, name).state_dict().items()}
        assert described == {key: tensor.shape for key, tensor in getattr(loaded, name).state_dict().items()}
    assert ours.size_rule() == loaded.size_rule()
    told = [name for name in ours.config if not name.startswith("_") and name != "tokenizer"]
    assert {name: ours.config[name] for name in told} == {name: loaded.config[name] for name in told}


@pytest.mark.parametrize("name", ["toybox", "toybox-iddpm"])
def test_bundled_models(name):
    ours, loaded = meta_pipeline(Tracer(), name).pipeline, load_pipeline(name)
    for network in NETWORKS:
        assert weight_bytes(getattr(ours, network)) == weight_bytes(getattr(loaded, network))


def test_published_models_need_not_be_there():
    meta = meta_pipeline(Tracer(), "opensora-1.0")
    assert meta.name == "opensora-1.0-hq-16x256x256"
    transformer = meta.pipeline.transformer
    assert sum(parameter.numel() for parameter in transformer.parameters()) > 7e8
    assert meta.pipeline.config.num_frames == 16


def test_a_part_can_be_replaced(saved, tmp_path):
    small = STDiT3(hidden_size=24, depth=1, num_heads=2, caption_channels=16, model_max_length=12)
    small.save_pretrained(tmp_path / "small")
    ours = meta_pipeline(Tracer(), saved, {"transformer": tmp_path / "small"}).pipeline
    assert weight_bytes(ours.transformer) == weight_bytes(small)
    with pytest.raises(OpenSoraError, match="does not exist"):
        meta_pipeline(Tracer(), saved, {"transformer": tmp_path / "nothing"})
    with pytest.raises(OpenSoraError, match="unknown component 'transfomer'; did you mean transformer"):
        meta_pipeline(Tracer(), saved, {"transfomer": tmp_path / "small"})


# --- weights of one network -------------------------------------------------------------------------------------------


def test_a_file_of_weights_is_completed_by_the_model_it_fits(tmp_path):
    transformer = make_transformer()
    save_file(transformer.state_dict(), tmp_path / "epoch3.safetensors")
    meta = meta_pipeline(Tracer(), tmp_path / "epoch3.safetensors")
    assert weight_bytes(meta.pipeline.transformer) == weight_bytes(transformer)
    assert meta.pipeline.autoencoder.temporal_factor == 4
    assert "epoch3.safetensors" in meta.name and "opensora-1.2" in meta.name


def test_a_folder_of_one_network(tmp_path):
    make_transformer().save_pretrained(tmp_path / "mine")
    assert weight_bytes(meta_pipeline(Tracer(), tmp_path / "mine").pipeline.transformer) == weight_bytes(
        make_transformer()
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["some.weight"], "of a network that nothing is known of"),
        (["blocks.0.adaLN_modulation.a", "temp_embed"], "that this package cannot run: Latte"),
    ],
)
def test_weights_of_something_else(tmp_path, names, message):
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "what.safetensors")
    with pytest.raises(OpenSoraError, match=message):
        meta_pipeline(Tracer(), tmp_path / "what.safetensors")


def test_files_that_are_no_weights(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file(make_transformer().state_dict(), whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(OpenSoraError, match=r"cut\.safetensors is damaged"):
        meta_pipeline(Tracer(), tmp_path / "cut.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OpenSoraError, match=r"holds no model_index\.json"):
        meta_pipeline(Tracer(), tmp_path / "empty")
    with pytest.raises(OpenSoraError, match=r"unknown model 'opensora-1\.4'; did you mean 'opensora-1\."):
        meta_pipeline(Tracer(), "opensora-1.4")


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": Exploit(tmp_path / "run")}))
    with pytest.raises(OpenSoraError, match="could run code"):
        meta_pipeline(Tracer(), tmp_path / "evil.pth")
    assert not (tmp_path / "run").exists()


# --- folders that are broken ------------------------------------------------------------------------------------------


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_weights_are_not_read(folder):
    """A folder without, or with damaged weights, has the same plan: that is what `opensora inspect` is for."""
    whole = weight_bytes(meta_pipeline(Tracer(), folder).pipeline.transformer)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert weight_bytes(meta_pipeline(Tracer(), folder).pipeline.transformer) == whole
    weights.unlink()
    assert weight_bytes(meta_pipeline(Tracer(), folder).pipeline.transformer) == whole
    with pytest.raises(OpenSoraError):
        load_component(folder / "transformer", STDiT3)


def test_an_autoencoder_of_another_model(folder):
    spatial = {"block_out_channels": [8], "norm_num_groups": 4, "latent_channels": 8}
    config = {"_class_name": "VideoAutoencoder", "spatial": spatial, "micro_frame_size": 17}
    (folder / "autoencoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(OpenSoraError, match="works on 4 latent channels, the autoencoder makes 8"):
        meta_pipeline(Tracer(), folder)


def test_a_scaling_factor_that_is_not_the_one_of_the_training(folder):
    space = json.loads((folder / "autoencoder" / "config.json").read_text())["latent_space"]
    change(folder / "model_index.json", trained_on={"latent_space": {**space, "scaling_factor": 0.13025}})
    with pytest.raises(OpenSoraError, match="scaling_factor"):
        meta_pipeline(Tracer(), folder)


@pytest.mark.parametrize(
    ("path", "values", "message"),
    [
        ("transformer/config.json", {"hidden_size": 47}, "does not describe a STDiT3"),
        ("transformer/config.json", {"hiden_size": 48}, "unknown option 'hiden_size'"),
        ("model_index.json", {"guidnce_scale": 3}, "unknown option 'guidnce_scale'; did you mean 'guidance_scale'"),
        ("model_index.json", {"transformer": None}, "names no transformer"),
        ("model_index.json", {"transformer": ["os", "system"]}, "components come from opensora"),
    ],
)
def test_configurations_that_say_something_impossible(folder, path, values, message):
    change(folder / path, **values)
    with pytest.raises(OpenSoraError, match=message):
        meta_pipeline(Tracer(), folder)


def test_configurations_that_are_missing(folder):
    (folder / "autoencoder" / "config.json").unlink()
    with pytest.raises(OpenSoraError, match=r"config\.json is missing"):
        meta_pipeline(Tracer(), folder)
