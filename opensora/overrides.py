"""Settings changed from the command line: texts such as `loop.steps=100`, strict as `settings` is."""

import dataclasses
import json
import typing
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from opensora.contents import parse_json
from opensora.errors import OpenSoraError
from opensora.settings import TYPE_KEY, build_value, dataclasses_in, flatten, nearest_name, to_dict, values_of

T = TypeVar("T")

_MOST_MEANT = 3


def assignments(settings: Any) -> list[str]:
    """Every setting in the form that `apply_overrides` takes, such as `training.lr=0.0003`; the name is left out."""

    def flat(tree: Any, path: str) -> list[str]:
        if isinstance(tree, dict) and tree and TYPE_KEY not in tree:  # of several kinds, and given as a whole
            return [line for key, value in tree.items() for line in flat(value, f"{path}.{key}" if path else key)]
        return [f"{path}={tree if isinstance(tree, str) else json.dumps(tree)}"]

    return flat({key: value for key, value in to_dict(settings).items() if key != "name"}, "")


def apply_overrides(settings: T, overrides: Sequence[str]) -> T:
    """A copy of a dataclass with fields changed by texts such as `training.lr=3e-4`.

    The value is read as the field's annotation asks: `true`, `3`, `3e-4`, `none`, a bare word, `1,2,2` or `[1, 2, 2]`,
    a JSON object for a nested dataclass or a dictionary. `name.type=Class` chooses among the dataclasses of a union,
    starting from its defaults; a field that only one of the others has chooses that one. The order of the texts does
    not matter; of one field given twice the last one counts.

    A dataclass may have a method `idle()` that names fields which change nothing beside the values of the others, and
    says why: such a field cannot be set.

    Raises:
        OpenSoraError: no `=`, an unknown key (names the nearest), a value of the wrong type, or a field without effect.
    """
    changes = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise OpenSoraError(f"{override!r} is no setting: write KEY=VALUE without blanks, such as loop.steps=100")
        changes.append(_Change(tuple(key.strip().split(".")), text.strip(), key.strip()))
    if not changes:
        return settings
    _check_begins(settings, changes)
    changed = _override(settings, type(settings), changes)
    for change in changes:
        _check_used(settings, changed, change)
    return changed


def _check_begins(settings: Any, changes: Sequence["_Change"]) -> None:
    """Names whole keys to users who gave the last part of one: `steps=100` means `loop.steps=100`."""
    known = {field.name for field in dataclasses.fields(settings)} if dataclasses.is_dataclass(settings) else set()
    for change in changes:
        if known and change.path[0] not in known:
            keys = list(flatten(to_dict(settings)))
            last = change.path[-1]
            meant = [key for key in keys if key == change.key or key.endswith(f".{change.key}")]
            meant = meant or [key for key in keys if key.split(".")[-1] == last]
            if meant:
                raise OpenSoraError(f"unknown setting {change.key}; did you mean {' or '.join(meant[:_MOST_MEANT])}?")


def _check_used(before: Any, settings: Any, change: "_Change") -> None:
    """Refuses a change of a field that has no effect beside the others; to say what it is anyway is no change."""
    if _value_at(before, change.path) == _value_at(settings, change.path):
        return
    inside: Any = settings
    for depth, name in enumerate(change.path):
        for idle, reason in (inside.idle() if hasattr(inside, "idle") else {}).items():
            parts = tuple(idle.split("."))
            if change.path[depth : depth + len(parts)] == parts:
                raise OpenSoraError(f"{change.key} has no effect: {reason}")
        inside = getattr(inside, name, None)


@dataclasses.dataclass(frozen=True)
class _Change:
    """A text for the field at a path below some settings; `key` is the whole path, for messages."""

    path: tuple[str, ...]
    text: str
    key: str


def _override(settings: Any, annotation: Any, changes: Sequence[_Change]) -> Any:
    """Settings with all changes at once, so that no check of several fields sees half of them."""
    below: dict[str, list[_Change]] = {}
    for change in changes:
        below.setdefault(change.path[0], []).append(dataclasses.replace(change, path=change.path[1:]))
    key, depth = changes[0].key, len(changes[0].path)
    if isinstance(settings, dict):
        for name, of_field in below.items():
            if name not in settings and all(change.path for change in of_field):
                raise _unknown(of_field[0], name, settings)
        inner = values_of(annotation)
        return settings | {name: _override_field(settings.get(name), inner, below[name]) for name in below}
    if not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        raise OpenSoraError(f"setting {key} does not exist: {'.'.join(key.split('.')[:-depth])} is a value")
    hints = typing.get_type_hints(type(settings))
    names = [field.name for field in dataclasses.fields(settings) if field.init]
    for name, of_field in below.items():
        if name not in names:
            raise _unknown(of_field[0], name, names)
    changed = {name: _override_field(getattr(settings, name), hints[name], below[name]) for name in below}
    return dataclasses.replace(settings, **changed)


def _value_at(settings: Any, path: Sequence[str]) -> Any:
    for name in path:
        settings = settings.get(name) if isinstance(settings, dict) else getattr(settings, name, None)
    return settings


def _unknown(change: _Change, name: str, known: Iterable[str]) -> OpenSoraError:
    """Names the whole key that may have been meant."""
    parts = change.key.split(".")
    place = ".".join(parts[: len(parts) - len(change.path) - 1])
    hint = nearest_name(name, known)
    if place and hint.startswith("; did"):
        hint = hint.replace("; did you mean ", f"; did you mean {place}.")
    return OpenSoraError(f"unknown setting {change.key}{hint}")


def _other_member(current: Any, annotation: Any, changes: Sequence[_Change]) -> Any:
    """The one of a union's dataclasses that has the fields which are changed, where the present one has not.

    What it needs besides, the present one may hand over by a method `carried_over()`: field -> value.
    """
    wanted = {change.path[0] for change in changes}
    if isinstance(current, dict) or wanted <= _field_names(type(current)):
        return current
    members = [member for member in dataclasses_in(annotation) if wanted <= _field_names(member)]
    direct = {change.path[0]: change for change in changes if len(change.path) == 1}
    carried = current.carried_over() if hasattr(current, "carried_over") else {}
    whole, missing = [], []
    for member in members:
        hints = typing.get_type_hints(member)
        needed = [field.name for field in dataclasses.fields(member) if _is_needed(field)]
        if lacking := [name for name in needed if name not in direct and name not in carried]:
            missing += lacking
            continue
        given = {name: build_from_text(hints[name], direct[name].text, direct[name].key) for name in direct}
        whole.append(member(**{**{name: carried[name] for name in needed if name in carried}, **given}))
    if len(whole) == 1:
        return whole[0]
    place = changes[0].key.rsplit(".", len(changes[0].path))[0]
    if whole:
        kinds = " and ".join(type(settings).__name__ for settings in whole)
        raise OpenSoraError(f"{changes[0].key} is a setting of {kinds}; choose by {place}.{TYPE_KEY}=NAME")
    if missing:
        raise OpenSoraError(f"{changes[0].key} needs {place}.{missing[0]} beside it")
    return current


def _field_names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()


def _is_needed(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _override_field(current: Any, annotation: Any, changes: Sequence[_Change]) -> Any:
    """A field after its changes: first those of all of it, then of what it is, then of what is inside."""
    inside = []
    has_type = bool(dataclasses_in(annotation))
    for change in sorted(changes, key=lambda change: len(change.path)):
        if not change.path:
            current = build_from_text(annotation, change.text, change.key)
        elif has_type and change.path == (TYPE_KEY,):
            key = change.key.removesuffix(f".{TYPE_KEY}")
            current = build_value(annotation, {TYPE_KEY: change.text}, key)
        else:
            inside.append(change)
    if inside and has_type:
        current = _other_member(current, annotation, inside)
    return _override(current, annotation, inside) if inside else current


def build_from_text(annotation: Any, text: str, key: str) -> Any:
    """Reads a text as an annotation asks: JSON where it is JSON, `a,b` as a list, `none`, otherwise the text itself.

    Raises:
        OpenSoraError: it is of another type; calls it `key`.
    """
    candidates: list[Any] = []
    value = _json_or_text(text)
    candidates.append(value)
    if text.lower() in ("none", "null"):
        candidates.append(None)
    if text.lower() in ("true", "false"):
        candidates.append(text.lower() == "true")
    if not isinstance(value, str):
        candidates.append(text)  # a text field may hold "12"
    if (isinstance(value, str) and "," in text) or not text:
        candidates.append([_json_or_text(part.strip()) for part in text.split(",") if part.strip()])
    if not isinstance(value, (list, dict)):
        candidates.append([value])
    for candidate in candidates:
        try:
            return build_value(annotation, candidate, key)
        except OpenSoraError:
            continue
    if text[:1] in ("{", "[") and isinstance(value, str):
        parse_json(text, key)
    # Say it about the reading that fits the field best: a list for a sequence, otherwise the plain value.
    is_sequence = typing.get_origin(annotation) in (list, tuple)
    return build_value(annotation, candidates[-1] if is_sequence else value, key)


def _json_or_text(text: str) -> Any:
    try:
        return parse_json(text, "the value")
    except OpenSoraError:
        pass
    try:
        return float(text)  # JSON does not know "1." or "inf"
    except ValueError:
        return text
