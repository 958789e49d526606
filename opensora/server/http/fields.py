"""Fields that a client may set: those of `ClipRequest`, by OpenAI's names or ours, and what is about the job."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from opensora.contents import describe_value, shown
from opensora.errors import OpenSoraError
from opensora.generation.request import FILES, ClipRequest
from opensora.overrides import build_from_text
from opensora.server.http.bodies import Sent
from opensora.server.http.errors import Refused
from opensora.server.http.fetching import Fetcher
from opensora.server.service import REFUSED
from opensora.settings import build_value, nearest_name

HINTS: dict[str, Any] = get_type_hints(ClipRequest)
OWN = tuple(item.name for item in fields(ClipRequest) if item.name not in REFUSED)
"""Fields of `ClipRequest` that are a client's to choose."""
OPENAI = ("seconds", "size", "input_reference", "video")
"""What OpenAI's clients call some of them."""
OF_THE_JOB: dict[str, Any] = {"format": str, "priority": int}


@dataclass
class Asked:
    """What a client asks for.

    Attributes:
        changes: fields of a `ClipRequest`; files lie where they were sent to.
        format: of the file.
        priority: of the job.
        video: job whose clip it is made from.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    format: str | None = None
    priority: int | None = None
    video: str | None = None


def asked_by(sent: Sent, fetcher: Fetcher, *, video: str | None = None, known: tuple[str, ...] | None = None) -> Asked:
    """What the fields of a request come to.

    Args:
        sent: the request.
        fetcher: of files that are named by URL.
        video: the field of a clip that is sent as `video`; None where none is expected.
        known: names that this endpoint takes; None for all.

    Raises:
        OpenSoraError: an unknown field (names the nearest), one that is the server's, or a value of the wrong type.
        TooLarge: a file.
    """
    known = known or (*OWN, *(name for name in OPENAI if name != "video" or video), *OF_THE_JOB)
    asked = Asked()
    for name in [*sent.fields, *(name for name, _ in sent.files)]:
        if name in REFUSED:
            raise OpenSoraError(f"`{name}` is the server's to choose; leave it out")
        if name not in known:
            raise OpenSoraError(f"unknown field `{shown(name)}`{nearest_name(name, known)}")
    for name, value in sent.fields.items():
        if name in FILES or name in ("input_reference", "video"):
            _name_file(asked, name, value, fetcher, video)
        elif name in OF_THE_JOB:
            setattr(asked, name, _value(OF_THE_JOB[name], value, name, sent.is_form))
        elif name == "size":
            _put(asked, _size(value))
        elif name == "seconds":
            _put(asked, {"num_frames": _seconds(value)})
        else:
            _put(asked, {name: _value(HINTS[name], value, name, sent.is_form)})
    for name, path in sent.files:
        _put_file(asked, _meant(name, video), path)
    return asked


def _value(annotation: Any, value: Any, name: str, is_text: bool) -> Any:
    if not is_text:
        return build_value(annotation, value, f"`{name}`")
    if isinstance(value, Mapping):
        return build_value(annotation, {key: _plain(text) for key, text in value.items()}, f"`{name}`")
    if isinstance(value, list):
        return build_value(annotation, [_plain(text) for text in value], f"`{name}`")
    return None if value == "" and _may_be_none(annotation) else build_from_text(annotation, value, f"`{name}`")


def _plain(value: Any) -> Any:
    """A text within an object or a list: nothing says what is meant but itself; clients write nothing for null."""
    if not isinstance(value, str):
        return value
    return build_from_text(int | float | bool | str, value, "a value") if value else None


def _may_be_none(annotation: Any) -> bool:
    return type(None) in getattr(annotation, "__args__", ())


def _put(asked: Asked, changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if name in asked.changes:
            raise OpenSoraError(f"`{name}` is given in two ways; use one of them")
        asked.changes[name] = value


def _size(value: Any) -> dict[str, int]:
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", value) if isinstance(value, str) else None
    if not match:
        raise OpenSoraError(f"`size` is {describe_value(value)}, expected WIDTHxHEIGHT such as 64x64")
    return {"width": int(match[1]), "height": int(match[2])}


def _seconds(value: Any) -> str:
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text):
        raise OpenSoraError(f"`seconds` is {describe_value(value)}, expected a number of seconds such as 4")
    return f"{text}s"


def _meant(name: str, video: str | None) -> str:
    """OpenAI's names of files, as they are here."""
    return {"input_reference": "image", "video": video or "video"}.get(name, name)


def _put_file(asked: Asked, name: str, path: Path) -> None:
    if name == "reference_path":
        asked.changes[name] = (*asked.changes.get(name, ()), path)
    else:
        _put(asked, {name: path})


def _name_file(asked: Asked, name: str, value: Any, fetcher: Fetcher, video: str | None) -> None:
    """A file that is not sent, but named: a clip that was made here, or a URL."""
    if name == "video" and isinstance(value, Mapping) and list(value) == ["id"]:
        asked.video = build_value(str, value["id"], "`video.id`")
        return
    for one in value if name == "reference_path" and isinstance(value, list) else [value]:
        url = one["image_url"] if isinstance(one, Mapping) and list(one) == ["image_url"] else one
        if not isinstance(url, str) or not url.startswith(("https://", "http://", "data:")):
            raise OpenSoraError(f"`{name}` is {describe_value(one)}, expected a file of a form, or its URL")
        _put_file(asked, _meant(name, video), fetcher.fetch(url, name))


def prompt_of(asked: Asked) -> str:
    """Takes the prompt out of what was asked for.

    Raises:
        Refused: there is none.
    """
    if "prompt" not in asked.changes:
        raise Refused(400, "invalid_request", "`prompt` is missing; say what the video should show")
    return asked.changes.pop("prompt")
