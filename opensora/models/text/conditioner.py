"""Text as a network is conditioned on it: what encoders make of prompts, and what stands for no text at all.

A network of the family reads the states of one encoder or of several, a mask, maybe one pooled vector. `TextStates`
holds all of that, for prompts, for negative prompts and for captions in training alike; a `TextConditioner` makes it.
Which conditioner a network needs, it says itself (`text_conditioner`).

Letters: B prompts, L tokens, D width of the states, P width of the pooled vector.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.models.text.encoders import encode_prompts


@dataclass(frozen=True)
class TextStates:
    """Encoded text, as every network of the family takes it.

    Attributes:
        states: (B, L, D).
        mask: (B, L), True or 1 for a token; None where all are.
        pooled: (B, P), of networks that read one vector for the whole text; None for the others.
        dropped: (B,) bool, True where the network is to read its learned null text in place of the states (their mask
            stays); None for nowhere.
    """

    states: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    dropped: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def inputs(self) -> dict[str, Tensor]:
        """Keywords of a network's `forward` and `encode_text`."""
        named = {
            "encoder_hidden_states": self.states,
            "encoder_attention_mask": self.mask,
            "pooled_projections": self.pooled,
            "drop_text": self.dropped,
        }
        return {name: value for name, value in named.items() if value is not None}

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "TextStates":
        """The same somewhere else; states and pooled vectors in another precision."""
        return TextStates(
            self.states.to(device, dtype),
            None if self.mask is None else self.mask.to(device),
            None if self.pooled is None else self.pooled.to(device, dtype),
            None if self.dropped is None else self.dropped.to(device),
        )

    def repeat_each(self, times: int) -> "TextStates":
        """Every row so often, its copies one after the other."""

        def repeated(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.repeat_interleave(times, dim=0)

        return TextStates(
            self.states.repeat_interleave(times, dim=0),
            repeated(self.mask),
            repeated(self.pooled),
            repeated(self.dropped),
        )

    @staticmethod
    def cat(texts: "Sequence[TextStates]") -> "TextStates":
        """Rows of several texts, one text after the other.

        Raises:
            OpenSoraError: some have a pooled vector and some have not.
        """
        if len(texts) == 1:
            return texts[0]
        pooled = [text.pooled for text in texts if text.pooled is not None]
        if pooled and len(pooled) < len(texts):
            raise OpenSoraError(f"{len(pooled)} of {len(texts)} texts have a pooled vector; give all one, or none")
        return TextStates(
            torch.cat([text.states for text in texts]),
            _cat(texts, "mask", lambda text: text.states.new_ones(text.states.shape[:2], dtype=torch.bool)),
            torch.cat(pooled) if pooled else None,
            _cat(texts, "dropped", lambda text: text.states.new_zeros(len(text), dtype=torch.bool)),
        )


def _cat(texts: Sequence[TextStates], name: str, neutral: Any) -> Tensor | None:
    """One field of several texts; `neutral` stands for None where another text has it."""
    values = [getattr(text, name) for text in texts]
    if all(value is None for value in values):
        return None
    return torch.cat([neutral(text) if value is None else value for text, value in zip(texts, values, strict=True)])


class TextConditioner(ABC):
    """The encoders of a pipeline, and what they make of text.

    Args:
        components: the pipeline's, by name: "text_encoder", "tokenizer" and what else the family has.
        network: the transformer that reads the text.
    """

    encoders: Sequence[str] = ("text_encoder",)
    """Names of the encoders among the components, in the order in which they are needed."""

    def __init__(self, components: Mapping[str, Any], network: Any) -> None:
        self.components, self.network = components, network

    @abstractmethod
    def encode(self, prompts: list[str]) -> TextStates:
        """The text of prompts, each as it would be alone, on the encoders' device.

        Raises:
            OpenSoraError: a prompt that is too long, or holds words that the tokenizer does not know.
        """

    @abstractmethod
    def unconditional(self, text: TextStates) -> TextStates:
        """What stands opposite to a text in guidance where there is no negative prompt."""

    def branches(self, text: TextStates, negative: TextStates | None) -> dict[str, TextStates]:
        """What every branch of guidance reads, by the names that the network's guidance rule knows."""
        return {"text": text, "null": self.unconditional(text) if negative is None else negative}


class T5Conditioner(TextConditioner):
    """One T5 encoder, and a null text that the network learnt: Open-Sora 1.0 to 1.2.

    Null rows keep the mask of the prompt they stand opposite to, because that is how the networks were trained to be
    sampled: a prompt of 7 tokens is compared with the first 7 null tokens.
    """

    def encode(self, prompts: list[str]) -> TextStates:
        tokenizer, encoder = self.components["tokenizer"], self.components["text_encoder"]
        return TextStates(*encode_prompts(tokenizer, encoder, prompts, self.network.max_text_tokens))

    def unconditional(self, text: TextStates) -> TextStates:
        return TextStates(text.states, text.mask, dropped=text.states.new_ones(len(text), dtype=torch.bool))
