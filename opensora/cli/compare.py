"""`opensora compare`: settings side by side, on the same prompts and the same noise."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from opensora import limits
from opensora.cli.options import FLAG, option, refuse_idle
from opensora.cli.progress import Progress, kept_in, quiet_libraries, say
from opensora.errors import saying_what_is_kept
from opensora.files import check_writable

if TYPE_CHECKING:
    from opensora.evaluation.intervals import Interval
    from opensora.lab.compare import Comparison
    from opensora.lab.grid import Column
    from opensora.lab.rows import Row

_AXES = (
    *("model", "adapter", "sampler", "num_inference_steps", "guidance_scale", "image_guidance_scale"),
    *("cfg_channels", "channel_scales", "guider", "time_shift", "fast", "latent_space", "negative_prompt", "dtype"),
)
_SIZES = ("num_frames", "resolution", "fps")
_OF_GRIDS = (*_AXES, *_SIZES, "suite", "prompts", "seeds", "batch_size", "device", "rows_only")


@dataclass(frozen=True)
class Compare:
    """Make clips by every combination of settings, from the same noise, measure them, and put them side by side.

    An option that is given several values varies; the first combination is what the others are held against. The folder
    gets index.html (all clips, playing in step, figures with 95 % intervals), rows.parquet, and the clips.
    """

    output: Path
    """Folder of the comparison; one that is there is resumed."""
    model: Annotated[tuple[str, ...], option("NAME|FOLDER ...", "toybox")] = ()
    """Models."""
    adapter: Annotated[tuple[str, ...], option("PATH|PATH:SCALE|none ...", "none")] = ()
    """Adapters, one at a time."""
    sampler: Annotated[tuple[str, ...], option("NAME ...", "the model's")] = ()
    """Samplers; model for the model's own."""
    num_inference_steps: Annotated[tuple[str, ...], option("N ...", "the model's")] = ()
    """Sampling steps, or respacings such as ddim50."""
    guidance_scale: Annotated[tuple[float, ...], option("S ...", "the model's")] = ()
    """How strongly the prompt is followed."""
    image_guidance_scale: Annotated[tuple[float, ...], option("S ...", "the model's")] = ()
    """How strongly given frames are followed, by models that are guided by them."""
    cfg_channels: Annotated[tuple[str, ...], option("K|0,3|all ...", "the model's")] = ()
    """Latent channels that guidance touches: the first K, indices ("2," for one), or all."""
    channel_scales: Annotated[tuple[str, ...], option("0-2:S,3:S|[S,...] ...", "none")] = ()
    """In place of both, a scale for each latent channel."""
    guider: Annotated[tuple[str, ...], option("NAME:OPTION=VALUE ...", "the model's rule")] = ()
    """How predictions with and without the text are combined: cfg, apg, cfg:guidance_rescale=0.7, ..."""
    time_shift: Annotated[tuple[float, ...], option("S ...", "the model's")] = ()
    """For rectified flow: above 1 more of the steps are spent at noisier times."""
    fast: Annotated[tuple[str, ...], option("none|quality|balanced|draft ...", "none")] = ()
    """How much of the network's work is forecast in place of being computed."""
    latent_space: Annotated[tuple[str, ...], option("X|JSON ...", "as declared")] = ()
    """What latents stand for: a scaling factor, or fields of the autoencoder's latent_space; declared for its own."""
    negative_prompt: Annotated[tuple[str, ...], option("TEXT ...", "none")] = ()
    """What to steer away from."""
    dtype: Annotated[tuple[str, ...], option("NAME ...", "float32 on the cpu, else bfloat16")] = ()
    """Numbers the networks compute in."""
    num_frames: Annotated[str | None, option("N|4s", "the model's")] = None
    """Length of all clips."""
    resolution: Annotated[str | None, option("NAME", "the model's")] = None
    """Size of all clips, such as 240p."""
    fps: Annotated[float | None, option("N", "the model's")] = None
    """Frames per second that the model is told."""
    suite: Annotated[str, option("NAME|FILE", "toybox")] = "toybox"
    """Prompts: toybox, toybox-zh (which the judge can read), a text file with one a line, or VBench's list (.json)."""
    prompts: int = 8
    """The first so many prompts of the suite."""
    seeds: int = 1
    """Clips of each prompt."""
    clips: Annotated[tuple[Path, ...], option("FOLDER ...")] = ()
    """Compare clips that are there, of the same name in every folder, whoever made them; no model is asked."""
    metrics: Annotated[tuple[str, ...], option("NAME ...", "all")] = ()
    """What is measured."""
    reference: Annotated[str | None, option("FOLDER|toybox", "none")] = None
    """Also tell how far each column's clips, as a set, are from these: a folder of clips, or clips that the toy world
    draws itself. With several seeds, also how much clips of a prompt differ."""
    workers: int = 1
    """Processes that make clips side by side; each holds a model."""
    batch_size: int = 1
    """Clips made at once; 1 makes what opensora generate makes with the same seed, to the bit."""
    rows_only: Annotated[bool, FLAG] = False
    """Keep figures alone: no clips, no page."""
    device: Annotated[str | None, option("NAME", "an accelerator if there is one, else cpu")] = None
    """cpu, cuda, cuda:1, mps."""
    yes: Annotated[bool, FLAG] = False
    """Make more than 2,000 clips."""

    def run(self) -> None:
        from opensora.lab.comparable import check_comparable
        from opensora.lab.compare import run, save_table
        from opensora.lab.page import write_page
        from opensora.lab.sets import Reference
        from opensora.lab.summary import summarise

        limits.check_count("`workers`", self.workers, limits.WORKERS)
        limits.check_count("`batch_size`", self.batch_size, limits.CLIPS)
        check_writable(self.output / "rows.parquet")
        reference = () if self.reference is None else tuple(Reference(self.reference).files.values())
        comparison = self._comparison()
        quiet_libraries()
        check_comparable(comparison, reference)
        num_clips = len(comparison.cells)
        say(f"{len(comparison.columns)} settings, {num_clips} clips in all")
        with saying_what_is_kept(lambda: kept_in(self.output)), Progress("comparing") as progress:
            rows = run(
                comparison,
                self.output,
                num_workers=self.workers,
                keep_clips=not self.rows_only,
                keep_features=self.reference is not None,
                on_progress=progress.update,
            )
        table = save_table(comparison, self.output, rows)
        found = summarise(comparison, rows)
        sets = self._sets(comparison, rows)
        _print_found(comparison, found, sets)
        say(f"rows: {table}")
        if not self.rows_only:
            command = shlex.join(["opensora", *sys.argv[1:]])
            print(write_page(comparison, self.output, rows, found, command, sets))

    def _comparison(self) -> "Comparison":
        from opensora.evaluation.metrics.catalogue import METRICS, metrics_of
        from opensora.evaluation.suites import read_suite
        from opensora.lab.compare import Comparison
        from opensora.lab.grid import check_number, columns_of, columns_of_folders, num_clips_of

        names = self.metrics or tuple(metric.name for metric in METRICS)
        metrics_of(names)
        if self.clips:
            refuse_idle(self, _OF_GRIDS, "the clips of --clips are there already")
            columns, prompts = columns_of_folders(self.clips)
            return Comparison(tuple(columns), tuple(prompts), 1, names)
        limits.check_count("`seeds`", self.seeds, limits.CLIPS)
        limits.check_count("`prompts`", self.prompts, limits.CLIPS)
        axes = self._axes()
        check_number(num_clips_of(axes, self.prompts, self.seeds), self.yes)
        prompts = read_suite(self.suite, self.prompts)
        columns = columns_of(self._base(), axes)
        self._check_models(columns)
        return Comparison(tuple(columns), tuple(prompts), self.seeds, names, self.batch_size)

    def _sets(self, comparison: "Comparison", rows: "list[Row]") -> "list[dict[str, Interval]]":
        """Figures of each column as a set; none without a reference."""
        if self.reference is None:
            return [{} for _ in comparison.columns]
        from opensora.lab.sets import figures_against

        return figures_against(self.reference, comparison.cells, self.output / "features", rows[0]["num_frames"])

    def _base(self) -> Any:
        from opensora.generation.request import ClipRequest

        given = {name: getattr(self, name) for name in _SIZES if getattr(self, name) is not None}
        return ClipRequest("", device=self.device, **given)

    def _axes(self) -> dict[str, Sequence[Any]]:
        """Field of the request -> the values that it takes."""
        from opensora.generation.loading import parse_adapter
        from opensora.generation.request import parse_cfg_channels, parse_steps

        parsers = {
            "adapter": lambda text: () if text == "none" else (parse_adapter(text),),
            "sampler": lambda text: None if text == "model" else text,
            "num_inference_steps": parse_steps,
            "cfg_channels": parse_cfg_channels,
            "fast": lambda text: None if text == "none" else text,
            "latent_space": lambda text: None if text == "declared" else text,
            "negative_prompt": lambda text: text or None,
        }
        given = {name: getattr(self, name) for name in _AXES if getattr(self, name)}
        parsed = {name: [parsers.get(name, lambda value: value)(value) for value in given[name]] for name in given}
        return {"adapters" if name == "adapter" else name: values for name, values in parsed.items()}

    def _check_models(self, columns: "Sequence[Column]") -> None:
        """Raises `OpenSoraError` for a model that is not here, or prompts that it has no words for."""
        from opensora.checkpoints.published import BUNDLED
        from opensora.evaluation.suites import TOYBOX
        from opensora.generation.loading import locate_model

        for name, request in {c.request.model_name: c.request for c in columns if c.request}.items():
            locate_model(request)
            if self.suite not in TOYBOX or name in BUNDLED:
                continue
            say(
                f"note: the prompts of {self.suite} are of the toy world, and {name} is a model of another; see --suite"
            )


def _print_found(
    comparison: "Comparison", found: "Sequence[dict[str, Any]]", sets: "Sequence[dict[str, Interval]]"
) -> None:
    """Means and intervals, a row a figure."""
    from opensora.cli.tables import print_table

    rows = [(name, *(str(column[name].mean) for column in found)) for name in comparison.figures]
    rows += [(name, *(str(column[name]) for column in sets)) for name in sets[0]]
    print_table(("mean [95 % interval]", *(column.name for column in comparison.columns)), rows, width=160)
