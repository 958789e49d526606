"""Every transformer in the shape of diffusers' model tests: files, offloading, casting, caches, adapters, compiling.

Offloading runs on a CPU, where its hooks are counted and weights that are away are seen to be away.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import hooks
from diffusers.hooks.hooks import HookRegistry
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from tiny_transformers import MODELS, SIZES, build, channels, inputs, some_frames_kept
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.models import attention
from opensora.models.attention import CrossAttention, SelfAttention
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3
from opensora.models.stdit4 import STDiT4

CPU = torch.device("cpu")
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "STDiT": (STDiT, {}),
    "STDiT, exact GELU": (STDiT, {"exact_gelu": True}),
    "STDiT, patches of two frames": (STDiT, {"patch_size": (2, 2, 2)}),
    "STDiT2": (STDiT2, {}),
    "STDiT2, no norm": (STDiT2, {"qk_norm": False}),
    "STDiT2, rotation after the norm": (STDiT2, {"qk_norm_legacy": False}),
    "STDiT3": (STDiT3, {}),
    "STDiT3, no norm": (STDiT3, {"qk_norm": False}),
    "STDiT3, exact GELU": (STDiT3, {"exact_gelu": True}),
    "STDiT3, patches of two frames": (STDiT3, {"patch_size": (2, 2, 2)}),
    "STDiT3, trained null text": (STDiT3, {"learn_null_text": True}),
    "STDiT4": (STDiT4, {"kernel_size": (2, 2, -1)}),
    "STDiT4, no norm": (STDiT4, {"qk_norm": False}),
    "STDiT4, rotation in windows alone": (STDiT4, {"use_spatial_rope": False}),
    "STDiT4, no windows": (STDiT4, {"kernel_size": None, "use_spatial_rope": False}),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny model of each kind, to be changed."""
    return build(request.param).requires_grad_(False)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Any:
    """A tiny model of each kind in each of its forms."""
    cls, changes = VARIANTS[request.param]
    return build(cls, **changes).requires_grad_(False)


def predict(model: Any, **changes: Any) -> Tensor:
    return model(**{**inputs(), **SIZES, **channels(model), **changes}).sample


def steps(model: Any, timesteps: list[float]) -> Tensor:
    """A few denoising steps of a fake sampler, which makes the tokens drift slowly; one caption is dropped."""
    arguments = inputs()
    text, mask = arguments.pop("encoder_hidden_states"), arguments.pop("encoder_attention_mask")
    sample = arguments["hidden_states"]
    with torch.no_grad():
        context = model.encode_text(text, mask, drop_text=torch.tensor([True, False]))
        for step, timestep in enumerate(timesteps):
            with model.cache_context("cond", step_index=step):
                prediction = model(sample, timestep, text_context=context, **SIZES).sample
            sample = sample - 0.01 * prediction[:, :3]
    return sample


TIMESTEPS = [500.0, 499.0, 498.0, 497.0]


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def near(actual: Tensor, expected: Tensor) -> None:
    """Not bit for bit: weights read from a file lie elsewhere in memory, and some CPUs' kernels depend on where."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_the_same_numbers_every_time(variant):
    equal(predict(variant), predict(variant))


def test_a_tuple_holds_what_the_output_object_does(variant):
    (sample,) = variant(**inputs(), **SIZES, **channels(variant), return_dict=False)
    equal(sample, predict(variant))


def test_a_batch_is_its_samples_one_by_one(variant):
    arguments, mask = inputs(), {}
    if variant.patch_size[0] == 1:
        mask = {"frame_mask": some_frames_kept()}
    both = variant(**arguments, **SIZES, **mask).sample
    for i in range(2):
        one = {name: value[i : i + 1] for name, value in {**arguments, **mask}.items()}
        near(variant(**one, **SIZES).sample[0], both[i])


# ---- files ----------------------------------------------------------------------------------------------------------


def assert_same_weights(actual: nn.Module, expected: nn.Module) -> None:
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        equal(actual.state_dict()[name], tensor)


def test_saved_and_loaded(variant, tmp_path):
    variant.save_pretrained(tmp_path)
    loaded = type(variant).from_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert loaded.to_json_string() == variant.to_json_string()
    assert_same_weights(loaded, variant)
    near(predict(loaded), predict(variant))


def test_built_from_a_configuration(variant):
    other = type(variant).from_config(variant.config)
    assert {name: tensor.shape for name, tensor in other.state_dict().items()} == {
        name: tensor.shape for name, tensor in variant.state_dict().items()
    }
    assert other.to_json_string() == variant.to_json_string()


def test_saved_in_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert len(set(index["weight_map"].values())) > 2
    for keywords in ({}, {"low_cpu_mem_usage": False}, {"device_map": {"": "cpu"}}):
        assert_same_weights(type(model).from_pretrained(tmp_path, **keywords), model)


def test_saved_as_a_variant_in_half_precision(model, tmp_path):
    """Positions stay exact whatever the weights are cast to."""
    model.to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
    assert (tmp_path / "diffusion_pytorch_model.bf16.safetensors").exists()
    loaded = type(model).from_pretrained(tmp_path, variant="bf16", torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert_same_weights(loaded, model)
    near(predict(loaded), predict(model))


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # the tables of STDiT are no modules
def test_weights_on_disk_behind_a_device_map(model, tmp_path):
    """Every block projects the text for itself, as its weights are there only while it runs."""
    expected = steps(model, TIMESTEPS[:2])
    model.save_pretrained(tmp_path / "saved")
    parts = [name for name, _ in [*model.named_children(), *model.named_buffers(recurse=False)]]
    places = {name: "disk" if name.endswith("blocks") else "cpu" for name in parts}
    loaded = type(model).from_pretrained(tmp_path / "saved", device_map=places, offload_folder=tmp_path / "away")
    assert loaded.blocks[0].attn.qkv.weight.is_meta
    near(steps(loaded, TIMESTEPS[:2]), expected)


@pytest.mark.parametrize("learn_null_text", [False, True])
def test_a_null_text_on_disk_is_read_or_refused(learn_null_text, tmp_path):
    """Of what is on disk diffusers reads parameters only, and a fixed null text is a buffer."""
    model = build(STDiT3, learn_null_text=learn_null_text).requires_grad_(False)
    expected = steps(model, TIMESTEPS[:2])
    model.save_pretrained(tmp_path / "saved")
    places = {name: "disk" if name == "y_embedder" else "cpu" for name, _ in model.named_children()}
    options = {"device_map": places, "offload_folder": tmp_path / "away"}
    if learn_null_text:
        near(steps(STDiT3.from_pretrained(tmp_path / "saved", **options), TIMESTEPS[:2]), expected)
    else:
        with pytest.raises(OpenSoraError, match="y_embedder on disk"):
            STDiT3.from_pretrained(tmp_path / "saved", **options)


# ---- offloading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_group_offload(model, level, where, blocks, tmp_path):
    expected = steps(model, TIMESTEPS[:2])
    model.enable_group_offload(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=level,
        num_blocks_per_group=blocks,
        use_stream=False,
        offload_to_disk_path=str(tmp_path) if where == "disk" else None,
    )
    if where == "disk":
        assert list(tmp_path.glob("*.safetensors"))
        for parameter in model.parameters():  # what lies in memory while the weights are away is anything
            parameter.data.fill_(torch.nan)
    near(steps(model, TIMESTEPS[:2]), expected)


def test_sequential_offload(model):
    accelerate = pytest.importorskip("accelerate")
    expected = steps(model, TIMESTEPS[:2])
    accelerate.cpu_offload(model, CPU, offload_buffers=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    equal(steps(model, TIMESTEPS[:2]), expected)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_model_offload(model, monkeypatch):
    """Both ways into the model bring its weights in."""
    accelerate, came = pytest.importorskip("accelerate"), []
    expected = steps(model, TIMESTEPS[:2])
    _, hook = accelerate.cpu_offload_with_hook(model, CPU)
    bring_in = hook.hook.pre_forward

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        came.append(module)
        return bring_in(module, *args, **kwargs)

    monkeypatch.setattr(hook.hook, "pre_forward", counted)
    equal(steps(model, TIMESTEPS[:2]), expected)
    assert came == [model] * 3  # the text, and two steps


# ---- casting --------------------------------------------------------------------------------------------------------


def test_layerwise_casting_casts_the_layers_of_the_blocks_and_no_others(variant):
    expected = predict(variant)
    variant.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    cast = {name for name, p in variant.named_parameters() if p.dtype == torch.float8_e4m3fn}
    in_blocks = {
        name for name, module in variant.named_modules() if "blocks." in name and isinstance(module, nn.Linear)
    }
    assert cast == {f"{name}.{kind}" for name in in_blocks for kind in ("weight", "bias")}
    assert {p.dtype for name, p in variant.named_parameters() if name not in cast} == {torch.float32}
    sample = predict(variant)
    assert 0 < (sample - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_layerwise_casting_in_half_precision_leaves_adapters_alone(model):
    model.to(torch.bfloat16)
    adapted(model, ["qkv", "fc1"], seed=1)
    expected = predict(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    kinds = {"lora_" in name: p.dtype for name, p in model.named_parameters() if ".qkv." in name}
    assert kinds == {True: torch.bfloat16, False: torch.float8_e4m3fn} and model.dtype == torch.bfloat16
    sample = predict(model)
    assert (sample - expected).abs().mean() < 0.1 * expected.abs().mean()


# ---- caches ---------------------------------------------------------------------------------------------------------


def taylorseer(**changes: Any) -> hooks.TaylorSeerCacheConfig:
    few = {"cache_interval": 3, "disable_cache_before_step": 1, "taylor_factors_dtype": torch.float32}
    return hooks.TaylorSeerCacheConfig(**{**few, **changes})


def broadcast(**ranges: Any) -> hooks.PyramidAttentionBroadcastConfig:
    return hooks.PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500, **ranges)


def magnitude() -> hooks.MagCacheConfig:
    return hooks.MagCacheConfig(
        threshold=10.0, max_skip_steps=3, num_inference_steps=4, retention_ratio=0.25, mag_ratios=[1.0] * 4
    )


def attention_along(model: Any, axis: str) -> set[str]:
    """Names of the modules that attend among patches, frames or to the text."""
    kind = CrossAttention if axis == "cross" else SelfAttention
    names = {name for name, module in model.named_modules() if isinstance(module, kind)}
    in_time = {name for name in names if "temporal_blocks" in name or name.endswith("attn_temp")}
    return {"spatial": names - in_time, "temporal": in_time, "cross": names}[axis]


def hooked(model: nn.Module) -> set[str]:
    """Names of the modules that a cache holds."""

    def registered(module: nn.Module) -> dict[str, Any]:
        return (
            module._diffusers_hook.hooks if isinstance(getattr(module, "_diffusers_hook", None), HookRegistry) else {}
        )

    return {name for name, module in model.named_modules() if registered(module)}


CACHES: dict[str, tuple[Callable[[], Any], str, float]] = {  # configuration, what is counted, at most of 4 steps of it
    "first block": (lambda: hooks.FirstBlockCacheConfig(threshold=10.0), "mlp", 2.5),
    "magnitude": (magnitude, "mlp", 1),
    "taylorseer": (taylorseer, "mlp.fc1", 2),
    "taylorseer, lite": (lambda: taylorseer(use_lite_mode=True), "mlp.fc1", 2),
    "broadcast in space": (lambda: broadcast(spatial_attention_block_skip_range=2), "attn.qkv", 3),
    "broadcast in time": (lambda: broadcast(temporal_attention_block_skip_range=2), "attn.qkv|attn_temp.qkv", 3),
    "broadcast to the text": (lambda: broadcast(cross_attention_block_skip_range=4), "cross_attn.q_linear", 1),
}


def count_calls(model: Any, ends: str) -> tuple[list[int], list[Any], int]:
    """Calls from now on of the layers of the blocks whose names end in one of `ends`, and how many layers these are."""
    calls: list[int] = []
    layers = [m for b in model.blocks for name, m in b.named_modules() if name in ends.split("|")]
    return calls, [layer.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in layers], len(layers)


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_hooks_saves_work_and_goes_without_a_trace(model, cache):
    """With no names given, every cache finds the modules of every model."""
    make, layer, most = CACHES[cache]
    exact, before = steps(model, TIMESTEPS), hooked(model)
    model.enable_cache(make())
    assert hooked(model) - before
    calls, handles, layers = count_calls(model, layer)
    cached = steps(model, TIMESTEPS)
    for handle in handles:
        handle.remove()
    assert 0 < len(calls) <= most * layers < 4 * layers
    drift = (exact - inputs()["hidden_states"]).abs().mean()
    assert 0 < (cached - exact).abs().mean() < 0.2 * drift
    with pytest.raises(OpenSoraError, match="enabled already"):
        model.enable_cache(make())
    model.disable_cache()
    equal(steps(model, TIMESTEPS), exact)


@pytest.mark.parametrize("axis", ["spatial", "temporal", "cross"])
def test_attention_is_broadcast_along_the_axis_asked_for(model, axis):
    model.enable_cache(broadcast(**{f"{axis}_attention_block_skip_range": 2}))
    assert hooked(model) - {""} == attention_along(model, axis)


def test_taylorseer_predicts_attention_and_mlps(model):
    model.enable_cache(taylorseer())
    mlps = {name for name, _ in model.named_modules() if "blocks." in name and name.endswith(".mlp")}
    assert hooked(model) - {""} == attention_along(model, "spatial") | attention_along(model, "temporal") | mlps


def test_names_that_are_given_are_kept(model):
    (last,) = [name for name, module in model.named_modules() if module is model.blocks[-1].mlp]
    model.enable_cache(taylorseer(cache_identifiers=[last]))
    assert hooked(model) - {""} == {last}


@pytest.mark.parametrize(
    "make",
    [
        lambda: taylorseer(cache_identifiers=["transformer_blocks[.].*"]),
        lambda: taylorseer(cache_identifiers=["blocks"], skip_predict_identifiers=["mlp"]),
        lambda: broadcast(
            spatial_attention_block_skip_range=2, spatial_attention_block_identifiers=("transformer_blocks",)
        ),
        lambda: broadcast(
            spatial_attention_block_skip_range=2,
            temporal_attention_block_skip_range=2,
            temporal_attention_block_identifiers=("transformer_blocks",),
        ),
        lambda: broadcast(  # space takes them all
            spatial_attention_block_skip_range=2,
            spatial_attention_block_identifiers=("block",),
            temporal_attention_block_skip_range=2,
        ),
    ],
)
def test_a_cache_that_would_hook_nothing_is_refused(model, make):
    with pytest.raises(OpenSoraError, match="fit no module") as error:
        model.enable_cache(make())
    assert "\n" not in str(error.value)
    assert not model.is_cache_enabled and not hooked(model)
    model.enable_cache(taylorseer())


@pytest.mark.parametrize("make", [hooks.FasterCacheConfig, hooks.TextKVCacheConfig, hooks.SeaCacheConfig])
def test_caches_of_other_models_are_refused(model, make):
    with pytest.raises(OpenSoraError, match=f"{make.__name__} does not work with {type(model).__name__}"):
        model.enable_cache(make())


# ---- adapters -------------------------------------------------------------------------------------------------------

TARGETS = {
    "attention": ["qkv", "q_linear", "kv_linear"],
    "patches and attention": ["proj"],  # also the projection of the patches
    "patches": ["x_embedder.proj"],
    "last layer and MLPs": ["linear", "fc1", "fc2"],
}
WEIGHTS = "pytorch_lora_weights.safetensors"


def adapted(model: Any, targets: list[str], seed: int, name: str = "default") -> Any:
    """`model` with an adapter that says something."""
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets), adapter_name=name)
    randomize(model, seed, name)
    return model


def randomize(model: Any, seed: int, name: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.data.normal_(std=0.2, generator=generator)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_a_fresh_adapter_changes_nothing_and_learns(model, targets):
    peft, plain = pytest.importorskip("peft"), predict(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets))
    near(predict(model), plain)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert any(name.startswith("x_embedder") for name in trained) == any("proj" in target for target in targets)
    (predict(model) - 1).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in trained.items() if "lora_B" in name)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_the_life_of_an_adapter(model, targets, tmp_path):
    """Saved, loaded, switched off and on, scaled, fused into the weights and out again, unloaded."""
    plain, other = predict(model), build(type(model)).requires_grad_(False)
    expected = predict(adapted(model, targets, seed=1))
    assert not torch.allclose(expected, plain, atol=1e-3)
    model.save_lora_adapter(tmp_path, weight_name=WEIGHTS)
    other.load_lora_adapter(tmp_path, prefix=None, weight_name=WEIGHTS, adapter_name="first")
    near(predict(other), expected)
    other.disable_lora()
    near(predict(other), plain)
    other.enable_lora()
    other.set_adapters(["first"], weights=[0.0])
    near(predict(other), plain)
    other.set_adapters(["first"], weights=[1.0])
    near(predict(other), expected)
    other.fuse_lora()
    near(predict(other), expected)
    other.unfuse_lora()
    near(predict(other), expected)
    other.unload_lora()
    assert not [name for name, _ in other.named_parameters() if "lora_" in name]
    near(predict(other), plain)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_adapters_are_swapped_in_place(model, targets, tmp_path):
    """Another adapter's weights take the place of the first's, without new modules."""
    samples = []
    for seed in (1, 2):
        trained = adapted(build(type(model)).requires_grad_(False), targets, seed)
        trained.save_lora_adapter(tmp_path / str(seed), weight_name=WEIGHTS)
        samples.append(predict(trained))
    model.load_lora_adapter(tmp_path / "1", prefix=None, weight_name=WEIGHTS, adapter_name="style")
    modules = list(model.modules())
    near(predict(model), samples[0])
    model.load_lora_adapter(tmp_path / "2", prefix=None, weight_name=WEIGHTS, adapter_name="style", hotswap=True)
    assert [*map(id, model.modules())] == [*map(id, modules)]
    near(predict(model), samples[1])


def test_two_adapters_are_added_up(model):
    """Low-rank terms of one linear network add; here of the last layer alone."""
    plain = predict(model)
    changes = []
    for number, name in enumerate(("one", "two")):
        adapted(model, ["final_layer.linear"], number, name)
        model.set_adapters([name])
        changes.append(predict(model) - plain)
    model.set_adapters(["one", "two"], weights=[1.0, 0.5])
    near(predict(model), plain + changes[0] + 0.5 * changes[1])
    model.delete_adapters(["two"])
    model.set_adapters(["one"])
    near(predict(model), plain + changes[0])


# ---- attention, training, compiling ---------------------------------------------------------------------------------


def test_attention_backends(model, monkeypatch):
    """The backend that is chosen computes; here on a CPU, where short sequences would do without."""
    # diffusers sets one for the whole process besides, and does not take it back.
    active = _AttentionBackendRegistry._active_backend
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", active)
    monkeypatch.setattr(attention, "SHORT_KEYS", 0)
    expected, chosen = predict(model), []
    dispatch = attention.dispatch_attention_fn

    def counted(*args: Any, backend: Any, **kwargs: Any) -> Tensor:
        chosen.append(backend)
        return dispatch(*args, backend=backend, **kwargs)

    monkeypatch.setattr(attention, "dispatch_attention_fn", counted)
    try:
        model.set_attention_backend("_native_math")
        near(predict(model), expected)
    finally:
        model.reset_attention_backend()
    assert len(chosen) == len(model.blocks) * (2 if isinstance(model, STDiT3 | STDiT4) else 3)
    assert {str(backend.value) for backend in chosen} == {"_native_math"}


def gradients(model: Any) -> dict[str, Tensor]:
    model.requires_grad_(True).train().zero_grad()
    predict(model, drop_text=torch.tensor([True, False])).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_computes_the_same_gradients(model):
    plain, runs = gradients(model), []
    model.enable_gradient_checkpointing()
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    again = gradients(model)
    assert len(runs) == 2 and plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)
    model.disable_gradient_checkpointing()
    gradients(model)
    assert len(runs) == 3


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_gradients(model):
    plain = gradients(model)
    model.compile_repeated_blocks(fullgraph=True)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], msg=name, atol=1e-5, rtol=1e-3)
