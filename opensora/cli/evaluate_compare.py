"""`opensora evaluate compare`: what changed from one evaluation to another, for people and for a CI."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from opensora.cli.options import option
from opensora.cli.progress import say
from opensora.errors import OpenSoraError

if TYPE_CHECKING:
    from opensora.evaluation.changes import Bounds, Change
    from opensora.evaluation.results import Results

EXIT_REGRESSION = 1


@dataclass(frozen=True)
class EvaluateCompare:
    """Tell what changed beyond chance between two evaluations; exit code 1 if one became worse than allowed.

    Clips of the same prompt and noise are compared pair by pair. A figure regresses if it is worse, its 95 % interval
    excludes no change, and the change is larger than its bound.
    """

    before: Annotated[Positional[Path], option("A.json")]
    """Results of an evaluation, or its folder."""
    after: Annotated[Positional[Path], option("B.json")]
    """Those that may have changed."""
    bound: Annotated[tuple[str, ...], option("SHARE|FIGURE=VALUE ...", "0")] = ()
    """How much worse a figure may become: a share of what it was (0.05), or for one figure a value in its own unit
    (right_all=0.02)."""

    def run(self) -> int:
        from opensora.evaluation.changes import changes
        from opensora.evaluation.results import Results

        bounds = _bounds(self.bound)
        before, after = Results.read(self.before), Results.read(self.after)
        found = changes(before, after, bounds)
        _say_what_differs(before, after)
        _print_changes(found)
        worse = [change.figure.name for change in found if change.is_regression]
        print(f"worse than allowed: {', '.join(worse)}" if worse else "nothing is worse than allowed")
        return EXIT_REGRESSION if worse else 0


def _bounds(texts: Sequence[str]) -> "Bounds":
    from opensora.evaluation.changes import Bounds

    share, of_figures = 0.0, {}
    for text in texts:
        name, is_named, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise OpenSoraError(
                f"--bound is {text!r}; give a share from 0 such as 0.05, or a figure's name and value: right_all=0.02"
            )
        if is_named:
            of_figures[name] = value
        else:
            share = value
    return Bounds(share, of_figures)


def _say_what_differs(before: "Results", after: "Results") -> None:
    from opensora.evaluation.changes import num_shared

    names = [name for name in before.settings.keys() | after.settings.keys() if name not in ("prompts", "files")]
    differing = sorted(name for name in names if before.settings.get(name) != after.settings.get(name))
    shared = num_shared(before, after)
    pairs = f"{shared} clips are in both and compared pair by pair" if shared else "no clip is in both"
    say(f"{pairs}; settings that differ: {', '.join(differing) or 'none'}")


def _print_changes(found: "Sequence[Change]") -> None:
    from opensora.cli.tables import print_table

    rows = [
        (
            change.figure.name,
            f"{change.before.value:.4g}",
            f"{change.after.value:.4g}",
            "" if change.difference is None else str(change.difference),
            change.verdict + (", beyond its bound" if change.is_regression else ""),
        )
        for change in found
    ]
    print_table(("figure", "before", "after", "change [95 % interval]", ""), rows, width=140)
