"""Whether a video file ends where it says it does: a copy or download that stopped early often plays up to the cut."""

import os
from pathlib import Path
from typing import BinaryIO

from opensora.errors import OpenSoraError

_FILLED_BOXES = (b"mdat", b"moof", b"moov")
_MOST_BOXES = 1_000_000


def check_whole(path: Path) -> None:
    """Raises `OpenSoraError` for an mp4, a Matroska or a gif that ends before it should; the message names no file."""
    with path.open("rb") as file:
        head = file.read(12)
        if head[4:8] == b"ftyp":
            end = _end_of_boxes(file)
        elif head[:4] == b"\x1aE\xdf\xa3":
            end = _end_of_segment(file)
        elif head[:4] == b"GIF8":
            end = _end_of_gif(file)
        else:
            return
        size = file.seek(0, os.SEEK_END)
    if end is not None and end > size:
        raise OpenSoraError(f"truncated: {size:,} of {end:,} bytes or more are there")


def _end_of_boxes(file: BinaryIO) -> int | None:
    """Where the last box of an mp4 ends that holds frames or says what they are."""
    at, end = 0, None
    for _ in range(_MOST_BOXES):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return end
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size < 8:  # 0: up to the end of the file, and otherwise no box
            return end
        at += size
        end = at if kind in _FILLED_BOXES else end
    return end


def _end_of_segment(file: BinaryIO) -> int | None:
    """Where the segment of a Matroska file ends; None where it does not say, as live recordings do not."""
    file.seek(4)
    header_size = _read_size(file)
    if header_size is None:
        return None
    file.seek(header_size, os.SEEK_CUR)
    if file.read(4) != b"\x18S\x80g":
        return None
    size = _read_size(file)
    return None if size is None else file.tell() + size


def _read_size(file: BinaryIO) -> int | None:
    first = file.read(1)
    length = 9 - first[0].bit_length() if first else 9
    if length > 8:
        return None
    bits = 7 * length
    value = int.from_bytes(first + file.read(length - 1), "big") & ((1 << bits) - 1)
    return None if value == (1 << bits) - 1 else value


def _end_of_gif(file: BinaryIO) -> int | None:
    """Where a gif has its trailer, or the place after all that is there; None for what is no block of one."""
    file.seek(10)
    flags = file.read(3)
    if len(flags) < 3:
        return 13
    file.seek(13 + _palette_bytes(flags[0]))
    while True:
        kind = file.read(1)
        if kind == b";":
            return file.tell()
        if kind == b"!":
            file.seek(1, os.SEEK_CUR)
        elif kind == b",":
            descriptor = file.read(9)
            if len(descriptor) == 9:
                file.seek(_palette_bytes(descriptor[8]) + 1, os.SEEK_CUR)
        else:
            return None if kind else file.tell() + 1
        while size := file.read(1):
            if size == b"\0":
                break
            file.seek(size[0], os.SEEK_CUR)


def _palette_bytes(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 128 else 0
