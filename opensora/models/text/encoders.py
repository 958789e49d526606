"""Text as the transformers see it: the states of a T5 encoder.

Any T5 encoder of transformers (`T5EncoderModel`) with any fast tokenizer serves.

Letters: B prompts, L text length of the transformer, D width of the encoder's states.
"""

import threading
from typing import Any

import torch
from tokenizers.models import WordLevel
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.models.offload_hooks import execution_device

# A fast tokenizer keeps how it pads between calls, and refuses a second thread meanwhile.
_TOKENIZING = threading.Lock()


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
    with _TOKENIZING:
        lengths = [len(ids) for ids in tokenizer(prompts, return_attention_mask=False)["input_ids"]]
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
    longest = max(range(len(prompts)), key=lambda i: lengths[i])
    if lengths[longest] > max_length:
        raise OpenSoraError(
            f"the prompt {_start_of(prompts[longest])!r} has {lengths[longest]} tokens, but this model reads "
            f"{max_length}; shorten it"
        )
    encoder_device = execution_device(text_encoder)
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
    with _TOKENIZING:
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


def _start_of(prompt: str, num_characters: int = 40) -> str:
    return prompt if len(prompt) <= num_characters else prompt[:num_characters].rstrip() + "..."
