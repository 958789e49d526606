"""Whether the files of a manifest are there at all, asked before the first step of a run."""

import logging
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from opensora.clip_rows import ClipRows
from opensora.errors import OpenSoraError

logger = logging.getLogger(__name__)

_AT_ONCE = 1000  # paths that a thread asks for
_THREADS = 16  # a network's file system answers late, but many at a time


def missing_files(rows: ClipRows, on_progress: Callable[[int, int], None] = lambda done, total: None) -> dict[int, str]:
    """Numbers of the clips whose files are not there, or hold nothing, and what is there instead."""
    paths, done = rows.paths(), 0
    missing: dict[int, str] = {}
    parts = iter(lambda: list(islice(paths, _AT_ONCE)), [])
    with ThreadPoolExecutor(_THREADS) as asking:
        while some := list(islice(parts, _THREADS)):
            for reasons in asking.map(_reasons, some):
                missing |= {done + number: reason for number, reason in enumerate(reasons) if reason}
                done += len(reasons)
                on_progress(done, len(rows))
    return missing


def check_presence(missing: dict[int, str], rows: ClipRows, max_share: float) -> None:
    """Refuses clips of which too many are missing, and warns of fewer.

    Raises:
        OpenSoraError: more than `max_share` of the clips are; names one of them.
    """
    if not missing:
        return
    told = f"{describe_missing(missing, rows)}; opensora data plan names them"
    if len(missing) > max_share * len(rows):
        raise OpenSoraError(f"{told} (max_broken_share {max_share:g} would allow {int(max_share * len(rows)):,})")
    logger.warning("%s; others take their places", told)


def describe_missing(missing: dict[int, str], rows: ClipRows) -> str:
    """Such as "8 of 9 clips are missing, such as a.mp4: it does not exist"."""
    number, reason = next(iter(missing.items()))
    return f"{len(missing):,} of {len(rows):,} clips are missing, such as {rows[number].path}: {reason}"


def _reasons(paths: Sequence[str]) -> list[str]:
    return [_reason(path) for path in paths]


def _reason(path: str) -> str:
    try:
        state = Path(path).stat()
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            return f"it cannot be read: {getattr(error, 'strerror', None) or error}"
        if Path(path).is_symlink():
            return "it is a link to nothing"
        return "it does not exist" + ("; backslashes are no folders here" if "\\" in path else "")
    if not stat.S_ISREG(state.st_mode):
        return "it is no file"
    return "" if state.st_size else "it is empty"
