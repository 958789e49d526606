"""Text as a network is conditioned on it: what encoders make of prompts, and what stands for no text at all.

A network of the family reads the states of one encoder or of several, a mask, maybe one pooled vector. `TextStates`
holds all of that, for prompts, for negative prompts and for captions in training alike; a `TextConditioner` makes it.
Which conditioner a network needs, it says itself (`text_conditioner`).

Letters: B prompts, L tokens, D width of the states, P width of the pooled vector.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.models.offload_hooks import execution_device
from opensora.models.text.tokens import check_words, tokenize, tokens_in_use, unread_pieces

Padding = Literal["longest", "max_length"]


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

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "TextStates":
        """The same somewhere else; states and pooled vectors in that precision, if one is given."""
        return TextStates(
            self.states.to(device, dtype),
            None if self.mask is None else self.mask.to(device),
            None if self.pooled is None else self.pooled.to(device, dtype),
            None if self.dropped is None else self.dropped.to(device),
        )

    def padded(self, num_tokens: int) -> "TextStates":
        """The same with so many tokens, the new ones masked out; never fewer than it has."""
        missing = max(0, num_tokens - self.states.shape[1])
        mask = self.states.new_ones(self.states.shape[:2], dtype=torch.bool) if self.mask is None else self.mask
        return replace(self, states=F.pad(self.states, (0, 0, 0, missing)), mask=F.pad(mask, (0, missing)))

    def replaced(self, other: "TextStates", states: Tensor, pooled: Tensor) -> "TextStates":
        """Rows of another text, which has one row, in place of some.

        Args:
            other: the text.
            states: (B,) bool, True where its states are taken, and their mask.
            pooled: (B,) bool, True where its pooled vector is, of texts that have one.
        """
        length = max(self.states.shape[1], other.states.shape[1])
        own, other = self.padded(length), other.padded(length)
        assert own.mask is not None and other.mask is not None
        return TextStates(
            torch.where(states[:, None, None], other.states, own.states),
            torch.where(states[:, None], other.mask, own.mask),
            None
            if own.pooled is None or other.pooled is None
            else torch.where(pooled[:, None], other.pooled, own.pooled),
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
            OpenSoraError: some have a pooled vector and some have not, or their states are of several sizes.
        """
        if len(texts) == 1:
            return texts[0]
        sizes = sorted({tuple(text.states.shape[1:]) for text in texts})
        if len(sizes) > 1:
            listed = " and ".join(map(str, sizes))
            raise OpenSoraError(f"text states (L, D) = {listed} in one batch; all must be as encode_prompt makes them")
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


def tokenizer_place(encoder_place: str) -> str:
    """The component that cuts text into the tokens of an encoder."""
    return encoder_place.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class TextTokens:
    """Texts as the encoders of a conditioner take them.

    Attributes:
        ids: encoder -> token ids (B, L).
        masks: encoder -> (B, L), 1 for a token.
        num_cut: texts that were longer than the network reads.
        num_read: tokens of a single encoder that take part, those behind them being padding; None = all.
    """

    ids: dict[str, Tensor]
    masks: dict[str, Tensor]
    num_cut: int = 0
    num_read: int | None = None

    def to(self, device: torch.device | str) -> "TextTokens":
        """The same somewhere else."""
        ids = {name: ids.to(device) for name, ids in self.ids.items()}
        masks = {name: mask.to(device) for name, mask in self.masks.items()}
        return replace(self, ids=ids, masks=masks)


class TextConditioner(ABC):
    """The encoders of a pipeline, and what they make of text: one way for prompts, captions and plans.

    Attributes:
        encoder_places: components of a pipeline that encode text; each has a tokenizer of the same number.
        null_prompt: the text that stands opposite to prompts where there is no negative prompt, of networks that read
            text then too; None of those that learnt a null text.
        pools: whether its states come with a pooled text, which the network reads too.

    Args:
        components: the pipeline's, by name: "text_encoder", "tokenizer" and what else the family has.
        network: the transformer that reads the text.
    """

    encoder_places: tuple[str, ...] = ("text_encoder",)
    null_prompt: str | None = None
    pools: bool = False

    def __init__(self, components: Mapping[str, Any], network: Any) -> None:
        self.components, self.network = components, network

    @property
    def encoders(self) -> tuple[str, ...]:
        """`encoder_places`, in the order in which the conditioner asks them."""
        return self.encoder_places

    @abstractmethod
    def tokenize(self, texts: Sequence[str], *, cut: bool = False, padding: Padding = "max_length") -> TextTokens:
        """Texts as tokens; see `models.text.tokens.tokenize` for what is cut and what is padded.

        Raises:
            OpenSoraError: a text is too long and is not to be cut.
        """

    @abstractmethod
    def encode_tokens(self, tokens: TextTokens) -> TextStates:
        """What the network reads of tokens, on the encoders' device. Differentiable."""

    @abstractmethod
    def unconditional(self, text: TextStates) -> TextStates:
        """What stands opposite to a text in guidance where there is no negative prompt."""

    @abstractmethod
    def check_words(self, texts: Sequence[str]) -> None:
        """Refuses words that a tokenizer would take for one another.

        Raises:
            OpenSoraError: naming them.
        """

    def unread_pieces(self, text: str) -> list[str]:
        """What of a text the encoders cannot tell from any other text, because no token stands for it."""
        return []

    @abstractmethod
    def blank_tokens(self, count: int, device: torch.device | str) -> TextTokens:
        """Texts of the greatest length without content, for plans."""

    @abstractmethod
    def blank_states(self, count: int, device: torch.device | str, dtype: torch.dtype) -> TextStates:
        """What the encoders would make of them, without asking the encoders."""

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """The text of prompts, each as it would be alone, on the encoders' device.

        Raises:
            OpenSoraError: a prompt that is too long, or holds words that the tokenizer does not know.
        """
        self.check_words(prompts)
        return self.encode_tokens(self.tokenize(prompts))

    def branches(self, text: TextStates, negative: TextStates | None) -> dict[str, TextStates]:
        """The texts that branches of guidance read, by the names that the network's guidance rule knows.

        "text" and "null" are always among them.
        """
        return {"text": text, "null": self.unconditional(text) if negative is None else negative}


class T5Conditioner(TextConditioner):
    """One T5 encoder, and a null text that the network learnt: Open-Sora 1.0 to 1.2.

    Any T5 encoder of transformers (`T5EncoderModel`) with any fast tokenizer serves. Null rows keep the mask of the
    prompt they stand opposite to, because that is how the networks were trained to be sampled: a prompt of 7 tokens is
    compared with the first 7 null tokens.
    """

    def tokenize(self, texts: Sequence[str], *, cut: bool = False, padding: Padding = "max_length") -> TextTokens:
        ids, mask, num_cut = tokenize(
            self.components["tokenizer"], texts, self.network.max_text_tokens, cut=cut, padding=padding
        )
        check_vocabulary(ids, self.components["text_encoder"])
        return TextTokens({"text_encoder": ids}, {"text_encoder": mask}, num_cut, tokens_in_use(mask))

    def encode_tokens(self, tokens: TextTokens) -> TextStates:
        encoder = self.components["text_encoder"]
        device = execution_device(encoder)
        ids, mask = (of_encoder["text_encoder"].to(device) for of_encoder in (tokens.ids, tokens.masks))
        read = slice(tokens.num_read)
        states = encoder(input_ids=ids[:, read], attention_mask=mask[:, read])[0]
        return TextStates(F.pad(states, (0, 0, 0, ids.shape[1] - states.shape[1])), mask.bool())

    def unconditional(self, text: TextStates) -> TextStates:
        return TextStates(text.states, text.mask, dropped=text.states.new_ones(len(text), dtype=torch.bool))

    def check_words(self, texts: Sequence[str]) -> None:
        check_words(self.components["tokenizer"], texts)

    def unread_pieces(self, text: str) -> list[str]:
        return unread_pieces(self.components["tokenizer"], text)

    def blank_tokens(self, count: int, device: torch.device | str) -> TextTokens:
        ids = torch.zeros(count, self.network.max_text_tokens, dtype=torch.long, device=device)
        return TextTokens({"text_encoder": ids}, {"text_encoder": ids + 1})

    def blank_states(self, count: int, device: torch.device | str, dtype: torch.dtype) -> TextStates:
        size = (count, self.network.max_text_tokens, self.network.config.caption_channels)
        return TextStates(torch.zeros(size, device=device, dtype=dtype))


def check_vocabulary(ids: Tensor, encoder: Any) -> None:
    """Refuses tokens that an encoder does not know, because tokenizer and encoder are not of one model."""
    words = encoder.get_input_embeddings().num_embeddings
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < words:
        raise OpenSoraError(
            f"the tokenizer makes the token {int(ids.max())} of this text, but the text encoder knows {words} tokens; "
            "they belong to different models, or the files of the tokenizer were changed"
        )
