"""Bodies of requests, JSON or a form, read piece by piece: none may be larger, longer or slower than it is allowed.

Files go to the disk as they come, under numbers; what a client calls them is read by nobody.
"""

import asyncio
import itertools
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from opensora.contents import parse_json
from opensora.errors import OpenSoraError
from opensora.server.http.errors import Refused
from opensora.server.service import TooLarge
from opensora.server.settings import InputLimits

_PICTURES = ("image", "last_image", "input_reference")
_KEY = re.compile(r"([^\[\]]{1,64})((?:\[[^\[\]]{0,64}\]){0,3})")


@dataclass
class Sent:
    """What a client sent.

    Attributes:
        fields: by name; values of JSON, or texts of a form, those of `a[b]` as an object and of `a[]` as a list.
        files: name of the field, and where the file lies for as long as the request is handled.
        is_form: fields are texts.
        folder: for files of this request, which goes when the request is handled.
    """

    folder: Path
    fields: dict[str, Any] = field(default_factory=dict)
    files: list[tuple[str, Path]] = field(default_factory=list)
    is_form: bool = False


@asynccontextmanager
async def sent_by(request: Request, limits: InputLimits, uploads: Path) -> AsyncIterator[Sent]:
    """The body of a request; its files go when the context ends.

    Args:
        request: whose body nobody has read.
        limits: how much may come.
        uploads: folder that files are kept in meanwhile.

    Raises:
        OpenSoraError: no JSON object, no form, or a field that cannot be one.
        TooLarge: a field, a file or all of it.
        Refused: another kind of body, or one that comes too slowly.
    """
    folder = Path(await run_in_threadpool(tempfile.mkdtemp, dir=uploads))
    try:
        try:
            async with asyncio.timeout(limits.body_s):
                sent = await _read(request, limits, folder)
        except TimeoutError:
            raise Refused(
                408,
                "body_timeout",
                f"the body did not arrive within {limits.body_s:g} s; send less, or faster",
                {"x-should-retry": "false", "connection": "close"},
            ) from None
        except ClientDisconnect:
            raise Refused(400, "disconnected", "the body ends early") from None
        yield sent
    finally:
        await run_in_threadpool(shutil.rmtree, folder, ignore_errors=True)


async def _read(request: Request, limits: InputLimits, folder: Path) -> Sent:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind == b"application/json":
        body = b"".join([piece async for piece in _pieces(request, _json_bytes(limits))])
        return await run_in_threadpool(_from_json, body, folder)
    if kind != b"multipart/form-data":
        raise Refused(
            415, "unsupported_media_type", "the body is neither `application/json` nor `multipart/form-data`; send one"
        )
    form = _Form(options.get(b"boundary", b""), limits, folder)
    try:
        async for piece in _pieces(request, limits.body_bytes):
            await run_in_threadpool(form.write, piece)
        return form.end()
    finally:
        form.close()


def _json_bytes(limits: InputLimits) -> int:
    """Of a JSON body: a picture in it takes four characters for three bytes."""
    return limits.image_bytes * 4 // 3 + limits.field_bytes


async def _pieces(request: Request, most: int) -> AsyncIterator[bytes]:
    """The body as it comes, as far as it may go."""
    announced = request.headers.get("content-length", "0")
    total = int(announced) if announced.isdecimal() else 0
    if total > most:
        raise TooLarge(f"the body has {total:,} bytes, expected at most {most:,}")
    total = 0
    async for piece in request.stream():
        total += len(piece)
        if total > most:
            raise TooLarge(f"the body has more than {most:,} bytes, the most that may come")
        yield piece


def _from_json(body: bytes, folder: Path) -> Sent:
    fields = parse_json(body, "the body")
    if not isinstance(fields, dict):
        raise OpenSoraError('the body is no JSON object; expected one such as {"prompt": "a red ball"}')
    return Sent(folder, fields)


class _Form:
    """Takes a form apart as it comes."""

    def __init__(self, boundary: bytes, limits: InputLimits, folder: Path) -> None:
        if not boundary:
            raise OpenSoraError("the form has no boundary; let the client library write the Content-Type")
        self._limits = limits
        self._sent = Sent(folder, is_form=True)
        self._header, self._value, self._disposition = b"", b"", b""
        self._name, self._text = "", bytearray()
        self._file: IO[bytes] | None = None
        self._left = 0
        self._num_fields, self._is_over = 0, False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._header_name,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": self._data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise OpenSoraError(f"the form cannot be read: {error}") from None

    def write(self, piece: bytes) -> None:
        """Takes what has come."""
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise OpenSoraError(f"the form cannot be read: {error}") from None

    def end(self) -> Sent:
        """What was sent, when all of it has come."""
        if not self._is_over:
            raise OpenSoraError("the form ends early; send all of it")
        return self._sent

    def close(self) -> None:
        """Lets go of a file that did not come whole."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._disposition, self._text = b"", bytearray()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = _text_of(options.get(b"name", b""), "the name of a field")
        if not _KEY.fullmatch(self._name):
            raise OpenSoraError("a part of the form has no name that a field could have; name every part")
        if b"filename" in options:
            if len(self._sent.files) == self._limits.num_files:
                raise TooLarge(f"more than {self._limits.num_files} files came, the most that may")
            path = self._sent.folder / str(len(self._sent.files))
            self._file = path.open("wb")
            self._sent.files.append((_KEY.fullmatch(self._name)[1], path))  # type: ignore[index]
            is_picture = self._name in _PICTURES
            self._left = self._limits.image_bytes if is_picture else self._limits.clip_bytes
        else:
            self._num_fields += 1
            if self._num_fields > self._limits.num_fields:
                raise TooLarge(f"more than {self._limits.num_fields} fields came, the most that may")
            is_picture = self._name.partition("[")[0] in _PICTURES  # as a data URL
            self._left = _json_bytes(self._limits) if is_picture else self._limits.field_bytes

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._left -= end - start
        if self._left < 0:
            raise TooLarge(f"`{self._name}` has more bytes than it may; send less")
        if self._file is None:
            self._text += data[start:end]
        else:
            self._file.write(data[start:end])

    def _end_part(self) -> None:
        if self._file is not None:
            self.close()
        else:
            _put(self._sent.fields, self._name, _text_of(bytes(self._text), f"`{self._name}`"))

    def _end(self) -> None:
        self._is_over = True


def _text_of(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise OpenSoraError(f"{what} is not UTF-8") from None


def _put(fields: dict[str, Any], name: str, text: str) -> None:
    """Puts the text of `a`, `a[b]` or `a[]` where it belongs.

    Raises:
        OpenSoraError: it is there already, or beside others that it cannot be beside.
    """
    match = _KEY.fullmatch(name)
    assert match
    path = [match[1], *re.findall(r"\[([^\[\]]*)\]", match[2])]
    place: Any = fields
    for part, following in itertools.pairwise(path):
        empty: Any = {} if following else []
        place = place.setdefault(part, empty) if isinstance(place, dict) and part else None
        if type(place) is not type(empty):
            raise OpenSoraError(f"`{name}` came in two ways; send it in one")
    if isinstance(place, list):
        place.append(text)
    elif path[-1] in place:
        raise OpenSoraError(f"`{name}` came twice; send it once")
    else:
        place[path[-1]] = text
