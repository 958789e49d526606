"""Prompts before they reach a tokenizer, and everything that Open-Sora's users write into them.

A plain prompt is a sentence. Around it the published models know: scores, in which the captions of the training videos
ended (`... aesthetic score: 6.5.`); one text for each loop of a long video (`|0|a cat|2|a dog`: loops 0 and 1 show the
cat); a JSON object at the end that names reference files and a mask strategy; and that mask strategy, which says which
frames of which reference go where. All of it is read as data; spelling mistakes are errors.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from opensora import limits
from opensora.contents import parse_json, shown
from opensora.errors import OpenSoraError
from opensora.limits import parse_count


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


def as_prompt_lists(
    prompt: str | Sequence[str] | None, negative_prompt: str | Sequence[str] | None, num_videos_per_prompt: int
) -> tuple[list[str] | None, list[str] | None]:
    """Prompts, and as many negative prompts.

    Args:
        prompt: one sentence or several; None where their text is at hand.
        negative_prompt: one for all prompts, or one each; None, or nothing but blanks, for none.
        num_videos_per_prompt: 1 or more.

    Raises:
        OpenSoraError: an empty prompt, another number of negative prompts, or fewer than one video per prompt.
    """
    count = num_videos_per_prompt
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise OpenSoraError(f"num_videos_per_prompt is {count!r}; expected a whole number, 1 or more")
    prompts = None if prompt is None else as_prompt_list(prompt)
    negative_prompt = _none_if_blank(negative_prompt)
    if negative_prompt is None:
        return prompts, None
    negatives = as_prompt_list(negative_prompt, "negative_prompt")
    if prompts is not None and len(negatives) not in (1, len(prompts)):
        raise OpenSoraError(f"got {len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one each")
    return prompts, negatives * (len(prompts) // len(negatives) if prompts is not None else 1)


def _none_if_blank(texts: str | Sequence[str] | None) -> str | Sequence[str] | None:
    """As given, or None where there is no word in any of them: an empty negative prompt is no negative prompt."""
    listed = [texts] if isinstance(texts, str) else texts
    if not listed or any(not isinstance(text, str) or text.strip() for text in listed):
        return texts
    return None


# ---- scores


SCORE_WORDS = {
    "aesthetic": "aesthetic score:",
    "flow": "motion score:",
    "camera_motion": "camera motion:",
    "fps": "FPS.",
    "motion": "motion score.",
}
"""What each score is called in a prompt."""


SCORE_SCALES: dict[str, tuple[tuple[float, str], ...]] = {
    "aesthetic": (
        (-math.inf, "terrible"),
        (4, "very poor"),
        (4.5, "poor"),
        (5, "fair"),
        (5.5, "good"),
        (6, "very good"),
        (6.5, "excellent"),
    ),
    "flow": (
        (-math.inf, "very low"),
        (0.5, "low"),
        (2, "fair"),
        (5, "high"),
        (10, "very high"),
        (20, "extremely high"),
    ),
}
"""What scores are from which number on, in words (1.3)."""

_SPELLED = {"aesthetic": "The aesthetic score is", "flow": "The motion strength is"}

_RATE = re.compile(r"\d FPS\.( [-+.\de]+ motion score\.)?$")
_MOTION = re.compile(r"\d motion score\.$")


def append_scores(
    prompt: str,
    *,
    aesthetic: float | str | None = None,
    flow: float | str | None = None,
    camera_motion: str | None = None,
    fps: float | None = None,
    motion: float | None = None,
    in_words: bool = False,
) -> str:
    """The prompt with the scores at its end, as in the captions that the models were trained on.

    A score the prompt names already stays as it is.

    Args:
        prompt: the sentence.
        aesthetic: how beautiful, about 4 to 7 (1.2, 1.3), or one of the words for it (1.3).
        flow: how much moves, 0 and up (1.2, 1.3), or likewise.
        camera_motion: in words, such as "pan left" or "static" (1.2, 1.3).
        fps: frames per second (2.0), a sentence of its own.
        motion: how much moves, 1 to 15 (2.0), likewise.
        in_words: `aesthetic` and `flow` are told in the words of `SCORE_SCALES`, as to 1.3.

    Raises:
        OpenSoraError: a score that is not finite, an unknown word, or an empty camera motion.
    """
    if in_words:
        for name, score in (("aesthetic", aesthetic), ("flow", flow)):
            prompt += (
                "" if score is None or _SPELLED[name] in prompt else f" {_SPELLED[name]} {score_word(name, score)}."
            )
        aesthetic = flow = None
    for name, score in (("aesthetic", aesthetic), ("flow", flow), ("fps", fps), ("motion", motion)):
        if score is not None and not (isinstance(score, int | float) and math.isfinite(score)):
            raise OpenSoraError(f"{name} score is {score}, expected a number such as 6.5")
    if camera_motion is not None and not camera_motion.strip():
        raise OpenSoraError("camera motion is empty; say it in words such as 'pan left', or leave it out")
    scores = {
        SCORE_WORDS["aesthetic"]: None if aesthetic is None else f"{aesthetic:.1f}",
        SCORE_WORDS["flow"]: None if flow is None else f"{flow:.1f}",
        SCORE_WORDS["camera_motion"]: camera_motion,
    }
    for name, score in scores.items():
        prompt += "" if score is None or name in prompt else f" {name} {score}."
    if fps is not None:
        prompt = prompt.strip()
        prompt += "" if prompt.endswith(".") else "."
        prompt += "" if _RATE.search(prompt) else f" {fps:g} FPS."
    return prompt if motion is None or _MOTION.search(prompt) else f"{prompt} {motion:g} motion score."


def score_word(name: str, score: float | str) -> str:
    """A score in words.

    Args:
        name: "aesthetic" or "flow".
        score: a number, or the word itself.

    Raises:
        OpenSoraError: a number that is not finite, or an unknown word.
    """
    words = [word for _, word in SCORE_SCALES[name]]
    if isinstance(score, str):
        if score.strip().lower() not in words:
            raise OpenSoraError(f"{name} score is {score!r}, expected a number or one of {', '.join(words)}")
        return score.strip().lower()
    if not math.isfinite(score):
        raise OpenSoraError(f"{name} score is {score}, expected a number such as 6.5")
    return next(word for least, word in reversed(SCORE_SCALES[name]) if score >= least)


def caption_of_2_0(text: str, *, fps: float | None, motion: float | None) -> str:
    """A caption as Open-Sora 2.0 was trained on: "a cat 24 FPS, 4 motion score.", other than its prompts are spelled.

    Args:
        text: what the clip shows.
        fps: frames per second of the frames that are taken; None for images, and where nobody knows.
        motion: the score of the whole clip, which is rounded; None where nobody knows.
    """
    told = [] if fps is None else [f"{fps:g} FPS"]
    told += [] if motion is None else [f"{math.floor(motion + 0.5)} motion score"]
    return f"{text} {', '.join(told)}." if told else text


# ---- one text for each loop


def split_loops(prompt: str) -> tuple[list[str], list[int] | None]:
    """The texts of `|0|a cat|2|a dog`, stripped, and the loops they begin at: (["a cat", "a dog"], [0, 2]).

    A prompt that does not begin with `|0|` is one text for all loops, and its loops are None.

    Raises:
        OpenSoraError: something other than loop number and text in turns, or numbers that do not rise.
    """
    pieces = _loop_pieces(prompt)
    if pieces is None:
        return [prompt], None
    return [text.strip() for _, text in pieces], [start for start, _ in pieces]


def join_loops(texts: Sequence[str], starts: Sequence[int] | None) -> str:
    """Undoes `split_loops`.

    Raises:
        OpenSoraError: not one loop number for each text, or several texts without numbers.
    """
    if starts is None and len(texts) == 1:
        return texts[0]
    if starts is None or len(starts) != len(texts):
        given = "no loop numbers" if starts is None else f"{len(starts)} loop numbers"
        raise OpenSoraError(f"got {given} for {len(texts)} texts; expected one number for each")
    return "".join(f"|{start}|{text}" for start, text in zip(starts, texts, strict=True))


def prompt_of_loop(prompt: str, loop: int) -> str:
    """The text that loop number `loop` (0 is the first) of a long video shows; the last text lasts to the end.

    Raises:
        OpenSoraError: as `split_loops`, or a negative loop.
    """
    if loop < 0:
        raise OpenSoraError(f"loop is {loop}; expected 0 for the first or more")
    pieces = _loop_pieces(prompt)
    if pieces is None:
        return prompt
    return [text for start, text in pieces if start <= loop][-1]


def _loop_pieces(prompt: str) -> list[tuple[int, str]] | None:
    if not prompt.startswith("|0|"):
        return None
    pieces = prompt.split("|")[1:]
    starts, texts = pieces[::2], pieces[1::2]
    if len(starts) != len(texts) or not all(re.fullmatch(r"\d+", start, re.ASCII) for start in starts):
        raise OpenSoraError(
            f"the prompt {prompt!r} begins with |0|, so loop number and text must take turns: |0|first|2|from loop 2 on"
        )
    numbers = [parse_count("a loop of the prompt", start, limits.LOOPS, least=0) for start in starts]
    if any(later <= earlier for earlier, later in itertools.pairwise(numbers)):
        raise OpenSoraError(f"the loops of the prompt begin at {numbers}; expected rising numbers")
    return list(zip(numbers, texts, strict=True))


# ---- a JSON object at the end


@dataclass(frozen=True)
class PromptReferences:
    """What the JSON object at the end of a prompt may say.

    Attributes:
        reference_path: files of images or videos, separated by `;`; empty for none.
        mask_strategy: which of their frames go where, see `parse_mask_strategy`; empty for none.
    """

    reference_path: str = ""
    mask_strategy: str = ""


# A quoted name and a colon, or a name of ours: whoever writes that means an object, not a brace.
_QUOTE = r"""["'“”„]"""
_JSON_BEGINS = re.compile(rf"\{{\s*(?:{_QUOTE}[^{{}}:]*{_QUOTE}\s*:|{_QUOTE}?(?:reference_path|mask_strategy)|\}}\s*$)")


def split_json(prompt: str) -> tuple[str, dict[str, Any]]:
    """The prompt without the JSON object at its end, and that object (empty where there is none).

    The object begins where it looks like one, at a brace before a quoted name with a colon. Any other brace is text, as
    in `a {red|blue} ball`.

    Raises:
        OpenSoraError: what begins like an object is none up to the end of the prompt, or names a thing twice.
    """
    begin = _JSON_BEGINS.search(prompt)
    if begin is None:
        return prompt, {}
    text, rest = prompt[: begin.start()], prompt[begin.start() :]
    try:
        return text, parse_json(rest, "it")
    except OpenSoraError as error:
        raise OpenSoraError(
            f"the prompt ends in {shown(repr(rest))}, which is not a JSON object ({error}); "
            'expected for example {"reference_path": "first.png", "mask_strategy": "0"}'
        ) from None


def split_references(prompt: str) -> tuple[str, PromptReferences]:
    """As `split_json`, for the two entries that name references.

    Raises:
        OpenSoraError: as `split_json`; another entry, or one that is not text.
    """
    text, entries = split_json(prompt)
    known = [field.name for field in fields(PromptReferences)]
    for name, value in entries.items():
        if name not in known:
            raise OpenSoraError(f"the JSON object of the prompt has an entry {name!r}; known: {', '.join(known)}")
        if not isinstance(value, str):
            raise OpenSoraError(f"{name} in the JSON object of the prompt is {value!r}; expected text in quotes")
    return text, PromptReferences(**entries)


# ---- mask strategies


@dataclass(frozen=True)
class FramePlacement:
    """Frames of a reference that are placed into a clip: one entry of a mask strategy.

    Attributes:
        loop: the loop of a long video this is for, 0 is the first.
        reference: which reference, 0 is the first; -1 is the last.
        reference_start: its first latent frame that is taken; negative counts from its end.
        target_start: the latent frame of the clip it is placed at; negative counts from its end.
        length: how many latent frames, as far as reference and clip reach.
        edit_ratio: their denoising strength, 0 (they stay) to 1 (nothing is left of them).
    """

    loop: int = 0
    reference: int = 0
    reference_start: int = 0
    target_start: int = 0
    length: int = 1
    edit_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.loop < 0:
            raise OpenSoraError(f"a mask strategy names loop {self.loop}; expected 0 for the first or more")
        if self.length < 1:
            raise OpenSoraError(f"a mask strategy takes {self.length} frames; expected 1 or more")
        if not 0 <= self.edit_ratio <= 1:
            raise OpenSoraError(f"a mask strategy has edit ratio {self.edit_ratio}; expected 0 (kept) to 1 (generated)")

    def __str__(self) -> str:
        """Open-Sora's spelling, all six fields."""
        return ",".join(str(getattr(self, field.name)) for field in fields(self))


def parse_mask_strategy(text: str | None) -> list[FramePlacement]:
    """The entries of a mask strategy such as `"0;0,1,0,-1,1"`.

    Entries are separated by `;`, their fields by `,`, in the order of `FramePlacement`; fields left out at the end have
    their default. So `"0"` places the first frame of the first reference at the beginning, and `"0;0,1,0,-1,1"` also
    the first frame of the second reference at the end.

    Args:
        text: the strategy; None or an empty one places nothing.

    Raises:
        OpenSoraError: an entry with too many fields, one that is no number, or values that `FramePlacement` refuses.
    """
    return [_parse_placement(entry) for entry in text.split(";")] if text and text.strip() else []


def _parse_placement(entry: str) -> FramePlacement:
    names = [field.name for field in fields(FramePlacement)]
    spelled = [value.strip() for value in entry.split(",")]
    if len(spelled) > len(names):
        raise OpenSoraError(
            f"the entry {entry!r} of a mask strategy has {len(spelled)} fields; expected at most {','.join(names)}"
        )
    values: dict[str, Any] = {}
    for name, value in zip(names, spelled, strict=False):
        convert, kind = (float, "a number") if name == "edit_ratio" else (int, "a whole number")
        try:
            values[name] = convert(value)
        except ValueError:
            raise OpenSoraError(f"{name} in the entry {entry!r} of a mask strategy is not {kind}") from None
    return FramePlacement(**values)
