"""Everything in and below a folder of clips: which files are clips by their endings, which captions, and what else.

Links to folders are followed, after all that lies in the folder itself; a folder that was entered before is not entered
again, so no loop is endless and no clip comes twice by way of its folder.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from opensora.contents import kind_of
from opensora.errors import OpenSoraError

# Files are opened by these endings, and read as what they are.
CLIP_NAME = re.compile(
    r".+\.(mp4|m4v|mov|qt|mkv|webm|avi|mpg|mpeg|ts|mts|m2ts|vob|wmv|asf|flv|f4v|3gp|3g2|ogv|ivf|nut|mxf|y4m|gif"
    r"|png|apng|jpg|jpeg|jpe|jfif|mpo|webp|bmp|tif|tiff|ppm|pgm|avif|heic|heif|hif|jp2)",
    re.I | re.S,
)
CAPTION_ENDINGS = (".txt", ".caption", ".json")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Tables of captions that lie beside their clips, as Hugging Face's datasets have them."""


@dataclass
class Kind:
    """Files of one kind: how many, and the first."""

    count: int = 0
    example: str = ""

    def add(self, path: str) -> None:
        """One more."""
        self.count += 1
        self.example = self.example or path


@dataclass
class Folder:
    """What was seen.

    Attributes:
        path: of the folder.
        clips: by their endings, sorted.
        captions: files that end in .txt, .caption or .json.
        tables: files called as in `METADATA`, sorted.
        others: files of other endings, by ending; "no file" are pipes, sockets and links to nothing.
        misnamed: of these, videos and pictures by their content.
        hidden: files whose names begin with a dot.
        hidden_folders: likewise; what they hold was not looked at.
        seen_before: links to folders that were entered already.
        unreadable: folders that cannot be entered, and why.
    """

    path: Path
    clips: list[str] = field(default_factory=list)
    captions: set[str] = field(default_factory=set)
    tables: list[str] = field(default_factory=list)
    others: dict[str, Kind] = field(default_factory=dict)
    misnamed: Kind = field(default_factory=Kind)
    hidden: Kind = field(default_factory=Kind)
    hidden_folders: Kind = field(default_factory=Kind)
    seen_before: Kind = field(default_factory=Kind)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def num_files(self) -> int:
        """All that were seen."""
        named = len(self.clips) + len(self.captions) + len(self.tables)
        return named + sum(kind.count for kind in self.others.values()) + self.hidden.count


def look_into(path: Path) -> Folder:
    """Sees every file in and below a folder.

    Raises:
        OpenSoraError: no such folder, or it cannot be entered.
    """
    if not path.is_dir():
        raise OpenSoraError(f"{path} {'is a file' if path.exists() else 'does not exist'}, expected a folder of clips")
    found = Folder(path)
    entered: set[tuple[int, int]] = set()
    followed, waiting = False, [str(path)]  # links to folders, after the folder itself
    while waiting:
        links: list[str] = []
        for folder in waiting:
            for entry in _entries(folder, found, entered, links):
                _sort_in(entry, found)
        followed, waiting = followed or bool(links), links
    if str(path) in found.unreadable:
        raise OpenSoraError(f"folder {path} cannot be read: {found.unreadable[str(path)]}")
    if followed:
        found.clips.sort(key=lambda name: Path(name).parts)
        found.tables.sort(key=lambda name: Path(name).parts)
    return found


def _entries(top: str, found: Folder, entered: set[tuple[int, int]], links: list[str]) -> Iterator["os.DirEntry[str]"]:
    """What lies in a folder and its own folders, each in the order of names."""
    stack = [_listed(top, found, entered)]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
        elif _is_folder(entry):
            if entry.name.startswith("."):
                found.hidden_folders.add(entry.path)
            elif entry.is_symlink():
                links.append(entry.path)
            else:
                stack.append(_listed(entry.path, found, entered))
        else:
            yield entry


def _listed(path: str, found: Folder, entered: set[tuple[int, int]]) -> Iterator["os.DirEntry[str]"]:
    try:
        state = Path(path).stat()
        if (state.st_dev, state.st_ino) in entered:
            found.seen_before.add(path)
            return iter(())
        entered.add((state.st_dev, state.st_ino))
        with os.scandir(path) as entries:
            return iter(sorted(entries, key=lambda entry: entry.name))
    except OSError as error:
        found.unreadable[path] = error.strerror or str(error)
        return iter(())


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _sort_in(entry: "os.DirEntry[str]", found: Folder) -> None:
    ending = Path(entry.name).suffix.lower()
    if entry.name.startswith("."):
        found.hidden.add(entry.path)
    elif CLIP_NAME.fullmatch(entry.name):  # pipes and links to nothing among them, so that they are named
        found.clips.append(entry.path)
    elif not _is_file(entry):
        found.others.setdefault("no file", Kind()).add(entry.path)
    elif entry.name in METADATA:
        found.tables.append(entry.path)
    elif ending in CAPTION_ENDINGS:
        found.captions.add(entry.path)
    else:
        found.others.setdefault(ending or "no ending", Kind()).add(entry.path)
        if _seems_a_clip(entry.path):
            found.misnamed.add(entry.path)


def _seems_a_clip(path: str) -> bool:
    try:
        return kind_of(path) in ("image", "video")
    except OpenSoraError:
        return False
