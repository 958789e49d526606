"""How far long work is: a bar in a terminal, a line now and then elsewhere, both with an estimate of the time left."""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opensora.generation.engine import Progress as GenerationProgress


class Progress:
    """Tells on stderr how much is done; as a context, from beginning to end.

    Args:
        what: the work, such as "reading clips".
    """

    seconds_between_lines = 15.0

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.what, self.lines = what, not sys.stderr.isatty()
        self.bar = Bar(*columns, console=Console(stderr=True), transient=True, disable=self.lines)
        self.task = self.bar.add_task(what, total=None)
        self.first: int | None = None  # done when it began
        self.started = self.told = time.monotonic()

    def update(self, done: int, total: int) -> None:
        """So much is done, of so much."""
        self.bar.update(self.task, completed=done, total=total)
        self.first = done if self.first is None else self.first
        now = time.monotonic()
        if self.lines and now - self.told >= self.seconds_between_lines and done > self.first:
            left_s = (now - self.started) / (done - self.first) * (total - done)
            print(f"{self.what}: {done} of {total}, {left_s:.0f} s left", file=sys.stderr)
            self.told = now

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()


class StepBar:
    """How far the sampling of a clip is: a bar in a terminal, nothing elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        self.bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("sampling", total=None)

    def update(self, progress: "GenerationProgress") -> None:
        """Shows an event of the engine."""
        which = f" loop {progress.loop + 1} of {progress.num_loops}" if progress.num_loops > 1 else ""
        doing = "decoding" if progress.stage == "decoding" else "sampling"
        total = progress.num_steps or None
        self.bar.update(self.task, completed=progress.step, total=total, description=doing + which)

    def __enter__(self) -> "StepBar":
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()


def say(line: str) -> None:
    """Prints a line to stderr."""
    print(line, file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """diffusers and transformers say nothing but errors."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
