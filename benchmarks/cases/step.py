"""One layer pair of a denoising step: ours against the plain rendition, and diffusers' nearest layers beside them."""

from collections.abc import Iterator

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from benchmarks.cases import layers
from benchmarks.cases.layers import LayerSize, Pair
from benchmarks.comparison import OURS, PLAIN, Comparison, Run, Setting

SIZES = layers.SIZES
LATTE = "diffusers' Latte layers"
COMPILED = "ours, compiled"


def comparisons(setting: Setting) -> Iterator[Comparison]:
    pair = Pair(SIZES[setting.size], getattr(torch, setting.dtype))
    latte = LatteLayers(pair)
    ways: dict[str, Run] = {OURS: pair.run_ours, PLAIN: pair.run_plain, LATTE: latte}
    ratios = [(OURS, PLAIN)]
    if setting.compile:
        blocks = [torch.compile(block) for block in pair.ours.blocks]
        ways[COMPILED] = lambda: pair.run_ours(blocks)
        ratios += [(COMPILED, OURS), (COMPILED, PLAIN)]
    yield Comparison(
        f"a layer pair, {pair.size}",
        ways,
        ratios,
        counted=(OURS, PLAIN, LATTE),
        note="Latte's layers lack text in time, rotary positions and norms of queries and keys: compare their TFLOP/s.",
    )


class LatteLayers:
    """The blocks of LatteTransformer3DModel at the same width, on the same tokens and words; text in space alone."""

    def __init__(self, pair: Pair) -> None:
        size, dim = pair.size, pair.size.hidden_size
        self.space, self.time = (block(size, with_text).to(pair.tokens.dtype).eval() for with_text in (True, False))
        self.frames = pair.tokens.flatten(0, 1)  # (B * T, S, D)
        text = torch.randn(size.batch, size.words, dim, dtype=pair.tokens.dtype)
        self.text = text.repeat_interleave(size.num_frames, dim=0)
        modulation = pair.modulation.flatten(1)
        self.of_frames = modulation.repeat_interleave(size.num_frames, dim=0)
        self.of_places = modulation.repeat_interleave(size.patches, dim=0)
        self.size = size

    def __call__(self) -> Tensor:
        size = self.size
        x = self.space(self.frames, encoder_hidden_states=self.text, timestep=self.of_frames)
        x = x.view(size.batch, size.num_frames, size.patches, -1).transpose(1, 2).flatten(0, 1)
        return self.time(x, timestep=self.of_places)


def block(size: LayerSize, with_text: bool) -> nn.Module:
    return BasicTransformerBlock(
        size.hidden_size,
        size.num_heads,
        size.hidden_size // size.num_heads,
        cross_attention_dim=size.hidden_size if with_text else None,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
