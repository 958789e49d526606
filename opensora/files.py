"""Writing files: proven possible before the work starts, then whole or not at all, and readable as other files are."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import filelock

from opensora.errors import OpenSoraError


def check_writable(path: str | Path) -> None:
    """Proves, before the work starts, that a file can be written there, in a folder that may still have to be made.

    Raises:
        OpenSoraError: it is a folder, or the folder cannot be made or written to.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise OpenSoraError(f"output {path} is a folder; name a file in it")
        nearest = next(folder for folder in path.absolute().parents if folder.exists())
        probe = nearest / f".{path.name}.{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(13, "the file there is write-protected")
    except OSError as error:
        raise OpenSoraError(f"output {path} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Within it no other process may own the folder. It is made if there is none, and then removed if it stays empty.

    Raises:
        OpenSoraError: another process owns it, or it cannot be written to.
    """
    check_writable(folder / ".lock")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise OpenSoraError(f"{folder} is in use by another process; stop that one, or choose another folder") from None
    try:
        yield
    finally:
        (folder / ".lock").unlink(missing_ok=True)  # while it is held, so that no other process loses its own
        lock.release()
        with contextlib.suppress(OSError):  # one of them holds something
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it on success and removed on any failure, interruption included.

    The folder is made if there is none. The temporary name starts with a dot and ends in `.part`, so no pattern that
    matches `path` by its ending finds half a file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def use_default_permissions(folder: Path) -> None:
    """Gives all files in and below a folder the permissions of new files; safetensors writes for the owner alone."""
    probe = folder / f".permissions.{os.getpid()}.probe"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def flush_folder(folder: Path) -> None:
    """Returns when the files of a folder, and their names, are on the disk."""
    for path in [*(p for p in folder.iterdir() if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
