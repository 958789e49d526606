"""What a file is, and what may be read of it: told by its content, checked before anything of it is trusted.

Whatever a user may hand over is read through here: text and JSON in bounded size, from regular files alone, with every
way in which they can be broken said in one line that names the file. What is large (weights, clips, tables) has readers
of its own, which ask `check_regular` and `kind_of` first.
"""

import codecs
import errno
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from opensora.errors import OpenSoraError

JSON_LIMIT_BYTES = 64 * 2**20  # the longest index of sharded weights has a few
TEXT_LIMIT_BYTES = 256 * 2**20  # a million prompts
DEPTH_LIMIT = 64  # of objects within objects
INTEGER_LIMIT = 2**64  # seeds are the largest numbers

Kind = Literal[
    "empty",
    "safetensors",
    "torch zip",
    "zip",
    "pickle",
    "gguf",
    "hdf5",
    "numpy",
    "parquet",
    "git-lfs pointer",
    "web page",
    "gzip",
    "bzip2",
    "xz",
    "zstd",
    "7z",
    "rar",
    "tar",
    "pdf",
    "image",
    "video",
    "audio",
    "json",
    "text",
    "unknown",
]

_WORDS: dict[Kind, str] = {
    "empty": "an empty file",
    "safetensors": "a safetensors file",
    "torch zip": "a file of torch.save",
    "zip": "a zip archive; unpack it",
    "pickle": "a pickle",
    "gguf": "a GGUF file of quantised weights",
    "hdf5": "an HDF5 file",
    "numpy": "a NumPy array",
    "parquet": "a Parquet table",
    "git-lfs pointer": "a git-lfs pointer, not the file itself; fetch it with `git lfs pull`, or download it again",
    "web page": "a web page, not the file itself; download it again from its direct link",
    "gzip": "a gzip archive; unpack it",
    "bzip2": "a bzip2 archive; unpack it",
    "xz": "an xz archive; unpack it",
    "zstd": "a zstd archive; unpack it",
    "7z": "a 7z archive; unpack it",
    "rar": "a rar archive; unpack it",
    "tar": "a tar archive; unpack it",
    "pdf": "a PDF document",
    "image": "a picture",
    "video": "a video",
    "audio": "an audio file",
    "json": "a JSON file",
    "text": "a text file",
    "unknown": "a file of unknown kind",
}

_SPECIAL: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)

# How files begin. Archives of weights, pickles and whatever needs a second look are told apart in `kind_of`.
_BEGINNINGS: tuple[tuple[bytes, Kind], ...] = (
    (b"version https://git-lfs", "git-lfs pointer"),
    (b"GGUF", "gguf"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"\x93NUMPY", "numpy"),
    (b"PAR1", "parquet"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!\x1a\x07", "rar"),
    (b"%PDF-", "pdf"),
    (b"\x89PNG\r\n\x1a\n", "image"),
    (b"\xff\xd8\xff", "image"),
    (b"GIF8", "image"),
    (b"BM", "image"),
    (b"II*\x00", "image"),
    (b"MM\x00*", "image"),
    (b"\x00\x00\x01\x00", "image"),
    (b"\x00\x00\x00\x0cJXL ", "image"),
    (b"\xff\x0a", "image"),
    (b"\x00\x00\x00\x0cjP  ", "image"),
    (b"\x1aE\xdf\xa3", "video"),
    (b"FLV\x01", "video"),
    (b"\x00\x00\x01\xba", "video"),
    (b"\x00\x00\x01\xb3", "video"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "video"),
    (b"OggS", "video"),
    (b"ID3", "audio"),
    (b"fLaC", "audio"),
)
_PICTURE_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis")
_HEAD_BYTES = 1024


def check_regular(path: str | Path, what: str = "file") -> None:
    """Proves that a file can be read, without opening it: a pipe or a device would never end.

    Args:
        path: what is to be read; links are followed.
        what: its role, for the message, such as "prompt file".

    Raises:
        OpenSoraError: it is missing, a folder, a pipe, a device or a socket, or may not be read.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        where = "is a link to a file that does not exist" if path.is_symlink() else "does not exist"
        raise OpenSoraError(f"{what} {path} {where}") from None
    except (OSError, ValueError) as error:
        raise OpenSoraError(f"{what} {shown(path)} cannot be read: {_reason(error)}") from None
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in _SPECIAL if is_kind(mode)), "no file")
        raise OpenSoraError(f"{what} {path} is {kind}, expected a file")
    if not os.access(path, os.R_OK):
        raise OpenSoraError(f"{what} {path} may not be read: permission denied; change its permissions (chmod u+r)")


def check_access(path: str | Path) -> None:
    """Proves that what may lie at a path can be looked for, and a folder there can be listed.

    Raises:
        OpenSoraError: a folder may not be entered, or the path is none that could exist.
    """
    path = Path(path)
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise OpenSoraError(f"{shown(path)} cannot be read: {_reason(error)}") from None
    if is_folder and not os.access(path, os.R_OK | os.X_OK):
        raise OpenSoraError(f"{path} may not be read: permission denied; change its permissions (chmod u+rx)")


def read_text(path: str | Path, what: str = "file", limit_bytes: int = TEXT_LIMIT_BYTES) -> str:
    """The text of a regular file in UTF-8, without the byte order mark that editors may put first.

    Raises:
        OpenSoraError: see `check_regular`; more than `limit_bytes`, or not UTF-8 (says what it seems to be).
    """
    path = Path(path)
    check_regular(path, what)
    try:
        with path.open("rb") as file:
            content = file.read(limit_bytes + 1)
    except OSError as error:
        raise OpenSoraError(f"{what} {path} cannot be read: {_reason(error)}") from None
    if len(content) > limit_bytes:
        raise OpenSoraError(f"{what} {path} has more than {_size(limit_bytes)}, the most that is read of one")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise OpenSoraError(f"{what} {path} is UTF-16 text, expected UTF-8; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = kind_of(path)
        is_text = kind in ("text", "json", "unknown") and b"\0" not in content
        line = content.count(b"\n", 0, error.start) + 1
        found = f"not UTF-8 in line {line}; save it as UTF-8" if is_text else f"{describe_kind(kind)}, expected text"
        raise OpenSoraError(f"{what} {path} is {found}") from None


def read_json(path: str | Path, what: str = "file", limit_bytes: int = JSON_LIMIT_BYTES) -> Any:
    """What a JSON file holds, see `parse_json`.

    Raises:
        OpenSoraError: it cannot be read as text (see `read_text`), or is not JSON that can be trusted.
    """
    source = f"{what} {path}" if what != "file" else str(path)
    text = read_text(path, what, limit_bytes)
    if (kind := kind_of(path)) in ("git-lfs pointer", "web page", "empty"):
        raise OpenSoraError(f"{source} is {describe_kind(kind)}; expected JSON")
    return parse_json(text, source)


def read_object(path: str | Path, what: str = "file", limit_bytes: int = JSON_LIMIT_BYTES) -> dict[str, Any]:
    """What a JSON file holds, if that is an object.

    Raises:
        OpenSoraError: as `read_json`, or it holds something else.
    """
    values = read_json(path, what, limit_bytes)
    if not isinstance(values, dict):
        raise OpenSoraError(f"{path} holds {describe_value(values)}, expected a JSON object {{...}}")
    return values


def parse_json(text: str | bytes, source: str) -> Any:
    """The value of a JSON text, of which nothing later can stumble over depth, length or kind of a part.

    Args:
        text: as it was read.
        source: what to call it in messages, such as the name of a file.

    Raises:
        OpenSoraError: not JSON (names the line); deeper than `DEPTH_LIMIT`; an integer outside +-`INTEGER_LIMIT`; a
            number that is not finite; a key twice; text that no file or terminal can hold (NUL, half a character).
    """
    try:
        value = json.loads(
            text,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_refuse_constant,
            object_pairs_hook=_object,
        )
    except json.JSONDecodeError as error:
        place = f"at line {error.lineno}, character {error.colno}"
        raise OpenSoraError(f"{source} is not valid JSON: {error.msg} {place}") from None
    except UnicodeDecodeError:
        raise OpenSoraError(f"{source} is not valid JSON: it is not UTF-8") from None
    except RecursionError:
        raise OpenSoraError(_too_deep(source)) from None
    except ValueError as error:  # of the readers of numbers and objects below
        raise OpenSoraError(f"{source} is not valid JSON: {error}") from None
    _check_values(value, source)
    return value


def kind_of(path: str | Path) -> Kind:
    """What a file is by its content, whatever its name says.

    Raises:
        OpenSoraError: see `check_regular`.
    """
    path = Path(path)
    check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise OpenSoraError(f"{path} cannot be read: {_reason(error)}") from None
    if not size:
        return "empty"
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "torch zip" if _is_of_torch(path, head) else "zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100 * 2**20:
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    as_text = _kind_of_text(head)
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning) and (as_text == "unknown" or kind in ("git-lfs pointer", "pdf")):
            return kind
    if head[4:8] == b"ftyp":
        return "image" if head[8:12] in _PICTURE_BRANDS else "video"
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free"):
        return "video"
    if head[:4] == b"RIFF":
        of_riff: dict[bytes, Kind] = {b"WEBP": "image", b"AVI ": "video", b"WAVE": "audio"}
        return of_riff.get(head[8:12], "unknown")
    if head[:1] == head[188:189] == head[376:377] == b"\x47":  # a packet of MPEG-TS has 188 bytes
        return "video"
    if head[257:262] == b"ustar":
        return "tar"
    return as_text


def describe_kind(kind: Kind) -> str:
    """A kind in words, and what to do about it, as in "a web page, not the file itself; download it again"."""
    return _WORDS[kind]


def describe_value(value: Any) -> str:
    """A JSON value in a few words, however long it is: `"a list of 3"`, `"the text 'abc'"`, `"the number 3"`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {shown(repr(value))}"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"the number {shown_number(value) if isinstance(value, int) else value}"


def shown(value: Any, most: int = 80) -> str:
    """Text for a message of one line: cut in the middle, with unprintable characters spelled out."""
    text = str(value)
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-most // 4 :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def shown_number(value: int) -> str:
    """An integer for a message: one too long to be written out is told by its length."""
    if abs(value) < 10**20:
        return str(value)
    return f"a number of about {int(value.bit_length() * math.log10(2)) + 1} digits"


# --- small things -----------------------------------------------------------------------------------------------------


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= INTEGER_LIMIT:
        raise ValueError(f"the integer {shown(digits, 24)} is too large")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text, 24)} is too large")
    return value


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {shown(repr(twice))} is there twice")
    return values


def _check_values(value: Any, source: str) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH_LIMIT:
            raise OpenSoraError(_too_deep(source))
        below = []
        for item in level:
            if isinstance(item, dict):
                _check_texts(item, source)
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                _check_texts((item,), source)
        level = below


def _check_texts(texts: Iterable[str], source: str) -> None:
    for text in texts:
        if (not text.isascii() and re.search("[\ud800-\udfff]", text)) or "\0" in text:
            raise OpenSoraError(
                f"{source} is not valid JSON: the text {shown(repr(text))} holds half a character or NUL"
            )


def _too_deep(source: str) -> str:
    return f"{source} is not valid JSON: objects lie within each other more than {DEPTH_LIMIT} deep"


def _is_of_torch(path: Path, head: bytes) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(("data.pkl", "constants.pkl")) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # cut off: the first entry tells
        return b"data.pkl" in head


_ASCII = re.compile(rb"[\t\n\r -~]")


def _kind_of_text(head: bytes) -> Kind:
    if b"\0" in head and not head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "unknown"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head", b"<body")):
        return "web page"
    if re.match(rb"""\{|\[\s*(?:[\[\]{"\d-]|true|false|null)""", text):  # and no [section] of other files
        return "json"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        # Latin-1 and the like, in which no text is without spaces, digits or letters of English.
        is_text = not any(byte < 9 or 13 < byte < 32 for byte in head) and 10 * len(_ASCII.findall(head)) > len(head)
        return "text" if is_text else "unknown"
    return "text" if not any(byte < 9 or 13 < byte < 27 for byte in head) else "unknown"


def why_unread(error: BaseException) -> str | None:
    """Why a file could not be read, where that says nothing of what it holds; None where it may be damaged."""
    rust = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and tokenizers
    number = error.errno if isinstance(error, OSError) else int(rust[1]) if rust else None
    return {
        errno.EACCES: "permission denied; change its permissions (chmod u+r)",
        errno.EPERM: "permission denied",
        errno.ENOMEM: "out of memory; end other programs, or use a machine with more of it",
        errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
        errno.ENFILE: "too many files are open",
        errno.EIO: "the disk does not give it",
    }.get(number or 0)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes:,} bytes"
