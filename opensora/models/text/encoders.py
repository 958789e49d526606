"""Text as the transformers see it: the states of a T5 encoder, or the learned stand-in for no text at all.

Any T5 encoder of transformers (`T5EncoderModel`) with any fast tokenizer serves. Two kinds of rows come out: encoded
text, for prompts and negative prompts, and the *null text*, an embedding the transformer learnt in place of dropped
captions, for the unconditional branch. Null rows keep the text mask of the prompt they stand opposite to, because that
is how the networks were trained to be sampled: a prompt of 7 tokens is compared with the first 7 null tokens.

Letters: B prompts, L text length of the transformer, D width of the encoder's states.
"""

from typing import Any

import torch
from tokenizers.models import WordLevel
from torch import Tensor

from opensora.errors import OpenSoraError


def encode_prompts(
    tokenizer: Any,
    text_encoder: torch.nn.Module,
    prompts: list[str],
    max_length: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode prompts, each padded to `max_length`, so that no row depends on which others it is encoded with.

    Args:
        tokenizer: a transformers tokenizer.
        text_encoder: a `T5EncoderModel`.
        prompts: B sentences.
        max_length: L, in tokens.
        device: where the results go; default: where the encoder is.
        dtype: of the states; default: the encoder's.

    Returns:
        `text_states` (B, L, D), the encoder's last hidden state, and `text_mask` (B, L) bool, True for tokens of text.

    Raises:
        OpenSoraError: a prompt is longer than L tokens, or `check_words` refuses it.
    """
    check_words(tokenizer, prompts)
    lengths = [len(ids) for ids in tokenizer(prompts, return_attention_mask=False)["input_ids"]]
    longest = max(range(len(prompts)), key=lambda i: lengths[i])
    if lengths[longest] > max_length:
        raise OpenSoraError(
            f"the prompt {_start_of(prompts[longest])!r} has {lengths[longest]} tokens, but this model reads "
            f"{max_length}; shorten it"
        )
    tokens = tokenizer(prompts, padding="max_length", max_length=max_length, return_tensors="pt")
    encoder_device = next(text_encoder.parameters()).device
    text_mask = tokens["attention_mask"].to(encoder_device)
    states = text_encoder(input_ids=tokens["input_ids"].to(encoder_device), attention_mask=text_mask)[0]
    return states.to(device=device, dtype=dtype), text_mask.to(device=device, dtype=torch.bool)


_MOST_WORDS = 20


def check_words(tokenizer: Any, prompts: list[str]) -> None:
    """Refuses what a word-level tokenizer would drop or turn into its unknown token; others read any text.

    Raises:
        OpenSoraError: words outside the vocabulary, each named once, or a prompt without any word.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, WordLevel) or tokenizer.unk_token_id is None:
        return
    tokens = tokenizer(prompts, return_attention_mask=False, return_offsets_mapping=True)
    unknown: list[str] = []
    for prompt, ids, places in zip(prompts, tokens["input_ids"], tokens["offset_mapping"], strict=True):
        words = [(token, prompt[start:end]) for token, (start, end) in zip(ids, places, strict=True) if end > start]
        if not words:
            raise OpenSoraError(f"the prompt {_start_of(prompt)!r} holds no word; say what the video should show")
        unknown += [word for token, word in words if token == tokenizer.unk_token_id]
    if unknown:
        words = list(dict.fromkeys(unknown))
        more = f" and {len(words) - _MOST_WORDS} more words" if len(words) > _MOST_WORDS else ""
        raise OpenSoraError(f"this model does not know: {', '.join(words[:_MOST_WORDS])}{more}")


def null_prompts(null_text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The unconditional counterpart of encoded prompts.

    Args:
        null_text: (L, D), the transformer's learned null embedding.
        text_mask: (B, L), the mask of the prompts it stands opposite to.

    Returns:
        `text_states` (B, L, D) and `text_mask` (B, L), the given one.

    Raises:
        OpenSoraError: the lengths differ.
    """
    if null_text.shape[0] != text_mask.shape[1]:
        raise OpenSoraError(
            f"the transformer's null text has {null_text.shape[0]} tokens, the prompts were padded to "
            f"{text_mask.shape[1]}; encode them with max_length={null_text.shape[0]}"
        )
    return null_text.expand(text_mask.shape[0], -1, -1), text_mask


def _start_of(prompt: str, num_characters: int = 40) -> str:
    return prompt if len(prompt) <= num_characters else prompt[:num_characters].rstrip() + "..."
