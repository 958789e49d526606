"""From prompts to what the transformer reads: spelled as its captions were, encoded, repeated for every video."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opensora.contents import shown
from opensora.errors import OpenSoraError
from opensora.models.text.cleaning import clean_text, has_words, leaves_nothing, removed_words
from opensora.models.text.conditioner import TextConditioner, TextStates
from opensora.models.text.prompts import append_scores, as_prompt_lists
from opensora.sampling.finite import check_finite

logger = logging.getLogger(__name__)


class PromptingMixin:
    """The text of a pipeline's calls."""

    config: Any
    networks: dict[str, Any]
    transformer: Any
    _execution_device: torch.device

    def on_device(self, name: str) -> contextlib.AbstractContextManager[None]:
        """See the pipeline."""
        raise NotImplementedError

    def _exclusive(self) -> contextlib.AbstractContextManager[Any]:
        """See `RunsMixin`."""
        raise NotImplementedError

    def spell(self, prompts: Sequence[str], scores: Mapping[str, float | str | None] | None = None) -> list[str]:
        """Prompts as the model's captions were: with scores at the end, cleaned.

        Args:
            prompts: sentences.
            scores: in place of the model's default ones.

        Raises:
            OpenSoraError: a score that the model does not know, or a prompt of which cleaning leaves nothing.
        """
        known = self.config.scores or {}
        for name in scores or {}:
            if name not in known:
                knows = f"it knows {', '.join(known)}" if known else "it knows none; leave them out"
                raise OpenSoraError(f"this model was not trained with the score {name!r}; {knows}")
        told: dict[str, Any] = {**known, **(scores or {}), "in_words": self.config.scores_in_words}
        return [self._clean(prompt, append_scores(prompt, **told)) for prompt in prompts]

    def rated_scores(
        self, scores: Mapping[str, float | str | None] | None, fps: float | None
    ) -> Mapping[str, float | str | None] | None:
        """Scores of a call, among them its frame rate, of a model that reads it in the prompt."""
        if fps is None or "fps" not in (self.config.scores or {}):
            return scores
        return {"fps": fps, **(scores or {})}

    def spell_negative(self, negatives: Sequence[str]) -> list[str]:
        """Negative prompts likewise, which have no scores."""
        return [self._clean(negative, negative, "negative prompt") for negative in negatives]

    def _clean(self, text: str, with_scores: str, what: str = "prompt") -> str:
        if not self.config.clean_prompts:
            return with_scores
        if leaves_nothing(text):
            raise OpenSoraError(
                f"nothing is left of the {what} {shown(repr(text))} when it is cleaned as the captions were that this "
                "model learnt from: they had no Chinese characters, addresses, file names or codes; write it in English"
            )
        return clean_text(with_scores)

    def text_notes(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str] = (),
        scores: Mapping[str, float | str | None] | None = None,
    ) -> list[str]:
        """What of prompts and negative prompts the model will not read, a sentence each.

        Raises:
            OpenSoraError: it would read nothing of one, or one is longer than it can read.
        """
        spelled = [*self.spell(prompts, scores), *self.spell_negative(negatives)]
        whats = ["prompt"] * len(prompts) + ["negative prompt"] * len(negatives)
        notes = [
            self._note(text, cleaned, what)
            for text, cleaned, what in zip([*prompts, *negatives], spelled, whats, strict=True)
        ]
        if spelled:
            self.text_conditioner.tokenize(spelled)
        return [note for note in dict.fromkeys(notes) if note]

    def _note(self, text: str, spelled: str, what: str) -> str:
        removed = removed_words(text, spelled) if self.config.clean_prompts else []
        unread = self.text_conditioner.unread_pieces(spelled)
        rest = clean_text(text) if self.config.clean_prompts else text  # without scores, which a model knows
        for piece in unread:
            rest = rest.replace(piece, "")
        if unread and not has_words(rest):
            raise OpenSoraError(f"this model can read nothing of the {what} {shown(repr(text))}; write it in English")
        missing = [f"without {_listed(removed)}, which cleaning removes"] if removed else []
        missing += [f"and cannot tell {_listed(unread)} from other unknown characters"] if unread else []
        return f"this model reads the {what} as {shown(repr(spelled))}, {' '.join(missing)}" if missing else ""

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_videos_per_prompt: int = 1,
        scores: Mapping[str, float | str | None] | None = None,
        prompt_embeds: TextStates | Tensor | None = None,
        negative_prompt_embeds: TextStates | Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
    ) -> tuple[TextStates, TextStates | None]:
        """Text as a call takes it back in `prompt_embeds` and `negative_prompt_embeds`; arguments as of a call.

        Returns:
            The prompts' text, one row per video, and the negative prompts' or None.

        Raises:
            OpenSoraError: no text, or two for one; a prompt that is too long, holds unknown words, or of which the
                model would read nothing; text states that are not finite.
        """
        prompts, negatives = as_prompt_lists(prompt, negative_prompt, num_videos_per_prompt)
        if (prompts is None) == (prompt_embeds is None):
            both = "both prompt and prompt_embeds" if prompts else "neither prompt nor prompt_embeds"
            raise OpenSoraError(f"got {both}; give one of them: what should the video show?")
        if negatives is not None and negative_prompt_embeds is not None:
            raise OpenSoraError("got both negative_prompt and negative_prompt_embeds; give one of them")
        spelled = None if prompts is None else self.spell(prompts, scores)
        cleaned = None if negatives is None else self.spell_negative(negatives)
        for note in self.text_notes(prompts or [], negatives or [], scores):
            logger.warning("%s", note)
        if negatives is None and negative_prompt_embeds is None and self.text_conditioner.null_prompt is not None:
            cleaned = [self.text_conditioner.null_prompt]
        with self._exclusive():
            text = self._encode(spelled, "prompt", prompt_embeds, prompt_attention_mask)
            negative = self._encode(cleaned, "negative_prompt", negative_prompt_embeds, negative_prompt_attention_mask)
        assert text is not None
        if negative is not None and len(negative) not in (1, len(text)):
            raise OpenSoraError(f"got {len(negative)} negative texts for {len(text)} texts; give one, or one each")
        if negative is not None and len(negative) < len(text):
            negative = negative.repeat_each(len(text))
        return text.repeat_each(num_videos_per_prompt), negative and negative.repeat_each(num_videos_per_prompt)

    def _encode(
        self, prompts: list[str] | None, name: str, embeds: TextStates | Tensor | None, mask: Tensor | None
    ) -> TextStates | None:
        """One row of text per prompt, or as given, where and as the transformer reads it."""
        if mask is not None and not isinstance(embeds, Tensor):
            raise OpenSoraError(f"{name}_attention_mask goes with a tensor in {name}_embeds, and there is none")
        if prompts is not None:
            with contextlib.ExitStack() as encoders:
                for encoder in self.text_conditioner.encoders:
                    encoders.enter_context(self.on_device(encoder))
                embeds = self.text_conditioner.encode(prompts)
        if embeds is None:
            return None
        if isinstance(embeds, Tensor):
            embeds = TextStates(embeds, mask)
        if not isinstance(embeds, TextStates) or embeds.states.ndim != 3 or not len(embeds):
            what = type(embeds).__name__ if not isinstance(embeds, TextStates) else tuple(embeds.states.shape)
            raise OpenSoraError(f"{name}_embeds is {what}; expected what encode_prompt returns, or a tensor (B, L, D)")
        if self.text_conditioner.pools and embeds.pooled is None:
            raise OpenSoraError(f"{name}_embeds has no pooled text, which this model reads; give encode_prompt's")
        if embeds.mask is not None and embeds.mask.shape != embeds.states.shape[:2]:
            expected = tuple(embeds.states.shape[:2])
            raise OpenSoraError(f"{name}_attention_mask is {tuple(embeds.mask.shape)}; expected (B, L) = {expected}")
        check_finite(embeds.states, f"the text states of {name}")
        return embeds.to(self._execution_device, self.transformer.dtype)

    @property
    def text_conditioner(self) -> TextConditioner:
        """What turns prompts into what the transformer reads, from the components of the moment."""
        return self.transformer.text_conditioner(self.networks, self.transformer)


def _listed(words: Sequence[str], most: int = 10) -> str:
    more = f" and {len(words) - most} more words" if len(words) > most else ""
    return ", ".join(shown(repr(word), 40) for word in words[:most]) + more
