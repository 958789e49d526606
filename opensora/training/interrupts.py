"""Ctrl-C and SIGTERM while a run trains."""

import contextlib
import signal
from collections.abc import Iterator

from opensora.training.trainer import Trainer


@contextlib.contextmanager
def stopping_between_steps(trainer: Trainer) -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM finish and save the step under way; a second one stops at once."""

    def stop(signal_number: int, frame: object) -> None:
        if trainer.stop_requested:
            raise KeyboardInterrupt
        trainer.stop_requested = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
