"""How far long work is: bars in a terminal, lines now and then or nothing elsewhere; and what else goes to stderr."""

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path

    from opensora.generation.progress import Progress as GenerationProgress


class Bar:
    """A bar of rich's while a context lasts, where that goes to a terminal.

    Args:
        what: the work, such as "reading clips".
        columns: names of rich's columns after the description.
        stderr: shown there, and gone when it is done; otherwise on stdout, where it stays.
    """

    def __init__(self, what: str, *columns: str, stderr: bool = True) -> None:
        from rich import progress
        from rich.console import Console

        shown = [getattr(progress, f"{column}Column")() for column in ("Bar", *columns)]
        console = Console(stderr=stderr)
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            *shown,
            console=console,
            transient=stderr,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(what, total=None)

    def show(self, done: int, total: int | None, what: str | None = None) -> None:
        """So much is done, of so much; None where nobody knows."""
        said: dict[str, Any] = {} if what is None else {"description": what}
        self.bar.update(self.task, completed=done, total=total, **said)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()


class Progress(Bar):
    """With an estimate of the time left, and a line now and then where there is no terminal."""

    seconds_between_lines = 15.0

    def __init__(self, what: str) -> None:
        super().__init__(what, "MofNComplete", "TimeRemaining")
        self.what, self.lines = what, not sys.stderr.isatty()
        self.first: int | None = None  # done at the first update, from which the estimate counts
        self.started = self.told = 0.0

    def update(self, done: int, total: int) -> None:
        """So much is done, of so much."""
        self.show(done, total)
        now = time.monotonic()
        if self.first is None:
            self.first, self.started, self.told = done, now, now
        if self.lines and now - self.told >= self.seconds_between_lines and done > self.first:
            left_s = (now - self.started) / (done - self.first) * (total - done)
            say(f"{self.what}: {done} of {total}, {left_s:.0f} s left")
            self.told = now


class ReadingBar(Bar):
    """While data is read."""

    def __init__(self) -> None:
        super().__init__("reading", "Download", "TimeRemaining")

    def update(self, what: str, done: int, total: int) -> None:
        """So many bytes of something are read."""
        self.show(done, total or None, what)


class StepBar(Bar):
    """While a clip is sampled."""

    def __init__(self) -> None:
        super().__init__("sampling", "MofNComplete", "TimeElapsed")

    def update(self, progress: "GenerationProgress") -> None:
        """Shows an event of the engine."""
        which = f" loop {progress.loop + 1} of {progress.num_loops}" if progress.num_loops > 1 else ""
        doing = "decoding" if progress.stage == "decoding" else "sampling"
        self.show(progress.step, progress.num_steps or None, doing + which)


def say(line: str) -> None:
    """Prints a line to stderr; where that is closed or full, the work goes on."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """diffusers and transformers say nothing but errors, and show no bars of their own; notes on prompts come once."""
    import logging as standard_logging

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    standard_logging.getLogger("opensora.sampling.prompting").setLevel(standard_logging.ERROR)


def kept_in(folder: "Path | None") -> str:
    """What to tell of clips whose making ended early; "" where none was kept. None is no folder."""
    if folder is None or not (folder / "rows.jsonl").exists():
        return ""
    return f"what was made until then is in {folder}, and the same command goes on from there"
