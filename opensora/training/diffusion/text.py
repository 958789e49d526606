"""What a transformer in training is told of its clips: captions spelled, cut into tokens, encoded.

The encoder is trained along (a small one, with the toybox's words), or it is frozen, or its work was done beforehand
and lies with the latents. How many encoders there are, and what stands for no text, is the transformer's affair.

Letters: B captions, L tokens, D width of the text.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ByT5Tokenizer

from opensora.checkpoints.components import build_model
from opensora.data.cache import Cache
from opensora.errors import OpenSoraError
from opensora.models.families import network_class
from opensora.models.text.cleaning import clean_text, has_words
from opensora.models.text.conditioner import TextConditioner, TextStates, TextTokens, tokenizer_place
from opensora.toybox.captions import build_tokenizer
from opensora.training.parts import META, Origin, Untrained, build_part, describe_origin, find_tokenizer
from opensora.weights import fingerprint


@dataclass(frozen=True)
class TrainedText:
    """A T5 encoder that is trained with the transformer, for captions of the toybox.

    Attributes:
        options: keywords of its configuration, from scratch; None to start from the model that the transformer starts
            from.
    """

    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class FrozenText:
    """Encoders as they are: a T5 encoder, and beside it a CLIP encoder where the transformer reads two.

    Attributes:
        origin: a model's name, a pipeline's folder, or a folder with the encoder and its tokenizer. An untrained one
            reads bytes.
        exported: write the encoders into the exported pipeline. Without it the folder holds configurations and
            tokenizers alone, and is loaded with `components={"text_encoder": ...}`.
        origin_2: likewise of the second encoder, of transformers that read text by two; None for that of the model
            which `origin` names.
    """

    origin: str | Untrained
    exported: bool = True
    origin_2: str | Untrained | None = None


@dataclass(frozen=True)
class CachedText:
    """Text states that were computed beforehand and come with the latents.

    Attributes:
        origin, origin_2: what they were computed with, for previews and the exported pipeline; see `FrozenText`. It is
            not loaded before it is needed.
        exported: see `FrozenText`.
    """

    origin: str | Untrained
    exported: bool = True
    origin_2: str | Untrained | None = None


TextConfig = TrainedText | FrozenText | CachedText


class Captions:
    """Tokenizers and encoders, as the transformer's `TextConditioner` asks for them.

    Args:
        config: where the encoders come from.
        init_from: the model that training starts from, for `TrainedText` without options.
        network: the transformer that reads the text.
        clean: spell captions as the published models' were, see `models.text.cleaning`.
        device: where the encoders go; on "meta" there is no tokenizer.
        dtype: of frozen encoders.

    Attributes:
        encoders: by their places in a pipeline; none until they are needed, for text that was encoded beforehand.
        tokenizers: likewise.
        trained: whether the encoder is trained along.
        num_cut: captions so far that were longer than the transformer reads.
        num_emptied: captions so far of which cleaning left nothing.

    Raises:
        OpenSoraError: encoders that are not there, or that the transformer does not read.
    """

    def __init__(
        self,
        config: TextConfig,
        init_from: Origin | None,
        network: Any,
        clean: bool,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.network, self.clean = config, network, clean
        self.device, self.dtype = device, dtype
        self.trained = isinstance(config, TrainedText)
        self.num_cut = self.num_emptied = 0
        self.encoders: dict[str, Any] = {}
        self.tokenizers: dict[str, Any] = {}
        self._cache: Cache | None = None
        self._null: TextStates | None = None
        self._origins = origins_of(config, network)
        if isinstance(config, TrainedText):
            self.tokenizers["tokenizer"] = build_tokenizer()
            words = len(self.tokenizers["tokenizer"])
            self.encoders["text_encoder"] = build_trained_encoder(config, init_from, words, device)
        elif isinstance(config, FrozenText):
            self.load()
            _ = self.conditioner.encoders  # which refuses those of other networks

    def load(self) -> dict[str, Any]:
        """The encoders, from their files if they are not here yet, and with them the tokenizers."""
        if not self.encoders:
            self.encoders = {
                place: build_part(origin, place, self.device, self.dtype) for place, origin in self._origins.items()
            }
            if self.device != META:
                self.tokenizers = self._find_tokenizers()
        return self.encoders

    @property
    def origins(self) -> dict[str, str]:
        """Where encoders that are not trained can be found again; without those that lie nowhere."""
        lying = {place: origin for place, origin in self._origins.items() if not isinstance(origin, Untrained)}
        return {place: str(Path(o).resolve()) if Path(o).exists() else o for place, o in lying.items()}

    def outline(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Encoders and tokenizers; encoders that are not needed yet have shapes and no weights."""
        if not self.encoders and any(isinstance(origin, Untrained) for origin in self._origins.values()):
            self.load()
        if self.encoders:
            return self.encoders, self.tokenizers
        outlines = {place: build_part(origin, place, META, self.dtype) for place, origin in self._origins.items()}
        return outlines, self._find_tokenizers()

    def _find_tokenizers(self) -> dict[str, Any]:
        return {tokenizer_place(place): tokenizer_of(origin, place) for place, origin in self._origins.items()}

    def use_cache(self, cache: Cache) -> None:
        """Refuses a cache whose text states will be read and come from other encoders, or from other spellings.

        Encoders of the same name are taken for the same; those of another name are loaded and compared.
        """
        if not isinstance(self.config, CachedText):
            return
        made, found = cache.index.made_from.text, None
        if made is not None and made.origin != describe_origins(self._origins):
            parts = {place: build_part(origin, place, "cpu", self.dtype) for place, origin in self._origins.items()}
            found = fingerprint_of_encoders(parts)
        cache.check_text(found, self.max_tokens, self.clean)
        self._cache = cache

    @property
    def max_tokens(self) -> int:
        """The most tokens that the transformer reads."""
        return self.network.max_text_tokens

    @property
    def conditioner(self) -> TextConditioner:
        """What turns captions into what the transformer reads."""
        return self.network.text_conditioner({**self.encoders, **self.tokenizers}, self.network)

    def check_words(self, captions: Iterable[str]) -> None:
        """Refuses captions with words that the tokenizer does not know, and would take for one another."""
        if isinstance(self.config, CachedText):
            return
        self.conditioner.check_words([caption for caption in captions if caption.strip()])

    def tokens(self, captions: list[str]) -> TextTokens:
        """Tokens, as many as the longest caption has; what is too long is cut, and counted."""
        spelled = [clean_text(caption) for caption in captions] if self.clean else captions
        self.num_emptied += sum(
            has_words(caption) and not has_words(text) for caption, text in zip(captions, spelled, strict=True)
        )
        tokens = self.conditioner.tokenize(spelled, cut=True, padding="longest")
        self.num_cut += tokens.num_cut
        return tokens

    def encode(self, tokens: TextTokens) -> TextStates:
        """What the transformer reads of tokens."""
        return self.conditioner.encode_tokens(tokens)

    @property
    def null_prompt(self) -> str | None:
        """The text that stands for no text; None where the transformer learns what does."""
        return self.network.text_conditioner.null_prompt

    @torch.no_grad()
    def null(self) -> TextStates:
        """What the transformer reads of `null_prompt`, one row."""
        if self._null is None:
            assert self.null_prompt is not None
            if self._cache is not None:
                self._null = self._cache.text([self.null_prompt])
            else:
                self._null = self.encode(self.tokens([self.null_prompt]).to(self.device))
        return self._null


def origins_of(config: TextConfig, network: Any) -> dict[str, str | Untrained]:
    """Where the encoders that a transformer reads come from, by their places; none of a trained one.

    Raises:
        OpenSoraError: settings that name another number of encoders.
    """
    places = network.text_conditioner.encoder_places
    name = type(network).__name__
    if isinstance(config, TrainedText):
        if len(places) > 1:
            raise OpenSoraError(
                f"one text encoder can be trained along, and a {name} reads {len(places)}; use "
                "objective.text.type=FrozenText"
            )
        return {}
    if len(places) == 1 and config.origin_2 is not None:
        raise OpenSoraError(f"a {name} reads one text encoder; leave objective.text.origin_2 out")
    second = config.origin if config.origin_2 is None else config.origin_2
    if len(places) > 1 and config.origin_2 is None and isinstance(config.origin, Untrained):
        raise OpenSoraError(
            f"a {name} reads {len(places)} text encoders; describe the other by objective.text.origin_2"
        )
    return dict(zip(places, (config.origin, second), strict=False))


def tokenizer_of(origin: str | Untrained, place: str) -> Any:
    """The tokenizer of an encoder, by the encoder's place; an untrained one reads bytes."""
    return ByT5Tokenizer() if isinstance(origin, Untrained) else find_tokenizer(origin, tokenizer_place(place))


def describe_origins(origins: Mapping[str, str | Untrained]) -> str:
    """Where text encoders came from, in words."""
    return " and ".join(dict.fromkeys(describe_origin(origin) for origin in origins.values()))


def fingerprint_of_encoders(encoders: Mapping[str, nn.Module]) -> str:
    """A hash of all their weights."""
    if len(encoders) == 1:
        (encoder,) = encoders.values()
        return fingerprint(encoder.state_dict())
    return fingerprint(nn.ModuleDict(dict(encoders)).state_dict())


def build_trained_encoder(config: TrainedText, init_from: Origin | None, words: int, device: str) -> Any:
    """A T5 encoder in training mode, with an embedding for each of so many words.

    Raises:
        OpenSoraError: neither options nor a model to start from.
    """
    if config.options is not None:
        with torch.device(META) if device == META else torch.device("cpu"):
            options = {"vocab_size": words, **config.options}
            return build_model(network_class("text_encoder"), options, Path("objective.text.options"))
    if init_from is None:
        raise OpenSoraError("a text encoder that is trained needs objective.text.options, or objective.init_from")
    encoder = build_part(init_from, "text_encoder", device)
    if len(encoder.get_input_embeddings().weight) < words:
        # A model of before the language grew; its words come first in the vocabulary of today.
        encoder.resize_token_embeddings(words, mean_resizing=False)
    return encoder.requires_grad_(True).train()
