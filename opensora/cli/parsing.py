"""Command lines to dataclasses by tyro, with its framed error pages turned into one line."""

import contextlib
import io
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tyro

from opensora.cli.mistakes import (
    Option,
    check_args,
    check_paths,
    chosen_of,
    commands_of,
    describe_unknown,
    nearest_option,
    options_of,
)
from opensora.errors import OpenSoraError
from opensora.settings import expected_one_of, nearest_name

_NARROW = 100  # groups of options come side by side on a wider terminal, where a line is no longer an option
_WIDE = 20_000


def parse(options: Any, args: Sequence[str], prog: str) -> Any:
    """Reads `args` as the dataclass `options`, or as one of a union of dataclasses; `--help` prints and exits.

    A dataclass may say in `REFUSED` what to do instead of options that it does not have.

    Raises:
        OpenSoraError: an unknown option (names the nearest), a missing or impossible value.
    """
    chosen = chosen_of(options, args)
    if hasattr(chosen, "SETTINGS"):
        args = _settings_together(args, chosen)
    args = list(_with_values(args, chosen))
    try:
        check_args(chosen, args)
        with contextlib.redirect_stderr(io.StringIO()):
            parsed = tyro.cli(options, prog=prog, args=list(args), config=(tyro.conf.FlagCreatePairsOff,))
    except OpenSoraError as error:
        raise OpenSoraError(f"{error} (see {prog} --help)") from None
    except SystemExit as stop:
        if not stop.code:
            raise
        page = _page(options, list(args), prog, columns=_WIDE)  # where no value is broken into lines
        raise OpenSoraError(f"{_statement(page, options, args, prog)} (see {prog} --help)") from None
    check_paths(parsed)
    return parsed


def _settings_together(args: Sequence[str], chosen: Any) -> list[str]:
    """All KEY=VALUE behind the other words: tyro wants them in one piece, and users write options between them."""
    known = options_of(chosen)
    words: list[str] = []
    settings: list[str] = []
    rest: list[str] = []
    takes_value = False
    for token in args:
        option = known.get(token.replace("_", "-")) if token.startswith("-") else None
        is_word = not token.startswith("-") and not takes_value
        takes_value = option is not None and bool(option.metavar)
        kind = rest if not is_word else settings if re.match(r"[A-Za-z_][\w.-]*\s*=", token) else words
        kind.append(token)
    return [*words, *settings, *rest]


def _with_values(args: Sequence[str], chosen: Any) -> Iterator[str]:
    """Options whose metavar is in brackets, such as `[networks|blocks]`, with the first value where none is given.

    Raises:
        OpenSoraError: what follows is nearly one of the values.
    """
    known = options_of(chosen)
    for token, following in itertools.zip_longest(args, args[1:]):
        yield token
        option = known.get(token.replace("_", "-"))
        if option is not None and option.metavar.startswith("["):
            values = _values_of(option)
            if following not in values:
                if following is not None and "; did" in nearest_name(following, values):
                    raise OpenSoraError(_no_choice(token, following, values))
                yield values[0]


def _values_of(option: Option) -> list[str]:
    return option.metavar.strip("[]").split("|")


def _no_choice(name: str, value: str, values: Sequence[str]) -> str:
    return f"{name} is {value!r}, {expected_one_of(value, values)}"


def _statement(page: str, options: Any, args: Sequence[str], prog: str) -> str:
    """What is wrong, in one sentence."""
    members = commands_of(options)
    if members and args and not args[0].startswith("-") and args[0] not in members:
        return f"unknown command {args[0]!r}{nearest_name(args[0], members)}"
    chosen = chosen_of(options, args)
    known = options_of(chosen)
    for token in itertools.takewhile(lambda token: token != "--", args):
        name = token.split("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known and name != "--help":
            if refused := getattr(chosen, "REFUSED", {}).get(name):
                return f"there is no option {name}: {refused}"
            if "." in name and hasattr(chosen, "SETTINGS"):
                return f"settings of a recipe have no dashes in front and a = behind: {token[2:].split('=')[0]}=VALUE"
            unknown = describe_unknown(token.split("=")[0], [*known, "--help"], prog)
            is_setting = hasattr(chosen, "SETTINGS") and ";" not in unknown
            return unknown + (
                "; settings of a recipe are written KEY=VALUE, such as loop.steps=100" if is_setting else ""
            )
    sentence = _sentence(page)
    if mistyped := re.match(r"(\S+): no type matching .* could be instantiated from \[(.*?)\](?:\. Got|$)", sentence):
        return _mistyped(mistyped[1], mistyped[2], sentence, known)
    if unexpected := re.fullmatch(r"Unrecognized options: ([^-].*)", sentence):
        for token, _, following in zip(args, args[1:], args[2:], strict=False):  # its first value stands between
            option = known.get(token.replace("_", "-"))
            if following == unexpected[1] and option is not None and option.metavar.startswith("["):
                return _no_choice(token, following, _values_of(option))
        return _unexpected(unexpected[1], list(known))
    if choice := re.fullmatch(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)", sentence):
        return _no_choice(
            choice[2], choice[1], [value for value in re.findall(r"'([^']*)'", choice[3]) if value != "None"]
        )
    return sentence


def _mistyped(name: str, given: str, sentence: str, known: Mapping[str, Option]) -> str:
    """A value of another kind than the option takes."""
    wanted = re.findall(r"\b(INT|FLOAT)\b|[{](?!None)([a-z]\w*)", sentence.split(" could be")[0])
    if wanted == [("INT", "")]:
        return f"{name}: {given} is not a whole number"
    if wanted == [("FLOAT", "")]:
        comma = re.fullmatch(r"'(-?\d*),(\d+)'", given)
        return f"{name}: {given} is not a number" + (f"; write {comma[1]}.{comma[2]}" if comma else "")
    if len(wanted) == 2 and ("INT", "") in wanted and any(word for _, word in wanted):
        return f"{name}: {given} is not a whole number, nor {max(word for _, word in wanted)}"
    option = known.get(name.split("/")[-1])
    return f"{name} is {given}, expected {option.metavar if option else 'something else'}"


def _unexpected(words: str, known: Sequence[str]) -> str:
    """Words that belong to no option."""
    name, equals, value = words.partition("=")
    near = nearest_option(f"--{name.strip()}", known) if equals and " " not in name.strip() else None
    if near is not None:
        return f"unexpected {words}; options begin with two dashes: {near} {value.strip()}"
    return f"unexpected {words}; text with spaces belongs in quotes"


def _page(options: Any, args: list[str], prog: str, columns: int = _NARROW) -> str:
    """What tyro prints for a command line that it answers by printing."""
    page = io.StringIO()
    with (
        _terminal(columns),
        contextlib.redirect_stdout(page),
        contextlib.redirect_stderr(page),
        contextlib.suppress(SystemExit),
    ):
        tyro.cli(options, prog=prog, args=args, config=(tyro.conf.FlagCreatePairsOff,))
    return page.getvalue()


@contextlib.contextmanager
def _terminal(columns: int) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(columns)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _sentence(error_page: str) -> str:
    """The sentence between the title of tyro's frame and the rule below; frames come in Unicode and in ASCII."""
    lines = [line.strip().strip("│").strip() for line in error_page.splitlines()]
    lines = [line for line in lines if line]
    is_rule = [set(line) <= set("─-╰╯") for line in lines]
    start = 2 if is_rule[1:2] == [True] else 1
    sentence = " ".join(itertools.takewhile(lambda line: not set(line) <= set("─-╰╯"), lines[start:]))
    if missing := re.match(r"Missing from [^:]*: (.*)", sentence):
        parts = (part.strip() for part in missing[1].split("(required)"))
        said = (re.sub(r"^(.*?) (?=[A-Z][a-z])(.*?)\.?$", r"\1 is missing: \2", part) for part in parts if part)
        return "; ".join(said)
    for pattern, ours in (
        (r"^Error parsing (\S+): ", r"\1: "),
        (r"Exceeds the limit \(\d+ digits\) for integer string conversion.*", "the number has too many digits"),
        (r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number"),
        (r"could not convert string to float: (.*)", r"\1 is not a number"),
    ):
        sentence = re.sub(pattern, ours, sentence)
    return sentence.rstrip(".") or "the command line cannot be understood"
