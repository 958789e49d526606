"""Passes in pieces: the same bits, less memory, and not where something hangs at a layer."""

import pytest
import torch
from torch import nn

from opensora.models import pieces
from opensora.models.attention import RotaryEmbedding, SelfAttention
from opensora.planning.tracing import LiveMemory

SHAPES = [(6, 4, 5, 16), (1, 4, 50, 16), (40, 4, 3, 16)]
"""Of queries: some heads to a piece, a piece for each head, several samples to a piece."""


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(pieces, "VALUES", 300)


def attention(**options) -> SelfAttention:
    torch.manual_seed(0)
    module = SelfAttention(64, 4, **options)
    for norm in (module.q_norm, module.k_norm):
        nn.init.normal_(norm.weight)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotate_before_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_bits_are_those_of_the_whole(small, shape, rotate_before_norm, dtype):
    module = attention(rotate_before_norm=rotate_before_norm).to(dtype)
    qkv, rope = torch.randn(3, *shape).to(dtype), RotaryEmbedding(16)(shape[2])
    calls = count_calls(module.q_norm)
    made = module.attend_all(qkv, rope)
    assert calls == [1], "what is hooked is called once"
    module.q_norm._forward_pre_hooks.clear()
    with pieces.in_whole():
        whole = module.attend_all(qkv, rope)
    assert torch.equal(module.attend_all(qkv, rope), whole)
    assert torch.equal(made, whole)


def count_calls(layer: nn.Module) -> list[int]:
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    layer.register_forward_pre_hook(count)
    return calls


def test_work_is_cut_where_that_pays_and_only_there(small):
    sizes: list[int] = []

    def noted(states: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states))
        return states * 2

    states = torch.randn(6, 4, 5, 16)
    with torch.no_grad():
        assert torch.equal(pieces.in_cache(noted, states), 2 * states)
    assert sizes == [3] * 8
    sizes.clear()
    pieces.in_cache(noted, states.requires_grad_())
    assert sizes == [24], "gradients are taken of the whole"
    sizes.clear()
    with torch.no_grad():
        pieces.in_cache(noted, torch.randn(1, 2, 5, 16))
    assert sizes == [2], "it fits as it is"


@torch.no_grad()
def test_pieces_take_less_memory():
    module, states = attention(), torch.randn(64, 4, 256, 16)
    with LiveMemory() as cut:
        module._placed(states, module.q_norm, RotaryEmbedding(16)(256))
    with pieces.in_whole(), LiveMemory() as whole:
        module._placed(states, module.q_norm, RotaryEmbedding(16)(256))
    assert cut.peak_bytes < 0.8 * whole.peak_bytes
