"""Memory and time of `opensora data plan` and `opensora data manifest` for very many clips.

    python -m benchmarks million-rows --rows 1000000 --files 1000000

makes a table of so many rows (captions of 130 characters, files that are not there), and a folder of so many pictures
(links to one of 16x16 pixels) with a table of captions, and prints seconds and the highest resident memory of each
command. All of it lies in a temporary folder.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

TEXT = (
    "a small red ball number {} rolls to the left over the grass while a large blue cube turns slowly "
    "in the light of the evening"
)
HEADER = ("path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks million-rows", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the table that is planned; 0 for none")
    parser.add_argument("--files", type=int, default=1_000_000, help="in the folder that is scanned; 0 for none")
    parser.add_argument("--recipe", default="v1_2_stage1", help="of the plan")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.rows:
            table = make_table(Path(folder), args.rows)
            measure(f"data plan, {args.rows:,} rows, {table.stat().st_size / 1e6:,.0f} MB", "plan", table, args.recipe)
        if args.files:
            clips, captions = make_folder(Path(folder), args.files)
            measure(f"data manifest, {args.files:,} files", "manifest", clips, captions)


def make_table(folder: Path, num_rows: int) -> Path:
    """Clips of 45 to 109 frames of 240x426."""
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for i in range(num_rows):
            path = f"clips/part {i // 1000:04d}/clip {i:07d}.mp4"
            writer.writerow([path, TEXT.format(i), 45 + i % 65, 240, 426, 240 / 426, 240 * 426, 24.0])
    return folder / "table.csv"


def make_folder(folder: Path, num_files: int) -> tuple[Path, Path]:
    """Links to one picture, a thousand a folder, and their captions."""
    Image.new("RGB", (16, 16)).save(folder / "one.png")
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text"])
        for i in range(num_files):
            part = folder / "clips" / f"part {i // 1000:04d}"
            if i % 1000 == 0:
                part.mkdir(parents=True)
            (part / f"{i:07d}.png").symlink_to("../../one.png")
            writer.writerow([f"{part.name}/{i:07d}.png", TEXT.format(i)])
    return folder / "clips", folder / "captions.csv"


def measure(what: str, command: str, source: Path, more: Path | str) -> None:
    """Runs a command and prints what it took."""
    options = ["--recipe", str(more)]
    if command == "manifest":
        options = ["--captions", str(more), "--output", str(source.with_name("manifest.csv"))]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "opensora.cli.main", "data", command, str(source), *options], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    took = f"{time.monotonic() - started:,.0f} s ({usage.ru_utime + usage.ru_stime:,.0f} s of a core)"
    print(f"{what}: {usage.ru_maxrss / 1024:,.0f} MB at most, {took}, exit code {os.waitstatus_to_exitcode(status)}")
