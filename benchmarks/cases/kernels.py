"""Kernels between which the networks choose on a CPU, each way in turn.

The MLP: plain layers against `models.fused`. Attention: the fused kernel of torch against two products and a softmax,
between which `models.attention` chooses; its threshold is set for each way in turn.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.comparison import Comparison, Run, Setting
from opensora.models import attention
from opensora.models.embeddings import MLP

WIDTHS = {"released": (12_150, 1_152, 4_608, False), "bundled": (12_800, 192, 768, True), "tiny": (64, 16, 32, False)}
"""Rows, width, width of the hidden layer, whether GELU is exact."""
SCORES = {
    "released": {
        "space": (60, 16, 405, 405, 72),
        "time": (810, 16, 15, 15, 72),
        "30 words": (2, 16, 6_075, 30, 72),
        "100 words": (2, 16, 6_075, 100, 72),
        "300 words": (2, 16, 6_075, 300, 72),
    },
    "bundled": {
        "space": (200, 6, 64, 64, 32),
        "time": (2_560, 6, 5, 5, 32),
        "words": (40, 6, 320, 20, 32),
    },
    "tiny": {"space": (4, 2, 6, 6, 8)},
}
"""Samples, heads, queries, keys, features of a head."""
SIZES = WIDTHS


def comparisons(setting: Setting) -> Iterator[Comparison]:
    torch.manual_seed(0)
    dtype = getattr(torch, setting.dtype)
    yield _mlp(*WIDTHS[setting.size], dtype)
    for name, shape in SCORES[setting.size].items():
        yield _attention(name, shape, dtype)


def _mlp(rows: int, width: int, hidden: int, exact: bool, dtype: torch.dtype) -> Comparison:
    layers, x = MLP(width, hidden, width, exact=exact).to(dtype), torch.randn(rows, width, dtype=dtype)

    def fused() -> None:
        layers(x)

    def by_layers() -> None:
        layers.fc2(F.gelu(layers.fc1(x), approximate=layers.approximate))

    ways: dict[str, Run] = {"fused": fused, "layer by layer": by_layers}
    return Comparison(f"MLP, {rows} rows of {width}", ways, [("fused", "layer by layer")], counted=tuple(ways))


def _attention(name: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> Comparison:
    samples, heads, queries, keys, features = shape
    tensors = [torch.randn(samples, heads, length, features, dtype=dtype) for length in (queries, keys, keys)]
    chosen = "products" if attention.prefers_products("cpu", (samples, heads, queries, keys)) else "kernel"
    ways: dict[str, Run] = {"products": _with_threshold(keys, tensors), "kernel": _with_threshold(0, tensors)}
    return Comparison(
        f"attention, {name}: {queries} queries, {keys} keys",
        ways,
        [("products", "kernel")],
        counted=tuple(ways),
        note=f"chosen here: {chosen}",
    )


def _with_threshold(short_keys: int, tensors: list[Tensor]) -> Callable[[], None]:
    """Attention that takes products up to so many keys."""

    def run() -> None:
        before, attention.SHORT_KEYS = attention.SHORT_KEYS, short_keys
        try:
            query, key, value = tensors
            attention.attend(query, key, value)
        finally:
            attention.SHORT_KEYS = before

    return run
