"""Weights in the formats the reference saves: every one loads into our networks, and every damage is named."""

import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_published
import torch
from exploit import Exploit
from safetensors.torch import save_file
from tiny_pipeline import make_transformer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from opensora import weights as weights_module
from opensora.checkpoints.components import load_component
from opensora.checkpoints.key_maps import find_config
from opensora.containers import tensors as tensors_module
from opensora.containers.files import weight_files
from opensora.containers.tensors import open_tensors
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3
from opensora.weights import StoredWeights, load_weights

MODELS = {
    STDiT: tiny_published.tiny("opensora-1.0-hq-16x256x256"),
    STDiT2: tiny_published.tiny("opensora-1.1-stage3"),
    STDiT3: tiny_published.tiny("opensora-1.2"),
}
SD_VAE, VAE_1_2 = MODELS[STDiT].autoencoder, MODELS[STDiT3].autoencoder


def tensors(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_same_weights(network: torch.nn.Module, original: torch.nn.Module) -> None:
    ours, theirs = network.state_dict(), original.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def refusal(path: Path, cls: Any, **options: Any) -> str:
    with pytest.raises(OpenSoraError) as error:
        load_component(path, cls, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def load(path: Path, cls: Any, part: Any) -> Any:
    """As a part in the place of a published one is loaded."""
    return load_component(path, cls, config=find_config(path, cls, part.config))


# --- transformers -----------------------------------------------------------------------------------------------------

WRAPPINGS = {
    "plain": lambda state: state,
    "ema": lambda state: {"ema": state, "model": {"x": torch.zeros(1)}},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
    "model": lambda state: {"model": state},
    "of a distributed run": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_lone_pickle(tmp_path, wrapping, zipped):
    network = tiny_published.network(MODELS[STDiT].transformer)
    path = tmp_path / "OpenSora-v1-HQ-16x256x256.pth"
    torch.save(WRAPPINGS[wrapping](tensors(network)), path, _use_new_zipfile_serialization=zipped)
    assert_same_weights(load(path, STDiT, MODELS[STDiT].transformer), network)


@pytest.mark.parametrize("cls", MODELS)
def test_a_lone_safetensors_file(tmp_path, cls):
    network = tiny_published.network(MODELS[cls].transformer)
    save_file(tensors(network), tmp_path / "any.safetensors")
    assert_same_weights(load(tmp_path / "any.safetensors", cls, MODELS[cls].transformer), network)


@pytest.mark.parametrize("cls", [STDiT2, STDiT3])
@pytest.mark.parametrize(
    ("stem", "suffix"),
    [("model", ".safetensors"), ("pytorch_model", ".bin"), ("diffusion_pytorch_model", ".safetensors")],
)
def test_shards(tmp_path, cls, stem, suffix):
    network = tiny_published.network(MODELS[cls].transformer)
    tiny_published.write_shards(tmp_path, tensors(network), stem, suffix)
    tiny_published.write_json(tmp_path / "config.json", tiny_published.reference_transformer_config(MODELS[cls]))
    loaded = load_component(tmp_path, cls)
    assert_same_weights(loaded, network)
    for number, said in ((2, "00002-of-00002" + suffix), (1, "2 of 2 files of weights")):
        (tmp_path / f"{stem}-{number:05d}-of-00002{suffix}").unlink()
        assert said in refusal(tmp_path, cls) and "missing" in refusal(tmp_path, cls)


def test_a_folder_of_a_training_run(tmp_path, caplog):
    trained, average = (tiny_published.network(MODELS[STDiT3].transformer, seed) for seed in (1, 2))
    tiny_published.write_shards(tmp_path / "model", tensors(trained), "pytorch_model", ".bin")
    (tmp_path / "optimizer").mkdir()
    part = MODELS[STDiT3].transformer
    assert_same_weights(load(tmp_path, STDiT3, part), trained)
    torch.save(tensors(average), tmp_path / "ema.pt")
    with caplog.at_level(logging.WARNING):
        assert_same_weights(load(tmp_path, STDiT3, part), average)
    assert "taking the moving average, ema.pt" in caplog.text
    assert_same_weights(load(tmp_path / "model", STDiT3, part), trained)


def test_position_tables_are_derived_whatever_the_file_holds(tmp_path):
    network = tiny_published.network(MODELS[STDiT].transformer)
    for name, weights in (
        ("other", tensors(network) | {"pos_embed": torch.zeros(1, 7, 48), "pos_embed_temporal": torch.ones(2)}),
        ("none", {key: value for key, value in tensors(network).items() if not key.startswith("pos_embed")}),
    ):
        torch.save(weights, tmp_path / f"{name}.pth")
        assert_same_weights(load(tmp_path / f"{name}.pth", STDiT, MODELS[STDiT].transformer), network)


@pytest.mark.parametrize("cls", [STDiT2, STDiT3])
def test_rotary_frequencies_may_be_missing(tmp_path, cls):
    network = tiny_published.network(MODELS[cls].transformer)
    weights = tensors(network)
    del weights["rope.freqs"]
    save_file(weights, tmp_path / "model.safetensors")
    tiny_published.write_json(tmp_path / "config.json", tiny_published.reference_transformer_config(MODELS[cls]))
    assert_same_weights(load_component(tmp_path, cls), network)


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("length", [25, 40, 60])
def test_the_null_text_takes_the_length_of_the_model(tmp_path, cls, length, caplog):
    part = MODELS[cls].transformer
    network = tiny_published.network(part)
    save_file(tensors(network), tmp_path / "weights.safetensors")
    with caplog.at_level(logging.WARNING):
        config = {**part.config, "model_max_length": length}
        loaded = load_component(tmp_path / "weights.safetensors", cls, config=config)
    kept = min(length, 40)
    assert loaded.null_text.shape == (length, network.null_text.shape[1])
    assert torch.equal(loaded.null_text[:kept], network.null_text[:kept])
    assert (loaded.null_text[kept:] == network.null_text[-1]).all()
    assert ("null text of 40 tokens" in caplog.text) == (length != 40)


def test_the_reference_configuration_becomes_ours(tmp_path):
    for cls, model in MODELS.items():
        if cls is STDiT:
            continue
        folder = tmp_path / cls.__name__
        folder.mkdir()
        config = tiny_published.reference_transformer_config(model) | {"mlp_ratio": 2.0, "input_sq_size": 256}
        network = cls(**{**model.transformer.config, "mlp_ratio": 2.0})
        save_file(tensors(network), folder / "model.safetensors")
        tiny_published.write_json(folder / "config.json", config)
        loaded = load_component(folder, cls)
        assert (loaded.config.mlp_ratio, loaded.config.input_sq_size) == (2.0, 256)
        tiny_published.write_json(folder / "config.json", config | {"window_size": 7})
        assert "config.json: unknown option window_size" in refusal(folder, cls)


def test_order_of_norm_and_rotation_is_the_files_where_it_says(tmp_path):
    model = MODELS[STDiT2]
    save_file(tensors(tiny_published.network(model.transformer)), tmp_path / "model.safetensors")
    config = tiny_published.reference_transformer_config(model)
    for said, meant in (({}, True), ({"qk_norm_legacy": True}, True), ({"qk_norm_legacy": False}, False)):
        tiny_published.write_json(tmp_path / "config.json", config | said)
        assert load_component(tmp_path, STDiT2).config.qk_norm_legacy is meant


def test_a_first_generation_model_without_positions_in_time_is_refused(tmp_path):
    model = MODELS[STDiT]
    save_file(tensors(tiny_published.network(model.transformer)), tmp_path / "model.safetensors")
    config = tiny_published.reference_transformer_config(model)
    tiny_published.write_json(tmp_path / "config.json", config)
    assert load_component(tmp_path, STDiT).config.space_scale == 0.5
    tiny_published.write_json(tmp_path / "config.json", config | {"no_temporal_pos_emb": True})
    assert "no_temporal_pos_emb is set" in refusal(tmp_path, STDiT)


def test_weights_of_another_network_are_called_by_its_name(tmp_path):
    save_file(tensors(make_transformer()), tmp_path / "weights.safetensors")
    assert "another network than the STDiT2 wanted here: transformer of Open-Sora 1.2" in refusal(
        tmp_path / "weights.safetensors", STDiT2
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    assert "unknown network" in refusal(tmp_path / "weights.safetensors", STDiT2)


# --- autoencoders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
@pytest.mark.parametrize("old_names", [True, False])
def test_the_2d_autoencoder(tmp_path, suffix, old_names):
    network = tiny_published.network(SD_VAE)
    weights = tiny_published.frame_weights(tensors(network))
    if not old_names:
        inverse = {old: new for new, old in tiny_published.OLD_NAMES.items()}
        for name in list(weights):
            *start, last, end = name.split(".")
            if last in inverse:
                weights[".".join([*start, inverse[last], end])] = weights.pop(name)
    path = tmp_path / f"diffusion_pytorch_model{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    assert_same_weights(load_component(path, VideoAutoencoder, config=SD_VAE.config), network)
    tiny_published.write_json(tmp_path / "config.json", tiny_published.frame_config(network))
    loaded = load_component(tmp_path, VideoAutoencoder)
    assert_same_weights(loaded, network)
    assert loaded.latent_space.scaling_factor == 0.18215 and loaded.micro_frame_size is None
    video = torch.rand(1, 3, 2, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(loaded(video), network(video))


def test_a_2d_autoencoder_declares_its_own_factor(tmp_path):
    network = tiny_published.network(SD_VAE)
    save_file(tiny_published.frame_weights(tensors(network)), tmp_path / "diffusion_pytorch_model.safetensors")
    tiny_published.write_json(tmp_path / "config.json", tiny_published.frame_config(network, scaling_factor=0.13025))
    assert load_component(tmp_path, VideoAutoencoder).latent_space.scaling_factor == 0.13025
    tiny_published.write_json(tmp_path / "config.json", tiny_published.frame_config(network, layer_per_block=1))
    assert "unknown option layer_per_block" in refusal(tmp_path, VideoAutoencoder)


def test_the_video_autoencoder_of_1_2(tmp_path):
    network = tiny_published.network(VAE_1_2)
    tiny_published.write_autoencoder(tmp_path, MODELS[STDiT3], network)
    loaded = load(tmp_path, VideoAutoencoder, VAE_1_2)
    assert_same_weights(loaded, network)
    assert loaded.micro_frame_size == 17 and loaded.latent_space.shift == (-0.10, 0.34, 0.27, 0.98)
    config = json.loads((tmp_path / "config.json").read_text())
    tiny_published.write_json(tmp_path / "config.json", config | {"micro_frame_size": 34, "scale": 1.0, "shift": 0.0})
    changed = tensors(network) | {"scale": torch.tensor(1.0), "shift": torch.tensor(0.0)}
    save_file(changed, tmp_path / "model.safetensors")
    loaded = load(tmp_path, VideoAutoencoder, VAE_1_2)
    assert loaded.micro_frame_size == 34 and loaded.latent_space.scale == (1.0,) * 4
    save_file(tensors(network), tmp_path / "model.safetensors")
    with pytest.raises(OpenSoraError, match="two different latent spaces"):
        load(tmp_path, VideoAutoencoder, VAE_1_2)
    tiny_published.write_json(tmp_path / "config.json", config | {"vae_temporal": {"type": "Wavelet"}})
    with pytest.raises(OpenSoraError, match="vae_temporal is a Wavelet"):
        load(tmp_path, VideoAutoencoder, VAE_1_2)


def test_half_of_the_video_autoencoder_is_not_enough(tmp_path):
    network = tiny_published.network(VAE_1_2)
    weights = {name: tensor for name, tensor in tensors(network).items() if not name.startswith("temporal_vae.")}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(OpenSoraError, match="the part over time is missing"):
        load(tmp_path / "model.safetensors", VideoAutoencoder, VAE_1_2)


# --- text encoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["encoder", "encoder with both names", "whole"])
def test_the_encoder_of_t5(tmp_path, stored):
    torch.manual_seed(0)
    whole = T5ForConditionalGeneration(T5Config(**tiny_published.TEXT))
    encoder = T5EncoderModel(T5Config(**tiny_published.TEXT))
    encoder.load_state_dict({name: t for name, t in tensors(whole).items() if name in encoder.state_dict()})
    weights = tensors(whole if stored == "whole" else encoder)
    if stored == "encoder":
        del weights["encoder.embed_tokens.weight"]
    tiny_published.write_shards(tmp_path, weights, "pytorch_model", ".bin")
    tiny_published.write_json(tmp_path / "config.json", tiny_published.TEXT)
    loaded = load_component(tmp_path, T5EncoderModel)
    assert_same_weights(loaded, encoder)
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight
    del weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    tiny_published.write_shards(tmp_path, weights, "pytorch_model", ".bin")
    assert "1 missing tensors (encoder.block.1.layer.1.DenseReluDense.wo.weight)" in refusal(tmp_path, T5EncoderModel)


# --- files ------------------------------------------------------------------------------------------------------------


class Drawn(TorchDispatchMode):
    """Notes every weight that is filled with random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("normal_", "uniform_")):
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cls", [*MODELS, VideoAutoencoder, T5EncoderModel], ids=lambda cls: cls.__name__)
def test_weights_that_are_read_next_are_not_drawn(tmp_path, cls):
    """Drawing those of the published text encoder would take minutes, and twice the memory."""
    part = MODELS[cls].transformer if cls in MODELS else VAE_1_2
    part = MODELS[STDiT].text_encoder if cls is T5EncoderModel else part
    network = tiny_published.network(part)
    save_file(tiny_published.untied(network), tmp_path / "weights.safetensors")
    with Drawn() as drawn:
        load_component(tmp_path / "weights.safetensors", cls, config=part.config)
    assert drawn.operations == []


@pytest.mark.parametrize("place", ["lone", "shard", "ema.pt", "autoencoder"])
@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, place, write):
    trap = tmp_path / "executed"
    part = MODELS[STDiT3].transformer
    network = tiny_published.network(part)
    folder = tmp_path / "folder"
    tiny_published.write_shards(folder / "model", tensors(network), "pytorch_model", ".bin")
    path = {
        "lone": tmp_path / "weights.pth",
        "shard": folder / "model" / "pytorch_model-00002-of-00002.bin",
        "ema.pt": folder / "ema.pt",
        "autoencoder": tmp_path / "vae.ckpt",
    }[place]
    bad = {"ema": {"weight": Exploit(trap)}}
    torch.save(bad, path) if write == "torch" else path.write_bytes(pickle.dumps(bad))
    asked = path if place in ("lone", "autoencoder") else folder
    cls = VideoAutoencoder if place == "autoencoder" else STDiT3
    message = refusal(asked, cls, config=part.config)
    assert "could run code when opened; refused" in message and path.name in message
    assert not trap.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_files_that_were_cut_off(tmp_path, suffix, share):
    part = MODELS[STDiT].transformer
    path = tmp_path / f"weights{suffix}"
    weights = tensors(tiny_published.network(part))
    save_file(weights, path) if suffix == ".safetensors" else torch.save({"ema": weights}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = refusal(path, STDiT, config=part.config)
    assert path.name in message and "damaged" in message


def test_missing_unexpected_and_misshaped_tensors_are_named(tmp_path):
    part = MODELS[STDiT2].transformer
    path = tmp_path / "weights.pth"
    weights = tensors(tiny_published.network(part))
    first = weights.pop("t_block_temp.1.bias")
    torch.save(weights, path)
    assert "1 missing tensors (t_block_temp.1.bias)" in refusal(path, STDiT2, config=part.config)
    torch.save({**weights, "t_block_temp.1.bias": first, "t_block_temp.2.bias": first}, path)
    assert "1 unexpected tensors (t_block_temp.2.bias)" in refusal(path, STDiT2, config=part.config)
    torch.save({**weights, "t_block_temp.1.bias": first[:5]}, path)
    message = refusal(path, STDiT2, config=part.config)
    assert "mis-shaped tensors: t_block_temp.1.bias is (5,) but the model has (144,)" in message
    torch.save({**weights, "t_block_temp.1.bias": first / 0}, path)
    assert "NaN or infinite values in t_block_temp.1.bias" in refusal(path, STDiT2, config=part.config)


def test_what_is_missing_is_never_made_up(tmp_path):
    part = MODELS[STDiT3].transformer
    weights = tensors(tiny_published.network(part))
    for name in [name for name in weights if "blocks" not in name and name != "rope.freqs"]:
        save_file({key: tensor for key, tensor in weights.items() if key != name}, tmp_path / "weights.safetensors")
        assert f"1 missing tensors ({name})" in refusal(tmp_path / "weights.safetensors", STDiT3, config=part.config)


@pytest.mark.parametrize("sharded", [True, False])
def test_portions_change_nothing(tmp_path, monkeypatch, sharded):
    """Weights are copied a gigabyte at a time; here it is a few numbers at a time, each file mapped often."""
    part = VAE_1_2
    network = tiny_published.network(part)
    opened = []

    def counting(path):
        opened.append(path)
        return open_tensors(path)

    monkeypatch.setattr(weights_module, "PORTION_BYTES", 2000)
    monkeypatch.setattr(tensors_module, "PORTION_BYTES", 2000)
    monkeypatch.setattr(tensors_module, "open_tensors", counting)
    if sharded:
        tiny_published.write_shards(tmp_path, tensors(network), "pytorch_model", ".bin")
    else:
        torch.save(tensors(network), tmp_path / "pytorch_model.bin")
    assert_same_weights(load_component(tmp_path, VideoAutoencoder, config=part.config), network)
    assert len(opened) > 5


def test_one_file_is_open_at_a_time(tmp_path):
    network = tiny_published.network(MODELS[STDiT3].transformer)
    tiny_published.write_shards(tmp_path, tensors(network), "pytorch_model", ".bin")
    stored = StoredWeights(tensors_module.StoredTensors(weight_files(tmp_path)), "x")
    for name in stored:
        assert torch.equal(stored[name], network.state_dict()[name])
        assert stored._stored._open is not None and name in stored._stored._open[1]
    assert len(stored) == len(network.state_dict())


def test_which_file_of_a_folder(tmp_path):
    weights = {"x": torch.zeros(2)}
    with pytest.raises(OpenSoraError, match="holds no weights"):
        weight_files(tmp_path)
    with pytest.raises(OpenSoraError, match="is missing"):
        weight_files(tmp_path / "gone")
    for name in ("a.pth", "pytorch_model.bin", "b.safetensors", "model.safetensors"):
        save_file(weights, tmp_path / name) if name.endswith("safetensors") else torch.save(weights, tmp_path / name)
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert weight_files(tmp_path) == [tmp_path / "pytorch_model.bin"]
    (tmp_path / "pytorch_model.bin").unlink()
    assert weight_files(tmp_path) == [tmp_path / "b.safetensors"]
    shutil.copy(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    with pytest.raises(OpenSoraError, match=r"several files of weights \(b.safetensors, c.safetensors\)"):
        weight_files(tmp_path)
    tiny_published.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {}})
    with pytest.raises(OpenSoraError, match="names no files of weights"):
        weight_files(tmp_path)


def test_no_weights_at_all(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    message = refusal(tmp_path / "empty.safetensors", STDiT3, config=MODELS[STDiT3].transformer.config)
    assert "missing tensors" in message
    network = torch.nn.Linear(2, 2)
    with pytest.raises(OpenSoraError, match="2 missing tensors"):
        load_weights(network, {}, source="nothing")
