"""From prompts to what the transformer reads: spelled as its captions were, encoded, repeated for every video."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.models.text.cleaning import clean_text
from opensora.models.text.conditioner import TextConditioner, TextStates
from opensora.models.text.prompts import append_scores, as_prompt_lists


class PromptingMixin:
    """The text of a pipeline's calls."""

    config: Any
    networks: dict[str, Any]
    transformer: Any
    _execution_device: torch.device

    def on_device(self, name: str) -> contextlib.AbstractContextManager[None]:
        """See the pipeline."""
        raise NotImplementedError

    def spell(self, prompts: Sequence[str], scores: Mapping[str, float | str | None] | None = None) -> list[str]:
        """Prompts as the model's captions were: with scores at the end, cleaned.

        Args:
            prompts: sentences.
            scores: in place of the model's default ones.

        Raises:
            OpenSoraError: a score that the model does not know.
        """
        known = self.config.scores or {}
        for name in scores or {}:
            if name not in known:
                knows = f"it knows {', '.join(known)}" if known else "it knows none; leave them out"
                raise OpenSoraError(f"this model was not trained with the score {name!r}; {knows}")
        spelled = [append_scores(prompt, **{**known, **(scores or {})}) for prompt in prompts]
        return self._clean(spelled)

    def _clean(self, prompts: Sequence[str]) -> list[str]:
        return [clean_text(prompt) if self.config.clean_prompts else prompt for prompt in prompts]

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
            OpenSoraError: no text, or two for one; a prompt that is too long or holds unknown words.
        """
        prompts, negatives = as_prompt_lists(prompt, negative_prompt, num_videos_per_prompt)
        if (prompts is None) == (prompt_embeds is None):
            both = "both prompt and prompt_embeds" if prompts else "neither prompt nor prompt_embeds"
            raise OpenSoraError(f"got {both}; give one of them: what should the video show?")
        if negatives is not None and negative_prompt_embeds is not None:
            raise OpenSoraError("got both negative_prompt and negative_prompt_embeds; give one of them")
        spelled = None if prompts is None else self.spell(prompts, scores)
        text = self._encode(spelled, prompt_embeds, prompt_attention_mask)
        assert text is not None
        cleaned = None if negatives is None else self._clean(negatives)
        negative = self._encode(cleaned, negative_prompt_embeds, negative_prompt_attention_mask)
        if negative is not None and len(negative) not in (1, len(text)):
            raise OpenSoraError(f"got {len(negative)} negative texts for {len(text)} texts; give one, or one each")
        if negative is not None and len(negative) < len(text):
            negative = negative.repeat_each(len(text))
        return text.repeat_each(num_videos_per_prompt), negative and negative.repeat_each(num_videos_per_prompt)

    def _encode(
        self, prompts: list[str] | None, embeds: TextStates | Tensor | None, mask: Tensor | None
    ) -> TextStates | None:
        """One row of text per prompt, or as given, where and as the transformer reads it."""
        if isinstance(embeds, Tensor):
            embeds = TextStates(embeds, mask)
        elif prompts is not None:
            with self.on_device("text_encoder"):
                embeds = self.text_conditioner.encode(prompts)
        return None if embeds is None else embeds.to(self._execution_device, self.transformer.dtype)

    @property
    def text_conditioner(self) -> TextConditioner:
        """What turns prompts into what the transformer reads, from the components of the moment."""
        return self.transformer.text_conditioner(self.networks, self.transformer)
