"""From a folder of clips to a manifest: looks into each, finds its caption, and accounts for everything that is there.

Looking into many files takes long, so every finding is noted in a journal beside the manifest; a scan that was
interrupted goes on where it was, and looks again at files that have changed since.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from opensora.clip_rows import ClipRow, ClipRows
from opensora.contents import parse_json, shown
from opensora.data.captions import CaptionError, Captions
from opensora.data.folder import Folder, look_into
from opensora.errors import OpenSoraError
from opensora.files import append_text
from opensora.manifest import write_manifest
from opensora.media.frames import ClipFacts, check_length, probe

Finding = ClipFacts | str
"""What a file holds, or the reason why it cannot be used."""
Notes = dict[str, tuple[int, str]]
"""What is said of clips -> of how many, and one of these."""

_NOTED_AT_ONCE = 64
_MOST_TOLD = 100
_EXAMPLES = 20


class Journal:
    """What was found in which file, kept in a file of JSON lines while a scan runs.

    Args:
        path: of the journal.
        verify: how closely the scan looks.
    """

    def __init__(self, path: Path, verify: str) -> None:
        self.path, self.verify = path, verify
        self._places: dict[int, int] = {}  # hash of a key -> where its line begins
        if path.exists():
            with path.open("rb") as file:
                place = 0
                for line in file:
                    if (entry := _entry(line)) is not None:
                        self._places[hash(entry[0])] = place
                    place += len(line)

    def find(self, path: Path) -> Finding | None:
        """What was found in a file, if it has not changed since."""
        place = self._places.get(hash(key := self.key(path))) if self._places and path.exists() else None
        if place is None:
            return None
        with self.path.open("rb") as file:
            file.seek(place)
            entry = _entry(file.readline())
        return entry[1] if entry is not None and entry[0] == key else None

    def note(self, findings: Iterable[tuple[Path, Finding]]) -> None:
        """Appends what was found."""
        lines = []
        for path, finding in findings:
            if path.exists():
                noted = {"broken": finding} if isinstance(finding, str) else {"facts": asdict(finding)}
                lines.append(json.dumps({"file": self.key(path), **noted}) + "\n")
        append_text(self.path, "".join(lines))

    def key(self, path: Path) -> str:
        """Names a file in the state it is in."""
        state = path.stat()
        return f"{path.absolute()} {state.st_size} {state.st_mtime_ns} {self.verify}"


def _entry(line: bytes) -> tuple[str, Finding] | None:
    try:
        entry = parse_json(line, "journal")
        if "broken" in entry:
            return entry["file"], entry["broken"]
        facts: dict[str, Any] = {**entry["facts"], "notes": tuple(entry["facts"]["notes"])}
        return entry["file"], ClipFacts(**facts)
    except (OpenSoraError, KeyError, TypeError):
        return None  # the last line of an interrupted scan may be cut


def probe_all(
    paths: Iterable[Path],
    total: int,
    *,
    verify: Literal["count", "decode"] = "count",
    num_workers: int = 8,
    journal: Journal | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[Path, Finding]]:
    """What every file holds, one after the other.

    Args:
        paths: of the files.
        total: how many there are.
        verify: how closely to look, see `media.frames.probe`.
        num_workers: files looked into at a time.
        journal: where findings are noted; what it knows already is taken over.
        on_progress: told how many files are done, of how many.
    """
    todo = iter(paths)
    readers = ThreadPoolExecutor(num_workers)
    new: list[tuple[Path, Finding]] = []

    def begin(path: Path) -> tuple[Path, Finding | Future[Finding]]:
        known = journal.find(path) if journal is not None else None
        return path, readers.submit(_probe, path, verify) if known is None else known

    try:
        running = deque(map(begin, islice(todo, 8 * num_workers)))
        done = 0
        while running:
            path, finding = running.popleft()
            if isinstance(finding, Future):
                finding = finding.result()
                new.append((path, finding))
            if journal is not None and len(new) >= _NOTED_AT_ONCE:
                journal.note(new)
                new = []
            running.extend(map(begin, islice(todo, 1)))
            done += 1
            on_progress(done, total)
            yield path, finding
    finally:
        readers.shutdown(cancel_futures=True)
        if journal is not None and new:
            journal.note(new)


def _probe(path: Path, verify: Literal["count", "decode"]) -> Finding:
    if not path.is_file():  # a pipe would wait for somebody to write
        return "no file, but a link to nothing" if path.is_symlink() else "no file"
    if path.stat().st_size == 0:
        return "an empty file, not a video"
    try:
        return probe(path, verify)
    except OpenSoraError as error:
        return str(error)


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@dataclass
class Verified:
    """What the files of a manifest are.

    Attributes:
        broken: those that are broken, or other than the manifest says, and what is wrong with them.
        notes: what will be done to frames that a user may not expect -> to those of how many clips, and one of these.
    """

    broken: dict[Path, str] = field(default_factory=dict)
    notes: Notes = field(default_factory=dict)


def verify_clips(rows: Sequence[ClipRow], on_progress: Callable[[int, int], None] | None = None) -> Verified:
    """Opens every file of a manifest.

    Args:
        rows: of the manifest.
        on_progress: called with how many files of how many are read.
    """
    findings = probe_all((row.path for row in rows), len(rows), on_progress=on_progress or (lambda done, total: None))
    verified = Verified()
    for row, (path, found) in zip(rows, findings, strict=True):
        if isinstance(found, str):
            verified.broken[path] = found
        elif (found.height, found.width) != (row.height, row.width):
            said = f"the manifest says {row.height}x{row.width}"
            verified.broken[path] = f"{found.height}x{found.width} pixels, but {said}"
        else:
            try:
                check_length(found.timeline, row.num_frames, row.fps)
                add_notes(verified.notes, notes_on(found, row.fps), str(path))
            except OpenSoraError as error:
                verified.broken[path] = str(error)
    return verified


def add_notes(notes: Notes, of_clip: Sequence[str], clip: str) -> None:
    """Counts what is said of a clip."""
    for note in of_clip:
        count, example = notes.get(note, (0, clip))
        notes[note] = (count + 1, example)


def note_lines(notes: Notes) -> Iterator[str]:
    """Notes in words."""
    for note, (count, example) in notes.items():
        yield f"note: {shown(example, 200)}{f' and {count - 1:,} more' if count > 1 else ''}: {note}"


def row_of(path: Path, text: str, found: ClipFacts, fps: float | None = None) -> ClipRow:
    """A clip in a manifest, whose frames are to be taken at this rate, by time; None for that of the file."""
    rate = None if found.num_frames == 1 else fps  # pictures have none
    num_frames = found.num_frames if rate is None else found.timeline.count(rate)
    return ClipRow(path, text, num_frames, found.height, found.width, rate or found.fps)


def notes_on(found: ClipFacts, fps: float | None = None) -> list[str]:
    """What is done to a file's frames that a user may not expect, where they are taken at this rate or its own."""
    notes = list(found.notes)
    if found.is_variable:
        notes.append("its frame rate varies; frames are taken by time")
    elif found.num_frames > 1 and not found.timeline.plays_at(fps):
        notes.append(f"it plays at another rate; frames are taken by time at {fps:g} fps")
    return notes


@dataclass
class Scan:
    """What a folder of clips came to.

    Attributes:
        folder: everything that was seen there.
        captions: where captions were looked for.
        rows: of the manifest.
        left_out: clips that are not in it, and why.
        near: clips without a caption -> a file of nearly their name that may be meant.
        notes: what will be done to frames that a user may not expect -> to those of how many clips, and one of these.
    """

    folder: Folder
    captions: Captions
    rows: ClipRows = field(default_factory=ClipRows)
    left_out: dict[str, str] = field(default_factory=dict)
    near: dict[str, str] = field(default_factory=dict)
    notes: Notes = field(default_factory=dict)

    def left_out_lines(self) -> Iterator[str]:
        """Which clips were left out: all of a few, of many how many for which reason as well."""
        yield f"left out: {len(self.left_out)}"
        yield from (f"  {shown(path, 200)}: {why}" for path, why in islice(self.left_out.items(), _MOST_TOLD))
        if len(self.left_out) > _MOST_TOLD:
            yield f"  and {len(self.left_out) - _MOST_TOLD:,} more (--json names all); in all"
            reasons = Counter(self.left_out.values()).most_common(_EXAMPLES)
            yield from (f"  {count:,}: {reason}" for reason, count in reasons)

    def account(self) -> dict[str, int]:
        """Where every file that was seen went; the sum is `folder.num_files`."""
        unused = len(self.captions.unused())
        json_files = Counter(file.endswith(".json") for file in self.folder.captions - self.captions.used)[True]
        counts = {
            "in the manifest": len(self.rows),
            "left out": len(self.left_out),
            "captions of clips": len(self.captions.used),
            "captions without a clip": unused,
            "tables of captions": len(self.folder.tables),
            ".json without a caption": json_files,
            **{kind: files.count for kind, files in sorted(self.folder.others.items())},
            "hidden": self.folder.hidden.count,
        }
        return {what: count for what, count in counts.items() if count}

    def account_lines(self) -> Iterator[str]:
        """The same in words, with examples of what may be a mistake."""
        folder, captions = self.folder, self.captions
        counts = ", ".join(f"{count:,} {what}" for what, count in self.account().items())
        yield f"files seen: {folder.num_files:,}; {counts}"
        examples = {"captions without a clip": captions.unused()[:1], "hidden": [folder.hidden.example]}
        examples |= {kind: [files.example] for kind, files in folder.others.items()}
        for what in self.account():
            yield from (f"  {what}, such as {shown(example, 200)}" for example in examples.get(what, []))
        for clip, file in islice(self.near.items(), _EXAMPLES):
            yield f"  {shown(file, 200)} has nearly the name of {shown(Path(clip).name)}; call them alike"
        said = [
            ("are videos or pictures by their content; give them their ending", folder.misnamed),
            ("hidden folders were not looked into", folder.hidden_folders),
            ("links lead to folders that were seen already", folder.seen_before),
            ("rows of tables are about other files", captions.unknown),
        ]
        for what, files in said:
            if files.count:
                yield f"  {files.count:,} {what}, such as {shown(files.example, 200)}"
        yield from (f"  folder {path} cannot be read: {reason}" for path, reason in folder.unreadable.items())
        yield from (f"  set aside: {row}" for row in captions.set_aside[:_EXAMPLES])
        if len(captions.set_aside) > _EXAMPLES:
            yield f"  and {len(captions.set_aside) - _EXAMPLES:,} more rows of tables set aside"


def make_manifest(
    folder: Path,
    output: Path,
    *,
    captions: Sequence[Path] | None = None,
    uncaptioned: bool = False,
    verify: Literal["count", "decode"] = "count",
    num_workers: int = 8,
    fps: float | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scan:
    """Writes a manifest of a folder, if any clip can be used; an interrupted scan goes on where it was.

    Args:
        folder: where the clips are.
        output: the manifest, .csv or .parquet.
        captions: tables of captions; None for what lies beside the clips, see `data.captions`.
        uncaptioned: keep clips that have no caption.
        verify: how closely to look at each.
        num_workers: files looked into at a time.
        fps: rate at which frames of videos will be taken, by time; None for that of each.
        on_progress: called with how many files of how many are read.

    Raises:
        OpenSoraError: no clips, or captions that cannot be read.
    """
    seen = look_into(folder)
    if not seen.clips:
        others = sorted({*seen.others, *(Path(file).suffix for file in seen.captions)})
        what = f"only files of other kinds ({', '.join(others[:5])})" if others else "nothing"
        raise OpenSoraError(f"no clips in {folder}: it holds {what}; clips end in .mp4, .webm, .png, .jpg and the like")
    scan = Scan(seen, Captions(seen, captions))
    output.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(output.with_name(f".{output.name}.scan"), verify)
    findings = probe_all(
        map(Path, seen.clips),
        len(seen.clips),
        verify=verify,
        num_workers=num_workers,
        journal=journal,
        on_progress=on_progress,
    )
    silent = []
    for number, (clip, (path, finding)) in enumerate(zip(seen.clips, findings, strict=True)):
        try:
            text, problem = scan.captions.of(number), ""
        except CaptionError as error:
            text, problem = "", str(error)
        if isinstance(finding, str):
            scan.left_out[clip] = finding
        elif not _is_text(clip):
            scan.left_out[clip] = "its name is not UTF-8"
        elif problem or (not text and not uncaptioned):
            scan.left_out[clip] = problem or "no caption"
        else:
            scan.rows.append(row_of(path, text, finding, fps))
            add_notes(scan.notes, notes_on(finding, fps), clip)
        if not text and not problem:
            silent.append(clip)
    scan.near = scan.captions.near(silent)
    if scan.rows:
        write_manifest(output, scan.rows)
        journal.path.unlink(missing_ok=True)
    return scan


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
