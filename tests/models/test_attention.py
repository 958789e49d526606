"""Attention by products and by fused kernels, and where which is used; rotary positions."""

import pytest
import torch

from opensora.models import attention
from opensora.models.attention import AttentionBackend, RotaryEmbedding, attend, prefers_products, rotate, text_bias


def short_tensors() -> list[torch.Tensor]:
    """Queries of 9 tokens, keys and values of 5."""
    torch.manual_seed(0)
    return [torch.randn(2, 3, tokens, 8) for tokens in (9, 5, 5)]


def test_products_equal_the_fused_kernel(monkeypatch):
    query, key, value = short_tensors()
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 0, 0, 0]])
    for bias in (None, text_bias(mask, torch.float32)):
        short = attend(query, key, value, bias)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "SHORT_KEYS", 0)
            torch.testing.assert_close(attend(query, key, value, bias), short)


@pytest.mark.parametrize(
    ("scores", "products"),
    [
        ((2, 4, 80, 24), True),
        ((2, 4, 80, 128), True),
        ((2, 4, 80, 129), False),
        ((64, 16, 512, 128), True),
        ((65, 16, 512, 128), False),  # more samples
        ((64, 17, 512, 128), False),  # more heads
        ((64, 16, 513, 128), False),
    ],
)
def test_products_are_for_few_keys_and_scores_on_a_cpu(scores, products, monkeypatch):
    """All scores of a call count, and accelerators never compute products."""
    monkeypatch.setattr(attention, "SHORT_KEYS", 128)  # as on a processor without AMX
    assert prefers_products("cpu", scores) == products
    assert not any(prefers_products(kind, scores) for kind in ("cuda", "mps", "xpu"))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_chosen_backend_is_used_on_accelerators(monkeypatch, elsewhere):
    chosen: list[str | None] = []

    def dispatch(query, key, value, bias, *, backend, parallel_config):
        chosen.append(backend)
        return torch.zeros_like(query)

    monkeypatch.setattr(attention, "dispatch_attention_fn", dispatch)
    if elsewhere:
        monkeypatch.setattr(attention, "_COUNTED_AS_CPU", ())
    backend = AttentionBackend()
    backend._attention_backend = "flash"
    attended = attend(*short_tensors(), backend=backend)
    assert attended.shape == (2, 3, 9, 8)
    assert chosen == (["flash"] if elsewhere else [])


def test_rotation_depends_on_distance_only():
    torch.manual_seed(0)
    rope = RotaryEmbedding(8)(6)
    query, key = (rotate(torch.randn(8).expand(6, 8), rope) for _ in range(2))
    products = query @ key.T
    for offset in range(-4, 5):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_rotation_is_not_rounded_by_a_cast():
    exact, cast = RotaryEmbedding(8), RotaryEmbedding(8).to(torch.bfloat16)
    assert all(torch.equal(*tables) for tables in zip(exact(500), cast(500), strict=True))
