"""A tiny STDiT3 under every concern a model of diffusers meets."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import hooks
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.models import attention
from opensora.models.attention import RotaryEmbedding, attend, rotate, text_bias
from opensora.models.clip_conditions import ClipConditions
from opensora.models.embeddings import position_embedding_2d
from opensora.models.stdit3 import STDiT3

TINY: dict[str, Any] = {
    "in_channels": 3,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "caption_channels": 10,
    "model_max_length": 7,
    "input_sq_size": 64,
}
CLIP = ClipConditions(fps=8.0, height=32.0, width=48.0, num_frames=3.0)
SIZES = {"clip_conditions": CLIP}


def build(**changes: Any) -> STDiT3:
    """A tiny model without zero-initialised layers, which would hide mistakes."""
    torch.manual_seed(0)
    model = STDiT3(**{**TINY, **changes})
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(batch: int = 2, size: tuple[int, int, int] = (3, 4, 6)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, 6, dtype=torch.long)
    mask[-1, 4:] = 0
    return {
        "hidden_states": torch.randn(batch, 3, *size, generator=generator),
        "timestep": torch.linspace(900, 3, batch),
        "encoder_hidden_states": torch.randn(batch, 6, 10, generator=generator),
        "encoder_attention_mask": mask,
    }


@pytest.fixture(scope="module")
def shared() -> STDiT3:
    """One model for the tests that change nothing about it."""
    return build().requires_grad_(False)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fused attention for short sequences too."""
    monkeypatch.setattr(attention, "SHORT_KEYS", 0)
    yield


# ---- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 4, 4), (3, 5, 7), (2, 1, 1)])
@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 2, 3)])
def test_any_size_and_patch(size, patch_size):
    sample = build(patch_size=patch_size)(**inputs(size=size), **SIZES).sample
    assert sample.shape == (2, 6, *size)
    assert sample.isfinite().all()


def test_pred_sigma_and_tuple(shared):
    assert build(pred_sigma=False)(**inputs(), **SIZES).sample.shape[1] == 3
    (sample,) = shared(**inputs(), **SIZES, return_dict=False)
    torch.testing.assert_close(sample, shared(**inputs(), **SIZES).sample, rtol=0, atol=0)


def test_fresh_model_predicts_zero():
    torch.manual_seed(0)
    assert not STDiT3(**TINY)(**inputs(), **SIZES).sample.any()


def test_same_seed_same_numbers(shared):
    samples = [model(**inputs(), **SIZES).sample for model in (shared, shared, build())]
    for sample in samples[1:]:
        torch.testing.assert_close(sample, samples[0], rtol=0, atol=0)


def test_batch_of_two_is_two_of_one(shared):
    arguments = inputs()
    both = shared(**arguments, **SIZES).sample
    for i in range(2):
        one = shared(**{name: value[i : i + 1] for name, value in arguments.items()}, **SIZES).sample
        torch.testing.assert_close(one[0], both[i], atol=1e-6, rtol=1e-5)


def test_each_sample_has_its_own_size(shared):
    """Pixel sizes and frame rates may differ within a batch."""
    arguments = inputs()
    told = {
        "fps": torch.tensor([8.0, 24.0]),
        "height": torch.tensor([32.0, 64.0]),
        "width": torch.tensor([48.0, 96.0]),
        "num_frames": torch.tensor([3.0, 3.0]),
    }
    both = shared(**arguments, clip_conditions=ClipConditions(**told)).sample
    for i in range(2):
        one = {name: value[i : i + 1] for name, value in arguments.items()}
        alone = ClipConditions(**{name: value[i].item() for name, value in told.items()})
        sample = shared(**one, clip_conditions=alone).sample
        torch.testing.assert_close(sample[0], both[i], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["fps", "height"])
def test_conditions_matter(shared, name):
    changed = replace(CLIP, **{name: getattr(CLIP, name) * 0.5})
    assert not torch.allclose(shared(**inputs(), **SIZES).sample, shared(**inputs(), clip_conditions=changed).sample)


def test_timestep_matters(shared):
    earlier = {**inputs(), "timestep": inputs()["timestep"] * 0.5}
    assert not torch.allclose(shared(**inputs(), **SIZES).sample, shared(**earlier, **SIZES).sample)


def test_padding_tokens_do_not_matter(shared):
    arguments = inputs()
    before = shared(**arguments, **SIZES).sample
    arguments["encoder_hidden_states"][arguments["encoder_attention_mask"] == 0] = 1e4
    torch.testing.assert_close(shared(**arguments, **SIZES).sample, before, rtol=0, atol=0)
    short = {name: value[1:] for name, value in arguments.items()}
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        short[name] = short[name][:, :4]
    torch.testing.assert_close(shared(**short, **SIZES).sample, before[1:], atol=1e-6, rtol=1e-5)


# ---- frames that are given ------------------------------------------------------------------------------------------


def test_frame_mask_of_ones_is_no_mask(shared):
    arguments = inputs()
    mask = torch.ones(2, 3, dtype=torch.bool)
    plain, masked = shared(**arguments, **SIZES).sample, shared(**arguments, **SIZES, frame_mask=mask).sample
    torch.testing.assert_close(masked, plain, rtol=0, atol=0)


def test_given_frames_ignore_the_timestep(shared):
    """With every frame given, the blocks never see the timestep; the last layer alone still does."""
    arguments, seen = inputs(), []
    hook = shared.temporal_blocks[-1].register_forward_hook(lambda _module, _args, out: seen.append(out))
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for timestep in (0.0, 700.0):
        shared(**{**arguments, "timestep": timestep}, **SIZES, frame_mask=mask)
    shared(**{**arguments, "timestep": 0.0}, **SIZES)
    hook.remove()
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
    torch.testing.assert_close(seen[0], seen[2], rtol=1e-5, atol=1e-6)


# ---- text -----------------------------------------------------------------------------------------------------------


def test_text_context_equals_plain(shared):
    arguments = inputs()
    text = {name: arguments.pop(name) for name in ("encoder_hidden_states", "encoder_attention_mask")}
    context = shared.encode_text(*text.values())
    for timestep in (900.0, 100.0):
        arguments["timestep"] = torch.full((2,), timestep)
        plain = shared(**arguments, **text, **SIZES).sample
        torch.testing.assert_close(shared(**arguments, text_context=context, **SIZES).sample, plain, rtol=0, atol=0)


def test_text_is_projected_once(shared):
    calls = []
    handles = [block.cross_attn.kv_linear.register_forward_hook(lambda *_: calls.append(1)) for block in shared.blocks]
    arguments = inputs()
    context = shared.encode_text(arguments.pop("encoder_hidden_states"), arguments.pop("encoder_attention_mask"))
    for _ in range(3):
        shared(**arguments, text_context=context, **SIZES)
    for handle in handles:
        handle.remove()
    assert len(calls) == len(shared.blocks)


def test_drop_text_reads_the_null_text(shared):
    arguments = inputs()
    null = arguments["encoder_hidden_states"].clone()
    null[0] = shared.null_text[:6]
    expected = shared(**{**arguments, "encoder_hidden_states": null}, **SIZES).sample
    drop_text = torch.tensor([True, False])
    torch.testing.assert_close(shared(**arguments, drop_text=drop_text, **SIZES).sample, expected, rtol=0, atol=0)


def test_offloaded_weights_project_in_forward():
    """`encode_text` with its weights away stores the text; a block whose weights were away projects for itself."""
    model, arguments = build().requires_grad_(False), inputs()
    expected = model(**arguments, **SIZES).sample
    text = arguments.pop("encoder_hidden_states"), arguments.pop("encoder_attention_mask")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for away in (model.y_embedder, model.blocks[1].cross_attn):
        away.to("meta")
        context = model.encode_text(*text)
        model.load_state_dict(state, assign=True)
        sample = model(**arguments, text_context=context, **SIZES).sample
        torch.testing.assert_close(sample, expected, rtol=0, atol=0)


# ---- training -------------------------------------------------------------------------------------------------------


def gradients(model: STDiT3, **extra: Any) -> dict[str, Tensor]:
    model.train().zero_grad()
    text = inputs()["encoder_hidden_states"].requires_grad_()
    arguments = {**inputs(), "encoder_hidden_states": text, "drop_text": torch.tensor([True, False])}
    mask = torch.tensor([[True, False, True], [True, True, True]])
    model(**arguments, **SIZES, frame_mask=mask, **extra).sample.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {**found, "text": text.grad}


@pytest.mark.parametrize("learn_null_text", [True, False])
def test_gradients_reach_everything(learn_null_text):
    model = build(learn_null_text=learn_null_text)
    found = gradients(model)
    assert ("y_embedder.y_embedding" in found) == learn_null_text
    assert "rope.freqs" not in found
    missing = [name for name, gradient in found.items() if gradient is None or not gradient.any()]
    assert not missing
    assert not found["text"][0].any(), "a dropped caption has no gradient"
    assert found["text"][1].any()


def test_encode_text_is_differentiable():
    model, arguments = build(), inputs()
    text, mask = arguments.pop("encoder_hidden_states").requires_grad_(), arguments.pop("encoder_attention_mask")
    model(**arguments, text_context=model.encode_text(text, mask), **SIZES).sample.sum().backward()
    assert text.grad is not None and text.grad[0].any()
    assert not text.grad[1, 4:].any(), "padding has no gradient"


def test_gradient_checkpointing_equals_plain():
    model = build()
    plain = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.enable_gradient_checkpointing()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@pytest.mark.parametrize("mode", ["autocast", "whole"])
def test_bf16(mode):
    """bf16 stays near float32, and the tokens stay bf16 from block to block."""
    model, arguments, dtypes = build(), inputs(), set()
    expected = model(**arguments, **SIZES).sample
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, out: dtypes.add(out.dtype))
    if mode == "whole":
        sample = model.to(torch.bfloat16)(**arguments, **SIZES).sample
    else:
        with torch.autocast("cpu", torch.bfloat16):
            sample = model(**arguments, **SIZES).sample
    assert dtypes == {torch.bfloat16}
    assert (sample.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_timesteps_are_not_rounded():
    """999 and 1000 are one number in bf16; the model tells them apart all the same."""
    model, seen = build().to(torch.bfloat16), []
    model.t_embedder.register_forward_hook(lambda _module, _args, out: seen.append(out))
    for timestep in (999, 1000):
        model(**{**inputs(), "timestep": torch.tensor([timestep, timestep])}, **SIZES)
    assert not torch.equal(seen[0], seen[1])


# ---- attention and embeddings ---------------------------------------------------------------------------------------


def test_short_attention_equals_fused(monkeypatch):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 0, 0, 0]])
    for bias in (None, text_bias(mask, torch.float32)):
        short = attend(query, key, value, bias)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "SHORT_KEYS", 0)
            torch.testing.assert_close(attend(query, key, value, bias), short)


def test_fused_attention_model(shared, fused):
    fused_sample = shared(**inputs(), **SIZES).sample
    attention.SHORT_KEYS = 128
    torch.testing.assert_close(fused_sample, shared(**inputs(), **SIZES).sample, atol=1e-5, rtol=1e-4)


def test_rotation_depends_on_distance_only():
    torch.manual_seed(0)
    rope = RotaryEmbedding(8)(6)
    query, key = (rotate(torch.randn(8).expand(6, 8), rope) for _ in range(2))
    products = query @ key.T
    for offset in range(-4, 5):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_positions_of_a_denser_grid_coincide():
    """Twice the picture in twice the patches: every second patch stays where it was."""
    coarse = position_embedding_2d(3, 4, 16, torch.tensor([1.0])).unflatten(1, (3, 4))
    fine = position_embedding_2d(6, 8, 16, torch.tensor([2.0])).unflatten(1, (6, 8))
    torch.testing.assert_close(fine[:, ::2, ::2], coarse)


# ---- diffusers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_null_text", [True, False])
def test_save_and_load(tmp_path, learn_null_text):
    model = build(learn_null_text=learn_null_text, patch_size=[1, 2, 2])
    model.save_pretrained(tmp_path)
    loaded = STDiT3.from_pretrained(tmp_path)
    public = [{k: v for k, v in m.config.items() if not k.startswith("_")} for m in (model, loaded)]
    assert public[0] == public[1]
    torch.testing.assert_close(loaded(**inputs(), **SIZES).sample, model(**inputs(), **SIZES).sample, rtol=0, atol=0)
    half = STDiT3.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for table, exact in zip(half.rope(500), model.rope(500), strict=True):
        assert torch.equal(table, exact)


def steps(model: STDiT3, timesteps: list[float]) -> Tensor:
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
        (hooks.FirstBlockCacheConfig(threshold=10.0), "mlp", 4 + 3),
        (
            hooks.MagCacheConfig(
                threshold=10.0, max_skip_steps=3, num_inference_steps=4, retention_ratio=0.25, mag_ratios=[1.0] * 4
            ),
            "mlp",
            4,
        ),
        (
            hooks.TaylorSeerCacheConfig(
                cache_interval=3,
                disable_cache_before_step=1,
                max_order=1,
                taylor_factors_dtype=torch.float32,
                cache_identifiers=[r"(spatial|temporal)_blocks[.][0-9]+[.](attn|mlp)"],
            ),
            "mlp.fc1",
            8,
        ),
        (
            hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                temporal_attention_block_skip_range=2,
                cross_attention_block_skip_range=4,
                spatial_attention_block_identifiers=("spatial_blocks",),
                temporal_attention_block_identifiers=("temporal_blocks",),
                cross_attention_block_identifiers=("spatial_blocks", "temporal_blocks"),
                current_timestep_callback=lambda: 500,
            ),
            "attn.qkv",
            8,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_caches(config, part, most):
    """The cache saves work, stays near the exact result, and goes without a trace."""
    model = build().requires_grad_(False)
    exact = steps(model, TIMESTEPS)
    model.enable_cache(config)
    calls: list[int] = []
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
    torch.testing.assert_close(steps(model, TIMESTEPS), exact, rtol=0, atol=0)


def test_caches_of_other_models_are_refused(shared):
    with pytest.raises(OpenSoraError, match="FasterCacheConfig does not work"):
        shared.enable_cache(hooks.FasterCacheConfig())


def test_layerwise_casting():
    model = build().requires_grad_(False)
    expected = model(**inputs(), **SIZES).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].attn.qkv.weight.dtype == torch.float8_e4m3fn
    sample = model(**inputs(), **SIZES).sample
    assert (sample - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload(level):
    pytest.importorskip("accelerate")
    model, cpu = build().requires_grad_(False), torch.device("cpu")
    expected = steps(model, [500.0])
    model.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type=level, num_blocks_per_group=1, use_stream=False
    )
    torch.testing.assert_close(steps(model, [500.0]), expected, rtol=0, atol=0)


def test_attention_backend(fused):
    model = build().requires_grad_(False)
    expected = model(**inputs(), **SIZES).sample
    try:
        model.set_attention_backend("_native_math")
        assert model.blocks[0].attn.processor._attention_backend is not None
        torch.testing.assert_close(model(**inputs(), **SIZES).sample, expected, atol=1e-5, rtol=1e-4)
    finally:
        model.reset_attention_backend()


@pytest.mark.slow
def test_compiled_blocks_equal_eager():
    model = build()
    plain = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.compile_repeated_blocks(fullgraph=True)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], msg=name, atol=1e-5, rtol=1e-3)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(2, 4, 3, 4, 6)}, r"expected \(B, 3, T, H, W\)"),
        ({"encoder_hidden_states": torch.zeros(2, 6, 9)}, r"expected \(B, L, 10\)"),
        ({"encoder_hidden_states": torch.zeros(2, 8, 10), "encoder_attention_mask": None}, "at most 7"),
        ({"encoder_hidden_states": torch.zeros(1, 6, 10), "encoder_attention_mask": None}, "the text has 1 samples"),
        ({"encoder_attention_mask": torch.ones(2, 5)}, r"expected \(2, 6\)"),
        ({"encoder_attention_mask": torch.tensor([[1] * 6, [0] * 6])}, "hides every token"),
        ({"frame_mask": torch.ones(2, 4, dtype=torch.bool)}, r"expected torch.bool \(2, 3\)"),
        ({"frame_mask": torch.ones(2, 3)}, "torch.float32"),
        ({"clip_conditions": replace(CLIP, fps=torch.ones(3))}, r"\(2,\)"),
        ({"encoder_hidden_states": None}, "no text"),
        ({"drop_text": torch.ones(1, dtype=torch.bool)}, "drop_text"),
    ],
)
def test_mistakes(shared, changes, message):
    with pytest.raises(OpenSoraError, match=message) as error:
        shared(**{**inputs(), **SIZES, **changes})
    assert "\n" not in str(error.value)


def test_mistakes_of_configuration(shared):
    with pytest.raises(OpenSoraError, match="hidden_size 26"):
        STDiT3(**{**TINY, "hidden_size": 26})
    with pytest.raises(OpenSoraError, match="patch_size"):
        STDiT3(**{**TINY, "patch_size": (2, 2)})
    with pytest.raises(OpenSoraError, match="patches of one frame"):
        build(patch_size=(3, 2, 2))(**inputs(), **SIZES, frame_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(OpenSoraError, match="give either"):
        shared(**inputs(), **SIZES, text_context=shared.encode_text(torch.zeros(2, 1, 10)))
