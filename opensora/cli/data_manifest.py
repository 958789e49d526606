"""`opensora data manifest`: from a folder of clips to a table that training reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from opensora.cli.options import FLAG, check_count, option
from opensora.cli.progress import Progress
from opensora.errors import OpenSoraError
from opensora.files import check_writable
from opensora.media.write import check_fps


@dataclass(frozen=True)
class DataManifest:
    """Make a manifest of a folder of clips and images: look into each, find its caption, leave out what is broken.

    Each file is read as what it is, whatever it is called. Captions are files of the same name that end in .txt,
    .caption or .json, metadata.jsonl (.csv, .parquet) of a folder, or tables. What is left out is listed with the
    reason, and every other file is accounted for. An interrupted scan is resumed.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
    """Where the clips are, folders inside it included."""
    output: Annotated[Path, option("FILE.csv|FILE.parquet")]
    """The manifest; paths in it are relative to its own folder."""
    captions: Annotated[tuple[Path, ...], option("TABLE ...", "what lies beside the clips")] = ()
    """Tables of captions (.csv, .parquet, .jsonl) with the columns path and text."""
    uncaptioned: Annotated[bool, FLAG] = False
    """Keep clips that have no caption, as training an autoencoder does."""
    verify: Literal["count", "decode"] = "count"
    """How closely to look: count the frames that are there, which finds files cut short, or decode every one."""
    fps: Annotated[float | None, option("N", "the rate of each")] = None
    """Rate at which frames of videos are taken in training, by time."""
    workers: int = 8
    """Files looked into at a time."""
    json: Annotated[bool, FLAG] = False
    """Print JSON, for programs."""

    def run(self) -> None:
        from opensora.data import scan

        check_count("--workers", self.workers)
        if self.output.suffix.lower() not in (".csv", ".parquet"):
            raise OpenSoraError(f"--output is {self.output}, expected a name that ends in .csv or .parquet")
        if self.fps is not None:
            check_fps(self.fps, "mp4", "--fps")
        check_writable(self.output)
        with Progress("reading clips") as progress:
            made = scan.make_manifest(
                self.folder,
                self.output,
                captions=self.captions or None,
                uncaptioned=self.uncaptioned,
                verify=self.verify,
                num_workers=self.workers,
                fps=self.fps,
                on_progress=progress.update,
            )
        rows = made.rows
        if self.json:
            written = str(self.output) if rows else None
            told = {"left_out": made.left_out, "files": made.account(), "nearly_named": made.near, "notes": made.notes}
            print(json.dumps({"manifest": written, "rows": len(rows), **told}, indent=2))
        else:
            if rows:
                print(f"{self.output}: {scan.summary(rows)}")
            print("\n".join([*scan.note_lines(made.notes), *made.left_out_lines(), *made.account_lines()]))
        if not rows:
            raise OpenSoraError(
                f"none of {len(made.folder.clips)} clips in {self.folder} can be used; no manifest was written"
            )
