"""Suites of prompts: the same prompts under the same ids for ever, and noise that depends on nothing else.

A suite is `toybox` (held-out captions of the toy world, whose clips the judge can read), a text file with one prompt a
line, or a list in VBench's format: JSON objects with `prompt_en` and `dimension`.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opensora import limits
from opensora.contents import read_json
from opensora.errors import OpenSoraError
from opensora.generation.batch import read_prompts

TOYBOX: dict[str, Literal["en", "zh"]] = {"toybox": "en", "toybox-zh": "zh"}
"""Suites of the toy world -> language of their captions."""


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt of a suite.

    Attributes:
        id: names it in files of results.
        text: what a model is told.
        wanted: attribute -> label that the judge of the toy world should read; None where nobody can.
        dimensions: what VBench asks of its clips.
    """

    id: str
    text: str
    wanted: dict[str, str] | None = None
    dimensions: tuple[str, ...] = ()

    def seed(self, number: int) -> int:
        """Of its clip number `number`, whatever else is made: a number that `opensora generate --seed` takes."""
        digest = hashlib.blake2b(f"{self.id}\n{self.text}\n{number}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big")


def read_suite(suite: str | Path, num_prompts: int | None = None) -> list[SuitePrompt]:
    """The first prompts of a suite.

    Args:
        suite: a name of `TOYBOX`, or a file.
        num_prompts: how many; None for all, which a suite of the toy world does not have.

    Raises:
        OpenSoraError: no such suite, a file that is none, or fewer prompts than are asked for.
    """
    if num_prompts is not None:
        limits.check_count("`prompts`", num_prompts, limits.CLIPS)
    if str(suite) in TOYBOX:
        return _held_out(str(suite), 500 if num_prompts is None else num_prompts)
    path = Path(suite)
    if not path.suffix and not path.exists():
        raise OpenSoraError(f"unknown suite {suite}; give {', '.join(TOYBOX)}, or a file with one prompt a line")
    prompts = _of_json(path) if path.suffix.lower() == ".json" else _of_lines(path)
    if num_prompts is not None and num_prompts > len(prompts):
        raise OpenSoraError(f"{path} holds {len(prompts)} prompts, but {num_prompts} are asked for")
    return prompts[:num_prompts]


def _held_out(name: str, num_prompts: int) -> list[SuitePrompt]:
    from opensora.evaluation.toybox import held_out_samples

    samples = held_out_samples(num_prompts, language=TOYBOX[name])
    return [SuitePrompt(sample.id, sample.prompt, sample.wanted) for sample in samples]


def _of_lines(path: Path) -> list[SuitePrompt]:
    texts = read_prompts((), path).texts
    return [SuitePrompt(f"{path.stem}-{number:05d}", text) for number, text in enumerate(texts)]


def _of_json(path: Path) -> list[SuitePrompt]:
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise OpenSoraError(f"{path} is no list of prompts; VBench's is a list of objects with prompt_en and dimension")
    prompts = []
    for number, entry in enumerate(content):
        text, dimensions = (entry.get("prompt_en"), entry.get("dimension", [])) if isinstance(entry, dict) else ("", [])
        if not isinstance(text, str) or not text.strip():
            raise OpenSoraError(f"{path}: entry {number} has no prompt_en, the text of the prompt")
        prompts.append(
            SuitePrompt(f"{path.stem}-{number:05d}", text.strip(), dimensions=_names(path, number, dimensions))
        )
    return prompts


def _names(path: Path, number: int, dimensions: Any) -> tuple[str, ...]:
    if not isinstance(dimensions, list) or not all(isinstance(name, str) for name in dimensions):
        raise OpenSoraError(f"{path}: entry {number} has the dimension {dimensions!r}; a list of names is expected")
    return tuple(dimensions)
