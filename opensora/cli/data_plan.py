"""`opensora data plan`: what training will make of a manifest, before it starts."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from opensora.cli.options import FLAG, check_count, option, with_flags
from opensora.cli.progress import Progress
from opensora.errors import OpenSoraError

if TYPE_CHECKING:
    from opensora.clip_rows import ClipRows
    from opensora.data.clips import ManifestClips
    from opensora.data.epoch_plan import EpochPlan
    from opensora.data.scan import Verified
    from opensora.training.diffusion.caption_plan import CaptionPlan


@dataclass(frozen=True)
class DataPlan:
    """Show what training will make of a manifest: clips and batches of every bucket, steps, and what is dropped why.

    Also told: clips that miss a length by a few frames or are enlarged, captions cut or emptied, files missing.
    The exit code is 2 if there would be nothing to train on.
    """

    manifest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MANIFEST", help_behavior_hint="")]
    """Table of clips, .csv or .parquet, as opensora data manifest makes it."""
    recipe: Annotated[str | None, option("NAME")] = None
    """Take buckets, frame interval and chances from this recipe."""
    buckets: Annotated[Path | None, option("FILE.json")] = None
    """Take the buckets from this file instead, such as {"240p": {"1": [0.5, 8], "51": [1.0, 2]}}: of each resolution
    and number of frames the chance that a clip is kept, and the batch size."""
    frame_interval: Annotated[int | None, option("N", "the recipe's, or 1")] = None
    """Every how manieth frame of a video is taken."""
    batches_in_a_row: Annotated[int | None, option("N", "the recipe's, or 8")] = None
    """How many batches of one size follow each other."""
    uncaptioned: Annotated[bool, FLAG] = False
    """Keep clips that have no caption; a recipe says so itself."""
    ranks: Annotated[int, option("N", "1")] = 1
    """Processes that each have batches of their own."""
    microbatches: Annotated[int, option("N", "1")] = 1
    """Batches of a process in a step."""
    seed: Annotated[int, option("N", "0")] = 0
    """Of the run: who stays by chance."""
    verify: Annotated[bool, FLAG] = False
    """Open every clip, name the broken ones and plan without them; say whose frame rate varies."""
    json: Annotated[bool, FLAG] = False
    """Print JSON, for programs."""

    def run(self) -> None:
        from opensora.clip_rows import ClipRows
        from opensora.data.buckets import Buckets
        from opensora.data.clips import rows_as_taken
        from opensora.data.epoch_plan import left_out_lines, missing_lines, plan_epoch, plan_lines, why_nothing
        from opensora.data.presence import missing_files
        from opensora.data.sampler import BucketSampler
        from opensora.data.scan import note_lines
        from opensora.manifest import read_manifest

        for name in ("ranks", "microbatches"):
            check_count(f"--{name}", getattr(self, name))
        config = self._config()
        with Progress("reading the manifest") as progress:
            manifest = read_manifest(self.manifest, text_required=config.text_required, on_progress=progress.update)
        missing: dict[int, str] = {}
        if not self.verify:  # which opens them all
            with Progress("looking for clips") as progress:
                missing = missing_files(manifest.rows, progress.update)
        verified = self._verified(manifest.rows)
        broken = verified.broken
        rows = ClipRows(row for row in manifest.rows if row.path not in broken) if broken else manifest.rows
        rows = rows_as_taken(rows, config)
        captions = self._captions(rows)
        sampler = BucketSampler(
            rows,
            Buckets(config.buckets),
            self.seed,
            frame_interval=config.frame_interval,
            batches_in_a_row=config.batches_in_a_row,
        )
        plan = plan_epoch(rows, sampler, ranks=self.ranks, microbatches=self.microbatches)
        if self.json:
            rejected = [dataclasses.asdict(row) for row in manifest.rejected]
            unread = {str(path): reason for path, reason in broken.items()}
            told: dict[str, Any] = {**dataclasses.asdict(plan), "rejected": rejected, "broken": unread}
            told |= {"missing": {str(manifest.rows[number].path): reason for number, reason in missing.items()}}
            told |= {"duplicates": manifest.num_duplicates, "notes": verified.notes}
            told |= {"captions": dataclasses.asdict(captions) if captions is not None else None}
            print(json.dumps(told, indent=2))
        else:
            _print_table(plan)
            lines = [*plan_lines(plan, self.ranks, self.microbatches, config.batches_in_a_row)]
            lines += note_lines(verified.notes)
            lines += captions.lines() if captions is not None else []
            lines += missing_lines(missing, manifest.rows, config.max_broken_share)
            lines += left_out_lines(broken, manifest.rejected, manifest.num_duplicates, manifest.duplicate)
            print(with_flags("\n".join(lines), self))
        if not plan.batches:
            raise OpenSoraError(f"nothing to train on: {why_nothing(plan, len(broken), len(manifest.rejected))}")

    def _captions(self, rows: "ClipRows") -> "CaptionPlan | None":
        """What a recipe that reads captions will read of these; None without one."""
        if self.recipe is None:
            return None
        from opensora.recipes import find_recipe
        from opensora.training.diffusion.caption_plan import plan_captions
        from opensora.training.diffusion.settings import DiffusionSettings

        settings = find_recipe(self.recipe).objective
        if not isinstance(settings, DiffusionSettings):
            return None
        with Progress("reading captions") as progress:
            return plan_captions(settings, rows, progress.update)

    def _verified(self, rows: "ClipRows") -> "Verified":
        from opensora.data.scan import Verified, verify_clips

        if not self.verify:
            return Verified()
        with Progress("reading clips") as progress:
            return verify_clips(rows, progress.update)

    def _config(self) -> "ManifestClips":
        """How the clips are used, by the recipe and what was said besides."""
        from opensora.contents import read_object
        from opensora.data.clips import ManifestClips
        from opensora.settings import parts_of_type

        if self.recipe is not None and self.buckets is not None:
            raise OpenSoraError("--recipe and --buckets both say which sizes are trained; give one of them")
        if self.recipe is not None:
            from opensora.recipes import find_recipe

            config = next(parts_of_type(find_recipe(self.recipe), ManifestClips), None)
            if config is None:
                raise OpenSoraError(f"recipe {self.recipe} does not train on the clips of a manifest; give --buckets")
        elif self.buckets is not None:
            config = ManifestClips(buckets=read_object(self.buckets))
        else:
            raise OpenSoraError("which sizes are trained? give --recipe NAME or --buckets FILE.json")
        said: dict[str, Any] = {"frame_interval": self.frame_interval, "batches_in_a_row": self.batches_in_a_row}
        said |= {"text_required": False if self.uncaptioned else None}
        return dataclasses.replace(config, **{name: value for name, value in said.items() if value is not None})


def _print_table(plan: "EpochPlan") -> None:
    from rich.console import Console
    from rich.table import Table

    if not plan.buckets:
        return
    table = Table("bucket", box=None, pad_edge=False)
    for name in ("clips", "batch size", "batches", "share", "repeats"):
        table.add_column(name, justify="right")
    table.add_column("height / width")
    for bucket in plan.buckets:
        table.add_row(*bucket.cells())
    Console(width=110, highlight=False).print(table)
