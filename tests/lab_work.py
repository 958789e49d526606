"""Work for the lab's processes, importable from them."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from opensora.errors import OpenSoraError


def start_squares() -> Callable[[int], tuple[int, int]]:
    """(the number squared, the process that did it)."""
    return lambda number: (number * number, os.getpid())


def start_refusing() -> Callable[[int], int]:
    def refuse(number: int) -> int:
        raise OpenSoraError(f"{number} is no good")

    return refuse


def start_dying() -> Callable[[int], int]:
    def die(number: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return number

    return die


def start_failing() -> Callable[[int], int]:
    return lambda number: number // 0


def start_noting(folder: Path) -> Callable[[int], int]:
    """Says which process it is."""
    (folder / f"{os.getpid()}.pid").touch()

    return lambda number: number
