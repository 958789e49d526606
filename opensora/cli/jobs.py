"""What `opensora generate` is to make: one job per clip, each with its prompt, its own seed and its own file."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from opensora.errors import OpenSoraError
from opensora.media.write import format_of
from opensora.models.text.prompts import PromptReferences, split_references

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline


@dataclass(frozen=True)
class Job:
    """One clip to make.

    Attributes:
        prompt: as given, without the references named in it.
        seed: of its noise.
        path: of its file.
        references: that the prompt names itself.
        refined_prompt: what a language model made of the prompt; None without one.
    """

    prompt: str
    seed: int
    path: Path
    references: PromptReferences = field(default_factory=PromptReferences)
    refined_prompt: str | None = None

    @property
    def shown(self) -> str:
        """The prompt that the clip is made from."""
        return self.prompt if self.refined_prompt is None else self.refined_prompt

    def refined(self, prompt: str) -> "Job":
        """The same with a refined prompt."""
        return dataclasses.replace(self, refined_prompt=prompt)


@dataclass(frozen=True)
class PromptFile:
    """Prompts of a run, and which of them it makes: a run may be one of several that share a prompt file.

    Attributes:
        prompts: all of them.
        start: the first that is made.
        end: one past the last.
    """

    prompts: list[str]
    start: int
    end: int


def plan(prompts: PromptFile, num_videos: int, seed: int, output: str, format: str | None, suffix: str) -> list[Job]:
    """The clips of a run, prompt after prompt. Clip number k of all prompts has the seed `seed` + k.

    Args:
        prompts: what to show.
        num_videos: clips per prompt.
        seed: of the first clip.
        output: a file, or a folder if it is one, ends in a slash or has no ending; several clips get numbered files.
        format: file format, None to go by the ending.
        suffix: ending of the files in a folder if no format is given, such as `.mp4`.

    Raises:
        OpenSoraError: an impossible number or file name, or a prompt that ends in something broken.
    """
    if num_videos < 1:
        raise OpenSoraError(f"--num-videos is {num_videos}, expected at least 1")
    count = num_videos * len(prompts.prompts)
    if not 0 <= seed <= 2**63 - count:
        raise OpenSoraError(f"--seed is {seed}, expected a number from 0 to 2^63 - 1")
    wanted = [split_references(prompt) for prompt in prompts.prompts for _ in range(num_videos)]
    for text, _ in wanted:
        if not text.strip():
            raise OpenSoraError("the prompt is empty but for the JSON object; say what the video should show")
    numbers = range(prompts.start * num_videos, prompts.end * num_videos)
    path = Path(output)
    if output.endswith("/") or path.is_dir() or not path.suffix:
        texts = {seed + number: wanted[number][0] for number in numbers}
        paths = _named(path, f".{format}" if format else suffix, texts)
    else:
        format_of(path, format)
        stem = path.stem
        paths = (path if count == 1 else path.with_name(f"{stem}-{number}{path.suffix}") for number in numbers)
    return [
        Job(wanted[number][0].strip(), seed + number, path, wanted[number][1])
        for number, path in zip(numbers, paths, strict=True)
    ]


def read_prompts(
    given: Sequence[str], path: Path | None, start: int | None = None, end: int | None = None
) -> PromptFile:
    """The prompts given, or the lines of a prompt file; blank lines do not count.

    Args:
        given: on the command line.
        path: of the prompt file.
        start: number of the first line that is made, from 0; None for the first.
        end: one past the last; None for all.

    Raises:
        OpenSoraError: none or both given, nothing but blanks, an unreadable file, or no line in that range.
    """
    if given and path is not None:
        raise OpenSoraError("a prompt and --prompt-path both say what to show; give one of them")
    if path is None:
        if start is not None or end is not None:
            raise OpenSoraError("--start-index and --end-index choose lines of --prompt-path; give one")
        if not given:
            raise OpenSoraError('what should the video show? for example: opensora generate "a red ball rolls left"')
        if not all(prompt.strip() for prompt in given):
            raise OpenSoraError("the prompt is empty; say what the video should show")
        return PromptFile([prompt.strip() for prompt in given], 0, len(given))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise OpenSoraError(f"prompt file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise OpenSoraError(f"prompt file {path} cannot be read: it is not UTF-8 text") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise OpenSoraError(f"prompt file {path} holds no prompt; write one a line")
    first, last = start or 0, len(prompts) if end is None else min(end, len(prompts))
    if not 0 <= first < last:
        raise OpenSoraError(
            f"--start-index {first} and --end-index {last} choose none of the {len(prompts)} prompts of {path}"
        )
    return PromptFile(prompts, first, last)


def check_bundled_words(model: str, texts: Sequence[str]) -> None:
    """What `check_words` would find of a bundled model, before it is loaded, and the shapes it was never shown.

    Raises:
        OpenSoraError: an unknown word, or none at all.
    """
    from opensora.toybox.captions import describe_vocabulary, unknown_words, words_of

    unknown = list(dict.fromkeys(word for text in texts for word in unknown_words(text)))
    if unknown:
        raise OpenSoraError(f"{model} does not know: {', '.join(unknown)}. It knows {describe_vocabulary()}")
    for text in texts:
        if not words_of(text):
            raise OpenSoraError(f"the prompt {text!r} holds no word. {model} knows {describe_vocabulary()}")


def check_words(pipe: "OpenSoraPipeline", texts: Sequence[str]) -> None:
    """All prompts, before the first of them is sampled.

    Raises:
        OpenSoraError: a word that the model's tokenizer does not know.
    """
    from opensora.models.text import encoders
    from opensora.toybox.captions import VOCABULARY, describe_vocabulary

    try:
        encoders.check_words(pipe.tokenizer, list(texts))
    except OpenSoraError as error:
        if set(VOCABULARY) <= pipe.tokenizer.get_vocab().keys():
            raise OpenSoraError(f"{error}. It knows {describe_vocabulary()}") from None
        raise


def _named(folder: Path, ending: str, prompts: dict[int, str]) -> Iterator[Path]:
    """Files named after prompt and seed, with names that no file has yet: a name nobody chose must not cost a clip."""
    taken: set[Path] = set()
    for seed, prompt in prompts.items():
        slug = "-".join(re.findall(r"\w+", prompt.lower()))[:60].strip("-") or "video"
        stem = f"{slug}-{seed}"
        path, number = folder / (stem + ending), 2
        while path.exists() or path in taken:
            path, number = folder / f"{stem}-{number}{ending}", number + 1
        taken.add(path)
        yield path
