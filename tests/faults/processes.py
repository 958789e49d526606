"""Processes that are forked to be killed, traps at what they write, and a disk of any size to fill."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
"""What Python tells its audit hooks before files and folders are changed."""
TIMEOUT_S = 120.0


def start(action: Callable[[], int | None], told: Path, trap: Callable[[], None] = lambda: None) -> int:
    """Forks a process that does something; what it says goes to files beside `told`."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            os.dup2(os.open(told.with_suffix(f".{number}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        trap()
        code = action() or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def end_of(process: int) -> int | None:
    """The exit code, negative for a signal; None for a process that hangs, and is killed."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def on_writes(folder: Path, act: Callable[[int], None]) -> None:
    """Calls `act` with the number of each write below a folder, before it is done."""
    count = 0

    def hook(event: str, args: Any) -> None:
        nonlocal count
        if event not in WRITES or not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        if os.path.abspath(os.fsdecode(args[0])).startswith(f"{folder}/case"):  # noqa: PTH100
            count += 1
            act(count)

    sys.addaudithook(hook)


def count_writes(folder: Path, told: Path) -> None:
    descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(descriptor, b"0")
    on_writes(folder, lambda number: (os.pwrite(descriptor, str(number).encode(), 0), None)[1])


DISK_BYTES = 2**28


def mount_disk(folder: Path) -> Path | None:
    """Mounts a disk that only this process and its children see; None where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, private, recursive = 0x00020000, 1 << 18, 1 << 14
    try:
        if libc.unshare(new_namespace) != 0 or libc.mount(b"none", b"/", None, private | recursive, None) != 0:
            return None
    except AttributeError:  # another system than Linux
        return None
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={DISK_BYTES}".encode()
    return folder if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options) == 0 else None


def resize(disk: Path, num_bytes: int) -> None:
    remount = 32
    options = f"size={num_bytes}".encode()
    failed = ctypes.CDLL(None).mount(b"tmpfs", os.fsencode(disk), b"tmpfs", remount, options)
    assert failed == 0, "the disk cannot be resized"
