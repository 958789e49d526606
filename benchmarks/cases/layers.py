"""One layer pair of STDiT3, a block in space and one in time, ours and plain, with the same weights and inputs.

Letters: B samples, T latent frames, S patches of a frame, L text tokens, D hidden size.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.plain.transformer import STDiT3 as PlainSTDiT3
from opensora.models.stdit3 import STDiT3
from opensora.models.transformer import TIME
from opensora.weights import cast_weights

CAPTION_CHANNELS = 64
"""Width of the text states: the layer that reads them belongs to no pair."""


@dataclass(frozen=True)
class LayerSize:
    """What a pair works on.

    Attributes:
        hidden_size, num_heads: D and attention heads.
        batch: B.
        num_frames: T.
        patches: S.
        tokens: L, as the texts are padded.
        words: of them, those that are tokens.
    """

    hidden_size: int
    num_heads: int
    batch: int
    num_frames: int
    patches: int
    tokens: int
    words: int

    def __str__(self) -> str:
        text = f"{self.words} of {self.tokens} text tokens"
        return f"{self.batch} x {self.num_frames} x {self.patches} tokens of {self.hidden_size}, {text}"


SIZES = {
    "240p": LayerSize(1152, 16, batch=2, num_frames=15, patches=405, tokens=300, words=100),
    "144p": LayerSize(1152, 16, batch=2, num_frames=15, patches=144, tokens=300, words=100),
    "bundled": LayerSize(192, 4, batch=2, num_frames=5, patches=64, tokens=24, words=16),
    "tiny": LayerSize(48, 2, batch=2, num_frames=3, patches=6, tokens=7, words=4),
}
"""240p and 144p are clips of 51 frames under guidance, at the width of the released model."""


class Pair:
    """Ours and plain.

    Args:
        size: what they work on.
        dtype: of weights and inputs.
    """

    def __init__(self, size: LayerSize, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": size.hidden_size,
            "num_heads": size.num_heads,
            "depth": 1,
            "caption_channels": CAPTION_CHANNELS,
            "model_max_length": size.tokens,
        }
        self.size = size
        self.ours, self.plain = STDiT3(**sizes), PlainSTDiT3(**sizes)
        fill(self.ours)
        self.plain.load_state_dict(self.ours.state_dict())
        for network in (self.ours, self.plain):
            cast_weights(network, dtype).eval()
        shape = (size.batch, size.num_frames, size.patches, size.hidden_size)
        self.tokens = torch.randn(shape, dtype=dtype)
        self.modulation = 0.1 * torch.randn(size.batch, 6, size.hidden_size, dtype=dtype)
        self.text = torch.randn(size.batch, size.tokens, CAPTION_CHANNELS, dtype=dtype)
        self.mask = torch.arange(size.tokens).expand(size.batch, -1) < size.words
        with torch.no_grad():
            self.context = self.ours.encode_text(self.text, self.mask)
            self.padded_states = self.plain.y_embedder(self.text)

    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained, of both."""
        return [*self.ours.parameters(), *self.plain.parameters()]

    def run_ours(self, blocks: list[Any] | None = None, *, keep_text: bool = True) -> Tensor:
        """(B, T, S, D).

        Args:
            blocks: in place of the network's own.
            keep_text: keys and values of the text are those made once for all steps; otherwise blocks make them.
        """
        x, rope = self.tokens, self.ours.rope(self.size.num_frames)
        context, modulation = self.context, self.modulation[:, None]
        for block, own, kept in zip(blocks or self.ours.blocks, self.ours.blocks, context.keys_values, strict=True):
            keys_values, turned = kept if keep_text else None, rope if own.axis == TIME else None
            x = block(x, context.states, modulation, context.bias, keys_values, turned)
        return x

    def run_plain(self) -> Tensor:
        """(B, T * S, D)."""
        x, angles = self.tokens.flatten(1, 2), self.plain.rope(self.size.num_frames)
        for block in (self.plain.spatial_blocks[0], self.plain.temporal_blocks[0]):
            x = block(x, self.padded_states, self.mask, self.modulation, angles, self.size.num_frames)
        return x


def at_places(size: LayerSize, num_frames: int, patches: int) -> LayerSize:
    """The same for one sample of another length and size."""
    return replace(size, batch=1, num_frames=num_frames, patches=patches)


def fill(network: nn.Module) -> None:
    """Arbitrary weights where a fresh network has zeros."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)
