"""What a command finds around it: standard streams that may be closed or full, signals, a folder it is started in."""

import contextlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from opensora.errors import OpenSoraError, Terminated


def open_standard_streams() -> bool:
    """Opens those that are closed on nothing, lest the next file that is opened becomes one; names print as they are.

    Returns:
        Whether standard output was closed.
    """
    closed = False
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)  # takes the lowest number that is free
            closed |= number == 1
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be any bytes
        is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")
    return closed


def drop_output() -> bool:
    """Sends what standard output and standard error cannot take to nowhere, as the interpreter writes what is left.

    Returns:
        Whether it was standard output that could not.
    """
    failed = []
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            failed.append(stream)
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return sys.stdout in failed


@contextlib.contextmanager
def signals_raised() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise `Terminated`, so that what is under way is left in order.

    Raises:
        KeyboardInterrupt: also where a library has made an error of its own of one, as those not written in Python do.
    """
    came: list[KeyboardInterrupt] = []

    def stop(number: int, frame: object) -> None:
        came.append(KeyboardInterrupt() if number == signal.SIGINT else Terminated(number))
        raise came[-1]

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not what nohup wants ignored
                before[number] = signal.signal(number, stop)
    try:
        yield
    except OpenSoraError:
        raise
    except Exception as error:
        if came:
            raise came[0] from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def threads_quiet_about_files() -> Iterator[None]:
    """Within it no thread tells what it could not write or read: whoever waits for it does, in one line."""
    before = threading.excepthook

    def hook(what: threading.ExceptHookArgs) -> None:
        if not isinstance(what.exc_value, OSError):
            before(what)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def check_working_folder() -> None:
    """Raises `OpenSoraError` if the folder that the command is started in is no more."""
    try:
        Path.cwd()
    except OSError as error:
        raise OpenSoraError(f"the working folder cannot be used ({error.strerror}); go to one that exists") from None


def with_home(word: str) -> str:
    """A word of the command line with `~` replaced where it begins a path, also after `--output=` and `key=`.

    Shells do it at the beginning of words only, and other programs that start commands nowhere.
    """
    begins = re.compile(r"(^|^[\w.-]+=|;)(~[\w.-]*)(?=/)")
    # Path.expanduser raises for users that there are not; then it is a name like any other.
    return begins.sub(lambda found: found[1] + os.path.expanduser(found[2]), word)  # noqa: PTH111
