"""SHA-256 of files; of large ones it is remembered, for reading many gigabytes takes minutes.

A file of the same path, size and time of change is taken for the same. What is remembered lies in the user's cache
folder; where that cannot be written, files are read every time.
"""

import contextlib
import hashlib
import json
from pathlib import Path

from opensora.contents import read_json
from opensora.errors import OpenSoraError
from opensora.files import replacing

REMEMBERED_BYTES = 1 << 24
"""Files of fewer bytes are read every time."""


def file_hash(path: Path) -> str:
    """64 hexadecimal digits."""
    stat = path.stat()
    if stat.st_size < REMEMBERED_BYTES:
        return read_hash(path)
    what = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    note = cache_folder() / f"{hashlib.sha256(what[0].encode()).hexdigest()}.json"
    with contextlib.suppress(ValueError, TypeError):
        *noted, digest = read_json(note)
        if noted == what:
            return digest
    digest = read_hash(path)
    with contextlib.suppress(OpenSoraError), replacing(note) as temporary:
        temporary.write_text(json.dumps([*what, digest]), encoding="utf-8")
    return digest


def cache_folder() -> Path:
    """Where hashes are remembered."""
    return Path.home() / ".cache" / "opensora" / "hashes"


def read_hash(path: Path) -> str:
    """The same, of what the file holds now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
