"""Captions as tokens, one way for training, held-out losses and text that is encoded beforehand.

A prompt that a model cannot read to its end is refused, because its author can shorten it. Captions come by the
million from a machine: they are cut, in training as the published models' were, and those that were cut are counted.

Letters: B captions, L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from opensora.models.text.cleaning import clean_text


@dataclass(frozen=True)
class CaptionTokens:
    """Captions as a text encoder takes them.

    Attributes:
        ids: (B, L).
        mask: (B, L), 1 = token.
        num_cut: captions that were longer than the model reads.
    """

    ids: Tensor
    mask: Tensor
    num_cut: int


def tokenize_captions(
    tokenizer: Any,
    captions: Sequence[str],
    max_tokens: int,
    *,
    clean: bool,
    padding: Literal["longest", "max_length"] = "longest",
) -> CaptionTokens:
    """Tokens of captions; what is too long is cut.

    Args:
        tokenizer: a transformers tokenizer.
        captions: B sentences.
        max_tokens: of the transformer.
        clean: spell them as the published models' were, see `models.text.cleaning`.
        padding: L is that of the longest of these captions, or `max_tokens`.
    """
    spelled = [clean_text(caption) for caption in captions] if clean else list(captions)
    tokens = tokenizer(spelled, padding=padding, truncation=True, max_length=max_tokens, return_tensors="pt")
    full = [text for text, mask in zip(spelled, tokens["attention_mask"], strict=True) if mask.sum() == max_tokens]
    lengths = [len(ids) for ids in tokenizer(full, return_attention_mask=False)["input_ids"]] if full else []
    return CaptionTokens(
        tokens["input_ids"], tokens["attention_mask"], num_cut=sum(length > max_tokens for length in lengths)
    )
