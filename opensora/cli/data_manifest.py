"""`opensora data manifest`: from a folder of clips to a table that training reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from opensora.cli.evaluate import check_count
from opensora.cli.options import FLAG, option
from opensora.cli.progress import Progress
from opensora.errors import OpenSoraError
from opensora.files import check_writable


@dataclass(frozen=True)
class DataManifest:
    """Make a manifest of a folder of clips and images: look into each, find its caption, leave out what is broken.

    Each file is read as what it is, whatever it is called. Captions are files of the same name that end in .txt, or
    the rows of a table. What is left out is listed with the reason. An interrupted scan is resumed.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
    """Where the clips are, folders inside it included."""
    output: Annotated[Path, option("FILE.csv|FILE.parquet")]
    """The manifest; paths in it are relative to its own folder."""
    captions: Annotated[Path | None, option("FILE.csv", "FILE.txt beside each clip")] = None
    """Table of captions with the columns path and text."""
    uncaptioned: Annotated[bool, FLAG] = False
    """Keep clips that have no caption, as training an autoencoder does."""
    verify: Literal["count", "decode"] = "count"
    """How closely to look: count the frames that are there, which finds files cut short, or decode every one."""
    workers: int = 8
    """Files looked into at a time."""
    json: Annotated[bool, FLAG] = False
    """Print JSON, for programs."""

    def run(self) -> None:
        from opensora.data import scan

        check_count("--workers", self.workers)
        if self.output.suffix.lower() not in (".csv", ".parquet"):
            raise OpenSoraError(f"--output is {self.output}, expected a name that ends in .csv or .parquet")
        check_writable(self.output)
        with Progress("reading clips") as progress:
            made = scan.make_manifest(
                self.folder,
                self.output,
                captions=self.captions,
                uncaptioned=self.uncaptioned,
                verify=self.verify,
                num_workers=self.workers,
                on_progress=progress.update,
            )
        rows, reasons = made.rows, {str(path): reason for path, reason in made.left_out.items()}
        if self.json:
            written = str(self.output) if rows else None
            print(json.dumps({"manifest": written, "rows": len(rows), "left_out": reasons}, indent=2))
        else:
            if rows:
                print(f"{self.output}: {scan.summary(rows)}")
            print("\n".join([f"left out: {len(reasons)}", *(f"  {path}: {why}" for path, why in reasons.items())]))
        if not rows:
            raise OpenSoraError(f"none of {made.num_files} files in {self.folder} can be used; no manifest was written")
