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

    def _exclusive(self) -> contextlib.AbstractContextManager[Any]:
        """See `RunsMixin`."""
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
        cleaned = None if negatives is None else self._clean(negatives)
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
            with self.on_device("text_encoder"):
                embeds = self.text_conditioner.encode(prompts)
        if embeds is None:
            return None
        if isinstance(embeds, Tensor):
            embeds = TextStates(embeds, mask)
        if not isinstance(embeds, TextStates) or embeds.states.ndim != 3 or not len(embeds):
            what = type(embeds).__name__ if not isinstance(embeds, TextStates) else tuple(embeds.states.shape)
            raise OpenSoraError(f"{name}_embeds is {what}; expected what encode_prompt returns, or a tensor (B, L, D)")
        if embeds.mask is not None and embeds.mask.shape != embeds.states.shape[:2]:
            expected = tuple(embeds.states.shape[:2])
            raise OpenSoraError(f"{name}_attention_mask is {tuple(embeds.mask.shape)}; expected (B, L) = {expected}")
        return embeds.to(self._execution_device, self.transformer.dtype)

    @property
    def text_conditioner(self) -> TextConditioner:
        """What turns prompts into what the transformer reads, from the components of the moment."""
        return self.transformer.text_conditioner(self.networks, self.transformer)
