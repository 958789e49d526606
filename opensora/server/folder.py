"""The files of a server: what was sent, what was made, and pictures of what is being made.

    uploads/            what is being sent
    inputs/ID/          what a job is made from, named by its content, whatever it was called
    clips/ID/1.mp4      of its first attempt, with its record, a thumbnail and a sheet of its frames beside it
    previews/ID.webp    while it is being made
    housekeeping.lock   held by the host that removes what is too old or too much

No name that came from outside is ever part of a path. What is done for one job takes as long as ever, however many
others there are.
"""

import itertools
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opensora.files import flush, remove_left_overs
from opensora.generation.record import sidecar_path
from opensora.generation.request import ClipRequest
from opensora.server.jobs import Job, JobResult

_ID = re.compile(r"video_[0-9a-f]{32}")
UPLOADS_S = 3600.0
"""What was sent may lie so long before its job is there."""


@dataclass(frozen=True)
class ServerFolder:
    """Where the files of a server are.

    Attributes:
        path: of all of them; shared by all hosts.
    """

    path: Path

    @property
    def inputs(self) -> Path:
        """What was sent, a folder for each job."""
        return self.path / "inputs"

    @property
    def uploads(self) -> Path:
        """What is being sent, before there is a job."""
        return self.path / "uploads"

    @property
    def clips(self) -> Path:
        """What was made."""
        return self.path / "clips"

    @property
    def previews(self) -> Path:
        """Pictures of what is being made."""
        return self.path / "previews"

    @property
    def colours(self) -> Path:
        """What latents look like, see `colours`."""
        return self.path / "colours"

    @property
    def housekeeping_lock(self) -> Path:
        """Held by whoever removes clips."""
        return self.path / "housekeeping.lock"

    def make(self) -> None:
        """Makes the folders, where they are not there."""
        for folder in (self.uploads, self.inputs, self.clips, self.previews, self.colours):
            folder.mkdir(parents=True, exist_ok=True)

    def new_clip(self, job: Job) -> Path:
        """Where this attempt writes its clip; another attempt writes elsewhere."""
        return self.clips_of(job.id) / f"{job.attempt}.{job.format}"

    def clip(self, result: JobResult) -> Path:
        """The clip that was made."""
        return self.clips / result.file

    def name_of(self, clip: Path) -> str:
        """What a result calls it."""
        return clip.relative_to(self.clips).as_posix()

    def record(self, result: JobResult) -> Path:
        """How it was made."""
        return sidecar_path(self.clip(result))

    def thumbnail(self, result: JobResult) -> Path:
        """Its middle frame."""
        return self.clip(result).with_suffix(".thumbnail.webp")

    def spritesheet(self, result: JobResult) -> Path:
        """Frames of it, side by side."""
        return self.clip(result).with_suffix(".sprites.jpg")

    def channels(self, result: JobResult) -> Path:
        """What each of its latent channels holds."""
        return self.clip(result).with_suffix(".channels.webp")

    def preview(self, job_id: str) -> Path:
        """A picture of what is being made."""
        return self.previews / f"{_checked(job_id)}.webp"

    def inputs_of(self, job_id: str) -> Path:
        """What a job is made from."""
        return self.inputs / _checked(job_id)

    def clips_of(self, job_id: str) -> Path:
        """What was made of a job, with its pictures."""
        return self.clips / _checked(job_id)

    def rooted(self, request: ClipRequest) -> ClipRequest:
        """The request with files as they are named here; stored ones are relative to the folder."""
        return request.with_files(lambda _, path: self.path / path)

    def relative(self, request: ClipRequest) -> ClipRequest:
        """The other way round."""
        return request.with_files(lambda _, path: path.relative_to(self.path))

    def remove(self, job: Job) -> int:
        """Everything of a job; returns how many bytes it was."""
        folders = (self.inputs_of(job.id), self.clips_of(job.id))
        size = sum(_num_bytes(folder) for folder in folders)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        self.preview(job.id).unlink(missing_ok=True)
        return size

    def remove_attempt(self, job: Job) -> None:
        """What this attempt wrote, which came too late."""
        for path in _entries(self.clips_of(job.id)):
            if _attempt_of(path) == job.attempt:
                path.unlink(missing_ok=True)

    def flush(self, job: Job) -> None:
        """Returns when the names of its clips are on the disk, as their contents are."""
        flush(self.clips_of(job.id))
        flush(self.clips)

    def remove_strays(self, attempts_of: Callable[[Sequence[str]], Mapping[str, int | None]]) -> list[str]:
        """Removes what no job knows: of processes that were killed between a file and its job, or amid a file.

        Args:
            attempts_of: of ids, those that jobs have, each with the attempt that has made its clip, or is about to.

        Returns:
            Names of what was removed.
        """
        for folder in (self.previews, self.colours):
            remove_left_overs(folder)
        gone = [path for path in _entries(self.uploads) if _is_old(path)]
        for some in _batches(path for path in _entries(self.inputs, self.previews) if is_id(path.stem)):
            known = attempts_of([path.stem for path in some])
            gone += [path for path in some if path.stem not in known and _is_old(path)]
        for some in _batches(path for path in _entries(self.clips) if is_id(path.name)):
            # What is listed before the store is asked is of jobs that it knows.
            files = {folder.name: _entries(folder) for folder in some}
            known = attempts_of(list(files))
            for folder in some:
                if folder.name in known:
                    remove_left_overs(folder)
                    made = known[folder.name]
                    gone += [path for path in files[folder.name] if _attempt_of(path) not in (None, made)]
                else:
                    gone.append(folder)
        for path in gone:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        return [path.name for path in gone]

    def num_bytes(self) -> int:
        """Of what was sent and made; the database is beside it."""
        return sum(_num_bytes(folder) for folder in (self.inputs, self.clips, self.previews))


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > UPLOADS_S
    except FileNotFoundError:
        return False


def is_id(job_id: str) -> bool:
    """Whether `store.new_id` may have made it."""
    return _ID.fullmatch(job_id) is not None


def _checked(job_id: str) -> str:
    """Raises `ValueError` for what `store.new_id` did not make."""
    if not is_id(job_id):
        raise ValueError(f"{job_id!r} is no id of a job")
    return job_id


def _entries(*folders: Path) -> list[Path]:
    return [path for folder in folders if folder.is_dir() for path in folder.iterdir()]


def _batches(paths: Iterable[Path]) -> Iterator[list[Path]]:
    """Some at a time, as many as a store is asked about at once."""
    left = iter(paths)
    while some := list(itertools.islice(left, 500)):
        yield some


def _attempt_of(path: Path) -> int | None:
    """Whose file that is; None for what is no attempt's."""
    number = path.name.split(".")[0]
    return int(number) if number.isdecimal() else None
