"""From a folder of clips to a manifest: finds the files, looks into each, and finds its caption.

Looking into many files takes long, so every finding is noted at once in a journal beside the manifest; a scan that was
interrupted goes on where it was, and looks again at files that have changed since.
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from opensora.errors import OpenSoraError
from opensora.manifest import ClipRow, write_manifest
from opensora.media.frames import ClipFacts, probe

# Files are opened by these endings, and read as what they are.
_CLIP_NAME = re.compile(
    r".+\.(mp4|m4v|mov|mkv|webm|avi|mpg|mpeg|ts|wmv|flv|3gp|ogv|y4m|gif|png|jpg|jpeg|webp|bmp|tif|tiff|ppm)",
    re.I | re.S,
)

Finding = ClipFacts | str
"""What a file holds, or the reason why it cannot be used."""


def find_files(folder: Path) -> list[Path]:
    """All videos and pictures in and below a folder, by their endings, sorted; hidden ones are left out.

    Whatever is called like one is among them, so that what cannot be read is named, too.

    Raises:
        OpenSoraError: no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise OpenSoraError(
            f"{folder} {'is a file' if folder.exists() else 'does not exist'}, expected a folder of clips"
        )
    found, others = [], set()
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or path.is_dir():
            continue
        if _CLIP_NAME.fullmatch(path.name):
            found.append(path)
        elif path.is_file():
            others.add(path.suffix.lower() or "no ending")
    if not found:
        what = f"only files of other kinds ({', '.join(sorted(others)[:5])})" if others else "nothing"
        raise OpenSoraError(f"no clips in {folder}: it holds {what}; clips end in .mp4, .webm, .png, .jpg and the like")
    return found


@dataclass
class Journal:
    """What was found in which file, kept in a file of JSON lines while a scan runs."""

    path: Path
    verify: str

    def read(self) -> dict[str, Finding]:
        """Findings about files that have not changed, by their key."""
        if not self.path.exists():
            return {}
        known: dict[str, Finding] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                known[entry["file"]] = entry["broken"] if "broken" in entry else ClipFacts(**entry["facts"])
            except (ValueError, KeyError, TypeError):
                continue  # the last line of an interrupted scan may be cut
        return known

    def note(self, findings: Mapping[Path, Finding]) -> None:
        """Appends what was found."""
        with self.path.open("a", encoding="utf-8") as file:
            for path, finding in findings.items():
                noted = {"broken": finding} if isinstance(finding, str) else {"facts": asdict(finding)}
                file.write(json.dumps({"file": self.key(path), **noted}) + "\n")

    def key(self, path: Path) -> str:
        """Names a file in the state it is in."""
        state = path.stat()
        return f"{path.absolute()} {state.st_size} {state.st_mtime_ns} {self.verify}"


def probe_all(
    paths: Sequence[Path],
    *,
    verify: Literal["count", "decode"] = "count",
    num_workers: int = 8,
    journal: Journal | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Path, Finding]:
    """What every file holds.

    Args:
        paths: of the files.
        verify: how closely to look, see `media.frames.probe`.
        num_workers: files looked into at a time.
        journal: where findings are noted; what it knows already is taken over.
        on_progress: told how many files are done, of how many.
    """
    known = journal.read() if journal is not None else {}
    found: dict[Path, Finding] = {}
    if journal is not None and known:
        found = {path: known[journal.key(path)] for path in paths if path.exists() and journal.key(path) in known}
    todo = iter([path for path in paths if path not in found])
    on_progress(len(found), len(paths))
    readers = ThreadPoolExecutor(num_workers)
    try:
        running = {readers.submit(_probe, path, verify): path for path in islice(todo, 4 * num_workers)}
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            new = {running.pop(future): future.result() for future in done}
            if journal is not None:
                journal.note({path: finding for path, finding in new.items() if path.exists()})
            found.update(new)
            on_progress(len(found), len(paths))
            running |= {readers.submit(_probe, path, verify): path for path in islice(todo, len(new))}
    finally:
        readers.shutdown(cancel_futures=True)
    return {path: found[path] for path in paths}


def _probe(path: Path, verify: Literal["count", "decode"]) -> Finding:
    if not path.is_file():  # a pipe would wait for somebody to write
        return "no file, but a link to nothing" if path.is_symlink() else "no file"
    try:
        return probe(path, verify)
    except OpenSoraError as error:
        return str(error)


def captions_beside(paths: Iterable[Path]) -> tuple[dict[Path, str], dict[Path, str]]:
    """Captions from a file of the same name that ends in .txt; clips without one are left out.

    Returns:
        The captions, and of the clips whose file cannot be read why.
    """
    captions, unreadable = {}, {}
    for path in paths:
        file = path.with_suffix(".txt")
        try:
            captions[path] = file.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            continue
        except UnicodeDecodeError:
            unreadable[path] = f"caption {file.name} is not UTF-8"
        except OSError as error:
            unreadable[path] = f"caption {file.name} cannot be read: {error.strerror}"
    return captions, unreadable


def captions_from(table: Path, folder: Path, paths: Iterable[Path]) -> dict[Path, str]:
    """Captions from the columns `path` and `text` of a CSV file; clips that it does not name are left out.

    Args:
        table: the file; its paths are relative to its own folder or to that of the clips.
        folder: of the clips.
        paths: the clips.

    Raises:
        OpenSoraError: no such file, no such columns, no row about any of the clips, or two captions for one.
    """
    by_path: dict[str, str] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in ("path", "text") if name not in (reader.fieldnames or ())]:
                raise OpenSoraError(f"captions {table} have no column {' and no '.join(missing)}")
            for row in reader:
                text = (row["text"] or "").strip()
                for place in {_normal(base / (row["path"] or "")) for base in (folder, table.parent)}:
                    if by_path.setdefault(place, text) != text:
                        raise OpenSoraError(
                            f"captions {table} have two for {row['path']}, the second one in line {reader.line_num}; "
                            "keep one"
                        )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OpenSoraError(f"captions {table} cannot be read: {error}") from None
    captions = {path: by_path[_normal(path)] for path in paths if _normal(path) in by_path}
    if not captions:
        raise OpenSoraError(f"captions {table} name none of the clips in {folder}; paths are relative to either folder")
    return captions


def _normal(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - unlike resolve() it leaves links, which the walk leaves too


def make_rows(
    findings: Mapping[Path, Finding],
    captions: Mapping[Path, str],
    *,
    unreadable: Mapping[Path, str] | None = None,
    uncaptioned: bool = False,
) -> tuple[list[ClipRow], dict[Path, str]]:
    """Rows of a manifest, and which files are left out why.

    Args:
        findings: what the files hold.
        captions: of the clips.
        unreadable: why the captions of some clips cannot be read.
        uncaptioned: keep clips without a caption.
    """
    rows, left_out = [], {}
    for path, finding in findings.items():
        text = captions.get(path, "")
        if isinstance(finding, str):
            left_out[path] = finding
        elif not _is_text(str(path)):
            left_out[path] = "its name is not UTF-8"
        elif not text and not uncaptioned:
            left_out[path] = (unreadable or {}).get(path, "no caption")
        else:
            rows.append(ClipRow(path, text, finding.num_frames, finding.height, finding.width, finding.fps))
    return rows, left_out


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def summary(rows: Sequence[ClipRow]) -> str:
    """Such as "12 clips (1.5 min), 3 images"."""
    videos = [row for row in rows if row.num_frames > 1]
    seconds = sum(row.num_frames / row.fps for row in videos if row.fps)
    length = (
        f"{seconds:.3g} s"
        if seconds < 60
        else f"{seconds / 60:.3g} min"
        if seconds < 3600
        else f"{seconds / 3600:,.3g} h"
    )
    parts = [f"{len(videos):,} clip{'s' * (len(videos) != 1)} ({length})"] if videos else []
    images = len(rows) - len(videos)
    return ", ".join([*parts, *([f"{images:,} image{'s' * (images != 1)}"] if images else [])]) or "nothing"


def broken_clips(rows: Sequence[ClipRow], on_progress: Callable[[int, int], None] | None = None) -> dict[Path, str]:
    """Files that are broken, or other than the manifest says, and what is wrong with them.

    Args:
        rows: of the manifest.
        on_progress: called with how many files of how many are read.
    """
    findings = probe_all([row.path for row in rows], on_progress=on_progress or (lambda done, total: None))
    broken = {}
    for row in rows:
        found = findings[row.path]
        if isinstance(found, str):
            broken[row.path] = found
        elif (found.height, found.width) != (row.height, row.width):
            broken[row.path] = f"{found.height}x{found.width} pixels, but the manifest says {row.height}x{row.width}"
        elif found.num_frames < row.num_frames:
            broken[row.path] = f"{found.num_frames} of the manifest's {row.num_frames} frames are there"
    return broken


@dataclass(frozen=True)
class Scan:
    """What a folder of clips came to.

    Attributes:
        rows: of the manifest.
        left_out: files that are not in it, and why.
        num_files: that were looked at.
    """

    rows: list[ClipRow]
    left_out: dict[Path, str]
    num_files: int


def make_manifest(
    folder: Path,
    output: Path,
    *,
    captions: Path | None = None,
    uncaptioned: bool = False,
    verify: Literal["count", "decode"] = "count",
    num_workers: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scan:
    """Writes a manifest of a folder, if any clip can be used; an interrupted scan goes on where it was.

    Args:
        folder: where the clips are.
        output: the manifest, .csv or .parquet.
        captions: table of captions; None for text files beside the clips.
        uncaptioned: keep clips that have no caption.
        verify: how closely to look at each.
        num_workers: files looked into at a time.
        on_progress: called with how many files of how many are read.

    Raises:
        OpenSoraError: no clips, or captions that cannot be read.
    """
    files = find_files(folder)
    unreadable: dict[Path, str] = {}
    if captions is None:
        texts, unreadable = captions_beside(files)
    else:
        texts = captions_from(captions, folder, files)
    output.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(output.with_name(f".{output.name}.scan"), verify)
    findings = probe_all(files, verify=verify, num_workers=num_workers, journal=journal, on_progress=on_progress)
    rows, left_out = make_rows(findings, texts, unreadable=unreadable, uncaptioned=uncaptioned)
    if rows:
        write_manifest(output, rows)
        journal.path.unlink(missing_ok=True)
    return Scan(list(rows), dict(left_out), len(files))
