"""Command lines to dataclasses by tyro, with its framed error pages turned into one line."""

import contextlib
import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from opensora.errors import OpenSoraError
from opensora.settings import nearest_name


def parse(options: Any, args: Sequence[str], prog: str) -> Any:
    """Reads `args` as the dataclass `options`, or as one of a union of dataclasses; `--help` prints and exits.

    A dataclass may say in `REFUSED` what to do instead of options that it does not have.

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
    raise OpenSoraError(f"{_statement(page.getvalue(), options, args, prog)} (see {prog} --help)")


def _statement(page: str, options: Any, args: Sequence[str], prog: str) -> str:
    """What is wrong, in one sentence."""
    words = list(itertools.takewhile(lambda token: not token.startswith("-"), args))[:1]
    known = _option_names(_page(options, [*words, "--help"], prog))
    # A union of commands lists its options only after one of its members.
    members = re.search(r"\{(.*)\}", _sentence(_page(options, [], prog))) if len(known) < 2 else None
    if members and words:
        names = [name.strip() for name in members[1].split(",")]
        return f"unknown command {words[0]!r}{nearest_name(words[0], names)}"
    for token in itertools.takewhile(lambda token: token != "--", args):
        name = token.split("=")[0].replace("_", "-")
        if len(known) > 1 and name.startswith("--") and name not in known:
            if refused := getattr(options, "REFUSED", {}).get(name):
                return f"there is no option {name}: {refused}"
            hint = nearest_name(name, known)
            return f"unknown option {token.split('=')[0]}{hint if hint.startswith('; did') else ''}"
    sentence = _sentence(page)
    if match := re.fullmatch(r"Unrecognized options: ([^-].*)", sentence):
        return f"unexpected {match[1]}; text with spaces belongs in quotes"
    return sentence


def _page(options: Any, args: list[str], prog: str) -> str:
    """What tyro prints for a command line that it answers by printing, in one column."""
    page = io.StringIO()
    with (
        _narrow_terminal(),
        contextlib.redirect_stdout(page),
        contextlib.redirect_stderr(page),
        contextlib.suppress(SystemExit),
    ):
        tyro.cli(options, prog=prog, args=args, config=(tyro.conf.FlagCreatePairsOff,))
    return page.getvalue()


@contextlib.contextmanager
def _narrow_terminal() -> Iterator[None]:
    """Groups of options come side by side on a wide terminal, where a line is no longer an option."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _option_names(help_page: str) -> list[str]:
    """Option names off a help page, where they stand at the start of a line or after a comma there."""
    listed = [line for line in help_page.splitlines() if re.match(r"\W*-", line)]
    return list(dict.fromkeys(name for line in listed for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", line)))


def _sentence(error_page: str) -> str:
    """The sentence between the title of tyro's frame and the rule below; frames come in Unicode and in ASCII."""
    lines = [line.strip().strip("│").strip() for line in error_page.splitlines()]
    lines = [line for line in lines if line]
    is_rule = [set(line) <= set("─-╰╯") for line in lines]
    start = 2 if is_rule[1:2] == [True] else 1
    sentence = " ".join(itertools.takewhile(lambda line: not set(line) <= set("─-╰╯"), lines[start:]))
    for pattern, ours in (
        (r"^Error parsing (\S+): ", r"\1: "),
        (r"no type matching .*INT could be instantiated from \[(.*)\]", r"\1 is not a whole number"),
        (r"no type matching .*FLOAT could be instantiated from \[(.*)\]", r"\1 is not a number"),
        (r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number"),
        (r"could not convert string to float: (.*)", r"\1 is not a number"),
    ):
        sentence = re.sub(pattern, ours, sentence)
    return sentence.rstrip(".") or "the command line cannot be understood"
