"""Numbered safetensors files that share many clips' tensors, each written whole or not at all.

A shard knows what it holds: its header carries a note, plain JSON, besides the tensors. So a folder of shards needs no
list that could disagree with it, several processes fill it side by side, and whoever goes on after a kill makes only
what is missing.
"""

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensora.contents import describe_value, parse_json, why_unread
from opensora.errors import OpenSoraError
from opensora.files import replacing

T = TypeVar("T")

_NOTE = "note"


def write_shard(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Writes tensors and a note, which may be anything JSON holds."""
    with replacing(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {_NOTE: json.dumps(note)})


def read_note(path: Path) -> dict[str, Any]:
    """The note of a shard; its tensors are not read.

    Raises:
        OpenSoraError: it is missing, damaged, or no shard.
    """
    with _reading(path), safe_open(path, "pt") as file:
        note = parse_json((file.metadata() or {})[_NOTE], "its note")
    if not isinstance(note, dict):
        raise _damaged(path, "it has no note")
    return note


def noted(path: Path, note: Any, name: str, kind: type[T]) -> T:
    """An entry of a shard's note, or of an object within it.

    Raises:
        OpenSoraError: it is missing, or of another type.
    """
    value: Any = note.get(name) if isinstance(note, dict) else None
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _damaged(path, f"its note says {name} is {describe_value(value)}, expected {kind.__name__}")
    return value


class ShardReader:
    """Reads single tensors, from any thread; the files it read from last stay open.

    Args:
        folder: where the shards lie.
        most_open: files open at a time.
    """

    def __init__(self, folder: Path, most_open: int = 64) -> None:
        self.folder, self.most_open = folder, most_open
        self._open: dict[str, Any] = {}
        self._lock = threading.Lock()

    def read(self, shard: str, name: str) -> Tensor:
        """A tensor of a shard, by file name and name.

        Raises:
            OpenSoraError: the file is missing or damaged.
        """
        with _reading(self.folder / shard):
            return self._opened(shard).get_tensor(name)

    def has(self, shard: str, name: str) -> bool:
        """Whether a shard holds a tensor; raises as `read` does."""
        with _reading(self.folder / shard):
            return name in self._opened(shard).keys()

    def _opened(self, shard: str) -> Any:
        with self._lock:
            file = self._open.pop(shard, None) or safe_open(self.folder / shard, "pt")
            self._open[shard] = file  # the one that was used last is the last
            if len(self._open) > self.most_open:
                self._open.pop(next(iter(self._open)))
        return file


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise OpenSoraError(f"{path} is missing; make the cache again, what is there is kept") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if reason := why_unread(error):
            raise OpenSoraError(f"{path} cannot be read: {reason}") from error
        raise _damaged(path, " ".join(str(error).split())) from error


def _damaged(path: Path, why: str) -> OpenSoraError:
    return OpenSoraError(f"{path} is damaged ({why}); delete it and make the cache again, the rest is kept")
