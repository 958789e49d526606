"""What the networks' kernels take on a CPU, each way in turn: `python benchmarks/kernels.py [mlp|attention]`.

CPU milliseconds of one thread, the least of several rounds, at the widths of the released models (240p, 51 frames,
guidance in one batch) and of the bundled ones. The MLP: plain layers against `models.fused`. Attention: the fused
kernel of torch against two products and a softmax, between which `models.attention` chooses.
"""

import argparse
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from opensora.models import attention
from opensora.models.embeddings import MLP

WIDTHS = {"released": (12_150, 1_152, 4_608, False), "bundled": (12_800, 192, 768, True)}
"""Rows, width, width of the hidden layer, whether GELU is exact."""
SCORES = {
    "released, space": (60, 16, 405, 405, 72),
    "released, time": (810, 16, 15, 15, 72),
    "released, 30 words": (2, 16, 6_075, 30, 72),
    "released, 100 words": (2, 16, 6_075, 100, 72),
    "released, 300 words": (2, 16, 6_075, 300, 72),
    "bundled, space": (200, 6, 64, 64, 32),
    "bundled, time": (2_560, 6, 5, 5, 32),
    "bundled, words": (40, 6, 320, 20, 32),
}
"""Samples, heads, queries, keys, features of a head."""


def least_milliseconds(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Of each way; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, call in ways.items():
            started = time.process_time()
            call()
            found[name].append(time.process_time() - started)
    return {name: 1e3 * min(seconds[1:]) for name, seconds in found.items()}


def plain(layers: MLP, x: torch.Tensor) -> torch.Tensor:
    """Layer by layer."""
    return layers.fc2(F.gelu(layers.fc1(x), approximate=layers.approximate))


def mlp(rounds: int) -> None:
    print("| MLP | numbers | plain, ms | fused, ms | ratio |\n|---|---|---|---|---|")
    for name, (rows, width, hidden, exact) in WIDTHS.items():
        for dtype in (torch.bfloat16, torch.float32):
            layers, x = MLP(width, hidden, width, exact=exact).to(dtype), torch.randn(rows, width, dtype=dtype)
            ways = {"plain": lambda layers=layers, x=x: plain(layers, x), "fused": lambda layers=layers, x=x: layers(x)}
            found = least_milliseconds(ways, rounds)
            ratio = found["fused"] / found["plain"]
            kind = str(dtype).removeprefix("torch.")
            print(f"| {name} | {kind} | {found['plain']:.0f} | {found['fused']:.0f} | {ratio:.2f} |", flush=True)


def attend_by(short_keys: int, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Attention with products up to so many keys."""
    before, attention.SHORT_KEYS = attention.SHORT_KEYS, short_keys
    try:
        return attention.attend(*tensors)
    finally:
        attention.SHORT_KEYS = before


def attend(rounds: int) -> None:
    print("| attention | numbers | products, ms | fused kernel, ms | ratio | chosen |\n|---|---|---|---|---|---|")
    for name, (samples, heads, queries, keys, features) in SCORES.items():
        for dtype in (torch.bfloat16, torch.float32):
            tensors = [torch.randn(samples, heads, n, features, dtype=dtype) for n in (queries, keys, keys)]
            ways = {
                "products": lambda tensors=tensors, keys=keys: attend_by(keys, tensors),
                "kernel": lambda tensors=tensors: attend_by(0, tensors),
            }
            found = least_milliseconds(ways, rounds)
            short = attention.prefers_products("cpu", (samples, heads, queries, keys))
            cells = (name, str(dtype).removeprefix("torch."), f"{found['products']:.0f}", f"{found['kernel']:.0f}")
            ratio = found["kernel"] / found["products"]
            print(f"| {' | '.join(cells)} | {ratio:.2f} | {'products' if short else 'kernel'} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=["mlp", "attention", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    has_amx = "AMX" if torch.cpu._is_amx_tile_supported() else "no AMX"
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {has_amx}\n")
    with torch.inference_mode():
        for name, measure in {"mlp": mlp, "attention": attend}.items():
            if options.which in (name, "all"):
                measure(options.rounds)
                print()


if __name__ == "__main__":
    main()
