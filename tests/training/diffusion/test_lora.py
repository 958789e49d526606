"""Adapters: trained by PEFT beside a frozen base, saved alone, merged by the loader without PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipeline import make_pipeline, seeded
from tiny_tasks import FAMILY, family_config, write_clips
from tiny_transformers import SIZES, build, inputs

from opensora.adapters.adapter import read_adapter
from opensora.adapters.reading import ADAPTER_FILE, is_adapter
from opensora.checkpoints.components import load_component
from opensora.checkpoints.loading import load_pipeline
from opensora.data.clips import ManifestClips
from opensora.errors import OpenSoraError
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3
from opensora.models.stdit4 import STDiT4
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.config import DiffusionTaskConfig
from opensora.training.diffusion.lora import LoRAConfig, adapter_layers, add_adapter, export_adapter, without_adapter
from opensora.training.diffusion.noise import Flow
from opensora.training.diffusion.text import FrozenText, TrainedText
from opensora.training.optimizer import OptimizerConfig
from opensora.training.trainer import Trainer

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "1.0": (STDiT, {"input_size": [3, 4, 6]}),
    "1.1": (STDiT2, {}),
    "1.2": (STDiT3, {}),
    "1.3": (STDiT4, {"kernel_size": [2, 2, -1]}),
}
PROMPT = "a small red ball rolls left"


def train_two_steps(model: Any, version: str) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for _ in range(2):
        model(**inputs(), **SIZES).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(params=MODELS)
def version(request) -> str:
    return request.param


@pytest.fixture
def trained(version, tmp_path) -> tuple[Path, Path, Any]:
    """A saved base, the folder of its adapter, and both in memory as PEFT computes them."""
    cls, options = MODELS[version]
    model = build(cls, **options)
    model.save_pretrained(tmp_path / "base")
    config = LoRAConfig(rank=3, alpha=6)
    add_adapter(model, config)
    train_two_steps(model, version)
    export_adapter(model, config, tmp_path / "adapter", base="tiny", training={"steps": 2})
    return tmp_path / "base", tmp_path / "adapter", model.eval()


def loaded(base: Path, version: str, *adapters: tuple[Path, float], dtype: torch.dtype = torch.float32) -> Any:
    read = [(read_adapter(path), scale) for path, scale in adapters]
    return load_component(base, MODELS[version][0], dtype, adapters=read)


@torch.no_grad()
def answer(model: Any, version: str) -> torch.Tensor:
    return model(**inputs(), **SIZES).sample


def test_a_merged_adapter_answers_as_peft_does(trained, version):
    base, adapter, in_memory = trained
    merged = loaded(base, version, (adapter, 1.0))
    torch.testing.assert_close(answer(merged, version), answer(in_memory, version), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(answer(merged, version), answer(loaded(base, version), version), atol=1e-2)
    assert not any("lora" in name for name, _ in merged.named_modules())


def test_every_kind_of_layer_is_adapted(trained, version):
    _, adapter, model = trained
    ends = {".".join(layer.split(".")[-2:]) for layer in read_adapter(adapter).layers}
    expected = {"attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"}
    expected |= {"mlp.fc1", "mlp.fc2"} | ({"attn_temp.qkv", "attn_temp.proj"} if version in ("1.0", "1.1") else set())
    assert ends == expected
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.lora_{which}.default.weight" for layer in adapter_layers(model) for which in "AB"
    }


def test_at_scale_0_and_beside_the_base_nothing_changes(trained, version):
    base, adapter, _ = trained
    plain, off = loaded(base, version), loaded(base, version, (adapter, 0.0))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, off.state_dict()[name]), name


def test_scales_multiply_and_adapters_add(trained, version):
    base, adapter, _ = trained
    name = f"{next(iter(read_adapter(adapter).layers))}.weight"
    weight = {key: loaded(base, version, *of).state_dict()[name] for key, of in {
        "base": (), "half": ((adapter, 0.5),), "whole": ((adapter, 1.0),), "twice": ((adapter, 0.5), (adapter, 0.5)),
    }.items()}  # fmt: skip
    whole = weight["whole"] - weight["base"]
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(weight["half"] - weight["base"], whole / 2)
    torch.testing.assert_close(weight["twice"], weight["whole"])


def test_deltas_are_added_before_weights_are_rounded(trained, version):
    base, adapter, _ = trained
    rounded = loaded(base, version, (adapter, 1.0), dtype=torch.bfloat16).state_dict()
    exact = loaded(base, version, (adapter, 1.0)).state_dict()
    name = f"{next(iter(read_adapter(adapter).layers))}.weight"
    assert torch.equal(rounded[name], exact[name].bfloat16())


def test_other_programs_read_the_file(trained, version):
    """diffusers' own loader makes the same network of it."""
    base, adapter, in_memory = trained
    theirs = loaded(base, version)
    theirs.load_lora_adapter(str(adapter), use_safetensors=True)
    torch.testing.assert_close(answer(theirs, version), answer(in_memory, version), rtol=1e-4, atol=1e-4)


def test_an_adapter_of_other_weights_is_refused(trained, version, tmp_path):
    _, adapter, _ = trained
    other = build(MODELS[version][0], **MODELS[version][1])
    with torch.no_grad():
        other.blocks[0].attn.proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(OpenSoraError, match=r"trained on other weights of tiny than those of .*other") as error:
        loaded(tmp_path / "other", version, (adapter, 1.0))
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_size_or_generation_is_refused(tmp_path):
    for name, (cls, options) in {"a": (STDiT3, {}), "b": (STDiT2, {}), "c": (STDiT3, {"hidden_size": 48})}.items():
        build(cls, **options).save_pretrained(tmp_path / name)
    model = build(STDiT3)
    add_adapter(model, LoRAConfig(rank=2))
    export_adapter(model, LoRAConfig(rank=2), tmp_path / "adapter", base="a", training={})
    with pytest.raises(OpenSoraError, match=r"adapter of a STDiT3, .*b is a STDiT2; it was trained on a"):
        loaded(tmp_path / "b", "1.1", (tmp_path / "adapter", 1.0))
    with pytest.raises(OpenSoraError, match=r"of size \(24, 24\), in .*c it has \(48, 48\)"):
        loaded(tmp_path / "c", "1.2", (tmp_path / "adapter", 1.0))


def test_what_is_no_adapter_is_one_line(trained, tmp_path):
    file = trained[1] / ADAPTER_FILE
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    first = next(name for name in tensors if name.endswith("lora_A.weight"))

    def broken(**changes: Any) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({**tensors, **changes.get("tensors", {})}, path, {**metadata, **changes.get("metadata", {})})
        return path

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:1000])
    lone = tmp_path / "lone.safetensors"
    save_file({first: tensors[first]}, lone, metadata)
    for path, words in {
        cut: "not a readable adapter",
        lone: "expected lora_A (r, in) and lora_B (out, r)",
        tmp_path / "nothing.safetensors": "is missing",
        broken(tensors={first: tensors[first] * float("nan")}): "NaN or infinite",
        broken(tensors={"transformer.x.weight": torch.zeros(2, 2)}): "holds transformer.x.weight",
        broken(tensors={first: torch.zeros(2, 24)}): "expected lora_A (r, in)",
        broken(metadata={"opensora": "{"}): "not JSON",
        broken(metadata={"opensora": '{"base": 1, "colour": 2}'}): "not understood",
        broken(metadata={"lora_adapter_metadata": '{"transformer.lora_alpha": "much"}'}): "expected a number",
    }.items():
        with pytest.raises(OpenSoraError) as error:
            read_adapter(path)
        assert words in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_targets_choose_layers(version):
    cls, options = MODELS[version]
    model = build(cls, **options)
    assert all(name.endswith(".mlp.fc1") for name in LoRAConfig(targets=("mlp.fc1",)).layers_of(model))
    part = "blocks" if version in ("1.0", "1.1") else "spatial_blocks"
    assert {name.split(".")[0] for name in LoRAConfig(targets=(part,)).layers_of(model)} == {part}
    with pytest.raises(OpenSoraError, match=r"targets to_q name no linear layer of this STDiT.*it has .*attn\.qkv"):
        LoRAConfig(targets=("to_q",)).layers_of(model)
    for options in ({"rank": 0}, {"alpha": -1.0}, {"dropout": 1.0}, {"preserve": -0.1}):
        with pytest.raises(OpenSoraError):
            LoRAConfig(**options)


def test_the_base_can_be_asked_while_the_adapter_is_trained(trained, version):
    base, _, model = trained
    before = answer(model, version)
    with without_adapter(model):
        torch.testing.assert_close(answer(model, version), answer(loaded(base, version), version))
    assert torch.equal(answer(model, version), before)
    assert all(p.requires_grad for pair in adapter_layers(model).values() for p in pair)


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline_folder(tmp_path) -> Path:
    make_pipeline().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def recipe(base: Path, manifest: Path, preserve: float = 0.0, **loop: Any) -> Recipe:
    """An adapter beside a tiny pipeline, on clips of a manifest."""
    objective = DiffusionTaskConfig(
        data=ManifestClips({"64x64": {"5": (1.0, 2)}}, manifest, batches_in_a_row=1, num_workers=0),
        diffusion=Flow(),
        autoencoder=str(base),
        text=FrozenText(str(base)),
        init_from=str(base),
        train=LoRAConfig(rank=2, preserve=preserve),
    )
    optimizer = OptimizerConfig(matrices="adamw", lr=0.05, warmup_steps=0, decay=0.0)
    return Recipe("lora", objective, LoopConfig(**{"steps": 3, "optimizer": optimizer, "precision": "fp32"} | loop))


def test_a_run_leaves_an_adapter_and_small_checkpoints(pipeline_folder, tmp_path):
    manifest = write_clips(tmp_path / "clips")
    model = Trainer(recipe(pipeline_folder, manifest), tmp_path / "run").run()
    assert [file.name for file in model.iterdir()] == [ADAPTER_FILE] and is_adapter(model)
    adapter = read_adapter(model)
    assert adapter.origin is not None and adapter.origin.base == "tiny"
    assert str(tmp_path) not in json.dumps(adapter.origin.training)

    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    # Weights, their average and two moments of each: four times the adapter, and no base.
    assert size(tmp_path / "run" / "checkpoints") < 6 * size(model) + 20_000 < size(pipeline_folder / "transformer")

    with_adapter = load_pipeline(pipeline_folder, adapters={model: 1.0})
    plain, off = load_pipeline(pipeline_folder), load_pipeline(pipeline_folder, adapters={model: 0.0})
    offloaded = load_pipeline(pipeline_folder, adapters={model: 1.0}, offload=True)
    frames = []
    for pipeline in (plain, off, with_adapter, offloaded):
        pipeline.set_progress_bar_config(disable=True)
        frames.append(pipeline(PROMPT, generator=seeded(1), output_type="pt").frames)
    assert torch.equal(frames[0], frames[1]) and not torch.allclose(frames[0], frames[2], atol=1e-3)
    torch.testing.assert_close(frames[2], frames[3])


def test_what_is_preserved_changes_less(pipeline_folder, tmp_path):
    """A threshold above all that the clips ask for leaves next to nothing of the adapter."""
    manifest, changes = write_clips(tmp_path / "clips"), {}
    for preserve in (0.0, 50.0):
        run = Trainer(recipe(pipeline_folder, manifest, preserve, steps=12, log_every=12), tmp_path / str(preserve))
        layers = read_adapter(run.run()).layers.values()
        changes[preserve] = max(float((b @ a).norm()) for a, b in layers)
    assert changes[50.0] < 0.5 * changes[0.0]
    figures = json.loads((tmp_path / "50.0" / "metrics.jsonl").read_text())
    assert figures["change"] > 0


def test_a_stopped_run_goes_on(pipeline_folder, tmp_path):
    manifest = write_clips(tmp_path / "clips")
    whole = Trainer(recipe(pipeline_folder, manifest, checkpoint_every=1), tmp_path / "whole").run()
    trainer = Trainer(recipe(pipeline_folder, manifest, checkpoint_every=1), tmp_path / "stopped")
    trainer.stop_requested = True
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    again = Trainer(recipe(pipeline_folder, manifest, checkpoint_every=1), tmp_path / "stopped")
    assert again.step == 1
    resumed = again.run()
    first, second = load_file(whole / ADAPTER_FILE), load_file(resumed / ADAPTER_FILE)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_whose_table_has_changed_is_refused(pipeline_folder, tmp_path):
    manifest = write_clips(tmp_path / "clips")
    Trainer(recipe(pipeline_folder, manifest, steps=1), tmp_path / "run").run()
    manifest.write_text("\n".join(manifest.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(OpenSoraError, match=r"other contents of: objective\.data\.manifest; give back"):
        Trainer(recipe(pipeline_folder, manifest, steps=1), tmp_path / "run")


@pytest.mark.parametrize("kind", FAMILY)
def test_each_generation_trains_an_adapter(kind, tmp_path):
    """Through its own objective: published conditions, a frozen text encoder, bf16."""
    manifest = write_clips(tmp_path / "clips")
    base = family_config(kind, manifest).build("cpu").task.networks.transformer
    for parameter in base.parameters():
        if not parameter.any():  # a last layer of zeros would hide all others
            torch.nn.init.normal_(parameter, std=0.2)
    base.save_pretrained(tmp_path / "base")
    config = family_config(kind, manifest, init_from=str(tmp_path / "base"), transformer=None, train=LoRAConfig(2))
    optimizer = OptimizerConfig(matrices="adamw", lr=0.01, warmup_steps=0, decay=0.0)
    model = Trainer(Recipe("lora", config, LoopConfig(steps=2, optimizer=optimizer)), tmp_path / "run").run()
    merged = load_component(tmp_path / "base", type(base), adapters=[(read_adapter(model), 1.0)])
    changed = [n for n, p in merged.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert changed and all(name.removesuffix(".weight") in read_adapter(model).layers for name in changed)


def test_an_adapter_needs_a_base_and_frozen_text(tmp_path):
    manifest = write_clips(tmp_path / "clips")
    with pytest.raises(OpenSoraError, match=r"name it by objective\.init_from"):
        family_config("1.2", manifest, train=LoRAConfig())
    with pytest.raises(OpenSoraError, match="freeze the text encoder"):
        family_config("1.2", manifest, train=LoRAConfig(), init_from="toybox", text=TrainedText())
    with pytest.raises(OpenSoraError, match=r"leave objective\.new_parts out"):
        family_config("1.2", manifest, train=LoRAConfig(), init_from="toybox", new_parts=("qk_norm",))
