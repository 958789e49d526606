"""Clips that latents are measured on: of a folder, of a manifest, or of the toy world; chosen by a seed.

They are read one by one, and those that are broken or too short are passed over, so that as many are measured as were
asked for where there are as many. All have one size.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from opensora import limits
from opensora.checkpoints.file_hashes import file_hash
from opensora.clip_rows import ClipRow
from opensora.data.buckets import Bucket
from opensora.data.clips import read_clip
from opensora.data.folder import look_into
from opensora.data.scan import row_of
from opensora.data.toybox import ToyboxClips
from opensora.distributed.seeding import derive_seed
from opensora.errors import OpenSoraError
from opensora.limits import check_count
from opensora.manifest import read_manifest, tables_of
from opensora.media.frames import probe
from opensora.toybox.specs import ClipSpec, sample_specs

TOYBOX = "toybox"
"""What names the toy world where a folder or a manifest may be named."""


Candidate = tuple[str, Callable[[], Tensor]]
"""Name of a clip, and what reads it: a video (3, T, H, W), or an `OpenSoraError` with the reason why not."""
Candidates = Callable[[], Iterator[Candidate]]


@dataclass(frozen=True)
class VideoSize:
    """Frames, and height and width in pixels, of every clip."""

    num_frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        check_count("`num_frames`", self.num_frames, limits.FRAMES)
        check_count("`height`", self.height, limits.SIDE_PX)
        check_count("`width`", self.width, limits.SIDE_PX)

    def __str__(self) -> str:
        return f"{self.num_frames} frame{'s' * (self.num_frames > 1)} of {self.height}x{self.width}"


@dataclass
class Clips:
    """Clips of one size; iterating reads them.

    Attributes:
        data: what they were chosen from, as it was named.
        size: of each.
        num_clips: at most so many.
        seed: which.
        sha256: hash of the manifest; of a folder that of its clips' names and sizes; "" of the toy world.
        candidates: begins anew with all there are, in the order in which they are tried.
        num_read: how many were read so far.
        left_out: those that were passed over so far, and why.
    """

    data: str
    size: VideoSize
    num_clips: int
    seed: int
    sha256: str
    candidates: Candidates = field(repr=False)
    num_read: int = 0
    left_out: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Tensor]:
        """Videos (1, 3, T, H, W) in [-1, 1].

        Raises:
            OpenSoraError: none of them can be used.
        """
        self.num_read = 0
        self.left_out.clear()
        for name, read in self.candidates():
            if self.num_read == self.num_clips:
                break
            try:
                video = read()
            except OpenSoraError as error:
                self.left_out[name] = str(error)
                continue
            self.num_read += 1
            yield video[None]
        if not self.num_read:
            name, reason = next(iter(self.left_out.items()))
            others = f" and {len(self.left_out) - 1} more" if len(self.left_out) > 1 else ""
            raise OpenSoraError(f"no clip of {self.data} can be measured: {name}: {reason}{others}")

    @property
    def said(self) -> str:
        """What was read, in words."""
        what = "held-out toy clips" if self.data == TOYBOX else f"clips of {self.data}"
        origin = f" (sha256 {self.sha256[:16]})" if self.sha256 else ""
        return f"{self.num_read} {what}{origin}, {self.size}, seed {self.seed}"


def choose_clips(data: str, size: VideoSize, num_clips: int, seed: int) -> Clips:
    """Chooses clips; none is read yet.

    Args:
        data: a folder, a manifest (or several, see `manifest`), or "toybox" for held-out clips of the toy world.
        size: of each; longer clips are cut to a window, all are resized and cropped.
        num_clips: at most so many.
        seed: chooses clips and windows.

    Raises:
        OpenSoraError: nothing there, no clips, or none of so many frames in the manifest.
    """
    check_count("`num_clips`", num_clips, limits.CLIPS)
    check_count("`seed`", seed, limits.SEED, least=0)
    if data == TOYBOX:
        candidates, sha256 = _of_toybox(size, num_clips, seed), ""
    elif Path(data).is_dir():
        candidates, sha256 = _of_folder(Path(data), size, seed)
    else:
        candidates, sha256 = _of_manifest(data, size, seed)
    return Clips(data, size, num_clips, seed, sha256, candidates)


def _of_toybox(size: VideoSize, num_clips: int, seed: int) -> Candidates:
    clips = ToyboxClips(num_frames=size.num_frames, height=size.height, width=size.width)
    specs = sample_specs(num_clips, seed, clips.world, "held_out")

    def render(spec: ClipSpec) -> Tensor:
        return clips.batch([spec], [""]).video[0]

    return lambda: ((str(number), partial(render, spec)) for number, spec in enumerate(specs))


def _of_folder(folder: Path, size: VideoSize, seed: int) -> tuple[Candidates, str]:
    names = look_into(folder).clips
    if not names:
        raise OpenSoraError(f"no clips in {folder}; clips end in .mp4, .webm, .png, .jpg and the like")
    listed = "".join(f"{os.path.relpath(name, folder)}\0{_size_of(name)}\n" for name in sorted(names))
    sha256 = hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()
    _shuffler(seed).shuffle(names)
    return lambda: ((name, partial(_read_file, Path(name), size, seed)) for name in names), sha256


def _size_of(name: str) -> int:
    path = Path(name)
    return path.stat().st_size if path.is_file() else 0


def _of_manifest(data: str, size: VideoSize, seed: int) -> tuple[Candidates, str]:
    tables = [table for table, _ in tables_of(data)]
    if absent := [table for table in tables if not table.exists()]:
        raise OpenSoraError(
            f"data {absent[0]} does not exist; give a folder of clips, a manifest (.csv, .parquet) or {TOYBOX}"
        )
    rows = read_manifest(data, text_required=False).rows
    if not rows:
        raise OpenSoraError(f"no clips in {data}; opensora data manifest makes a manifest of a folder")
    lengths = rows.sizes()[:, 0]
    numbers = [number for number, frames in enumerate(lengths.tolist()) if frames >= size.num_frames]
    if not numbers:
        raise OpenSoraError(_too_short(data, size.num_frames, int(lengths.max())))
    _shuffler(seed).shuffle(numbers)
    hashes = [file_hash(table) for table in tables]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def candidates() -> Iterator[Candidate]:
        for row in (rows[number] for number in numbers):
            yield str(row.path), partial(_read_row, row, size, seed)

    return candidates, sha256


def _read_file(path: Path, size: VideoSize, seed: int) -> Tensor:
    if not path.is_file():  # a pipe would wait for somebody to write
        raise OpenSoraError("no file")
    facts = probe(path)
    if facts.num_frames < size.num_frames:
        raise OpenSoraError(_too_short("the file", size.num_frames, facts.num_frames))
    return _read_row(row_of(path, "", facts), size, seed)


def _read_row(row: ClipRow, size: VideoSize, seed: int) -> Tensor:
    bucket = Bucket("", size.num_frames, size.height / size.width, size.height, size.width, 1)
    return read_clip(row, bucket, 1, random.Random(derive_seed("latents window", str(row.path.name), seed)))


def _shuffler(seed: int) -> random.Random:
    return random.Random(derive_seed("latents", seed))


def _too_short(what: str, wanted: int, longest: int) -> str:
    if longest == 1:
        return f"{what} has pictures alone, of 1 frame, where `num_frames` is {wanted}; give 1"
    return f"{what} has {longest} frames at most, where `num_frames` is {wanted}; give {longest} or fewer"
