"""Training steps on tensors without data: work against published figures, memory against plain tracing."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny_mmdit import TINY
from torch import Tensor, nn

from opensora.models.clip_conditions import ClipConditions
from opensora.models.mmdit import MMDiT
from opensora.models.stdit3 import STDiT3
from opensora.planning.autocast import MetaAutocast
from opensora.planning.flops import CountedFlops
from opensora.planning.step import count_work, trace_step
from opensora.training.parallel import wrap_blocks

SMALL = {"hidden_size": 64, "num_heads": 4, "caption_channels": 32, "model_max_length": 20}


def make(depth: int, device: str = "meta", **sizes: int) -> STDiT3:
    with torch.device(device):
        return STDiT3(depth=depth, **sizes).train()


def loss_of(model: STDiT3, batch: int, frames: int, height: int, width: int, num_text: int) -> Callable[[], Tensor]:
    """Of empty latents, with all tokens of the text."""
    device, channels = next(model.parameters()).device, model.null_text.shape[1]

    def compute() -> Tensor:
        latents = torch.zeros(batch, 4, frames, height, width, device=device)
        text, mask = torch.zeros(batch, num_text, channels, device=device), torch.ones(batch, num_text, device=device)
        clip = ClipConditions(fps=24.0, height=height * 8.0, width=width * 8.0, num_frames=frames)
        times = torch.full((batch,), 500.0, device=device)
        prediction = model(latents, times, text, mask, clip_conditions=clip).sample
        return (prediction.float()[:, :4] - latents).square().mean()

    return compute


@pytest.mark.parametrize(
    ("frames", "height", "width", "tflop"), [(15, 30, 53, 26.3), (30, 90, 160, 556), (1, 128, 128, 21.7)]
)
def test_a_step_of_the_published_model_computes_what_others_counted(frames, height, width, tflop):
    # STDiT3-XL/2, two rows and 100 text tokens: 240p of 51 frames, 720p of 102 frames, 1024x1024
    model = make(28)
    work = count_work(loss_of(model, 2, frames, height, width, 100), model.blocks)
    assert work.forward / 1e12 == pytest.approx(tflop, rel=0.003)
    assert work.tokens == (2, frames, -(-height // 2) * -(-width // 2), 1152)
    assert 2 <= work.backward / work.forward < 2.11  # attention costs 2.5 times as much again


@pytest.mark.parametrize("frozen", ["nothing", "spatial_blocks", "everything but the last layer"])
def test_work_told_from_the_forward_pass_is_what_both_passes_compute(frozen):
    model = make(5, **SMALL)
    for name, parameter in model.named_parameters():
        if name.startswith(frozen) or (frozen.startswith("everything") and not name.startswith("final_layer")):
            parameter.requires_grad_(False)
    compute = loss_of(model, 3, 4, 24, 32, 20)
    work = count_work(compute, model.blocks)
    assert work.forward + work.backward == pytest.approx(trace_step(compute, model).flops, rel=1e-9)


@pytest.mark.parametrize("frozen", ["nothing", "double_blocks"])
def test_one_layer_of_each_stack_tells_the_work_of_all(frozen):
    with torch.device("meta"):
        model = MMDiT(**{**TINY, "depth": 3, "depth_single_blocks": 4}).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))

    def compute() -> Tensor:
        given = {"encoder_hidden_states": torch.zeros(2, 5, 10), "pooled_projections": torch.zeros(2, 6)}
        latents, times = torch.zeros(2, 3, 3, 4, 6), torch.zeros(2)
        told = {name: tensor.to("meta") for name, tensor in given.items()}
        return model(latents.to("meta"), times.to("meta"), **told).sample.square().mean()

    work = count_work(compute, list(model.double_blocks), list(model.single_blocks))
    whole = count_work(compute)
    assert (work.forward, work.backward) == (whole.forward, whole.backward)
    assert work.tokens == (2, 3 * 2 * 3, TINY["hidden_size"]) and whole.tokens is None
    assert 0 < work.in_layers < work.forward


def test_work_of_real_tensors_is_that_of_meta_ones():
    model = make(2, "cpu", **SMALL)
    with CountedFlops() as counted:
        loss_of(model, 1, 2, 8, 8, 5)()
    meta = make(2, **SMALL)
    work = count_work(loss_of(meta, 1, 2, 8, 8, 5), meta.blocks)
    assert counted.totals == (work.forward, work.backward)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("on_accelerator", [False, True])
def test_three_layers_tell_what_many_take(recompute, on_accelerator):
    def step(blocks_of: Callable[[STDiT3], list[nn.Module]]):
        model = make(7, **SMALL)
        wrap_blocks(model.blocks, recompute, compiled=False)
        autocast = MetaAutocast(enabled=True, on_accelerator=on_accelerator)
        return trace_step(loss_of(model, 3, 4, 24, 32, 20), model, blocks_of(model), autocast)

    some, everything = step(lambda model: list(model.blocks)), step(lambda model: [])
    assert some.flops == everything.flops
    assert some.activation_bytes == pytest.approx(everything.activation_bytes, rel=1e-3)
    assert sum(s.gradient_bytes for s in some.segments) == sum(s.gradient_bytes for s in everything.segments)


def test_checkpointing_trades_memory_for_work():
    def step(recompute):
        model = make(12, **SMALL)
        wrap_blocks(model.blocks, recompute, compiled=False)
        return trace_step(loss_of(model, 3, 4, 24, 32, 20), model, list(model.blocks))

    none, selective, full = step("none"), step("selective"), step("full")
    assert full.activation_bytes < selective.activation_bytes < none.activation_bytes
    assert none.flops == selective.flops < full.flops < 1.35 * none.flops


def test_gradients_are_ready_when_the_step_is_over():
    model = make(2, **SMALL)
    step = trace_step(loss_of(model, 1, 2, 8, 8, 5), model, list(model.blocks))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [ready for _, ready in step.moments()][-1] == 4 * trained
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("on_accelerator", [False, True])
def test_meta_autocast_casts_as_autocast_does(on_accelerator):
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> list[Tensor]:
            y = self.linear(x)
            return [y, self.norm(y), y @ y.transpose(-1, -2), F.softmax(y, -1), y + x, F.gelu(y), (y * y).sum()]

    with torch.device("meta"):
        layers, values = Layers(), torch.empty(2, 3, 8)
    with MetaAutocast(enabled=True, on_accelerator=on_accelerator):
        meta = [result.dtype for result in layers(values)]
    half, full = torch.bfloat16, torch.float32
    if on_accelerator:
        assert meta == [half, full, half, full, full, half, full]
    else:
        with torch.autocast("cpu", torch.bfloat16):
            assert meta == [result.dtype for result in Layers()(torch.zeros(2, 3, 8))]
