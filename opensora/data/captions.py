"""Captions of clips in a folder: files of the same name, tables, and names that nearly match.

Beside a clip `a.mp4` its caption may stand in `a.txt` or `a.caption`, or in `a.json` under `text` or `caption`; and in
`metadata.jsonl` (`.csv`, `.parquet`) of its folder under its `file_name`. Where two of them say different things, the
clip is set aside: which one is meant only its owner knows.
"""

import os
import re
import unicodedata
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from opensora.clip_rows import Texts
from opensora.contents import read_object, read_text, shown
from opensora.data.folder import CAPTION_ENDINGS, CLIP_NAME, Folder, Kind
from opensora.errors import OpenSoraError
from opensora.manifest import check_path, check_text, rows_of_clips
from opensora.tables import is_empty

_LONGEST_BYTES = 2**20


class CaptionError(OpenSoraError):
    """Why the caption of a clip cannot be used."""


class Captions:
    """The captions of a folder's clips.

    Args:
        folder: what lies there.
        tables: of captions, whose paths are relative to them or to the folder; None takes what lies beside the clips.

    Attributes:
        used: files of captions that clips have.
        unknown: rows of tables about files that are no clips of the folder.
        set_aside: rows of tables that cannot be used, with what is wrong with them.

    Raises:
        OpenSoraError: a table that cannot be read, that has two captions for a clip, or given ones of which none is
            about any of the clips.
    """

    def __init__(self, folder: Folder, tables: Sequence[Path] | None = None) -> None:
        self.folder = folder
        self.used: set[str] = set()
        self.unknown = Kind()
        self.set_aside: list[str] = []
        self._beside = tables is None
        self._texts, self._tables = Texts(), list[str]()  # captions of tables, and the names of these
        self._told = array("q", [-1]) * len(folder.clips)  # of each clip, which of the captions is its own
        self._told_by = array("L", [0]) * len(folder.clips)  # and which of the tables
        wanted = [Path(table) for table in folder.tables] if tables is None else tables
        numbers = {_absolute(clip): number for number, clip in enumerate(folder.clips)} if wanted else {}
        for table in wanted:
            self._read(table, numbers)
        if tables and not len(self._texts):
            names = " and ".join(map(str, tables))
            raise OpenSoraError(
                f"captions {names} name none of the clips in {folder.path}; paths are relative to either folder"
            )

    def of(self, number: int) -> str:
        """The caption of a clip, by its number in the folder; "" without one.

        Raises:
            CaptionError: it cannot be read, is empty, or there are two that differ.
        """
        told = self._told[number]
        found = [(self._texts[told], self._tables[self._told_by[number]])] if told >= 0 else []
        stem = self.folder.clips[number].rpartition(".")[0]
        for file in [stem + ending for ending in CAPTION_ENDINGS] if self._beside else []:
            if file in self.folder.captions and (text := _read_file(file)) is not None:
                self.used.add(file)
                found.append((text, Path(file).name))
        texts = [(text, where) for text, where in found if not is_empty(text)]
        if len({text for text, _ in texts}) > 1:
            raise CaptionError(f"two captions that differ, in {' and '.join(where for _, where in texts)}; keep one")
        if found and not texts:
            raise CaptionError(f"its caption in {found[0][1]} is empty")
        return texts[0][0] if texts else ""

    def unused(self) -> list[str]:
        """Files of captions that no clip has, after all clips were asked for theirs; of .json only those that nearly
        bear the name of a clip."""
        return sorted(file for file in self.folder.captions - self.used if not file.endswith(".json"))

    def near(self, clips: Iterable[str]) -> dict[str, str]:
        """Clips whose caption seems to lie in a file of nearly their name -> that file.

        Names are held to be near that differ in case, spaces, the form of accented letters, dots at the end, or by
        something more between dots, such as `a.mp4.txt` or `a.en.txt`.
        """
        by_name: dict[str, str] = {}
        for file in self.unused():
            for name in _near_names(file.rpartition(".")[0]):
                by_name.setdefault(name, file)
        found = {clip: by_name.get(_near_name(clip.rpartition(".")[0])) for clip in clips}
        return {clip: file for clip, file in found.items() if file is not None}

    def _read(self, table: Path, numbers: Mapping[str, int]) -> None:
        self._tables.append(table.name)
        for row in rows_of_clips(table, "captions", ("path", "text")):
            where = f"row {row.number}" if row.line is None else f"line {row.line}"
            try:
                if row.problem:
                    raise OpenSoraError(row.problem)
                path, text = check_path(row.cells.get("path")), check_text(row.cells.get("text")).strip()
            except OpenSoraError as error:
                self.set_aside.append(f"{table}, {where}: {error}")
                continue
            places = dict.fromkeys(_absolute(base / path) for base in (self.folder.path, table.parent))
            clips = [numbers[place] for place in places if place in numbers]
            if not clips:
                self.unknown.add(f"{shown(path)} ({table.name}, {where})")
            for clip in clips:
                if self._told[clip] < 0:
                    self._told[clip], self._told_by[clip] = len(self._texts), len(self._tables) - 1
                    self._texts.append(text)
                elif self._texts[self._told[clip]] != text:
                    raise OpenSoraError(
                        f"captions {table} have two for {shown(path)}, the second one in {where}; keep one"
                    )


def _read_file(path: str) -> str | None:
    """What a file says of its clip; None where it is JSON that says nothing of a caption."""
    name = Path(path).name
    try:
        if not path.endswith(".json"):
            return read_text(path, "caption", _LONGEST_BYTES).strip()
        values = read_object(path, "caption")
        key = next((key for key in ("text", "caption") if key in values), None)
        return None if key is None else check_text(values[key]).strip()
    except OpenSoraError as error:
        raise CaptionError(str(error).replace(path, name)) from None


def _absolute(path: str | Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - unlike resolve() it leaves links, which the walk leaves too


def _near_name(stem: str) -> str:
    folder, _, name = stem.rpartition(os.sep)
    name = re.sub(r"[\s_]+", "", unicodedata.normalize("NFKC", name))
    return f"{folder}/{name.casefold().rstrip('.')}"


def _near_names(stem: str) -> list[str]:
    """What a clip may be called whose caption's file is called so, up to its last dot."""
    names = [_near_name(stem)]
    if CLIP_NAME.fullmatch(stem) or re.search(r"\.[A-Za-z-]{2,8}$", stem):
        names.append(_near_name(stem.rpartition(".")[0]))
    return names
