"""How far long work is: a bar in a terminal, a line now and then elsewhere, both with an estimate of the time left."""

import sys
import time


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
