"""How options look on a help page, which of them were given, and what they are called in errors."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tyro.conf import arg

from opensora import limits
from opensora.errors import OpenSoraError
from opensora.files import check_writable

FLAG: Any = arg(help_behavior_hint="")


def option(metavar: str, default: str = "", **more: Any) -> Any:
    """An option whose default is None: none at all, the model's own, or what `default` tells on the help page."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "", **more)


def given_options(options: Any) -> Iterator[tuple[str, Any]]:
    """(field, value) of what was given, groups included; what was not is None, False for a flag, () for a list."""
    for name, value in _fields(options):
        if value is not None and value is not False and value != ():
            yield name, value


def refuse_idle(options: Any, names: Iterable[str], reason: str) -> None:
    """Raises `OpenSoraError` for the first of these options that was given: beside others it would change nothing."""
    for field in dataclasses.fields(options):
        if field.name in names and getattr(options, field.name) != field.default:
            raise OpenSoraError(f"{flag(field.name)} has no effect: {reason}; leave it out")


def flag(field: str) -> str:
    """`num_frames` -> `--num-frames`."""
    return f"--{field.strip('_').replace('_', '-')}"


def with_flags(text: str, *options: Any) -> str:
    """A text as the command line says it: where it names a field in backticks, the option of that name."""
    known = {name for group in options for name, _ in _fields(group)}
    return re.sub(r"`(\w+)`", lambda match: flag(match[1]) if match[1] in known else match[0], text)


def _fields(options: Any) -> Iterator[tuple[str, Any]]:
    """(field, value) of all options, groups included."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value)
        else:
            yield field.name, value


def check_count(option: str, value: int, least: int = 1) -> None:
    """Raises `OpenSoraError` for a number below `least`."""
    if value < least:
        raise OpenSoraError(f"{option} is {value}; give {least} or more")
    limits.check_count(option, value, limits.WORKERS if option == "--workers" else limits.CLIPS, least)


def check_output(option: str, path: Path | None, suffix: str) -> None:
    """Raises `OpenSoraError` for a file that could not be written at the end, or whose ending says something else."""
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise OpenSoraError(f"{option} is {path}; give a file that ends in {suffix}")
    check_writable(path)
