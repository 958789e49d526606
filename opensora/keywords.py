"""Keywords that a file gives, held against the function that is to take them: names, types, and how large numbers are.

A network's configuration is the keywords of its `__init__`, a model's index has those of the pipeline; annotations say
what each may be. So every value is checked as it is read, with its name and its file, and none is found wrong later.
"""

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from opensora import limits
from opensora.contents import describe_value, shown_number
from opensora.errors import OpenSoraError


def check_keywords(
    function: Callable[..., Any], values: Mapping[str, Any], where: Path | str, *, also: Sequence[str] = ()
) -> None:
    """Proves that a function can be called with these keywords, as far as names, types and sizes of numbers tell.

    Args:
        function: an `__init__`, say; parameters without an annotation take anything.
        values: name -> value as JSON has it; names with a leading underscore are the libraries' own notes.
        where: the file that they come from.
        also: names that may be there besides.

    Raises:
        OpenSoraError: naming the first that is not known (and the nearest that is), of another type, or too large.
    """
    parameters = {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}
    hints = _hints(function)
    for name, value in values.items():
        if name.startswith("_") or name in also:
            continue
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(parameters)}"
            raise OpenSoraError(f"{where}: unknown option {name!r}; {hint}")
        default = parameters[name].default
        if value is default or (type(value) is type(default) and value == default):
            continue
        annotation = hints.get(name, Any)
        if not _fits(value, annotation):
            raise OpenSoraError(f"{where}: {name} is {describe_value(value)}, expected {_words(annotation)}")
        check_sizes(name, value, where)


def check_sizes(name: str, value: Any, where: Path | str) -> None:
    """Refuses whole numbers and lengths of lists that no network has, at whatever depth of a value.

    Raises:
        OpenSoraError: naming the value and its limit.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            check_sizes(f"{name}.{key}", item, where)
    elif isinstance(value, list | tuple):
        if len(value) > limits.LAYERS:
            raise OpenSoraError(f"{where}: {name} has {len(value):,} entries, expected at most {limits.LAYERS:,}")
        for item in value:
            check_sizes(name, item, where)
    elif isinstance(value, int):
        most = limits.most_of(name) or limits.NETWORK_SIZE
        if abs(value) > most:
            raise OpenSoraError(f"{where}: {name} is {shown_number(value)}, expected {most:,} at most")
        least = limits.least_of(name)
        if least is not None and value < least:
            raise OpenSoraError(f"{where}: {name} is {value}, expected {least} or more")


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # one names what a library imports for type checkers alone
        parameters = inspect.signature(function).parameters
        return {name: p.annotation for name, p in parameters.items() if not isinstance(p.annotation, str)}


def _fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Any, inspect.Parameter.empty):
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, member) for member in arguments)
    if annotation in (None, type(None)):
        return value is None
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if annotation in (list, tuple, Sequence) or origin in (list, tuple, Sequence):
        members = [member for member in arguments if member is not Ellipsis]  # diffusers says tuple[int] of any length
        is_list = isinstance(value, list | tuple)
        return is_list and all(not members or any(_fits(item, member) for member in members) for item in value)
    if annotation in (dict, Mapping) or origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(annotation, type) or isinstance(value, annotation)


def _words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(member) for member in arguments)
    if annotation in (None, type(None)):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if annotation in (list, tuple, Sequence) or origin in (list, tuple, Sequence):
        members = [_words(member) for member in arguments if member is not Ellipsis]
        return f"a list, each entry {members[0]}" if members else "a list"
    if annotation in (dict, Mapping) or origin in (dict, Mapping):
        return "an object"
    named = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return named.get(annotation, getattr(annotation, "__name__", str(annotation)))
