"""How options look on a help page, and which of them were given."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from tyro.conf import arg

FLAG: Any = arg(help_behavior_hint="")


def option(metavar: str, default: str = "", **more: Any) -> Any:
    """An option whose default is None: none at all, the model's own, or what `default` tells on the help page."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "", **more)


def given_options(options: Any) -> Iterator[tuple[str, Any]]:
    """(field, value) of what was given, groups included; what was not is None, False for a flag, () for a list."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from given_options(value)
        elif value is not None and value is not False and value != ():
            yield field.name, value


def flag(field: str) -> str:
    """`num_frames` -> `--num-frames`."""
    return f"--{field.strip('_').replace('_', '-')}"
