"""Words of a prompt that a model does not know, found before anything is sampled."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opensora.errors import OpenSoraError

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline


def check_bundled_words(model: str, texts: Sequence[str]) -> None:
    """What `check_words` would find of a bundled model, before it is loaded, and the shapes it was never shown.

    Raises:
        OpenSoraError: an unknown word, or none at all.
    """
    from opensora.toybox.captions import describe_vocabulary, language_of, unknown_words, words_of

    known = describe_vocabulary(language=language_of("".join(texts)))
    unknown = list(dict.fromkeys(word for text in texts for word in unknown_words(text)))
    if unknown:
        raise OpenSoraError(f"{model} does not know: {', '.join(unknown)}. It knows {known}")
    for text in texts:
        if not words_of(text):
            raise OpenSoraError(f"the prompt {text!r} holds no word. {model} knows {known}")


def check_words(pipe: "OpenSoraPipeline", texts: Sequence[str]) -> None:
    """All prompts, before the first of them is sampled.

    Raises:
        OpenSoraError: a word that the model's tokenizer does not know.
    """
    from opensora.toybox.captions import VOCABULARY, describe_vocabulary, language_of

    try:
        pipe.text_conditioner.check_words(texts)
    except OpenSoraError as error:
        if set(VOCABULARY) <= pipe.tokenizer.get_vocab().keys():
            known = describe_vocabulary(language=language_of("".join(texts)))
            raise OpenSoraError(f"{error}. It knows {known}") from None
        raise
