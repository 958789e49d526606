"""Mistakes in a command line that can be seen before it is read, each in one sentence that says what to type."""

import dataclasses
import importlib
import itertools
import os
import pkgutil
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from opensora.errors import OpenSoraError
from opensora.settings import nearest_name

# Hyphens and dashes that editors and web pages put in place of `-`.
_DASHES = "-\u2010-\u2015\u2212\u2e3a\u2e3b\ufe58\ufe63\uff0d"
_CLOSE = 0.72  # how alike two names of options are to be: `--steps` does not mean `--save-fps`


@dataclass(frozen=True)
class Option:
    """An option as a dataclass declares it.

    Attributes:
        names: on the command line, such as `("--guidance-scale", "--cfg-scale")`.
        metavar: how its value is shown; empty for a flag.
        repeats: it may be given several times.
    """

    names: tuple[str, ...]
    metavar: str
    repeats: bool

    @property
    def is_text(self) -> bool:
        """Whether an empty value means something."""
        return self.metavar.startswith("TEXT")


def kind_of(command: str) -> Any:
    """A command's dataclass, or union of dataclasses: `PlanServing` of "plan serving"; None if its module has none."""
    module = importlib.import_module(f"opensora.cli.{command.replace(' ', '_')}")
    return getattr(module, command.title().replace(" ", ""), None)


def commands_of(kind: Any) -> dict[str, Any]:
    """The members of a union of commands by their names; empty for a single command."""
    names = ((_subcommand_of(member), _class_of(member)) for member in typing.get_args(kind))
    return {name: cls for name, cls in names if name}


def chosen_of(kind: Any, args: Sequence[str]) -> Any:
    """The member of a union of commands that the first word chooses; the union itself where it chooses none."""
    return commands_of(kind).get(args[0], kind) if args else kind


def options_of(kind: Any) -> dict[str, Option]:
    """Every option of a command, or of all members of a union of commands, by its names."""
    classes = list(commands_of(kind).values()) or [kind]
    return {name: option for cls in classes for option in _declared(cls) for name in option.names}


def check_args(kind: Any, args: Sequence[str]) -> None:
    """Raises `OpenSoraError` for what tyro would misunderstand, take silently, or explain badly."""
    known = options_of(kind)
    tokens = list(itertools.takewhile(lambda token: token != "--", args))
    seen: dict[Option, str] = {}
    for token, following in itertools.zip_longest(tokens, tokens[1:]):
        name, equals, value = token.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        option = known.get(name)
        if option is None:
            _check_dashes(token, known)
            continue
        if option in seen and not option.repeats:
            both = "" if seen[option] == name else f", as {seen[option]} and as {name}"
            raise OpenSoraError(f"{option.names[0]} is given twice{both}; give it once")
        seen[option] = name
        given = value if equals else following
        if not option.metavar:
            _check_flag(name, given, is_joined=bool(equals))
        elif given is None or (not equals and re.match(r"--?[a-zA-Z]", given)):
            dashed = "" if given is None or given.startswith("--") else f"; one with a dash in front is {name}={given}"
            raise OpenSoraError(f"{name} needs a value: {name} {option.metavar}{dashed}")
        elif not given.strip() and not option.is_text:
            raise OpenSoraError(f"{name} is empty; give {option.metavar}, or leave {name} out")


def check_paths(options: Any) -> None:
    """Raises `OpenSoraError` for paths of Windows where they would be odd names of files."""
    if os.name == "nt":
        return
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            check_paths(value)
        elif (isinstance(value, Path) or field.name == "output") and re.match(r"[A-Za-z]:\\|\\\\", str(value)):
            raise OpenSoraError(f"{value} is a path of Windows; here folders are separated by /, as in folder/clip.mp4")


def describe_unknown(name: str, known: Sequence[str], prog: str) -> str:
    """An option that does not exist, and what may have been meant."""
    near = nearest_option(name, known)
    if near is not None:
        return f"unknown option {name}; did you mean {near}?"
    elsewhere = [command for command, kind in _commands() if prog != f"opensora {command}" and name in options_of(kind)]
    return f"unknown option {name}" + (f"; it is one of opensora {' and '.join(elsewhere)}" if elsewhere else "")


def nearest_option(name: str, known: Sequence[str]) -> str | None:
    """The option that is spelled nearly so, or that begins so."""
    hint = nearest_name(name, known, cutoff=_CLOSE)
    if hint.startswith("; did"):
        return hint.removeprefix("; did you mean ").removesuffix("?")
    longer = [option for option in known if option.startswith(name) and len(name) >= len("--cfg")]
    return longer[0] if longer else None


def _check_dashes(token: str, known: dict[str, Option]) -> None:
    """One dash where two belong, or a long one."""
    match = re.fullmatch(rf"[{_DASHES}]+([A-Za-z][\w-]*)(=.*)?", token)
    if match is None or token.startswith("--") or token in ("-h", "-"):
        return
    meant = f"--{match[1].replace('_', '-')}"
    near = nearest_option(meant, list(known)) or next((name for name in known if name.startswith(meant)), None)
    if token.startswith("-"):
        said = f"did you mean {near}?" if near else "options begin with two dashes"
        raise OpenSoraError(f"unknown option {token.split('=')[0]}; {said}")
    if near is not None:
        raise OpenSoraError(f"{token} begins with another dash than options do; write {near}{match[2] or ''}")


def _check_flag(name: str, value: str | None, *, is_joined: bool) -> None:
    said = value is not None and value.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0", "none")
    if is_joined or said:
        raise OpenSoraError(f"{name} takes no value; write {name} alone, or leave it out")


def _declared(cls: Any) -> Iterator[Option]:
    """The options of a dataclass, groups included; what has no name on the command line is left out."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        extras = getattr(hint, "__metadata__", ())
        plain = _class_of(hint)
        if tyro.conf.Positional in extras:
            continue
        if dataclasses.is_dataclass(plain):
            yield from _declared(plain)
            continue
        said = [extra for extra in extras if hasattr(extra, "metavar")]
        name = next((extra.name for extra in said if extra.name), field.name).strip("_").replace("_", "-")
        aliases = [alias for extra in said for alias in extra.aliases or ()]
        is_flag = plain is bool
        name = f"--no-{name}" if is_flag and field.default is True else f"--{name}"
        metavar = "" if is_flag else next((extra.metavar for extra in said if extra.metavar), field.name.upper())
        yield Option((name, *aliases), metavar, repeats=tyro.conf.UseAppendAction in extras)


def _class_of(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def _subcommand_of(member: Any) -> str:
    return next((extra.name for extra in getattr(member, "__metadata__", ()) if hasattr(extra, "is_default")), "")


def _commands() -> Iterator[tuple[str, Any]]:
    """Every command and its dataclass, or union of dataclasses: see `main.py`."""
    for module in pkgutil.iter_modules(importlib.import_module("opensora.cli").__path__):
        command = module.name.replace("_", " ")
        kind = kind_of(command)
        if dataclasses.is_dataclass(kind) or typing.get_args(kind):
            yield command, kind
