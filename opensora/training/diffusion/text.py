"""What a transformer in training is told of its clips: captions spelled, cut into tokens, encoded.

The encoder is trained along (a small one, with the toybox's words), or it is frozen, or its work was done beforehand
and lies with the latents.

Letters: B captions, L tokens, D width of the text.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ByT5Tokenizer

from opensora.checkpoints.components import build_model
from opensora.checkpoints.weights import fingerprint
from opensora.data.cache import Cache
from opensora.errors import OpenSoraError
from opensora.models.families import network_class
from opensora.models.text.cleaning import clean_text
from opensora.models.text.conditioner import TextConditioner, TextStates, TextTokens
from opensora.toybox.captions import build_tokenizer
from opensora.training.parts import META, Origin, Untrained, build_part, find_tokenizer


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
    """A T5 encoder as it is.

    Attributes:
        origin: a model's name, a pipeline's folder, or a folder with the encoder and its tokenizer. An untrained one
            reads bytes.
        exported: write the encoder into the exported pipeline. Without it the folder holds configuration and tokenizer
            alone, and is loaded with `components={"text_encoder": ...}`.
    """

    origin: str | Untrained
    exported: bool = True


@dataclass(frozen=True)
class CachedText:
    """Text states that were computed beforehand and come with the latents.

    Attributes:
        origin: what they were computed with, for previews and the exported pipeline; see `FrozenText`. It is not
            loaded before it is needed.
        exported: see `FrozenText`.
    """

    origin: str | Untrained
    exported: bool = True


TextConfig = TrainedText | FrozenText | CachedText


class Captions:
    """Tokenizer and encoder.

    Args:
        config: where the encoder comes from.
        init_from: the model that training starts from, for `TrainedText` without options.
        network: the transformer that reads the text.
        clean: spell captions as the published models' were, see `models.text.cleaning`.
        device: where the encoder goes; on "meta" there is no tokenizer.
        dtype: of a frozen encoder.

    Attributes:
        encoder: None until it is needed, for text that was encoded beforehand.
        trained: whether the encoder is trained along.
        num_cut: captions so far that were longer than the transformer reads.
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
        self.num_cut = 0
        self.encoder: Any = None
        self.tokenizer: Any = None
        if isinstance(config, TrainedText):
            self.tokenizer = build_tokenizer()
            self.encoder = _trained(config, init_from, len(self.tokenizer), device)
        elif isinstance(config, FrozenText):
            self.load()

    def load(self) -> Any:
        """Encoder and tokenizer, from their files if they are not here yet."""
        if self.encoder is None:
            assert not isinstance(self.config, TrainedText)  # which has one from the start
            origin = self.config.origin
            self.encoder = build_part(origin, "text_encoder", self.device, self.dtype)
            if self.device != META:
                self.tokenizer = ByT5Tokenizer() if isinstance(origin, Untrained) else find_tokenizer(origin)
        return self.encoder

    def check_cache(self, cache: Cache) -> None:
        """Refuses a cache whose text states will be read and come from another encoder, or from other spellings.

        An encoder of the same name is taken for the same; one of another name is loaded and compared.
        """
        if not isinstance(self.config, CachedText):
            return
        made, origin, found = cache.index.made_from.text, self.config.origin, None
        if made is not None and made.origin != origin:
            found = fingerprint(build_part(origin, "text_encoder", "cpu", self.dtype).state_dict())
        cache.check_text(found, self.max_tokens, self.clean)

    @property
    def max_tokens(self) -> int:
        """The most tokens that the transformer reads."""
        return self.network.max_text_tokens

    @property
    def conditioner(self) -> TextConditioner:
        """What turns captions into what the transformer reads."""
        components = {"text_encoder": self.encoder, "tokenizer": self.tokenizer}
        return self.network.text_conditioner(components, self.network)

    def check_words(self, captions: Iterable[str]) -> None:
        """Refuses captions with words that the tokenizer does not know, and would take for one another."""
        if isinstance(self.config, CachedText):
            return
        self.conditioner.check_words([caption for caption in captions if caption.strip()])

    def tokens(self, captions: list[str]) -> TextTokens:
        """Tokens, as many as the longest caption has; what is too long is cut, and counted."""
        spelled = [clean_text(caption) for caption in captions] if self.clean else captions
        tokens = self.conditioner.tokenize(spelled, cut=True, padding="longest")
        self.num_cut += tokens.num_cut
        return tokens

    def encode(self, tokens: TextTokens) -> TextStates:
        """What the transformer reads of tokens."""
        return self.conditioner.encode_tokens(tokens)


def _trained(config: TrainedText, init_from: Origin | None, words: int, device: str) -> Any:
    if config.options is not None:
        with torch.device(META) if device == META else torch.device("cpu"):
            options = {"vocab_size": words, **config.options}
            return build_model(network_class("text_encoder"), options, Path("objective.text.options"))
    if init_from is None:
        raise OpenSoraError("a text encoder that is trained needs objective.text.options, or objective.init_from")
    return build_part(init_from, "text_encoder", device).requires_grad_(True).train()
