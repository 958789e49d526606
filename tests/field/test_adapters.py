"""Adapters as the field writes them: every layout and container, at the stated strength, whole or not at all."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from tiny_pipeline import make_pipeline
from tiny_tasks import write_clips
from tiny_transformers import SIZES, build, inputs
from torch import Tensor

from opensora.adapters.adapter import Adapter, read_adapter
from opensora.adapters.layouts import write_adapter
from opensora.adapters.merging import AdaptedWeights, fit
from opensora.adapters.reading import adapter_hash, is_adapter
from opensora.checkpoints.adapters import convert_adapter, inspect_adapter
from opensora.checkpoints.conversion import convert
from opensora.checkpoints.loading import load_pipeline
from opensora.cli.main import main
from opensora.data.clips import ManifestClips
from opensora.errors import OpenSoraError
from opensora.generation.loading import used_adapters
from opensora.generation.request import Adapter as GivenAdapter
from opensora.generation.request import ClipRequest
from opensora.models.stdit import STDiT
from opensora.models.stdit3 import STDiT3
from opensora.pipeline import OpenSoraPipeline
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.config import DiffusionTaskConfig
from opensora.training.diffusion.lora import LoRAConfig, add_adapter, export_adapter, without_adapter
from opensora.training.diffusion.noise import Flow
from opensora.training.diffusion.text import FrozenText
from opensora.training.optimizer import OptimizerConfig
from opensora.training.trainer import Trainer

peft = pytest.importorskip("peft")

LAYERS = ("spatial_blocks.0.attn.qkv", "temporal_blocks.1.cross_attn.q_linear", "spatial_blocks.1.mlp.fc1")
RANK, ALPHA = 3, 6.0
State = dict[str, Tensor]
DOWN_UP = ("down", "up")


@pytest.fixture(scope="module")
def model() -> Any:
    return build(STDiT3)


@pytest.fixture(scope="module")
def pairs(model) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> A and B."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return 0.3 * torch.randn(*size, generator=generator)

    sizes = {layer: model.get_submodule(layer).weight.shape for layer in LAYERS}
    return {layer: (draw(RANK, size[1]), draw(size[0], RANK)) for layer, size in sizes.items()}


def state(pairs: Mapping[str, tuple[Tensor, Tensor]], name: str, which: tuple[str, str] = ("A", "B")) -> State:
    """Tensors under names such as `transformer.{}.lora_{}.weight`, of a layer and of which matrix."""
    return {name.format(layer, w): t for layer, pair in pairs.items() for w, t in zip(which, pair, strict=True)}


def kohya(pairs: Mapping[str, tuple[Tensor, Tensor]], name: str = "lora_unet_{}.lora_{}.weight") -> State:
    return state({layer.replace(".", "_"): pair for layer, pair in pairs.items()}, name, DOWN_UP)


def with_alpha(tensors: State, alpha: float = ALPHA) -> State:
    return tensors | {n.replace(".lora_down.weight", ".alpha"): torch.tensor(alpha) for n in tensors if "down" in n}


def saved(path: Path, tensors: State, **metadata: str) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def changes(path: Path | Adapter, model: Any) -> State:
    """Name of a parameter -> what is added to it."""
    adapter = path if isinstance(path, Adapter) else read_adapter(path)
    own = model.state_dict()
    merged = AdaptedWeights(model, own, [(adapter, 1.0)], "tiny")
    return {name: merged[name] - own[name] for name in own if not torch.equal(merged[name], own[name])}


def expected(pairs: Mapping[str, tuple[Tensor, Tensor]], factor: float = ALPHA / RANK) -> State:
    return {f"{layer}.weight": factor * (b @ a) for layer, (a, b) in pairs.items()}


def equal(actual: State, wanted: State) -> None:
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5)


def refused(what: Callable[[], Any]) -> str:
    with pytest.raises(OpenSoraError) as error:
        what()
    assert "\n" not in str(error.value)
    return str(error.value)


# --- names ------------------------------------------------------------------------------------------------------------

DOTTED = [
    ("{}.lora_{}.weight", ("A", "B")),
    ("transformer.{}.lora_{}.weight", ("A", "B")),
    ("unet.{}.lora.{}.weight", DOWN_UP),
    ("transformer.{}.lora_linear_layer.{}.weight", DOWN_UP),
    ("base_model.model.{}.lora_{}.default.weight", ("A", "B")),
    ("diffusion_model.{}.lora_{}.weight", DOWN_UP),
    ("diffusion_model.{}.lora_{}.weight", ("A", "B")),
    ("module.{}.lora_{}.weight", ("A", "B")),
    ("_orig_mod.module.transformer.{}.lora_{}.weight", ("A", "B")),
    ("state_dict.model.{}.lora_{}.weight", DOWN_UP),
    ("{}.lora_{}", ("A", "B")),
    ("whatever.a_trainer.calls_it.{}.lora_{}.weight", DOWN_UP),
]
FLAT = [
    *("lora_unet_{}.lora_{}.weight", "lora_transformer_{}.lora_{}.weight", "lycoris_{}.lora_{}.weight"),
    *("lora_some_tool_{}.lora_{}.weight", "lora_unet__orig_mod_{}.lora_{}.weight"),
]


@pytest.mark.parametrize(("name", "which"), DOTTED)
def test_names_of_every_tool_mean_the_same_layers(model, pairs, tmp_path, name, which):
    tensors = state(pairs, name, which)
    equal(changes(saved(tmp_path / "x.safetensors", tensors, lora_alpha="6"), model), expected(pairs))


@pytest.mark.parametrize("name", FLAT)
def test_underscores_for_dots_are_resolved_by_the_network(model, pairs, tmp_path, name):
    tensors = with_alpha(kohya(pairs, name))
    equal(changes(saved(tmp_path / "x.safetensors", tensors), model), expected(pairs))


def test_attention_processors_of_old_diffusers(model, tmp_path):
    a, b = torch.ones(2, 24), torch.ones(72, 2)
    name = "unet.spatial_blocks.0.attn.processor.qkv_lora.{}.weight"
    file = saved(tmp_path / "x.safetensors", {name.format("down"): a, name.format("up"): b})
    equal(changes(file, model), {"spatial_blocks.0.attn.qkv.weight": b @ a})


def test_names_of_a_network_that_looks_wrapped():
    """Its own names have the words that frameworks wrap networks in."""
    network = torch.nn.ModuleDict({"transformer": torch.nn.ModuleDict({"model_0_x": torch.nn.Linear(2, 2)})})
    adapter = Adapter(Path("x"), {"model_0_x": (torch.ones(1, 2), torch.ones(2, 1))}, {"model_0_x": 1.0})
    assert list(fit(adapter, network, "it").layers) == ["transformer.model_0_x"]
    two = torch.nn.ModuleDict({"a_b": torch.nn.Linear(2, 2), "a": torch.nn.ModuleDict({"b": torch.nn.Linear(2, 2)})})
    flat = Adapter(Path("x"), {"lora_unet_a_b": (torch.ones(1, 2), torch.ones(2, 1))}, {"lora_unet_a_b": 1.0})
    assert "may be a_b or a.b" in refused(lambda: fit(flat, two, "it"))


# --- containers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["x.safetensors", "x.pt", "x.bin", "x.ckpt", "lightning.ckpt", "no_ending"])
def test_every_container_alike(model, pairs, tmp_path, container):
    tensors = with_alpha(kohya(pairs))
    if container == "no_ending":
        file = saved(tmp_path / "x.safetensors", tensors).rename(tmp_path / container)
    elif container.endswith(".safetensors"):
        file = saved(tmp_path / container, tensors)
    else:
        file = tmp_path / container
        torch.save({"state_dict": tensors} if "lightning" in container else tensors, file)
    assert is_adapter(file)
    equal(changes(file, model), expected(pairs))


@pytest.mark.parametrize("beside", [
    {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3, "lora_alpha": 6, "alpha": 6},
    {"hyper_parameters": {"lora_alpha": 6.0, "lr": 1e-4, "alpha": 0.1}, "optimizer_states": []},
    {"network_alpha": 6},
])  # fmt: skip
def test_pickles_of_trainers_state_their_strength_beside_the_tensors(model, pairs, tmp_path, beside):
    torch.save({"model": state(pairs, "{}.lora_{}.weight"), **beside}, tmp_path / "x.ckpt")
    equal(changes(tmp_path / "x.ckpt", model), expected(pairs))
    assert read_adapter(tmp_path / "x.ckpt").notes == ()


def test_averages_are_preferred_to_what_they_are_an_average_of(model, pairs, tmp_path):
    raw = {name: tensor + 1 for name, tensor in kohya(pairs).items()}
    floats = {f"lora_unet_{layer.replace('.', '_')}.alpha": ALPHA for layer in LAYERS}
    torch.save({"model": raw | floats, "ema": kohya(pairs) | floats}, tmp_path / "x.pt")
    equal(changes(tmp_path / "x.pt", model), expected(pairs))
    assert "took the averaged" in read_adapter(tmp_path / "x.pt").notes[0]


def test_folders(model, pairs, tmp_path):
    tensors = state(pairs, "{}.lora_{}.weight")
    folder = tmp_path / "folder"
    (folder / "model").mkdir(parents=True)
    assert "holds no adapter" in refused(lambda: read_adapter(folder))
    saved(folder / "model" / "pytorch_lora_weights.safetensors", tensors, lora_alpha="6")
    saved(folder / "optimizer.safetensors", {"state.0": torch.ones(2)})
    equal(changes(folder, model), expected(pairs))  # as a run leaves it
    saved(folder / "look-1.safetensors", tensors, lora_alpha="6")
    equal(changes(folder, model), expected(pairs))
    saved(folder / "look-2.safetensors", tensors)
    said = refused(lambda: read_adapter(folder))
    assert "holds 2 adapters (look-1.safetensors, look-2.safetensors); name one of them" in said


# --- libraries write them ---------------------------------------------------------------------------------------------


def peft_model(model: Any, **options: Any) -> Any:
    """PEFT's own model of a transformer, whose adapter does something."""
    config = peft.LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": list(LAYERS), **options})
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"attn.qkv": 5}, "alpha_pattern": {"attn.qkv": 2, "^spatial_blocks.1.mlp.fc1": 9}},
        {"lora_bias": True},
        {"target_modules": ["x_embedder.proj", "final_layer.linear"]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=["plain", "rslora", "patterns", "bias", "convolution", "gaussian"],
)
@pytest.mark.parametrize("safe", [True, False])
def test_what_peft_saves_acts_as_in_peft(model, tmp_path, options, safe):
    wrapped = peft_model(model, **options)
    wrapped.save_pretrained(tmp_path / "a", safe_serialization=safe)
    adapter = read_adapter(tmp_path / "a")
    assert adapter.notes == () and adapter.stated == "adapter_config.json"
    own, merged = model.state_dict(), wrapped.merge_and_unload().state_dict()
    wanted = {name: merged[name] - own[name] for name in own if not torch.equal(merged[name], own[name])}
    equal(changes(adapter, model), wanted)
    file = next((tmp_path / "a").glob("adapter_model.*"))
    equal(changes(file, model), wanted)  # the file alone finds its configuration beside it


@pytest.mark.parametrize(("config", "words"), [
    (lambda: peft.LoraConfig(target_modules=["attn.qkv"], bias="lora_only"), "no part of LoRA"),
    (lambda: peft.LoraConfig(target_modules=["attn.qkv"], modules_to_save=["final_layer"]), "no part of LoRA"),
    (lambda: peft.LoraConfig(target_modules=["attn.qkv"], use_dora=True), "DoRA"),
    (lambda: peft.LoHaConfig(target_modules=["attn.qkv"]), "LoHa"),
    (lambda: peft.LoKrConfig(target_modules=["attn.qkv"]), "LoKr"),
    (lambda: peft.IA3Config(target_modules=["attn.qkv"], feedforward_modules=[]), "IA3"),
    (lambda: peft.OFTConfig(target_modules=["attn.qkv"], oft_block_size=8, r=0), "OFT"),
])  # fmt: skip
def test_what_peft_can_do_besides_is_refused_by_name(model, tmp_path, config, words):
    peft.get_peft_model(copy.deepcopy(model), config()).save_pretrained(tmp_path / "a")
    assert words in refused(lambda: read_adapter(tmp_path / "a"))


def test_an_adapter_of_another_name_lies_in_a_folder_of_its_own(model, tmp_path):
    wrapped = peft_model(model)
    wrapped.add_adapter("style", wrapped.peft_config["default"])
    wrapped.save_pretrained(tmp_path / "both")
    assert read_adapter(tmp_path / "both").path.parent.name == "both"
    assert read_adapter(tmp_path / "both" / "style").rank == RANK
    wrapped.save_pretrained(tmp_path / "one", selected_adapters=["style"])
    assert read_adapter(tmp_path / "one").path.parent.name == "style"


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_what_diffusers_saves(model, tmp_path, ending):
    other = copy.deepcopy(model)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LAYERS), rank_pattern={"mlp.fc1": 2})
    other.add_adapter(config)
    torch.manual_seed(1)
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    safe = ending == "safetensors"
    other.save_lora_adapter(tmp_path / "network", safe_serialization=safe)
    layers = peft.get_peft_model_state_dict(other)
    options = {"transformer_lora_adapter_metadata": other.peft_config["default"].to_dict()} if safe else {}
    OpenSoraPipeline.save_lora_weights(tmp_path / "pipeline", layers, safe_serialization=safe, **options)
    for module in other.modules():
        if hasattr(module, "merge") and hasattr(module, "lora_A"):
            module.merge()
    merged = other.state_dict()
    wanted = {f"{layer}.weight": merged[f"{layer}.base_layer.weight"] - model.state_dict()[f"{layer}.weight"]
              for layer in LAYERS}  # fmt: skip
    if not safe:  # a pickle cannot say alpha; diffusers takes it as the rank, and so do we, and say so
        assert all("guessed" in read_adapter(tmp_path / where).notes[0] for where in ("network", "pipeline"))
        scales = {layer: ALPHA / len(a) for layer, (a, _) in read_adapter(tmp_path / "network").layers.items()}
        wanted = {name: tensor / scales[name.removesuffix(".weight")] for name, tensor in wanted.items()}
    equal(changes(tmp_path / "network", model), wanted)
    equal(changes(tmp_path / "pipeline", model), wanted)


def test_what_diffusers_converts_for_kohya(model, pairs, tmp_path):
    theirs = convert_state_dict_to_kohya(state(pairs, "base_model.model.{}.lora_{}.weight"))
    equal(changes(saved(tmp_path / "x.safetensors", theirs), model), expected(pairs, 1.0))


# --- more than pairs of matrices --------------------------------------------------------------------------------------


def test_comfyui_differences_of_weights_and_biases(model, tmp_path):
    bias = torch.ones(72)
    tensors = {
        "diffusion_model.spatial_blocks.1.mlp.fc1.diff": torch.full((96, 24), 0.5),
        "diffusion_model.spatial_blocks.0.attn.qkv.diff_b": bias,
    }
    file = saved(tmp_path / "x.safetensors", tensors)
    equal(changes(file, model), {
        "spatial_blocks.1.mlp.fc1.weight": torch.full((96, 24), 0.5), "spatial_blocks.0.attn.qkv.bias": bias,
    })  # fmt: skip
    again = write_adapter(read_adapter(file), tmp_path / "again.safetensors", "comfyui")
    assert {n: t.sum() for n, t in load_file(again).items()} == {n: t.sum() for n, t in tensors.items()}
    assert "which peft has no place for" in refused(lambda: write_adapter(read_adapter(file), tmp_path / "p", "peft"))
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "lora_unet_spatial_blocks_0_attn_qkv.hada_w1_a": "LoHa",
        "lora_unet_spatial_blocks_0_attn_qkv.lokr_w1": "LoKr",
        "lora_unet_spatial_blocks_0_attn_qkv.dora_scale": "DoRA",
        "base_model.model.spatial_blocks.0.attn.qkv.lora_magnitude_vector.weight": "DoRA",
        "lora_unet_x_embedder_proj.lora_mid.weight": "Tucker",
        "spatial_blocks.0.attn.qkv.oft_blocks": "OFT",
        "base_model.model.x.lora_embedding_A": "embeddings",
        "base_model.model.final_layer.linear.weight": "no part of LoRA",
        "text_encoder.encoder.block.0.q.lora_A.weight": "text encoder",
        "lora_te1_encoder_block_0_q.lora_down.weight": "text encoder",
    }.items(),
)
def test_what_is_not_supported_is_named_and_nothing_is_left_out(pairs, tmp_path, name, words):
    tensors = with_alpha(kohya(pairs)) | {name: torch.ones(2, 2), name + "2.weight": torch.ones(2, 2)}
    said = refused(lambda: read_adapter(saved(tmp_path / "x.safetensors", tensors)))
    assert words in said and (name in said or "2 of" in said or "of 2" in said), said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "peft_type LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "a base that was changed"),
        ({"modules_to_save": ["final_layer"]}, "modules_to_save"),
        ({"lora_alpha": "much"}, "lora_alpha is the text 'much', expected a number"),
        ({"lora_alpha": 0}, "alpha of spatial_blocks.0.attn.qkv is 0"),
        ({"alpha_pattern": [1]}, "alpha_pattern is a list of 1"),
        ({"alpha_pattern": {"(a+)+": 1}}, "expected the name of a layer"),
        ({"alpha_pattern": {"(": 1}}, "which is no pattern"),
        ({"r": {}}, "r is an object of 0"),
    ],
)
def test_configurations_are_checked_as_they_are_read(model, tmp_path, change, words):
    peft_model(model).save_pretrained(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    said = refused(lambda: read_adapter(tmp_path / "a"))
    assert words in said and ("adapter_config.json" in said), said


# --- strength ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "factor"),
    [
        ({"lora_alpha": "6"}, 2.0),
        ({"ss_network_alpha": "1.5", "ss_network_dim": "3"}, 0.5),
        ({"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, None),
        ({"lora_adapter_metadata": '{"transformer.r": 3, "transformer.lora_alpha": 6}'}, 2.0),
        ({"lora_adapter_metadata": '{"r": 3, "lora_alpha": 6, "alpha_pattern": {"attn.qkv": 6}}'}, 2.0),
        ({"lora_adapter_metadata": '{"transformer.lora_alpha": 3, "transformer.use_rslora": true}'}, 3**0.5),
        ({"lora_adapter_metadata": '{"text_encoder.lora_alpha": 99, "transformer.lora_alpha": 6}'}, 2.0),
        ({"lora_config": '{"r": 3, "lora_alpha": 6}'}, 2.0),
        ({}, None),
    ],
)
def test_strength_from_metadata(model, pairs, tmp_path, metadata, factor):
    file = saved(tmp_path / "x.safetensors", state(pairs, "transformer.{}.lora_{}.weight"), **metadata)
    adapter = read_adapter(file)
    equal(changes(adapter, model), expected(pairs, factor or 1.0))
    assert (adapter.stated is None) == (factor is None)
    assert [note for note in adapter.notes if "guessed" in note] == ([] if factor else list(adapter.notes))


def test_alpha_tensors_count_layer_by_layer_and_contradictions_are_said(model, pairs, tmp_path):
    tensors = with_alpha(kohya(pairs))
    first = next(name for name in tensors if name.endswith(".alpha"))
    tensors[first] = torch.tensor(1.5)
    file = saved(tmp_path / "x.safetensors", tensors, ss_network_alpha="6", ss_network_dim="3")
    wanted = expected(pairs)
    wanted[f"{LAYERS[0]}.weight"] /= 4
    equal(changes(file, model), wanted)
    assert read_adapter(file).notes == ()  # such files say what most layers have
    other = saved(tmp_path / "y.safetensors", tensors, ss_network_alpha="8", ss_network_dim="4")
    notes = read_adapter(other).notes
    assert "alpha is 1.5 in its alpha tensors and 8 in its metadata ss_network_alpha; took the former" in notes[0]
    assert "the rank is 4 in its metadata ss_network_dim, and 3 in the matrices" in notes[1]
    equal(changes(other, model), wanted)
    del tensors[first]
    partly = read_adapter(saved(tmp_path / "z.safetensors", tensors))
    assert "its strength is guessed for 1 of 3 layers" in partly.notes[0]
    text = saved(tmp_path / "t.safetensors", tensors, ss_network_alpha="much")
    assert "ss_network_alpha is 'much', expected a number" in refused(lambda: read_adapter(text))


def test_a_scale_multiplies_what_is_stated(model, pairs, tmp_path):
    file = saved(tmp_path / "x.safetensors", with_alpha(kohya(pairs)))
    own = model.state_dict()
    half = AdaptedWeights(model, own, [(read_adapter(file), 0.5)], "tiny")
    name = f"{LAYERS[0]}.weight"
    torch.testing.assert_close(half[name] - own[name], expected(pairs)[name] / 2, rtol=1e-4, atol=1e-5)
    equal(changes(read_adapter(file).scaled(0.5), model), expected(pairs, 1.0))


@pytest.mark.parametrize(("dtype", "words"), [
    (torch.float8_e4m3fn, None), (torch.float16, None), (torch.int8, "values of int8"), (torch.complex64, "complex64"),
])  # fmt: skip
def test_numbers_of_other_kinds(model, pairs, tmp_path, dtype, words):
    tensors = {name: tensor.to(dtype) for name, tensor in state(pairs, "{}.lora_{}.weight").items()}
    file = saved(tmp_path / "x.safetensors", tensors, lora_alpha="6")
    if words is not None:
        assert words in refused(lambda: read_adapter(file))
        return
    rounded = {layer: (a.to(dtype).float(), b.to(dtype).float()) for layer, (a, b) in pairs.items()}
    equal(changes(file, model), expected(rounded))


@pytest.mark.parametrize(("content", "words"), [
    (b"<!doctype html><html>", "a web page"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (b"", "an empty file"), (b"GGUF\3\0\0\0", "GGUF"), (None, "is a pipe"),
])  # fmt: skip
def test_what_is_no_file_of_tensors(tmp_path, content, words):
    file = tmp_path / "look.safetensors"
    os.mkfifo(file) if content is None else file.write_bytes(content)
    assert words in refused(lambda: read_adapter(file))
    if content is None:
        assert words in refused(lambda: adapter_hash(file))
    assert not is_adapter(file)


# --- another network's ------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_counted_and_nothing_is_applied(model, pairs, tmp_path):
    strange = {f"strange.{number}": (torch.ones(3, 24), torch.ones(24, 3)) for number in range(4)}
    some = saved(tmp_path / "x.safetensors", state({**pairs, **strange}, "{}.lora_{}.weight"))
    said = refused(lambda: changes(some, model))
    assert "changes strange.0, one of 4 of its 7 layers, which tiny does not have" in said
    wide = build(STDiT3, hidden_size=48)
    file = saved(tmp_path / "y.safetensors", with_alpha(kohya(pairs)))
    assert "of size (72, 24), in tiny it has (144, 48)" in refused(lambda: changes(file, wide))
    assert "which tiny does not have" in refused(lambda: changes(file, build(STDiT, input_size=[3, 4, 6])))
    twice = kohya(pairs) | state(pairs, "transformer.{}.lora_{}.weight")
    both = saved(tmp_path / "z.safetensors", twice)
    assert "changes spatial_blocks.0.attn.qkv twice" in refused(lambda: changes(both, model))
    norm = saved(tmp_path / "n.safetensors", state({"spatial_blocks.0.attn": pairs[LAYERS[0]]}, "{}.lora_{}.weight"))
    assert "no layer with a matrix" in refused(lambda: changes(norm, model))


# --- out and in again -------------------------------------------------------------------------------------------------


@pytest.fixture
def ours(model, tmp_path) -> Path:
    """An adapter of PEFT with ranks and alphas of its own layers, as the file of this package."""
    patterns = {"rank_pattern": {"attn.qkv": 5}, "alpha_pattern": {"mlp.fc1": 9}}
    peft_model(model, use_rslora=True, **patterns).save_pretrained(tmp_path / "theirs")
    write_adapter(fit(read_adapter(tmp_path / "theirs"), model, "tiny"), tmp_path / "ours")
    return tmp_path / "ours"


OUTPUTS = {"diffusers": "out", "peft": "out", "kohya": "out.safetensors", "comfyui": "out.safetensors"}


@pytest.mark.parametrize("layout", OUTPUTS)
def test_written_for_a_tool_and_read_again_it_is_the_same_to_the_bit(model, ours, tmp_path, layout):
    before = read_adapter(ours)
    model.save_pretrained(tmp_path / "model")
    report = convert_adapter({ours: 1.0}, tmp_path / OUTPUTS[layout], layout, tmp_path / "model")
    assert Path(report.path).is_relative_to(tmp_path / OUTPUTS[layout])
    after = fit(read_adapter(tmp_path / OUTPUTS[layout]), model, "tiny")
    assert after.notes == () and after.alphas == before.alphas
    for layer, pair in before.layers.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, after.layers[layer], strict=True))
    back = convert_adapter({tmp_path / OUTPUTS[layout]: 1.0}, tmp_path / "back", "diffusers", tmp_path / "model")
    assert load_file(back.path).keys() == load_file(before.path).keys()
    assert "exists; name something" in refused(
        lambda: convert_adapter({ours: 1.0}, tmp_path / OUTPUTS[layout], layout, tmp_path / "model")
    )


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_libraries_read_what_is_written(model, ours, tmp_path, layout):
    wanted = changes(ours, model)
    write_adapter(read_adapter(ours), tmp_path / "out", layout)
    other = copy.deepcopy(model)
    if layout == "peft":
        merged = peft.PeftModel.from_pretrained(other, tmp_path / "out").merge_and_unload()
    else:
        other.load_lora_adapter(str(tmp_path / "out"), use_safetensors=True)
        other.fuse_lora()
        other.unload_lora()
        merged = other
    own = model.state_dict()
    equal({name: t - own[name] for name, t in merged.state_dict().items() if not torch.equal(t, own[name])}, wanted)


def test_names_without_dots_need_the_model(model, pairs, tmp_path):
    file = saved(tmp_path / "x.safetensors", with_alpha(kohya(pairs)))
    assert "name the model" in refused(lambda: convert_adapter({file: 1.0}, tmp_path / "out", "peft"))
    assert not (tmp_path / "out").exists()
    assert "did you mean peft" in refused(lambda: convert_adapter({file: 1.0}, tmp_path / "out", "pefft"))
    assert "one file; name it NAME.safetensors" in refused(
        lambda: write_adapter(read_adapter(file), tmp_path / "out", "kohya")
    )
    report = inspect_adapter(file)
    assert report.strength == (2.0, 2.0) and report.stated == "its alpha tensors" and report.fits == []


# --- beside the network -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A tiny model's folder, and beside it an adapter of kohya's and one of PEFT's, which are the same."""
    folder = tmp_path_factory.mktemp("tiny")
    pipeline = make_pipeline()
    pipeline.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for layer in LAYERS:
        size = pipeline.transformer.get_submodule(layer).weight.shape
        pair = [0.3 * torch.randn(*s, generator=generator) for s in ((RANK, size[1]), (size[0], RANK))]
        layers[layer] = (pair[0], pair[1])
    saved(folder / "look.safetensors", with_alpha(kohya(layers)))
    saved(folder / "guessed.safetensors", kohya(layers))
    convert_adapter({folder / "look.safetensors": 1.0}, folder / "peft", "peft", folder / "model")
    return folder


@pytest.mark.parametrize("name", ["look.safetensors", "peft", "guessed.safetensors"])
def test_loaded_beside_a_pipeline_it_acts_as_merged(tiny, name, caplog):
    merged = load_pipeline(tiny / "model", adapters={tiny / name: 1.0}).transformer.state_dict()
    said = [record.message for record in caplog.records if "guessed" in record.message]
    assert len(said) == (name == "guessed.safetensors")
    pipe = load_pipeline(tiny / "model")
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(str(tiny / name), adapter_name="look")
    pipe.load_lora_weights(tiny / name, adapter_name="again")
    pipe.set_adapters(["look", "again"], [0.25, 0.75])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = pipe.transformer.state_dict()
    assert not torch.equal(fused[f"{LAYERS[0]}.weight"], before[f"{LAYERS[0]}.weight"])
    equal(fused, merged)


def test_tensors_and_what_does_not_fit_beside_a_pipeline(tiny):
    pipe = load_pipeline(tiny / "model")
    tensors = load_file(tiny / "look.safetensors")
    with_dora = tensors | {"lora_unet_spatial_blocks_0_attn_qkv.dora_scale": torch.ones(1)}
    assert "DoRA" in refused(lambda: pipe.load_lora_weights(with_dora))
    biases = {f"{LAYERS[0]}.diff_b": torch.zeros(144)}
    assert "load_pipeline(adapters=...)" in refused(lambda: pipe.load_lora_weights(biases))
    assert "does not have" in refused(
        lambda: pipe.load_lora_weights(kohya({"x.0.y": (torch.ones(1, 2), torch.ones(2, 1))}))
    )
    assert not any("lora" in name for name, _ in pipe.transformer.named_modules())
    pipe.load_lora_weights(tensors)
    assert pipe.transformer.get_submodule(LAYERS[0]).scaling == {"default_0": ALPHA / RANK}


def test_a_guessed_strength_stands_in_the_record(tiny):
    request = ClipRequest(prompt="a", adapters=(GivenAdapter(tiny / "guessed.safetensors"),))
    [used] = used_adapters(request).values()
    assert "guessed" in used.notes[0] and used.name == "guessed.safetensors"


# --- part of a model for good -----------------------------------------------------------------------------------------


def test_a_model_with_its_adapters_fused_is_the_merged_one_to_the_bit(tiny, tmp_path, capsys):
    given = {tiny / "look.safetensors": 0.5, tiny / "peft": -0.25}
    options = [text for path, scale in given.items() for text in ("--adapter", f"{path}:{scale}")]
    assert main(["convert", str(tiny / "model"), str(tmp_path / "fused"), *options]) == 0
    said = capsys.readouterr().out
    assert "adapter look.safetensors at 0.5" in said and "adapter peft at -0.25" in said
    merged = load_pipeline(tiny / "model", adapters=given).transformer.state_dict()
    fused = load_pipeline(tmp_path / "fused").transformer
    assert all(torch.equal(tensor, merged[name]) for name, tensor in fused.state_dict().items())
    assert [one["scale"] for one in fused.config["_fused_adapters"]] == [0.5, -0.25]
    convert(tmp_path / "fused" / "transformer", tmp_path / "more", adapters={tiny / "peft": 1.0})
    more = json.loads((tmp_path / "more" / "config.json").read_text())["_fused_adapters"]
    assert [one["name"] for one in more] == ["look.safetensors", "peft", "peft"]


def test_what_cannot_be_converted_is_one_line(tiny, tmp_path, capsys):
    look, model = str(tiny / "look.safetensors"), str(tiny / "model")
    for words, *command in [
        ("is an adapter and no model", look, str(tmp_path / "out")),
        ("an adapter changes a transformer", f"{model}/autoencoder", str(tmp_path / "out"), "--adapter", look),
        ("FOLDER is missing", model, "--adapter", look),
        ("and none is given with --adapter", str(tmp_path / "out"), "--to", "peft"),
        ("did you mean kohya", str(tmp_path / "o.safetensors"), "--to", "khoya", "--adapter", look),
        ("--dtype does nothing", model, str(tmp_path / "o"), "--to", "peft", "--adapter", look, "--dtype", "float16"),
        ("scale 0 changes nothing", model, str(tmp_path / "o"), "--to", "peft", "--adapter", f"{look}:0"),
        ("is given twice", model, str(tmp_path / "o"), "--adapter", look, "--adapter", look),
    ]:
        assert main(["convert", *command]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
    assert list(tmp_path.iterdir()) == []
    assert main(["convert", model, str(tmp_path / "half"), "--to", "peft", "--adapter", f"{look}:0.5"]) == 0
    assert "alpha / rank is 1, as stated in adapter_config.json" in capsys.readouterr().out


# --- training from one ------------------------------------------------------------------------------------------------


def test_training_goes_on_from_an_adapter(model, pairs, tmp_path, caplog):
    other = {"spatial_blocks.1.mlp.fc2": (torch.ones(2, 96), torch.ones(24, 2))}
    alphas = {"lora_unet_spatial_blocks_1_mlp_fc2.alpha": torch.tensor(5.0)}
    file = saved(tmp_path / "x.safetensors", with_alpha(kohya(pairs)) | kohya(other) | alphas)
    trained = copy.deepcopy(model)
    config = LoRAConfig(rank=16, init_adapter=str(file))
    add_adapter(trained, config)
    said = " ".join(record.message for record in caplog.records)
    assert "its rank 3 is trained, not objective.train.rank=16" in said and "its layers are trained (4)" in said
    result = trained(**inputs(), **SIZES).sample
    merged = copy.deepcopy(model)
    merged.load_state_dict(dict(AdaptedWeights(model, model.state_dict(), [(read_adapter(file), 1.0)], "tiny")))
    torch.testing.assert_close(result, merged(**inputs(), **SIZES).sample, rtol=1e-3, atol=1e-3)
    with without_adapter(trained):
        torch.testing.assert_close(trained(**inputs(), **SIZES).sample, model(**inputs(), **SIZES).sample)
    assert sum(p.numel() for p in trained.parameters() if p.requires_grad) == read_adapter(file).num_parameters
    after = read_adapter(export_adapter(trained, config, tmp_path / "out", base="tiny", training={}))
    before = fit(read_adapter(file), model, "tiny")
    assert after.alphas == before.alphas and after.layers.keys() == before.layers.keys()
    assert all(torch.equal(a, b) for n in before.layers for a, b in zip(before.layers[n], after.layers[n], strict=True))
    assert after.origin is not None and after.origin.training["init_adapter"]["name"] == "x.safetensors"


def test_what_training_cannot_go_on_from(model, tmp_path):
    biases = saved(tmp_path / "b.safetensors", {f"{LAYERS[0]}.diff_b": torch.zeros(72)})
    said = refused(lambda: add_adapter(copy.deepcopy(model), LoRAConfig(init_adapter=str(biases))))
    assert "objective.train.init_adapter" in said
    strange = saved(tmp_path / "s.safetensors", kohya({"x.0.y": (torch.ones(1, 2), torch.ones(2, 1))}))
    said = refused(lambda: add_adapter(copy.deepcopy(model), LoRAConfig(init_adapter=str(strange))))
    assert "changes x_0_y, which STDiT3 does not have" in said
    missing = str(tmp_path / "nowhere")
    assert "is missing" in refused(lambda: add_adapter(copy.deepcopy(model), LoRAConfig(init_adapter=missing)))


def test_a_run_from_an_adapter_leaves_it_where_it_was_and_is_bound_to_it(tiny, tmp_path):
    """At a learning rate of next to nothing; resumed, it asks for the adapter that it began with."""

    def trainer(output: str) -> Trainer:
        objective = DiffusionTaskConfig(
            data=ManifestClips({"64x64": {"5": (1.0, 2)}}, manifest, batches_in_a_row=1, num_workers=0),
            diffusion=Flow(),
            autoencoder=str(tiny / "model"),
            text=FrozenText(str(tiny / "model")),
            init_from=str(tiny / "model"),
            train=LoRAConfig(init_adapter=str(tmp_path / "start.safetensors")),
        )
        optimizer = OptimizerConfig(matrices="adamw", lr=1e-12, warmup_steps=0, decay=0.0)
        loop = LoopConfig(steps=1, optimizer=optimizer, precision="fp32")
        return Trainer(Recipe("lora", objective, loop), tmp_path / output)

    manifest = write_clips(tmp_path / "clips")
    start = shutil.copy(tiny / "look.safetensors", tmp_path / "start.safetensors")
    before = fit(read_adapter(start), load_pipeline(tiny / "model").transformer, "tiny")
    after = read_adapter(trainer("run").run())
    assert after.alphas == before.alphas and after.layers.keys() == before.layers.keys()
    for layer, pair in before.layers.items():
        torch.testing.assert_close(after.layers[layer], pair)
    assert str(tmp_path) not in json.dumps(after.origin.training if after.origin else {})
    saved(tmp_path / "start.safetensors", load_file(tiny / "look.safetensors"), ss_network_alpha="8")
    assert "other contents of: objective.train.init_adapter" in refused(lambda: trainer("run"))
