"""What STDiT and STDiT2 share, under every concern a model of diffusers meets (STDiT3 has its own file)."""

from typing import Any

import pytest
import torch
from diffusers import hooks
from diffusers.hooks._helpers import TransformerBlockRegistry
from tiny_pipeline import make_pipeline, seeded
from tiny_transformers import SIZES, TINY, build, inputs, some_frames_given
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opensora.errors import OpenSoraError
from opensora.models import attention
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2

MODELS = [STDiT, STDiT2]


@pytest.fixture(scope="module", params=MODELS)
def shared(request) -> Any:
    """One model of each kind for the tests that change nothing about it."""
    return build(request.param).requires_grad_(False)


@pytest.fixture(params=MODELS)
def model(request) -> Any:
    return build(request.param)


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize(
    ("patch_size", "size"), [((1, 2, 2), (1, 5, 7)), ((2, 2, 3), (3, 5, 7)), ((1, 2, 2), (2, 1, 1))]
)
def test_any_size_and_patch(cls, patch_size, size):
    sample = build(cls, patch_size=patch_size)(**inputs(size=size), **SIZES).sample
    assert sample.shape == (2, 6, *size)
    assert sample.isfinite().all()


@pytest.mark.parametrize("cls", MODELS)
def test_pred_sigma_and_tuple(cls):
    (sample,) = build(cls, pred_sigma=False)(**inputs(), **SIZES, return_dict=False)
    assert sample.shape[1] == 3


@pytest.mark.parametrize("cls", MODELS)
def test_fresh_model_predicts_zero_from_untouched_tokens(cls):
    torch.manual_seed(0)
    fresh, seen = cls(**TINY), []
    fresh.blocks[0].register_forward_hook(lambda _module, args, out: seen.append((args[0], out)))
    assert not fresh(**inputs(), **SIZES).sample.any()
    ((before, after),) = seen
    equal(after, before)


def test_batch_of_two_is_two_of_one(shared):
    arguments = inputs()
    both = shared(**arguments, **SIZES, frame_mask=some_frames_given()).sample
    for i in range(2):
        one = {name: value[i : i + 1] for name, value in arguments.items()}
        sample = shared(**one, **SIZES, frame_mask=some_frames_given()[i : i + 1]).sample
        torch.testing.assert_close(sample[0], both[i], atol=1e-6, rtol=1e-5)


def test_frame_mask_of_ones_is_no_mask(shared):
    mask = torch.ones(2, 3, dtype=torch.bool)
    equal(shared(**inputs(), **SIZES, frame_mask=mask).sample, shared(**inputs(), **SIZES).sample)


# ---- text -----------------------------------------------------------------------------------------------------------


def test_text_context_equals_plain_and_is_projected_once(shared):
    arguments, calls = inputs(), []
    text = {name: arguments.pop(name) for name in ("encoder_hidden_states", "encoder_attention_mask")}
    expected = {timestep: shared(**{**arguments, "timestep": timestep}, **text, **SIZES) for timestep in (900.0, 100.0)}
    handles = [block.cross_attn.kv_linear.register_forward_hook(lambda *_: calls.append(1)) for block in shared.blocks]
    context = shared.encode_text(*text.values())
    for timestep, plain in expected.items():
        equal(shared(**{**arguments, "timestep": timestep}, text_context=context, **SIZES).sample, plain.sample)
    for handle in handles:
        handle.remove()
    assert len(calls) == len(shared.blocks)


def test_padding_tokens_do_not_matter(shared):
    arguments = inputs()
    before = shared(**arguments, **SIZES).sample
    arguments["encoder_hidden_states"][arguments["encoder_attention_mask"] == 0] = 1e4
    equal(shared(**arguments, **SIZES).sample, before)


def test_drop_text_reads_the_null_text(shared):
    arguments = inputs()
    null = arguments["encoder_hidden_states"].clone()
    null[0] = shared.null_text[:6]
    expected = shared(**{**arguments, "encoder_hidden_states": null}, **SIZES).sample
    equal(shared(**arguments, drop_text=torch.tensor([True, False]), **SIZES).sample, expected)


def test_offloaded_weights_project_in_forward(model):
    model.requires_grad_(False)
    arguments = inputs()
    expected = model(**arguments, **SIZES).sample
    text = arguments.pop("encoder_hidden_states"), arguments.pop("encoder_attention_mask")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for away in (model.y_embedder, model.blocks[1].cross_attn):
        away.to("meta")
        context = model.encode_text(*text)
        model.load_state_dict(state, assign=True)
        equal(model(**arguments, text_context=context, **SIZES).sample, expected)


# ---- training -------------------------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, Any]:
    model.train().zero_grad()
    text = inputs()["encoder_hidden_states"].requires_grad_()
    arguments = {**inputs(), "encoder_hidden_states": text, "drop_text": torch.tensor([True, False])}
    model(**arguments, **SIZES, frame_mask=some_frames_given()).sample.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"text": text.grad}


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("learn_null_text", [True, False])
def test_gradients_reach_everything(cls, learn_null_text):
    found = gradients(build(cls, learn_null_text=learn_null_text))
    assert ("y_embedder.y_embedding" in found) == learn_null_text
    assert "rope.freqs" not in found
    assert not [name for name, gradient in found.items() if gradient is None or not gradient.any()]
    assert not found["text"][0].any(), "a dropped caption has no gradient"


def test_gradient_checkpointing_equals_plain(model):
    plain = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.enable_gradient_checkpointing()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_gradient_checkpointing_by_a_function_of_ones_own(model):
    """Which blocks are computed again is the caller's choice."""
    plain, seen = {name: gradient.clone() for name, gradient in gradients(model).items()}, []

    def first_block_only(block: Any, *arguments: Any) -> Any:
        seen.append(block)
        again = block is model.blocks[0]
        return checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)

    model.enable_gradient_checkpointing(first_block_only)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)
    assert seen == list(model.blocks)


@pytest.mark.parametrize("mode", ["autocast", "whole"])
def test_bf16(model, mode):
    """bf16 stays near float32, and the tokens stay bf16 from block to block."""
    arguments, dtypes = {**inputs(), **SIZES, "frame_mask": some_frames_given()}, set()
    expected = model(**arguments).sample
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, out: dtypes.add(out.dtype))
    if mode == "whole":
        sample = model.to(torch.bfloat16)(**arguments).sample
    else:
        with torch.autocast("cpu", torch.bfloat16):
            sample = model(**arguments).sample
    assert dtypes == {torch.bfloat16}
    assert (sample.float() - expected).abs().mean() < 0.04 * expected.abs().mean()


def test_timesteps_are_not_rounded(model):
    """999 and 1000 are one number in bf16; the model tells them apart all the same."""
    seen: list[Tensor] = []
    model.to(torch.bfloat16).t_embedder.register_forward_hook(lambda _module, _args, out: seen.append(out))
    for timestep in (999, 1000):
        model(**{**inputs(), "timestep": torch.tensor([timestep, timestep])}, **SIZES)
    assert not torch.equal(seen[0], seen[1])


# ---- diffusers ------------------------------------------------------------------------------------------------------


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.to_json_string() == model.to_json_string()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        equal(loaded.state_dict()[name], tensor)
    # Not bit for bit: weights mapped from a file lie elsewhere in memory, and some CPUs' kernels depend on where.
    torch.testing.assert_close(loaded(**inputs(), **SIZES).sample, model(**inputs(), **SIZES).sample)


def steps(model: Any, timesteps: list[float]) -> Tensor:
    """A few denoising steps of a fake sampler, which makes the tokens drift slowly."""
    arguments = inputs()
    context = model.encode_text(arguments.pop("encoder_hidden_states"), arguments.pop("encoder_attention_mask"))
    sample = arguments["hidden_states"]
    with torch.no_grad():
        for step, timestep in enumerate(timesteps):
            with model.cache_context("cond", step_index=step):
                prediction = model(sample, timestep, text_context=context, **SIZES).sample
            sample = sample - 0.01 * prediction[:, :3]
    return sample


TIMESTEPS = [500.0, 499.0, 498.0, 497.0]


@pytest.mark.parametrize(
    ("config", "part", "most"),
    [
        (hooks.FirstBlockCacheConfig(threshold=10.0), "mlp", 2 + 3),
        (
            hooks.MagCacheConfig(
                threshold=10.0, max_skip_steps=3, num_inference_steps=4, retention_ratio=0.25, mag_ratios=[1.0] * 4
            ),
            "mlp",
            2,
        ),
        (
            hooks.TaylorSeerCacheConfig(
                cache_interval=3,
                disable_cache_before_step=1,
                max_order=1,
                taylor_factors_dtype=torch.float32,
                cache_identifiers=[r"blocks[.][0-9]+[.](attn|attn_temp|mlp)"],
            ),
            "attn_temp.qkv",
            4,
        ),
        (
            hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                temporal_attention_block_skip_range=4,
                cross_attention_block_skip_range=4,
                spatial_attention_block_identifiers=(r"[.]attn$",),
                temporal_attention_block_identifiers=(r"[.]attn_temp$",),
                cross_attention_block_identifiers=(r"[.]cross_attn$",),
                current_timestep_callback=lambda: 500,
            ),
            "attn_temp.qkv",
            2,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_caches(model, config, part, most):
    """The cache saves work, stays near the exact result, and goes without a trace."""
    model.requires_grad_(False)
    exact, calls = steps(model, TIMESTEPS), []
    model.enable_cache(config)
    handles = [
        block.get_submodule(part).register_forward_pre_hook(lambda *_: calls.append(1)) for block in model.blocks
    ]
    cached = steps(model, TIMESTEPS)
    for handle in handles:
        handle.remove()
    assert 0 < len(calls) <= most < 4 * len(model.blocks)
    drift = (exact - inputs()["hidden_states"]).abs().mean()
    assert (cached - exact).abs().mean() < 0.2 * drift
    with pytest.raises(OpenSoraError, match="enabled already"):
        model.enable_cache(config)
    model.disable_cache()
    equal(steps(model, TIMESTEPS), exact)


def test_caches_of_other_models_are_refused(shared):
    with pytest.raises(OpenSoraError, match=f"does not work with {type(shared).__name__}"):
        shared.enable_cache(hooks.FasterCacheConfig())


def test_blocks_are_registered(shared):
    assert {type(block) for block in shared.blocks} == {type(shared.blocks[0])}
    assert [type(shared.blocks[0]).__name__] == shared._no_split_modules == shared._repeated_blocks
    assert TransformerBlockRegistry.get(type(shared.blocks[0])).return_hidden_states_index == 0


def test_layerwise_casting(model):
    model.requires_grad_(False)
    expected = model(**inputs(), **SIZES).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].attn_temp.qkv.weight.dtype == torch.float8_e4m3fn
    sample = model(**inputs(), **SIZES).sample
    assert (sample - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload(model, level):
    cpu = torch.device("cpu")
    model.requires_grad_(False)
    expected = steps(model, [500.0])
    model.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type=level, num_blocks_per_group=1, use_stream=False
    )
    equal(steps(model, [500.0]), expected)


def test_attention_backend(model, monkeypatch):
    monkeypatch.setattr(attention, "SHORT_KEYS", 0)
    expected = model(**inputs(), **SIZES).sample
    try:
        model.set_attention_backend("_native_math")
        assert model.blocks[0].attn_temp.processor._attention_backend is not None
        torch.testing.assert_close(model(**inputs(), **SIZES).sample, expected, atol=1e-5, rtol=1e-4)
    finally:
        model.reset_attention_backend()


@pytest.mark.slow
def test_compiled_blocks_equal_eager(model):
    plain = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.compile_repeated_blocks(fullgraph=True)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], msg=name, atol=1e-5, rtol=1e-3)


def test_adapters(model, tmp_path):
    """An adapter changes the result, is saved and loaded, and can be switched off."""
    peft = pytest.importorskip("peft")
    model.requires_grad_(False)
    plain, name = model(**inputs(), **SIZES).sample, "pytorch_lora_weights.safetensors"
    other = build(type(model))
    model.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["qkv", "q_linear"]))
    adapted = model(**inputs(), **SIZES).sample
    assert (adapted - plain).abs().max() > 0.1
    model.save_lora_adapter(tmp_path, weight_name=name)
    other.load_lora_adapter(tmp_path, prefix=None, weight_name=name)
    torch.testing.assert_close(other(**inputs(), **SIZES).sample, adapted)
    other.disable_adapters()
    torch.testing.assert_close(other(**inputs(), **SIZES).sample, plain)


@pytest.mark.parametrize("cls", MODELS)
def test_pipeline(cls):
    """The pipeline calls every transformer of the family alike."""
    pipeline = make_pipeline("iddpm")
    width, length = pipeline.transformer.null_text.shape[1], pipeline.transformer.null_text.shape[0]
    other = build(cls, in_channels=4, caption_channels=width, model_max_length=length)
    pipeline.register_modules(transformer=other)
    frames = pipeline("a red ball moves left", num_inference_steps=2, generator=seeded(0)).frames
    assert frames.shape == (1, 5, 3, 16, 24)
    assert frames.isfinite().all()


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(2, 4, 3, 4, 6)}, r"expected \(B, 3, T, H, W\)"),
        ({"encoder_hidden_states": torch.zeros(2, 6, 9)}, r"expected \(B, L, 10\)"),
        ({"encoder_hidden_states": None}, "no text"),
        ({"encoder_attention_mask": torch.tensor([[1] * 6, [0] * 6])}, "hides every token"),
        ({"frame_mask": torch.ones(2, 4, dtype=torch.bool)}, r"expected torch.bool \(2, 3\)"),
        ({"frame_mask": torch.ones(2, 3)}, "torch.float32"),
        ({"timestep": torch.ones(3)}, r"\(2,\)"),
        ({"drop_text": torch.ones(1, dtype=torch.bool)}, "drop_text"),
    ],
)
def test_mistakes(shared, changes, message):
    with pytest.raises(OpenSoraError, match=message) as error:
        shared(**{**inputs(), **SIZES, **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cls", MODELS)
def test_mistakes_of_configuration(cls):
    with pytest.raises(OpenSoraError, match="hidden_size 26"):
        cls(**{**TINY, "hidden_size": 26})
    with pytest.raises(OpenSoraError, match="patch_size"):
        cls(**{**TINY, "patch_size": (2, 2)})
    with pytest.raises(OpenSoraError, match="patches of one frame"):
        build(cls, patch_size=(3, 2, 2))(**inputs(), **SIZES, frame_mask=torch.ones(2, 3, dtype=torch.bool))
