"""`opensora inspect`: what a checkpoint is, and whether its parts fit together."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from opensora.cli.options import FLAG
from opensora.cli.progress import ReadingBar
from opensora.errors import OpenSoraError

if TYPE_CHECKING:
    from opensora.checkpoints.wording import Lines


@dataclass(frozen=True)
class Inspect:
    """Say what a checkpoint is (a model, component, adapter or file of weights) and whether its parts fit together.

    Nothing is run and no code in a file is executed. The exit code is 2 if something is wrong.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|PATH", help_behavior_hint="")]
    """Name of a model, folder of a model, a component or an adapter, or file of weights."""
    quick: Annotated[bool, FLAG] = False
    """Read names and shapes only: no hash, no look for NaN, no comparison with the autoencoder of the training."""
    json: Annotated[bool, FLAG] = False
    """Print JSON, for programs."""

    def run(self) -> None:
        from opensora.adapters.reading import is_adapter
        from opensora.checkpoints.adapters import inspect_adapter
        from opensora.checkpoints.fit import inspect_model
        from opensora.checkpoints.wording import report_lines, verdict

        if is_adapter(self.model):
            report = inspect_adapter(self.model)
        else:
            with ReadingBar() as progress:
                report = inspect_model(self.model, on_progress=None if self.quick else progress.update)
        if self.json:
            print(json.dumps(report.to_dict(), indent=2, default=list))
        else:
            print_lines(report_lines(report), report.problems, verdict(report))
        if report.problems:
            more = f" (and {len(report.problems) - 1} more)" if len(report.problems) > 1 else ""
            raise OpenSoraError(report.problems[0] + more)


def print_lines(lines: "Lines", problems: list[str], verdict: str) -> None:
    """Prints aligned lines, then what is wrong, or else the verdict."""
    from rich.console import Console

    width = max(len(label) for label, _ in lines) + 2
    plain: dict[str, Any] = {"soft_wrap": True, "highlight": False, "markup": False}
    console = Console()
    for label, text in lines:
        console.print(f"{label:<{width}}{text}".rstrip(), **plain)
    for problem in problems:
        console.print(f"{'problem':<{width}}{problem}", style="red", **plain)
    if not problems:
        console.print(f"{'verdict':<{width}}{verdict}", style="green", **plain)
