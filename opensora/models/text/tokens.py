"""Sentences as tokens, and the words that a tokenizer does not know.

Letters: B sentences, L tokens.
"""

import threading
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

from tokenizers.models import WordLevel
from torch import Tensor

from opensora.errors import OpenSoraError

# A fast tokenizer keeps how it pads between calls, and refuses a second thread meanwhile.
_TOKENIZING = threading.Lock()


def tokens_in_use(mask: Tensor) -> int:
    """How many of the L tokens take part: those behind the last one that any text has are padding, and change nothing.

    Args:
        mask: (B, L), 1 or True for a token; where it is on an accelerator, this waits for it.
    """
    used = mask.any(dim=0).nonzero()
    return int(used.max()) + 1 if len(used) else 1


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int,
    *,
    cut: bool = False,
    padding: Literal["longest", "max_length"] = "max_length",
) -> tuple[Tensor, Tensor, int]:
    """Token ids of texts.

    A prompt that a model cannot read to its end is refused, because its author can shorten it. Captions come by the
    million from a machine: they are cut, as the published models' were in training, and counted.

    Args:
        tokenizer: a transformers tokenizer.
        texts: B sentences.
        max_length: the most tokens that the model reads.
        cut: whether texts that are longer are cut.
        padding: L is `max_length`, so that no row depends on the others, or that of the longest of these texts.

    Returns:
        Ids (B, L), their mask (B, L), 1 = token, and how many texts were cut.

    Raises:
        OpenSoraError: a text is longer than `max_length` and is not to be cut; a tokenizer without a padding token.
    """
    if getattr(tokenizer, "pad_token", "") is None:
        raise OpenSoraError("the tokenizer has no padding token; name its `pad_token` in tokenizer_config.json")
    with _TOKENIZING:
        tokens = tokenizer(list(texts), padding=padding, truncation=True, max_length=max_length, return_tensors="pt")
        full = [text for text, mask in zip(texts, tokens["attention_mask"], strict=True) if mask.sum() == max_length]
        lengths = [len(ids) for ids in tokenizer(full, return_attention_mask=False)["input_ids"]] if full else []
    num_cut = sum(length > max_length for length in lengths)
    if num_cut and not cut:
        longest = max(range(len(full)), key=lambda i: lengths[i])
        raise OpenSoraError(
            f"the prompt {_start_of(full[longest])!r} has {lengths[longest]} tokens, but this model reads "
            f"{max_length}; shorten it"
        )
    return tokens["input_ids"], tokens["attention_mask"], num_cut


_MOST_WORDS = 20


def check_words(tokenizer: Any, prompts: Sequence[str]) -> None:
    """Refuses what a word-level tokenizer would drop or turn into its unknown token; others read any text.

    Raises:
        OpenSoraError: words outside the vocabulary, each named once, or a prompt without any word.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, WordLevel) or tokenizer.unk_token_id is None:
        return
    with _TOKENIZING:
        tokens = tokenizer(list(prompts), return_attention_mask=False, return_offsets_mapping=True)
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


def unread_pieces(tokenizer: Any, text: str) -> list[str]:
    """What of a text a tokenizer turns into its unknown token, such as the letters of a script that it was not made of.

    Marks that carry no meaning of their own (braces, quotation marks) are not told. Tokenizers that read any text, byte
    by byte, or that do not say which piece became which token, have none; of whole words, see `check_words`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or isinstance(backend.model, WordLevel) or tokenizer.unk_token_id is None:
        return []
    with _TOKENIZING:
        tokens = tokenizer(text, return_attention_mask=False, return_offsets_mapping=True)
    places = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    pieces = (text[start:end].strip() for token, (start, end) in places if token == tokenizer.unk_token_id)
    return [piece for piece in dict.fromkeys(pieces) if any(_means_something(character) for character in piece)]


def _means_something(character: str) -> bool:
    """Letters, digits and pictures."""
    return character.isalnum() or unicodedata.category(character) == "So"


def _start_of(prompt: str, num_characters: int = 40) -> str:
    return prompt if len(prompt) <= num_characters else prompt[:num_characters].rstrip() + "..."
