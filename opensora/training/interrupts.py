"""Ctrl-C and SIGTERM while a run trains."""

import contextlib
import signal
from collections.abc import Iterator

from opensora.errors import Terminated
from opensora.training.trainer import Trainer


@contextlib.contextmanager
def stopping_between_steps(trainer: Trainer) -> Iterator[None]:
    """Lets Ctrl-C, SIGTERM and SIGHUP finish and save the step under way; a second one stops at once.

    Raises:
        Terminated: one of the latter two came first, and the trainer stopped.
    """
    came: list[int] = []

    def stop(signal_number: int, frame: object) -> None:
        came.append(signal_number)
        if trainer.stop_requested:
            raise KeyboardInterrupt("interrupted")
        trainer.stop_requested = True

    hang_up = getattr(signal, "SIGHUP", signal.SIGTERM)
    heard = {signal.SIGINT, signal.SIGTERM} | ({hang_up} if signal.getsignal(hang_up) != signal.SIG_IGN else set())
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if came and came[0] != signal.SIGINT:
            raise Terminated(came[0], str(interrupt)) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
