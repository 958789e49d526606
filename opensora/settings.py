"""Settings: dataclasses that can be written to a JSON file and read back.

Strict in both directions. A key that the dataclass does not have is an `OpenSoraError` naming the nearest one; a value
of another type than the annotation says is an `OpenSoraError` naming both. Nothing is converted silently except what
loses nothing: an int where a float is expected, a list where a tuple is, text where a `Path` is. Understood
annotations: `bool`, `int`, `float`, `str`, `None`, `Path`, `Literal`, enums, `list`, `tuple`, `dict` with text keys,
`Any`, nested dataclasses, and unions of these. In a union of several dataclasses the key `"type"` holds the class name.
"""

import dataclasses
import difflib
import enum
import json
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from opensora.contents import read_json, shown_number
from opensora.errors import OpenSoraError
from opensora.files import replacing
from opensora.limits import most_of

T = TypeVar("T")

TYPE_KEY = "type"


def nearest_name(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`"; did you mean X?"` when a known name lies near, otherwise the list of what is known.

    Args:
        name: what was written.
        known: what could have been.
        cutoff: how near it has to lie, from 0 to 1.
    """
    names = list(known)
    lowered = {candidate.lower(): candidate for candidate in names}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=cutoff)
    if near:
        return f"; did you mean {lowered[near[0]]}?"
    return f"; known: {', '.join(names)}" if names else ""


def expected_one_of(value: Any, choices: Iterable[Any]) -> str:
    """`"expected one of X, Y"`, and `"; did you mean X?"` where one lies near what was written."""
    names = [str(choice) for choice in choices]
    return f"expected one of {', '.join(names)}{_only_near(nearest_name(str(value), names))}"


def to_dict(settings: Any) -> Any:
    """What `json.dump` can write: dataclasses as objects, tuples as lists, paths and enums as their values.

    A dataclass inside another carries its class name under `"type"` where the field's annotation leaves a choice.
    """
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        hints = typing.get_type_hints(type(settings))
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            plain[field.name] = to_dict(value)
            if len(dataclasses_in(hints[field.name])) > 1 and dataclasses.is_dataclass(value):
                plain[field.name] = {TYPE_KEY: type(value).__name__, **plain[field.name]}
        return plain
    if isinstance(settings, dict):
        return {str(key): to_dict(value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [to_dict(value) for value in settings]
    if isinstance(settings, enum.Enum):
        return settings.value
    if isinstance(settings, Path):
        return settings.as_posix()
    return settings


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects, such as `to_dict` makes, as one: {"loop.steps": 100, ...}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def parts_of_type(settings: Any, cls: type[T]) -> Iterator[T]:
    """Every `cls` among settings and the dataclasses inside them, outermost first."""
    if isinstance(settings, cls):
        yield settings
    elif dataclasses.is_dataclass(settings):
        for field in dataclasses.fields(settings):
            yield from parts_of_type(getattr(settings, field.name), cls)


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Builds `cls` from what `to_dict` made.

    Args:
        cls: a dataclass.
        data: a dictionary; missing keys take the field's default.
        where: what to call the place in error messages, such as a file name.

    Raises:
        OpenSoraError: an unknown key (names the nearest), a missing one, or a value of the wrong type.
    """
    return _build(cls, data, "", f" in {where}" if where else "")


def save_settings(settings: Any, path: str | Path) -> None:
    """Writes a dataclass, or what `to_dict` makes, as JSON; no half file is ever seen."""
    with replacing(path) as temporary:
        temporary.write_bytes(as_json(settings))


def as_json(settings: Any) -> bytes:
    """The text of a dataclass, or of what `to_dict` makes, in UTF-8; names of files that are none are escaped."""
    text = json.dumps(to_dict(settings), indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", errors="backslashreplace")


def load_settings(cls: type[T], path: str | Path) -> T:
    """Reads a dataclass from a JSON file.

    Raises:
        OpenSoraError: no such file, not JSON, or not this dataclass.
    """
    return from_dict(cls, read_json(path), where=str(path))


def build_value(annotation: Any, value: Any, key: str) -> Any:
    """A plain value as an annotation says it.

    Raises:
        OpenSoraError: it is of another type; calls it `key`.
    """
    return _build(annotation, value, key, "")


def _build(annotation: Any, value: Any, key: str, place: str) -> Any:
    """Checks `value` against an annotation and builds it; `key` and `place` are for the message."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin is typing.Annotated:
        return _build(arguments[0], value, key, place)
    if origin in (Union, types.UnionType):
        return _build_union(annotation, arguments, value, key, place)
    if origin is Literal:
        for choice in arguments:
            if value == choice and type(value) is type(choice):
                return value
        raise OpenSoraError(f"{key}{place} is {value!r}, {expected_one_of(value, arguments)}")
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return _build_dataclass(annotation, value, key, place)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        for member in annotation:
            if value == member.value:
                return member
        raise OpenSoraError(f"{key}{place} is {value!r}, {expected_one_of(value, (m.value for m in annotation))}")
    if origin in (list, tuple, Sequence) or annotation in (list, tuple):
        return _build_sequence(annotation, origin or annotation, arguments, value, key, place)
    if origin is dict or annotation is dict:
        if not isinstance(value, dict):
            raise _mistyped(annotation, value, key, place)
        inner = arguments[1] if len(arguments) == 2 else Any
        return {name: _build(inner, item, f"{key}.{name}", place) for name, item in value.items()}
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is Path and isinstance(value, (str, Path)):
        return Path(value)
    if annotation in (None, type(None)):
        if value is None:
            return None
    elif (
        isinstance(annotation, type)
        and isinstance(value, annotation)
        and not (isinstance(value, bool) and annotation is not bool)
    ):
        if annotation is int and (most := most_of(key)) is not None and abs(value) > most:
            raise OpenSoraError(f"{key}{place} is {shown_number(value)}, expected {most:,} at most")
        return value
    raise _mistyped(annotation, value, key, place)


def _build_union(annotation: Any, members: tuple[Any, ...], value: Any, key: str, place: str) -> Any:
    choices = dataclasses_in(annotation)
    if isinstance(value, dict) and choices:
        if len(choices) == 1:
            return _build(choices[0], value, key, place)
        by_name = {choice.__name__: choice for choice in choices}
        if TYPE_KEY not in value:
            raise OpenSoraError(f"{key}{place} needs a key {TYPE_KEY!r} naming one of {', '.join(by_name)}")
        name = value[TYPE_KEY]
        if not isinstance(name, str) or name not in by_name:
            raise OpenSoraError(f"{key}.{TYPE_KEY}{place} is {name!r}, {expected_one_of(name, by_name)}")
        rest = {item: content for item, content in value.items() if item != TYPE_KEY}
        return _build(by_name[name], rest, key, place)
    # An exact match first, so that `int | float` keeps 3 an int and `str | Path` keeps text as text.
    for member in members:
        if isinstance(member, type) and type(value) is member:
            return _build(member, value, key, place)
    for member in members:
        try:
            return _build(member, value, key, place)
        except OpenSoraError:
            continue
    raise _mistyped(annotation, value, key, place)


def _build_dataclass(cls: type, value: Any, key: str, place: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise _mistyped(cls, value, key, place)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    prefix = f"{key}." if key else ""
    given = {name: content for name, content in value.items() if name != TYPE_KEY or TYPE_KEY in fields}
    if TYPE_KEY in value and TYPE_KEY not in fields and value[TYPE_KEY] != cls.__name__:
        raise OpenSoraError(f"{prefix}{TYPE_KEY}{place} is {value[TYPE_KEY]!r}, expected {cls.__name__}")
    for name in given:
        if name not in fields:
            hint = nearest_name(name, fields).replace("; did you mean ", f"; did you mean {prefix}")
            raise OpenSoraError(f"unknown setting {prefix}{name}{place}{hint}")
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in given and not has_default:
            raise OpenSoraError(f"setting {prefix}{name}{place} is missing ({_name_of(hints[name])})")
    return cls(**{name: _build(hints[name], content, prefix + name, place) for name, content in given.items()})


def _build_sequence(
    annotation: Any, kind: Any, arguments: tuple[Any, ...], value: Any, key: str, place: str
) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _mistyped(annotation, value, key, place)
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise OpenSoraError(
                f"{key}{place} has {len(value)} entries, expected {len(arguments)}: {_name_of(annotation)}"
            )
        inner = list(arguments)
    else:
        inner = [arguments[0] if arguments else Any] * len(value)
    built = [
        _build(kind_, item, f"{key}[{i}]", place) for i, (kind_, item) in enumerate(zip(inner, value, strict=True))
    ]
    return tuple(built) if kind is tuple else built


def values_of(annotation: Any) -> Any:
    """What a dictionary of this annotation holds: `int` for `dict[str, int] | None`, `Any` where nothing is said."""
    members = typing.get_args(annotation) if typing.get_origin(annotation) is not dict else (annotation,)
    held = [typing.get_args(member)[1] for member in members if typing.get_origin(member) is dict]
    return held[0] if held else Any


def dataclasses_in(annotation: Any) -> list[type]:
    """The dataclasses among the members of a union (or the annotation itself)."""
    members = (
        typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    )
    return [member for member in members if isinstance(member, type) and dataclasses.is_dataclass(member)]


def _mistyped(annotation: Any, value: Any, key: str, place: str) -> OpenSoraError:
    near = _only_near(nearest_name(value, _words_in(annotation))) if isinstance(value, str) else ""
    return OpenSoraError(f"{key or 'the value'}{place} is {value!r}, expected {_name_of(annotation)}{near}")


def _name_of(annotation: Any) -> str:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_name_of(member) for member in typing.get_args(annotation))
    if annotation in (None, type(None)):
        return "none"
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)


def _words_in(annotation: Any) -> list[str]:
    """What may be written for an annotation, as far as it is words."""
    members = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return [str(member) for member in members]
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [word for member in members for word in _words_in(member)]
    return ["none"] if annotation is type(None) else []


def _only_near(hint: str) -> str:
    return hint if hint.startswith("; did") else ""
