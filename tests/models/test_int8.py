"""Weights in eight bits: what they are, how far from the others, and that all else works with them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_pipeline import make_pipeline, seeded
from tiny_two_encoders import pipeline_of
from torch import nn

from opensora import ClipRequest, Engine, load_pipeline
from opensora.models.int8 import Int8Linear, is_int8, quantize_rows, round_to_int8
from opensora.models.network import blocks_of
from opensora.planning.meta_pipeline import meta_pipeline
from opensora.planning.planner import stored_weight_bytes
from opensora.planning.tracing import Tracer, weight_bytes
from opensora.weights import cast_weights

PROMPT = "a small red ball rolls left"


def sample(pipe: Any, **options: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, generator=seeded(0), num_inference_steps=2, output_type="latent", **options).frames


@pytest.fixture(scope="module", params=[make_pipeline, lambda: pipeline_of("opensora-2.0")], ids=["1.2", "2.0"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    request.param().save_pretrained(path)
    return path


def test_every_row_is_rounded_to_the_nearest_of_its_255_steps():
    weight = torch.randn(6, 40) * torch.logspace(-3, 2, 6)[:, None]
    weight[2] = 0
    q, scale = quantize_rows(weight)
    assert q.dtype == torch.int8 and q.abs().amax(1).tolist() == [127, 127, 0, 127, 127, 127]
    assert (q * scale[:, None] - weight).abs().le(scale[:, None] / 2 * 1.0001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_with_what_its_weights_mean(dtype, bias):
    layer = nn.Linear(40, 6, bias=bias)
    q, scale = quantize_rows(layer.weight.detach())
    eight = Int8Linear(layer)
    eight.weight, eight.weight_scale = (nn.Parameter(value, requires_grad=False) for value in (q, scale))
    inputs = torch.randn(3, 40)
    expected = inputs.double() @ (q * scale[:, None]).double().T + (layer.bias.double() if bias else 0)
    result = eight(inputs.to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=2e-2, atol=2e-2)


def test_a_model_in_eight_bits_says_nearly_the_same(folder):
    half, eight = load_pipeline(folder, dtype=torch.bfloat16), load_pipeline(folder, dtype=torch.int8)
    assert not is_int8(eight.autoencoder)
    for network in (eight.transformer, eight.text_encoder):
        linear = [m for b in blocks_of(network).values() for m in b.modules() if isinstance(m, nn.Linear)]
        assert linear and all(isinstance(module, Int8Linear) for module in linear)
        assert network.dtype == torch.bfloat16
    one, other = sample(half).float(), sample(eight).float()
    assert 0 < (one - other).pow(2).mean().sqrt() < 0.1 * one.std()
    assert eight.describe()["dtype"] == "int8" and half.describe()["dtype"] == "bfloat16"


def test_blocks_that_take_turns_are_rounded_as_they_are_read(folder):
    assert torch.equal(
        sample(load_pipeline(folder, dtype=torch.int8, offload="blocks")),
        sample(load_pipeline(folder, dtype=torch.int8)),
    )


def test_adapters_are_merged_before_rounding_or_lie_beside(tmp_path):
    peft = pytest.importorskip("peft")
    make_pipeline().save_pretrained(tmp_path / "base")
    trained = load_pipeline(tmp_path / "base")
    trained.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["attn.qkv", "mlp.fc1"]))
    for name, weight in trained.transformer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=1.0)
    trained.transformer.save_lora_adapter(tmp_path / "adapter")
    expected = sample(load_pipeline(tmp_path / "base", dtype=torch.bfloat16, adapters={tmp_path / "adapter": 1.0}))
    merged = sample(load_pipeline(tmp_path / "base", dtype=torch.int8, adapters={tmp_path / "adapter": 1.0}))
    pipe = load_pipeline(tmp_path / "base", dtype=torch.int8)
    plain = sample(pipe)
    pipe.load_lora_weights(tmp_path / "adapter")
    assert is_int8(pipe.transformer)
    for made in (merged, sample(pipe)):
        assert (made - expected).abs().mean() < 0.3 * (plain - expected).abs().mean()


def test_plans_count_what_is_there(folder):
    tracer = Tracer()
    planned, loaded = meta_pipeline(tracer, folder).pipeline, load_pipeline(folder, dtype=torch.int8)
    for name in ("transformer", "text_encoder"):
        network = cast_weights(getattr(planned, name), torch.bfloat16)
        assert stored_weight_bytes(network, int8=True)[0] == weight_bytes(getattr(loaded, name))


def test_a_clip_is_made_again_in_eight_bits(folder, tmp_path):
    request = ClipRequest(PROMPT, model=str(folder), dtype="int8", num_inference_steps=1, device="cpu")
    clip = Engine.load(request).generate(request)
    assert clip.record is not None and clip.record.dtype == "int8"


def rounded(layer: nn.Linear) -> tuple[Int8Linear, torch.Tensor]:
    """A layer in eight bits, and the weight that it has then."""
    q, scale = quantize_rows(layer.weight.detach())
    eight = Int8Linear(layer)
    eight.weight, eight.weight_scale = nn.Parameter(q, requires_grad=False), nn.Parameter(scale, requires_grad=False)
    return eight, q * scale[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_weights_that_are_meant(dtype, bias):
    layer = nn.Linear(40, 6, bias=bias)
    eight, weight = rounded(layer)
    found, expected = (torch.randn(2, 3, 40, generator=seeded(0)[0]).to(dtype).requires_grad_() for _ in range(2))
    towards = torch.randn(2, 3, 6, generator=seeded(1)[0]).to(dtype)
    (eight(found) * towards).sum().backward()
    to_bias = None if layer.bias is None else layer.bias.grad
    layer.zero_grad()
    (
        F.linear(expected, weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)) * towards
    ).sum().backward()
    assert torch.equal(found.grad, expected.grad) and found.grad.any()
    assert to_bias is None if layer.bias is None else torch.equal(to_bias, layer.bias.grad)


def test_nothing_but_the_eight_bits_is_kept_for_a_backward_pass():
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    layer = nn.Linear(256, 128)
    eight, _ = rounded(layer)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        eight(torch.randn(4, 256, requires_grad=True))
    assert sum(kept.values()) == weight_bytes(eight) - layer.bias.nbytes == 256 * 128 + 4 * 128


def test_layers_follow_autocast():
    eight, weight = rounded(nn.Linear(40, 6))
    inputs = torch.randn(3, 40, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = eight(inputs), F.linear(inputs, weight, eight.bias)
    assert result.dtype == torch.bfloat16 and torch.equal(result, expected)
    result.sum().backward()
    assert inputs.grad.dtype == torch.float32


def test_weights_that_are_trained_are_not_rounded():
    model = make_pipeline().transformer.requires_grad_(False)
    first, second = list(blocks_of(model).values())[:2]
    second.requires_grad_(True)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    round_to_int8(model)
    assert all(type(m) is not nn.Linear for m in first.modules()) and not is_int8(second)
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            weight = before.pop(f"{name}.weight")
            assert (module.weight * module.weight_scale[:, None] - weight).abs().max() <= weight.abs().max() / 250
    assert all(torch.equal(weight, model.get_parameter(name)) for name, weight in before.items())
