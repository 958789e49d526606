"""Text of networks that read the states of a T5 encoder and one pooled vector of a CLIP encoder (Open-Sora 2.0, FLUX).

Letters: B prompts, L tokens that the network reads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import CLIPTextModel

from opensora.errors import OpenSoraError
from opensora.models.offload_hooks import execution_device
from opensora.models.text.conditioner import (
    Padding,
    TextConditioner,
    TextStates,
    TextTokens,
    check_vocabulary,
    tokenizer_place,
)
from opensora.models.text.tokens import check_words, tokenize, unread_pieces


class T5ClipConditioner(TextConditioner):
    """A T5 encoder and a CLIP encoder, each with its tokenizer; which is which, their classes tell.

    T5's padding takes part in attention, in the encoder as in the network, as in training: texts always have L tokens
    and no mask. CLIP reads the beginning of a text that is too long for it. No text is the encoding of an empty one.
    """

    encoder_places = ("text_encoder", "text_encoder_2")
    null_prompt = ""
    pools = True

    @property
    def encoders(self) -> tuple[str, ...]:
        return (self._t5, self._clip)

    @property
    def _clip(self) -> str:
        """Which component the CLIP encoder is."""
        given = {name: self.components.get(name) for name in self.encoder_places}
        found = [name for name, encoder in given.items() if isinstance(encoder, CLIPTextModel)]
        if len(found) != 1 or None in given.values():
            classes = ", ".join(f"{name} {type(encoder).__name__}" for name, encoder in given.items())
            raise OpenSoraError(f"got {classes}; this transformer reads text by a T5 encoder and a CLIP encoder")
        return found[0]

    @property
    def _t5(self) -> str:
        return next(name for name in self.encoder_places if name != self._clip)

    def _tokenizer(self, encoder: str) -> Any:
        return self.components[tokenizer_place(encoder)]

    def tokenize(self, texts: Sequence[str], *, cut: bool = False, padding: Padding = "max_length") -> TextTokens:
        t5, clip = self.encoders
        longest = self.components[clip].config.max_position_embeddings
        ids, mask, num_cut = tokenize(self._tokenizer(t5), texts, self.network.max_text_tokens, cut=cut)
        clip_ids, clip_mask, _ = tokenize(self._tokenizer(clip), texts, longest, cut=True)
        tokens = {t5: ids, clip: clip_ids}
        for name, of_encoder in tokens.items():
            check_vocabulary(of_encoder, self.components[name])
        return TextTokens(tokens, {t5: mask, clip: clip_mask}, num_cut)

    def encode_tokens(self, tokens: TextTokens) -> TextStates:
        t5, clip = (self.components[name] for name in self.encoders)
        ids, clip_ids = (
            tokens.ids[name].to(execution_device(encoder))
            for name, encoder in zip(self.encoders, (t5, clip), strict=True)
        )
        return TextStates(t5(input_ids=ids)[0], pooled=clip(input_ids=clip_ids).pooler_output)

    def unconditional(self, text: TextStates) -> TextStates:
        return self.encode([""]).repeat_each(len(text)).to(text.states.device, text.states.dtype)

    def check_words(self, texts: Sequence[str]) -> None:
        if worded := [text for text in texts if text != self.null_prompt]:
            check_words(self._tokenizer(self._t5), worded)

    def unread_pieces(self, text: str) -> list[str]:
        return unread_pieces(self._tokenizer(self._t5), text)

    def blank_tokens(self, count: int, device: torch.device | str) -> TextTokens:
        t5, clip = self.encoders
        lengths = {t5: self.network.max_text_tokens, clip: self.components[clip].config.max_position_embeddings}
        ids = {name: torch.zeros(count, n, dtype=torch.long, device=device) for name, n in lengths.items()}
        return TextTokens(ids, {name: of_encoder + 1 for name, of_encoder in ids.items()})

    def blank_states(self, count: int, device: torch.device | str, dtype: torch.dtype) -> TextStates:
        config, kind = self.network.config, {"device": device, "dtype": dtype}
        states = torch.zeros(count, self.network.max_text_tokens, config.caption_channels, **kind)
        return TextStates(states, pooled=torch.zeros(count, config.pooled_channels, **kind))
