"""Forward and backward of one layer pair, ours and plain; in bfloat16 by autocast, as in training."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases import layers
from benchmarks.cases.layers import Pair
from benchmarks.comparison import OURS, PLAIN, Comparison, Run, Setting

SIZES = {
    "240p": replace(layers.SIZES["240p"], batch=1),
    "144p": replace(layers.SIZES["144p"], batch=1),
    "bundled": replace(layers.SIZES["bundled"], batch=32),
    "tiny": layers.SIZES["tiny"],
}
COMPILED = "ours, compiled"


def comparisons(setting: Setting) -> Iterator[Comparison]:
    pair = Pair(SIZES[setting.size], torch.float32)

    def step(forward: Callable[[], Tensor]) -> Run:
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.dtype == "bfloat16"):
                predicted = forward()
            predicted.float().square().mean().backward()
            for parameter in pair.parameters():
                parameter.grad = None

        return run

    ways = {OURS: step(lambda: pair.run_ours(keep_text=False)), PLAIN: step(pair.run_plain)}
    ratios = [(OURS, PLAIN)]
    if setting.compile:
        blocks = [torch.compile(block) for block in pair.ours.blocks]
        ways[COMPILED] = step(lambda: pair.run_ours(blocks, keep_text=False))
        ratios += [(COMPILED, OURS), (COMPILED, PLAIN)]
    name = f"forward and backward of a layer pair, {pair.size}"
    yield Comparison(name, ways, ratios, counted=(OURS, PLAIN), gradients=True)
