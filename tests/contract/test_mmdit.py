"""The MMDiT in the shape of diffusers' model tests, and what it refuses."""

from typing import Any

import pytest
import torch
from diffusers import hooks
from tiny_mmdit import TINY, build, inputs
from torch import Tensor, nn

from opensora.adapters.adapter import read_adapter
from opensora.checkpoints.components import load_component
from opensora.errors import OpenSoraError
from opensora.models import mmdit
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.mmdit import MMDiT
from opensora.training.diffusion.lora import LoRAConfig

CPU = torch.device("cpu")


def predict(model: MMDiT, **changes: Any) -> Tensor:
    return model(**{**inputs(), **changes}).sample


def steps(model: MMDiT) -> Tensor:
    """Four steps of a fake sampler, which makes the tokens drift slowly."""
    arguments = inputs()
    text = {name: arguments.pop(name) for name in ("encoder_hidden_states", "pooled_projections")}
    sample = arguments.pop("hidden_states")
    del arguments["timestep"]
    with torch.no_grad():
        for step in range(4):
            with model.cache_context("text", step_index=step):
                context = model.encode_text(**text)
                prediction = model(sample, 500.0 - 4 * step, text_context=context, **arguments).sample
            sample = sample - 0.01 * prediction
    return sample


@pytest.fixture
def model() -> MMDiT:
    return build().requires_grad_(False)


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_a_batch_is_its_samples_one_by_one(model):
    both = predict(model)
    for i in range(2):
        one = inputs()
        known = one.pop("channel_conditioning")
        one = {name: value[i : i + 1] for name, value in one.items()}
        one["channel_conditioning"] = ChannelConditioning(known.latents[i : i + 1], known.mask[i : i + 1])
        near(model(**one).sample[0], both[i])


def test_sizes_that_fill_no_patch_are_padded_with_zeros(model):
    odd = inputs(size=(2, 3, 5)) | {"channel_conditioning": None}
    sample = model(**odd).sample
    assert sample.shape == odd["hidden_states"].shape
    wider = odd | {"hidden_states": nn.functional.pad(odd["hidden_states"], (0, 1, 0, 1))}
    near(model(**wider).sample[..., :3, :5], sample)


def test_everything_that_is_told_is_read(model):
    plain = predict(model)
    arguments = inputs()
    known = arguments.pop("channel_conditioning")
    for name, value in arguments.items():
        assert (predict(model, **{name: value * 0.5 + 0.1}) - plain).abs().max() > 1e-4
    for other in (None, ChannelConditioning(known.latents, ~known.mask), known.without_latents()):
        assert (predict(model, channel_conditioning=other) - plain).abs().max() > 1e-4
    near(predict(model, encoder_attention_mask=torch.zeros(2, 5)), plain)  # as in training, padding counts


def test_a_distilled_network_is_told_its_guidance():
    model = build(guidance_embed=True, cond_embed=False)
    plain = predict(model, channel_conditioning=None)
    near(predict(model, channel_conditioning=None, guidance=4.0), plain)
    assert (predict(model, channel_conditioning=None, guidance=2.0) - plain).abs().max() > 1e-3


def test_timesteps_are_rounded_as_in_training():
    """From 512 on, 1000 t lies 4 apart in bfloat16."""
    rounded, exact = build(), build(bf16_timesteps=False)
    exact.load_state_dict(rounded.state_dict())
    near(predict(rounded, timestep=995.0), predict(exact, timestep=996.0))
    assert (predict(rounded, timestep=995.0) - predict(exact, timestep=995.0)).abs().max() > 1e-4


def test_an_adapted_network_begins_as_the_one_it_was():
    """What is conditioned on says nothing before training."""
    model = MMDiT(**TINY)
    near(predict(model), predict(model, channel_conditioning=None))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_states": torch.zeros(2, 4, 3, 4, 6)}, r"hidden_states has shape .*expected \(B, 3, T, H, W\)"),
        (
            {"channel_conditioning": ChannelConditioning.none(torch.zeros(2, 3, 3, 4, 4))},
            r"channel_conditioning has shape .*expected that of hidden_states",
        ),
        ({"encoder_hidden_states": torch.zeros(2, 5, 9)}, r"encoder_hidden_states has shape .*\(2, L, 10\)"),
        ({"pooled_projections": torch.zeros(1, 6)}, r"pooled_projections has shape .*\(2, 6\)"),
        ({"pooled_projections": None}, "no text"),
        ({"frame_mask": torch.ones(2, 3, dtype=torch.bool)}, "knows no frame_mask"),
        ({"drop_text": torch.ones(2, dtype=torch.bool)}, "no learned null text"),
        ({"guidance": 3.0}, "guidance is for guidance-distilled weights"),
        ({"text_context": {}}, "text_context came with"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(model, changes, said):
    with pytest.raises(OpenSoraError, match=said) as error:
        predict(model, **changes)
    assert "\n" not in str(error.value)


def test_a_network_without_conditions_takes_none():
    with pytest.raises(OpenSoraError, match="reads no channel_conditioning"):
        predict(build(cond_embed=False))


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 33}, {"axes_dim": (4, 6, 8)}, {"axes_dim": (5, 5, 6)}, {"axes_dim": (8, 8)}]
)
def test_heads_that_do_not_add_up_are_refused(changes):
    with pytest.raises(OpenSoraError, match=r"must be a multiple|expected three even numbers with the sum 16"):
        build(**changes)


# ---- files, offloading, casting -------------------------------------------------------------------------------------


def test_saved_in_shards_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    loaded: Any = MMDiT.from_pretrained(tmp_path)
    assert loaded.to_json_string() == model.to_json_string()
    near(predict(loaded), predict(model))


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_group_offload(model, level, where, tmp_path):
    expected = steps(model)
    model.enable_group_offload(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=level,
        num_blocks_per_group=1,
        use_stream=False,
        offload_to_disk_path=str(tmp_path) if where == "disk" else None,
    )
    if where == "disk":
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
    near(steps(model), expected)


def test_sequential_offload(model):
    accelerate = pytest.importorskip("accelerate")
    expected = steps(model)
    accelerate.cpu_offload(model, CPU, offload_buffers=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    near(steps(model), expected)


def test_layerwise_casting(model):
    expected = predict(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    cast = {name for name, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert cast and all("blocks." in name and "mod" not in name and "norm" not in name for name in cast)
    sample = predict(model)
    assert 0 < (sample - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_checkpointed_gradients_are_the_same():
    model = build()
    predict(model).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    predict(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        near(parameter.grad, expected[name])


# ---- caches ---------------------------------------------------------------------------------------------------------

CACHES = {
    "first block": lambda: hooks.FirstBlockCacheConfig(threshold=10.0),
    "magnitude": lambda: hooks.MagCacheConfig(
        threshold=10.0, max_skip_steps=3, num_inference_steps=4, retention_ratio=0.25, mag_ratios=[1.0] * 4
    ),
    "taylorseer": lambda: hooks.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
    ),
    "broadcast": lambda: hooks.PyramidAttentionBroadcastConfig(
        current_timestep_callback=lambda: 500, spatial_attention_block_skip_range=2
    ),
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_saves_work_and_goes_without_a_trace(model, cache, monkeypatch):
    calls: list[int] = []
    attend = mmdit.attend
    monkeypatch.setattr(mmdit, "attend", lambda *args, **options: calls.append(1) or attend(*args, **options))
    exact, all_of_them = steps(model), len(calls)
    model.enable_cache(CACHES[cache]())
    calls.clear()
    cached = steps(model)
    assert 0 < len(calls) < all_of_them
    drift = (exact - inputs()["hidden_states"]).abs().mean()
    assert 0 < (cached - exact).abs().mean() < 0.2 * drift
    model.disable_cache()
    torch.testing.assert_close(steps(model), exact, rtol=0, atol=0)


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_an_adapter_is_saved_loaded_and_merged(fused, tmp_path):
    """Beside the network, loaded anew, and merged into its weights it predicts the same."""
    peft = pytest.importorskip("peft")
    model = build(fused_qkv=fused).requires_grad_(False)
    model.save_pretrained(tmp_path / "model")
    plain = predict(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=LoRAConfig().layers_of(model)))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    adapted = predict(model)
    assert (adapted - plain).abs().max() > 1e-2
    model.save_lora_adapter(tmp_path / "adapter")
    beside: Any = MMDiT.from_pretrained(tmp_path / "model")
    beside.load_lora_adapter(
        tmp_path / "adapter", weight_name="pytorch_lora_weights.safetensors", use_safetensors=True, prefix=None
    )
    near(predict(beside), adapted)
    merged = load_component(tmp_path / "model", MMDiT, adapters=[(read_adapter(tmp_path / "adapter"), 1.0)])
    near(predict(merged), adapted)
