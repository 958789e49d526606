"""What a run will read of its captions: which are cut, and which say nothing once they are cleaned."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import ByT5Tokenizer

from opensora.clip_rows import ClipRows
from opensora.contents import shown
from opensora.errors import OpenSoraError
from opensora.models.text.cleaning import clean_text, has_words
from opensora.toybox.captions import build_tokenizer
from opensora.training.diffusion.adaptation import build_transformer
from opensora.training.diffusion.settings import DiffusionSettings
from opensora.training.diffusion.text import TrainedText
from opensora.training.parts import META, Untrained, find_tokenizer

_MOST_READ = 100_000  # of more captions, every so manieth is looked at
_AT_ONCE = 256
_CHARACTERS_OF_A_TOKEN = 4  # of English in T5's tokens; rather too few
# Cleaning takes names, numbers, addresses and sales talk out of a text; never as many plain words in a row.
_PLAIN = re.compile(r"(?:[A-Za-z]{2,}[ ,]+){8}")


@dataclass(frozen=True)
class CaptionPlan:
    """What becomes of captions.

    Attributes:
        num_read: captions that were looked at.
        every: how manieth that is; 1 for all.
        max_tokens: the most that the transformer reads.
        estimated: from the number of characters, since the tokenizer is not on this machine.
        num_cut: longer ones.
        most_tokens: of the longest.
        longest: how it begins.
        num_emptied: which cleaning leaves no word of.
        emptied: one of these.
    """

    num_read: int
    every: int
    max_tokens: int
    estimated: bool
    num_cut: int = 0
    most_tokens: int = 0
    longest: str = ""
    num_emptied: int = 0
    emptied: str = ""

    def lines(self) -> list[str]:
        """In words; nothing where nothing is lost."""
        of = f" of {self.num_read:,} looked at (1 in {self.every})" if self.every > 1 else ""
        about = f", at {_CHARACTERS_OF_A_TOKEN} characters a token by estimate (the tokenizer is not on this machine)"
        lines = []
        if self.num_cut:
            lines.append(
                f"captions cut at {self.max_tokens} tokens: {self.num_cut:,}{of}{about * self.estimated}; the longest "
                f"has {self.most_tokens:,}: {shown(self.longest)}"
            )
        if self.num_emptied:
            lines.append(
                f"captions that cleaning leaves nothing of: {self.num_emptied:,}{of}, such as {shown(self.emptied)}"
            )
        return lines


def plan_captions(
    settings: DiffusionSettings,
    rows: ClipRows,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> CaptionPlan:
    """Reads captions as a run would.

    Args:
        settings: of the run.
        rows: the clips.
        on_progress: told how many captions are read, of how many.

    Raises:
        OpenSoraError: the transformer is not known, so nobody can say how much it reads.
    """
    transformer = build_transformer(
        settings.architecture, settings.transformer, settings.init_from, settings.new_parts, META
    )
    max_tokens, tokenizer = transformer.max_text_tokens, _tokenizer(settings)
    clean = {**settings.data.defaults(), **settings.defaults}.get("clean_prompts", False)
    step = -(-len(rows) // _MOST_READ) or 1
    texts = itertools.islice(rows.texts(), 0, None, step)
    total, read, cut, emptied = -(-len(rows) // step), 0, 0, 0
    longest, nothing = (0, ""), ""
    while batch := list(itertools.islice(texts, _AT_ONCE)):
        spelled = [_spelled(text, max_tokens) if clean else text for text in batch]
        gone = [
            text for text, words in zip(batch, spelled, strict=True) if clean and has_words(text) > has_words(words)
        ]
        emptied, nothing = emptied + len(gone), nothing or next(iter(gone), "")
        long = [text for text in spelled if _may_be_cut(text, max_tokens)]
        lengths = _lengths(tokenizer, long)
        cut += sum(length > max_tokens for length in lengths)
        longest = max([longest, *zip(lengths, long, strict=True)], key=lambda found: found[0])
        read += len(batch)
        on_progress(read, total)
    return CaptionPlan(read, step, max_tokens, tokenizer is None, cut, *longest, emptied, nothing)


def _tokenizer(settings: DiffusionSettings) -> Any:
    """That of the run; None where it is not on this machine."""
    if isinstance(settings.text, TrainedText):
        return build_tokenizer()
    if isinstance(settings.text.origin, Untrained):
        return ByT5Tokenizer()
    try:
        return find_tokenizer(settings.text.origin)
    except OpenSoraError:
        return None


def _spelled(text: str, max_tokens: int) -> str:
    """As cleaning spells it, where that may matter for its length or for whether anything is left."""
    return text if _PLAIN.search(text) and not _may_be_cut(text, max_tokens) else clean_text(text)


def _may_be_cut(text: str, max_tokens: int) -> bool:
    """No token is shorter than a byte, and one marks the end."""
    return len(text) * 4 >= max_tokens and len(text.encode("utf-8", "replace")) >= max_tokens


def _lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    if tokenizer is None:
        return [-(-len(text) // _CHARACTERS_OF_A_TOKEN) for text in texts]
    return [len(ids) for ids in tokenizer(list(texts), return_attention_mask=False)["input_ids"]] if texts else []
