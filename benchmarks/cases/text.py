"""The text encoder on one prompt of a few words: ours reads as many tokens as there are, plain all the padding, too."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from transformers import T5Config, T5EncoderModel

from benchmarks.comparison import OURS, PLAIN, Comparison, Setting
from opensora.models.text.conditioner import T5Conditioner, TextTokens
from opensora.models.text.tokens import tokens_in_use

WORDS = 1_000
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "t5-xxl": ({"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 1}, 300, 100),
    "bundled": ({"d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4, "num_layers": 2}, 24, 12),
    "tiny": ({"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1}, 7, 4),
}
"""Sizes of the encoder, tokens of a padded prompt, and those that are words; of T5-XXL's 24 layers one."""


def comparisons(setting: Setting) -> Iterator[Comparison]:
    sizes, length, words = SIZES[setting.size]
    torch.manual_seed(0)
    config = T5Config(vocab_size=WORDS, feed_forward_proj="gated-gelu", **sizes)
    encoder = T5EncoderModel(config).to(getattr(torch, setting.dtype)).eval()
    ids, mask = torch.randint(WORDS, (1, length)), (torch.arange(length) < words).long()[None]
    conditioner = T5Conditioner({"text_encoder": encoder}, SimpleNamespace(max_text_tokens=length))

    def ours() -> None:
        tokens = TextTokens({"text_encoder": ids}, {"text_encoder": mask}, num_read=tokens_in_use(mask))
        conditioner.encode_tokens(tokens)

    def plain() -> None:
        encoder(input_ids=ids, attention_mask=mask)

    name = f"{sizes['num_layers']} layers of T5, {words} of {length} tokens"
    yield Comparison(name, {OURS: ours, PLAIN: plain}, [(OURS, PLAIN)], counted=(OURS, PLAIN))
