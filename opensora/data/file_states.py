"""What a file held when it was used: told by its size and time of change, and by its content where the time differs.

So a copied folder, whose files have other times, is known again at the cost of reading it, and a file that was replaced
by another of the same name is not taken for the old one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opensora.checkpoints.file_hashes import read_hash


@dataclass(frozen=True)
class FileState:
    """A file's size, when it was changed (nanoseconds since 1970), and the SHA-256 of what it holds."""

    size_bytes: int
    modified_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """Of a file as it is; OSError where it cannot be read."""
        state = path.stat()
        return cls(state.st_size, state.st_mtime_ns, read_hash(path))

    @classmethod
    def noted(cls, note: Mapping[str, Any]) -> "FileState | None":
        """As `to_note` wrote it; None where nothing was noted, or something else."""
        try:
            return cls(int(note["size_bytes"]), int(note["modified_ns"]), str(note["sha256"]))
        except (KeyError, TypeError, ValueError):
            return None

    def to_note(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def differs_from(self, path: Path) -> bool:
        """Whether a file holds something else now; one that is not there, or cannot be read, does not say."""
        try:
            state = path.stat()
            if state.st_size != self.size_bytes:
                return True
            return state.st_mtime_ns != self.modified_ns and read_hash(path) != self.sha256
        except OSError:
            return False
