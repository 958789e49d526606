"""Command lines to dataclasses by tyro, with its framed error pages turned into one line."""

import contextlib
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

import tyro

from opensora.errors import OpenSoraError
from opensora.settings import nearest_name


def parse(options: Any, args: Sequence[str], prog: str) -> Any:
    """Reads `args` as the dataclass `options`, or as one of a union of dataclasses; `--help` prints and exits.

    Raises:
        OpenSoraError: an unknown option (names the nearest), a missing or impossible value.
    """
    page = io.StringIO()
    try:
        with contextlib.redirect_stderr(page):
            return tyro.cli(options, prog=prog, args=list(args), config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if not stop.code:
            raise
    known = _known_options(options, args, prog)
    for token in args:
        if token == "--":
            break
        name = token.split("=")[0].replace("_", "-")
        if len(known) > 1 and name.startswith("--") and name not in known:
            raise OpenSoraError(f"unknown option {token.split('=')[0]}{_near(name, known)} (see {prog} --help)")
    statement = _first_statement(page.getvalue())
    if match := re.fullmatch(r"Unrecognized options: ([^-].*)", statement):
        statement = f"unexpected {match[1]}; text with spaces belongs in quotes"
    raise OpenSoraError(f"{statement} (see {prog} --help)")


def _near(name: str, known: list[str]) -> str:
    hint = nearest_name(name, known)
    return hint if hint.startswith("; did") else ""


def _known_options(options: Any, args: Sequence[str], prog: str) -> list[str]:
    """Option names off the help page, of the member of a union that `args` begin with; none if they name no member."""
    page, words = io.StringIO(), list(itertools.takewhile(lambda token: not token.startswith("-"), args))
    with contextlib.redirect_stdout(page), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        tyro.cli(options, prog=prog, args=[*words[:1], "--help"], config=(tyro.conf.FlagCreatePairsOff,))
    # Options stand at the start of a line of the help page or after a comma there.
    listed = [line for line in page.getvalue().splitlines() if re.match(r"\W*-", line)]
    return list(dict.fromkeys(name for line in listed for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", line)))


def _first_statement(page: str) -> str:
    """The sentence above the first rule inside tyro's frame."""
    lines = []
    for line in page.splitlines():
        inner = line.strip().strip("│").strip()
        if line.strip().startswith("╭"):
            continue
        if not inner or set(inner) <= {"─", "╰", "╯"}:
            break
        lines.append(inner)
    statement = " ".join(lines) or "the command line could not be understood"
    statement = re.sub(r"^Error parsing (\S+): ", r"\1: ", statement)
    statement = re.sub(
        r"no type matching .*INT could be instantiated from \[(.*)\]", r"\1 is not a whole number", statement
    )
    statement = re.sub(
        r"no type matching .*FLOAT could be instantiated from \[(.*)\]", r"\1 is not a number", statement
    )
    statement = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", statement)
    statement = re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", statement)
    return statement.rstrip(".")
