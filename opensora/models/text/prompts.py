"""Prompts before they reach a tokenizer: one list of sentences, none of them empty."""

from collections.abc import Sequence

from opensora.errors import OpenSoraError


def as_prompt_list(prompt: str | Sequence[str], name: str = "prompt") -> list[str]:
    """Return the prompts as a list, one or more, each stripped of surrounding white space.

    Args:
        prompt: one sentence or several.
        name: what to call them in an error.

    Raises:
        OpenSoraError: no prompt, an empty one, or something that is not text.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes) or not all(isinstance(p, str) for p in prompts):
        raise OpenSoraError(f"{name} is {prompt!r}; expected a sentence or a list of sentences")
    if not prompts:
        raise OpenSoraError(f"{name} is an empty list; give at least one sentence")
    stripped = [sentence.strip() for sentence in prompts]
    if "" in stripped:
        where = "" if len(stripped) == 1 else f" at position {stripped.index('')}"
        raise OpenSoraError(f"{name}{where} is empty; say in a few words what the video shows")
    return stripped


def pair_prompts(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, num_videos_per_prompt: int
) -> tuple[list[str], list[str] | None]:
    """One prompt and one negative prompt per video.

    Args:
        prompt: one sentence or several.
        negative_prompt: one for all prompts, or one each; None for none.
        num_videos_per_prompt: every prompt is repeated so often, its videos one after the other.

    Returns:
        The prompts, and as many negative prompts or None.

    Raises:
        OpenSoraError: an empty prompt, another number of negative prompts, or fewer than one video per prompt.
    """
    count = num_videos_per_prompt
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise OpenSoraError(f"num_videos_per_prompt is {count!r}; expected a whole number, 1 or more")
    prompts = as_prompt_list(prompt)
    negatives = None
    if negative_prompt is not None:
        negatives = as_prompt_list(negative_prompt, "negative_prompt")
        if len(negatives) not in (1, len(prompts)):
            raise OpenSoraError(
                f"got {len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one each"
            )
        negatives = negatives * (len(prompts) // len(negatives))
        negatives = [sentence for sentence in negatives for _ in range(count)]
    return [sentence for sentence in prompts for _ in range(count)], negatives
