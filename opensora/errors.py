"""What ends a command besides success: mistakes of the user's, signals, and too little memory."""

import contextlib
from collections.abc import Callable, Iterator


class OpenSoraError(ValueError):
    """A mistake in the input: one line saying what came, what was expected and what to do.

    The command line prints the message and exits with code 2; library callers catch a `ValueError`.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came; what is under way is left in order, as after Ctrl-C.

    Args:
        number: of the signal.
        text: what to say of it.
    """

    def __init__(self, number: int, text: str = "terminated") -> None:
        super().__init__(text)
        self.number = number


def is_out_of_memory(error: BaseException) -> bool:
    """Accelerators have exceptions of their own; the CPU's allocator, mapped files and some backends only say it."""
    said = ("allocate memory", "out of memory", "not enough memory", "std::bad_alloc", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


@contextlib.contextmanager
def saying_what_is_kept(kept: Callable[[], str]) -> Iterator[None]:
    """Adds to whatever ends the work within it, a signal included, what of the work is there; "" for nothing."""
    try:
        yield
    except BaseException as error:
        if note := kept():
            error.add_note(note)
        raise
