"""Several clips of one run: prompts given or read from a file, a seed and a file for each clip.

Clip number k of a run, counted over all prompts, has the seed of the run + k: each can be made again alone.
"""

import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opensora import limits
from opensora.contents import read_text, shown_number
from opensora.errors import OpenSoraError
from opensora.generation.request import ClipRequest
from opensora.media.write import format_of, is_numbered


@dataclass(frozen=True)
class Prompts:
    """Prompts of a run, and which of them it makes: a run may be one of several that share a prompt file.

    Attributes:
        texts: all of them.
        start: the first that is made.
        end: one past the last.
    """

    texts: list[str]
    start: int
    end: int


STANDARD_INPUT = Path("-")

# What editors take for the end of a line. `str.splitlines` ends lines at eight more characters, which text may hold.
_LINE_ENDS = re.compile(r"\r\n|\n|\r")


def random_seed() -> int:
    """A seed that nobody chose: of ten digits at most, to be typed again."""
    return secrets.randbelow(2**32)


def read_prompts(
    given: Sequence[str],
    path: Path | None,
    start: int | None = None,
    end: int | None = None,
    *,
    skip_comments: bool = False,
) -> Prompts:
    """The prompts given, or the lines of a prompt file; blank lines do not count.

    Args:
        given: prompts.
        path: of the prompt file; `STANDARD_INPUT` for that.
        start: number of the first line that is made, from 0; None for the first.
        end: one past the last; None for all.
        skip_comments: lines that begin with # do not count either.

    Raises:
        OpenSoraError: none or both given, nothing but blanks, an unreadable file, or no line in that range.
    """
    if given and path is not None:
        raise OpenSoraError("a prompt and `prompt_path` both say what to show; give one of them")
    if path is None:
        if start is not None or end is not None:
            raise OpenSoraError("`start_index` and `end_index` choose lines of `prompt_path`; give one")
        if skip_comments:
            raise OpenSoraError("`skip_comments` is for the lines of `prompt_path`; give one, or leave it out")
        if not given:
            raise OpenSoraError('what should the video show? for example: opensora generate "a red ball rolls left"')
        if not all(prompt.strip() for prompt in given):
            raise OpenSoraError("the prompt is empty; say what the video should show")
        return Prompts([prompt.strip() for prompt in given], 0, len(given))
    name = "standard input" if path == STANDARD_INPUT else f"prompt file {path}"
    text = _read_standard_input() if path == STANDARD_INPUT else read_text(path, "prompt file")
    lines = [line.strip() for line in _LINE_ENDS.split(text)]
    prompts = [line for line in lines if line and not (skip_comments and line.startswith("#"))]
    if not prompts:
        raise OpenSoraError(f"{name} holds no prompt; write one a line")
    first, last = start or 0, len(prompts) if end is None else min(end, len(prompts))
    if not 0 <= first < last:
        raise OpenSoraError(
            f"`start_index` {first} and `end_index` {last} choose none of the {len(prompts)} prompts of {name}"
        )
    return Prompts(prompts, first, last)


def _read_standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise OpenSoraError("standard input is not UTF-8 text; write the prompts in UTF-8, one a line") from None


def requests_of(prompts: Prompts, request: ClipRequest, num_videos: int) -> list[ClipRequest]:
    """The clips of a run, prompt after prompt: a request each, with its own seed.

    Args:
        prompts: what to show.
        request: everything else, and the seed of the first clip of the first prompt.
        num_videos: clips per prompt.

    Raises:
        OpenSoraError: an impossible number, or a prompt that ends in something broken.
    """
    if num_videos < 1:
        raise OpenSoraError(f"`num_videos` is {num_videos}, expected at least 1")
    count = num_videos * len(prompts.texts)
    if count > limits.CLIPS:
        raise OpenSoraError(f"`num_videos` is {shown_number(num_videos)}: more than {limits.CLIPS:,} clips in all")
    if not 0 <= request.seed <= 2**63 - count:
        raise OpenSoraError(f"`seed` is {request.seed}, expected a number from 0 to 2^63 - 1")
    texts = [text for text in prompts.texts for _ in range(num_videos)]
    wanted = [
        replace(request, prompt=text, seed=request.seed + number).separated() for number, text in enumerate(texts)
    ]
    return wanted[prompts.start * num_videos : prompts.end * num_videos]


def output_paths(
    requests: Sequence[ClipRequest], output: str, format: str | None, suffix: str, *, numbers: range | None = None
) -> list[Path]:
    """A file for each clip.

    Args:
        requests: of the clips.
        output: a file, or a folder if it is one, ends in a slash or has no ending. Files in a folder are named after
            prompt and seed, and take no name that a file has yet.
        format: file format, None to go by the ending.
        suffix: ending of the files in a folder if no format is given, such as `.mp4`.
        numbers: of the clips, which the names of several get; None for one clip, which takes the name itself.

    Raises:
        OpenSoraError: an ending that names no format, or another than `format`.
    """
    path = Path(output)
    if output.endswith("/") or path.is_dir() or not path.suffix:
        ending = "" if format == "frames" else f".{format}" if format else suffix
        return list(_named(path, ending, requests))
    format_of(path, format)
    if numbers is None:
        return [path]
    if is_numbered(path):  # a folder for each
        return [path.parent.absolute().with_name(f"{path.parent.name}-{number}") / path.name for number in numbers]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in numbers]


def written_of(written: Sequence[Path], paths: Sequence[Path]) -> str:
    """Which clips of a run that ended early are there, in words; "" for none."""
    return f"{len(written)} of {len(paths)} clips were written, up to {written[-1]}" if written else ""


def _named(folder: Path, ending: str, requests: Sequence[ClipRequest]) -> Iterator[Path]:
    """Files named after prompt and seed, with names that no file has yet: a name nobody chose must not cost a clip."""
    taken: set[Path] = set()
    for request in requests:
        slug = "-".join(re.findall(r"\w+", request.prompt.lower()))[:60].strip("-") or "video"
        stem = f"{slug}-{request.seed}"
        path, number = folder / (stem + ending), 2
        while path.exists() or path in taken:
            path, number = folder / f"{stem}-{number}{ending}", number + 1
        taken.add(path)
        yield path
