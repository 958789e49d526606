"""What `opensora generate` is to make: one job per clip, each with its prompt, its own seed and its own file."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opensora.errors import OpenSoraError
from opensora.media.write import format_of


@dataclass(frozen=True)
class Job:
    """One clip to make."""

    prompt: str
    seed: int
    path: Path


def plan(prompts: list[str], num_videos: int, seed: int, output: Path, format: str | None, suffix: str) -> list[Job]:
    """The clips of a run, prompt after prompt. Clip number k of the run has the seed `seed` + k.

    Args:
        prompts: what to show.
        num_videos: clips per prompt.
        seed: of the first clip.
        output: a file, or a folder if it is one or has no ending; several clips get numbered files.
        format: file format, None to go by the ending.
        suffix: ending of the files in a folder if no format is given, such as `.mp4`.

    Raises:
        OpenSoraError: an impossible number or file name.
    """
    if num_videos < 1:
        raise OpenSoraError(f"--num-videos is {num_videos}, expected at least 1")
    if not 0 <= seed <= 2**63 - num_videos * len(prompts):
        raise OpenSoraError(f"--seed is {seed}, expected a number from 0 to 2^63 - 1")
    wanted = [prompt for prompt in prompts for _ in range(num_videos)]
    if output.is_dir() or not output.suffix:
        paths = _named(output, f".{format}" if format else suffix, wanted, seed)
    else:
        format_of(output, format)
        paths = _numbered(output, len(wanted))
    return [Job(prompt, seed + index, path) for index, (prompt, path) in enumerate(zip(wanted, paths, strict=True))]


def read_prompts(prompt: str | None, prompt_path: Path | None) -> list[str]:
    """The prompt, or the lines of a prompt file; blank lines do not count.

    Raises:
        OpenSoraError: none or both given, nothing but blanks, or an unreadable file.
    """
    if prompt is not None and prompt_path is not None:
        raise OpenSoraError("a prompt and --prompt-path both say what to show; give one of them")
    if prompt_path is None:
        if prompt is None:
            raise OpenSoraError('what should the video show? for example: opensora generate "a red ball rolls left"')
        if not prompt.strip():
            raise OpenSoraError("the prompt is empty; say what the video should show")
        return [prompt.strip()]
    try:
        lines = prompt_path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise OpenSoraError(f"prompt file {prompt_path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise OpenSoraError(f"prompt file {prompt_path} cannot be read: it is not UTF-8 text") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise OpenSoraError(f"prompt file {prompt_path} holds no prompt; write one a line")
    return prompts


def _named(folder: Path, ending: str, prompts: list[str], seed: int) -> Iterator[Path]:
    """Files named after prompt and seed, with names that no file has yet: a name nobody chose must not cost a clip."""
    taken: set[Path] = set()
    for index, prompt in enumerate(prompts):
        slug = "-".join(re.findall(r"\w+", prompt.lower()))[:60].strip("-") or "video"
        stem = f"{slug}-{seed + index}"
        path, number = folder / (stem + ending), 2
        while path.exists() or path in taken:
            path, number = folder / f"{stem}-{number}{ending}", number + 1
        taken.add(path)
        yield path


def _numbered(output: Path, count: int) -> Iterator[Path]:
    for index in range(count):
        yield output if count == 1 else output.with_name(f"{output.stem}-{index}{output.suffix}")
