"""What is compared: every combination of the settings that vary, each a column, all else being equal."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opensora.contents import kind_of
from opensora.errors import OpenSoraError
from opensora.evaluation.suites import SuitePrompt
from opensora.generation.request import ClipRequest

MOST_CLIPS = 2_000
"""More than this has to be asked for twice."""


@dataclass(frozen=True)
class Column:
    """One combination of settings.

    Attributes:
        name: its settings in words, or the name of a folder of clips.
        settings: those that vary, by the name of the request's field, as they were given.
        request: a clip of it, all but prompt and seed; None for clips that are there already,
        files: by the name of their prompt.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    request: ClipRequest | None = None
    files: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One clip of a grid.

    Attributes:
        column: number of its column.
        prompt: number of its prompt.
        seed: number of its noise, of those of its prompt.
    """

    column: int
    prompt: int
    seed: int

    @property
    def name(self) -> str:
        """The same for ever, in tables and as a file name."""
        return f"{self.column:03d}-{self.prompt:04d}-{self.seed:03d}"


def columns_of(base: ClipRequest, axes: Mapping[str, Sequence[Any]]) -> list[Column]:
    """A column for every combination; the last axis varies fastest.

    Args:
        base: what all clips have in common.
        axes: field of the request -> its values.

    Raises:
        OpenSoraError: a value twice, or what no clip can be.
    """
    varying = {name: values for name, values in axes.items() if len(values) > 1}
    for name, values in axes.items():
        if len({str(value) for value in values}) < len(values):
            raise OpenSoraError(f"`{name}` has a value twice; give each once")
    fixed = replace(base, **{name: values[0] for name, values in axes.items() if len(values) == 1})
    columns = []
    for values in itertools.product(*varying.values()):
        settings = dict(zip(varying, values, strict=True))
        request = replace(fixed, **settings)
        replace(request, prompt="a clip").check()
        columns.append(Column(column_name(settings) or request.model_name, settings, request))
    return columns


def columns_of_folders(folders: Sequence[Path]) -> tuple[list[Column], list[SuitePrompt]]:
    """Columns of clips that are there, made by whatever program, and the names that all folders have a clip of.

    Raises:
        OpenSoraError: a folder without clips, or no name that all folders have.
    """
    columns = []
    for folder in folders:
        if not folder.is_dir():
            raise OpenSoraError(f"{folder} is no folder; give folders of clips")
        files = [path for path in sorted(folder.iterdir()) if path.is_file() and kind_of(path) in ("video", "image")]
        if not files:
            raise OpenSoraError(f"{folder} holds no clip; give a folder of clips")
        columns.append(Column(str(folder), files={path.stem: path for path in files}))
    if len({column.name for column in columns}) < len(columns):
        raise OpenSoraError("a folder is given twice; give each once")
    shared = [name for name in columns[0].files if all(name in column.files for column in columns)]
    if not shared:
        first, other = next(iter(columns[0].files)), next(iter(columns[-1].files))
        raise OpenSoraError(
            f"clips are compared with those of the same name in the other folder; there are none ({first}, {other}), "
            "name what belongs together alike"
        )
    return columns, [SuitePrompt(name, name) for name in shared]


def column_name(settings: Mapping[str, Any]) -> str:
    """`cfg_channels 3, guidance_scale 7`."""
    return ", ".join(f"{name} {shown_value(value)}" for name, value in settings.items())


def shown_value(value: Any) -> str:
    """A value as one would type it; values that differ are typed otherwise."""
    if value is None:
        return "default"
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    if isinstance(value, list | tuple):
        alone = "," if len(value) == 1 and isinstance(value[0], int) else ""  # the index 1, not the first one
        return (",".join(map(shown_value, value)) or "none") + alone
    if hasattr(value, "path"):  # an adapter
        return f"{value.path}" if value.scale is None else f"{value.path}:{value.scale:g}"
    return str(value)


def cells_of(columns: Sequence[Column], prompts: Sequence[SuitePrompt], num_seeds: int) -> list[Cell]:
    """All clips of a grid, column after column.

    Raises:
        OpenSoraError: none at all.
    """
    if num_seeds < 1:
        raise OpenSoraError(f"`seeds` is {num_seeds}; give at least 1")
    if not prompts or not columns:
        raise OpenSoraError("no clip is asked for; give at least one prompt and one setting")
    counts = (range(len(columns)), range(len(prompts)), range(num_seeds))
    return [Cell(*numbers) for numbers in itertools.product(*counts)]


def check_number(num_clips: int, confirmed: bool) -> None:
    """Raises `OpenSoraError` for more clips than anybody asks for by mistake."""
    if num_clips > MOST_CLIPS and not confirmed:
        raise OpenSoraError(
            f"the grid has {num_clips:,} clips, more than {MOST_CLIPS:,}; give `yes` if that is meant, or fewer "
            "settings, prompts or seeds"
        )


def num_clips_of(axes: Mapping[str, Sequence[Any]], num_prompts: int, num_seeds: int) -> int:
    """How many clips a grid has, told before it is laid out."""
    return math.prod(len(values) for values in axes.values()) * num_prompts * num_seeds
