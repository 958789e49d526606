"""Writing files: proven possible before the work starts, then whole or not at all, and readable as other files are."""

import contextlib
import ctypes
import errno
import functools
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import filelock

from opensora.errors import OpenSoraError


def check_writable(path: str | Path) -> None:
    """Proves, before the work starts, that a file can be written there, in a folder that may still have to be made.

    What killed processes left in that folder is removed, once in a process.

    Raises:
        OpenSoraError: it is a folder or a device, no file can be called so, or the folder cannot be made or written to.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise OpenSoraError(f"output {path} is a folder; name a file in it")
        if path.exists() and not path.is_file():
            raise OpenSoraError(f"output {path} is a device or a pipe; name a file")
        nearest = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if not nearest.exists():
            raise OpenSoraError(f"output {path} cannot be written: {nearest} is a link that leads nowhere")
        for name in path.absolute().relative_to(nearest).parts:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(nearest / name)  # which knows what may be a name
        _tidy(nearest)
        probe = nearest / _temporary_path(path).name
        try:
            probe.touch()
        finally:
            _remove(probe)
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(13, "the file there is write-protected")
    except OpenSoraError:
        raise
    except (OSError, ValueError) as error:  # the latter for characters that no name can have
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OpenSoraError(f"output {path} cannot be written: {reason}") from None


def check_empty(folder: Path) -> None:
    """Raises `OpenSoraError` if there is a folder of that name with something in it."""
    if folder.is_dir() and any(folder.iterdir()):
        raise OpenSoraError(f"output {folder} is a folder with something in it; name a folder that does not exist yet")


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
def holding(lock: Path) -> Iterator[bool]:
    """Locks a file, so that of processes that do the same work one does at a time.

    Yields:
        Whether nobody else holds it; True where there are no locks.
    """
    with lock.open("a") as file:
        yield _take(file) is not False


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path, renamed to `path` on success and removed on any failure, interruption included.

    The folder is made if there is none, and what killed processes left in it is removed, once in a process. The
    temporary file lies in a folder of its own beside `path`, which also takes what libraries put down on the way; its
    name begins with a dot and ends in `.part`, so no pattern that matches `path` by its ending finds half a file.

    Raises:
        OpenSoraError: the disk is full, or the place cannot be written to.
    """
    path = Path(path)
    with _workplace(path) as workplace:
        temporary = workplace / "file.part"
        yield temporary
        temporary.chmod(stat.S_IMODE((workplace / _LOCK).stat().st_mode))  # safetensors writes for the owner alone
        flush(temporary)
        temporary.replace(path)


@contextlib.contextmanager
def replacing_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """As `replacing`, for a folder that is not there yet, or empty.

    Args:
        path: of the folder.
        overwrite: it may be there and hold something, and gives way when the new one is whole.

    Raises:
        OpenSoraError: another process writes or has written it, the disk is full, or the place cannot be written to.
    """
    path = Path(path)
    if not overwrite:
        check_empty(path)
    with _workplace(path) as workplace:
        if not overwrite and (writer := _earlier_writer(path, workplace)):
            raise OpenSoraError(
                f"output {path} is being written by another process ({writer}); wait for it, or choose another folder"
            )
        temporary = workplace / "folder.part"
        temporary.mkdir()
        yield temporary
        use_default_permissions(temporary)
        flush_folder(temporary)
        _put_in_place(temporary, path, overwrite)


def append_text(path: Path, text: str) -> None:
    """Appends to a file.

    Raises:
        OpenSoraError: see `adding_to`.
    """
    with adding_to(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


@contextlib.contextmanager
def adding_to(path: Path) -> Iterator[None]:
    """Around whatever adds to a file or a folder of files.

    Raises:
        OpenSoraError: the disk is full, or the place cannot be written to.
    """
    try:
        yield
    except OSError as error:
        raise OpenSoraError(f"{path} cannot be written: {error.strerror or error}; make room or give access") from error


def remove_left_overs(folder: Path) -> list[Path]:
    """Removes temporary files and folders of processes that are gone; returns those whose processes are alive.

    What tells is the lock, which also speaks for processes in other containers, and on other machines as far as file
    systems let it; where there is none, whether a process of that number runs on this machine.
    """
    alive = []
    for path in [Path(entry.path) for entry in os.scandir(folder)]:
        if _TEMPORARY.fullmatch(path.name):
            locked = _is_locked(path / _LOCK)
            if locked or (locked is None and _is_alive(_process_of(path))):
                alive.append(path)
            else:
                _remove(path)
    return alive


@functools.lru_cache(maxsize=1024)
def _tidy(folder: Path) -> None:
    """Removes left-overs, once in a process: a folder of very many files takes long to list."""
    remove_left_overs(folder)


_TEMPORARY = re.compile(r"\.(.+?)\.(\d{1,18})(?:-[0-9a-f]+)?\.part", re.S)
_LOCK = "lock"
_MOST_OF_A_NAME = 200
"""Bytes of a file's own name in its temporary name, as file systems take no names of more than 255."""


def _temporary_path(path: Path) -> Path:
    """Beside `path`, by a name that no other process and no other thread takes."""
    name = os.fsdecode(os.fsencode(path.name)[:_MOST_OF_A_NAME])
    return path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A folder beside `path` that goes when the context ends; its lock goes with the process.

    Raises:
        OpenSoraError: in one line, what the system said of that place or of what was written there.
    """
    workplace = _temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path.parent.absolute())
        try:
            workplace.mkdir()
            with (workplace / "new").open("w") as lock:
                _take(lock)
                (workplace / "new").rename(workplace / _LOCK)  # so that one of this name is held, or its holder is gone
                yield workplace
        finally:
            _remove(workplace)
    except OpenSoraError:
        raise
    except Exception as error:
        reason = _why_unwritable(error, path)
        if reason is None:
            raise
        raise OpenSoraError(f"output {path} cannot be written: {reason}") from error


def _why_unwritable(error: Exception, path: Path) -> str | None:
    """What the system said; None for errors of other kinds, or about files in other folders."""
    if isinstance(error, OSError):
        elsewhere = isinstance(error.filename, str) and not error.filename.startswith(str(path.parent))
        return None if elsewhere else error.strerror or str(error)
    rust = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and tokenizers
    return os.strerror(int(rust[1])) if rust else None


def _earlier_writer(path: Path, workplace: Path) -> int | None:
    """A living process that began to write there before."""
    name, began = workplace.name.rpartition(f".{os.getpid()}-")[0], workplace.stat().st_mtime_ns
    of_same_name = re.compile(re.escape(name) + r"\.\d+(-[0-9a-f]+)?\.part")
    for other in remove_left_overs(path.parent):
        if of_same_name.fullmatch(other.name) and other != workplace:
            with contextlib.suppress(FileNotFoundError):
                if (other.stat().st_mtime_ns, other.name) < (began, workplace.name):
                    return _process_of(other)
    return None


def _process_of(temporary: Path) -> int:
    match = _TEMPORARY.fullmatch(temporary.name)
    assert match
    return int(match[2])


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True  # where asking would end it
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):  # one that has ended and waits to be asked how
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1] not in "ZX"
    return True


def _is_locked(lock: Path) -> bool | None:
    """Whether somebody holds it; None if there is none, or nobody can tell."""
    try:
        with lock.open("r+") as file:
            taken = _take(file)
    except OSError:
        return None
    return None if taken is None else not taken


def _take(lock: IO[str]) -> bool | None:
    """Locks a file until it is closed, by the end of the process at the latest; whether that was possible.

    None where there are no locks: on Windows, and on file systems that know none.
    """
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _remove(path: Path) -> None:
    """Removes a file or a folder; an interruption waits for it."""
    try:
        _unlink(path)
    except KeyboardInterrupt:
        _unlink(path)
        raise


def _unlink(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _put_in_place(temporary: Path, path: Path, overwrite: bool) -> None:
    try:
        temporary.replace(path)  # an empty folder may be there
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not overwrite:
            raise OpenSoraError(f"output {path} was written by another process meanwhile; choose another") from None
        if not _exchanged(temporary, path):
            aside = _temporary_path(path)
            path.rename(aside)
            temporary.rename(path)
            _remove(aside)


def _exchanged(one: Path, other: Path) -> bool:
    """Gives two folders each other's names at one blow, which Linux can, and Python does not offer."""
    try:
        exchange = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return exchange(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def use_default_permissions(folder: Path) -> None:
    """Gives all files in and below a folder the permissions of new files; safetensors writes for the owner alone."""
    probe = folder / _temporary_path(folder).name
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def flush_folder(folder: Path) -> None:
    """Returns when the files in and below a folder, and their names, are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or path.is_dir():
            flush(path)


def flush(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
