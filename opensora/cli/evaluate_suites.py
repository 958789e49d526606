"""`opensora evaluate toybox` and `prompts`: clips of a suite of prompts, made, measured, and kept as results."""

import contextlib
import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from opensora import limits
from opensora.cli.generate_options import MachineOptions, ModelOptions, SamplingOptions, SizeOptions
from opensora.cli.options import given_options, option
from opensora.cli.progress import Progress, kept_in, quiet_libraries, say
from opensora.errors import OpenSoraError, saying_what_is_kept
from opensora.files import check_writable

if TYPE_CHECKING:
    from opensora.evaluation.intervals import Interval
    from opensora.evaluation.results import Results
    from opensora.generation.request import ClipRequest
    from opensora.lab.compare import Comparison
    from opensora.lab.rows import Row


@dataclass(frozen=True)
class SuiteOptions:
    """What is made of a suite's prompts, and what is measured."""

    seeds: int = 1
    """Clips of each prompt."""
    output: Annotated[Path | None, option("FOLDER", "none")] = None
    """Gets results.json, a page that plays the clips (index.html), and the clips; one that is there is resumed."""
    metrics: Annotated[tuple[str, ...], option("NAME ...", "all; of the toy world the judge alone")] = ()
    """What is measured: all, or names such as flicker and motion."""
    reference: Annotated[str | None, option("FOLDER|toybox", "none")] = None
    """Also tell how far the clips, as a set, are from these: a folder of clips, or clips that the toy world draws."""
    workers: int = 1
    """Processes that make clips side by side; each holds a model."""
    batch_size: int = 20
    """Clips made at once; 1 makes what opensora generate makes with the same seed, to the bit."""
    model: OmitArgPrefixes[Annotated[ModelOptions, arg(name="model")]] = field(default_factory=ModelOptions)
    size: OmitArgPrefixes[Annotated[SizeOptions, arg(name="size")]] = field(default_factory=SizeOptions)
    sampling: OmitArgPrefixes[Annotated[SamplingOptions, arg(name="sampling")]] = field(default_factory=SamplingOptions)
    machine: OmitArgPrefixes[Annotated[MachineOptions, arg(name="machine")]] = field(default_factory=MachineOptions)

    def evaluate(self, suite: str, num_prompts: int | None, metrics: tuple[str, ...]) -> None:
        """Makes what is missing, prints figures, and writes results and page.

        Args:
            suite: name or file, see `evaluation.suites.read_suite`.
            num_prompts: its first so many; None for all.
            metrics: names of those that clips are measured by, besides the judge of the toy world; or "all".
        """
        comparison = self._comparison(suite, num_prompts, metrics)
        quiet_libraries()
        say(f"{len(comparison.prompts)} prompts, {len(comparison.cells)} clips")
        with self._folder() as folder:
            from opensora.lab.compare import run
            from opensora.lab.summary import results_of

            with saying_what_is_kept(lambda: kept_in(self.output)), Progress("evaluating") as progress:
                rows = run(
                    comparison,
                    folder,
                    num_workers=self.workers,
                    keep_clips=self.output is not None,
                    keep_features=self.reference is not None,
                    on_progress=progress.update,
                )
            sets = self._sets(comparison, folder, rows)
            results = results_of(comparison, Path(suite).name, rows, sets)
            print_results(results)
            if self.output is not None:
                self._write(comparison, rows, results, sets)

    def _write(
        self, comparison: "Comparison", rows: "list[Row]", results: "Results", sets: "dict[str, Interval]"
    ) -> None:
        from opensora.evaluation.results import FILE
        from opensora.lab.page import write_page
        from opensora.lab.summary import summarise

        assert self.output is not None
        results.save(self.output / FILE)
        command = shlex.join(["opensora", *sys.argv[1:]])
        page = write_page(comparison, self.output, rows, summarise(comparison, rows), command, [sets] if sets else ())
        print(f"results: {self.output / FILE}")
        print(f"page: {page}")

    def _comparison(self, suite: str, num_prompts: int | None, metrics: tuple[str, ...]) -> "Comparison":
        from opensora.evaluation.metrics.catalogue import METRICS, metrics_of
        from opensora.evaluation.results import FILE
        from opensora.evaluation.suites import read_suite
        from opensora.generation.loading import locate_model
        from opensora.lab.comparable import check_comparable
        from opensora.lab.compare import Comparison
        from opensora.lab.grid import columns_of
        from opensora.lab.sets import Reference

        limits.check_count("`seeds`", self.seeds, limits.CLIPS)
        limits.check_count("`workers`", self.workers, limits.WORKERS)
        limits.check_count("`batch_size`", self.batch_size, limits.CLIPS)
        if metrics == ("all",):
            metrics = tuple(metric.name for metric in METRICS)
        metrics_of(metrics)
        if self.output is not None:
            check_writable(self.output / FILE)
        reference = () if self.reference is None else tuple(Reference(self.reference).files.values())
        prompts = tuple(read_suite(suite, num_prompts))
        request = self._request()
        locate_model(request, download=self.model.download)
        comparison = Comparison(tuple(columns_of(request, {})), prompts, self.seeds, metrics, self.batch_size)
        check_comparable(comparison, reference)
        return comparison

    def _request(self) -> "ClipRequest":
        """What the options say of every clip."""
        from opensora.generation.request import ClipRequest

        names = {field.name for field in dataclasses.fields(ClipRequest)} - {"prompt", "model"}
        groups = (self.size, self.sampling, self.machine)
        wishes: dict[str, Any] = {k: v for group in groups for k, v in given_options(group) if k in names}
        return ClipRequest("", **wishes, **self.model.wishes())

    def _sets(self, comparison: "Comparison", folder: Path, rows: "list[Row]") -> "dict[str, Interval]":
        """Figures of all clips together; none without a reference."""
        if self.reference is None:
            return {}
        from opensora.lab.sets import figures_against

        return figures_against(self.reference, comparison.cells, folder / "features", rows[0]["num_frames"])[0]

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        """Where rows are kept: the output, or a folder that is gone afterwards."""
        if self.output is not None:
            yield self.output
            return
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "rows"


@dataclass(frozen=True)
class EvaluateToybox(SuiteOptions):
    """Generate held-out toy prompts, let the judge read the clips, tell the share that is right."""

    num_prompts: int = 500
    """How many held-out prompts."""
    language: Literal["en", "zh"] = "en"
    """Of the prompts: English or Chinese."""

    def run(self) -> None:
        suite = "toybox" if self.language == "en" else f"toybox-{self.language}"
        self.evaluate(suite, self.num_prompts, self.metrics)


@dataclass(frozen=True)
class EvaluatePrompts(SuiteOptions):
    """Generate the prompts of a file and measure the clips."""

    suite: Annotated[Positional[Path], option("FILE")] = field(kw_only=True)
    """A text file with one prompt a line, or a list as VBench writes it (.json)."""
    num_prompts: Annotated[int | None, option("N", "all")] = None
    """The first so many."""

    def run(self) -> None:
        from opensora.evaluation.suites import TOYBOX

        if str(self.suite) in TOYBOX:
            raise OpenSoraError(f"{self.suite} is a suite of the toy world; write opensora evaluate toybox")
        self.evaluate(str(self.suite), self.num_prompts, self.metrics or ("all",))


def print_results(results: "Results") -> None:
    """A row a figure: its mean and interval."""
    from opensora.cli.tables import print_table

    found = [(figure, results.mean(name)) for name, figure in results.figures.items()]
    found += list(results.sets.values())
    rows = [(figure.name, figure.unit, str(interval), str(interval.num_clips)) for figure, interval in found]
    print_table((results.suite, "unit", "mean [95 % interval]", "clips"), rows, width=120)
