"""The files of a server: what was sent, what was made, and pictures of what is being made.

    uploads/            what is being sent
    inputs/ID/          what a job is made from, named by its content, whatever it was called
    clips/ID-1.mp4      of its first attempt, with its record, a thumbnail and a sheet of its frames beside it
    previews/ID.webp    while it is being made

No name that came from outside is ever part of a path.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from opensora.files import flush, remove_left_overs
from opensora.generation.record import sidecar_path
from opensora.generation.request import ClipRequest
from opensora.server.jobs import Job, JobResult

_ID = re.compile(r"video_[0-9a-f]{32}")
UPLOADS_S = 3600.0
"""What was sent may lie so long before its job is there."""
_INPUTS = ("image", "last_image", "extend", "edit")


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

    def make(self) -> None:
        """Makes the folders, where they are not there."""
        for folder in (self.uploads, self.inputs, self.clips, self.previews, self.colours):
            folder.mkdir(parents=True, exist_ok=True)

    def new_clip(self, job: Job) -> Path:
        """Where this attempt writes its clip; another attempt writes elsewhere."""
        return self.clips / f"{job.id}-{job.attempt}.{job.format}"

    def clip(self, result: JobResult) -> Path:
        """The clip that was made."""
        return self.clips / result.file

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

    def rooted(self, request: ClipRequest) -> ClipRequest:
        """The request with files as they are named here; stored ones are relative to the folder."""
        return _with_paths(request, lambda path: self.path / path)

    def relative(self, request: ClipRequest) -> ClipRequest:
        """The other way round."""
        return _with_paths(request, lambda path: path.relative_to(self.path))

    def remove(self, job: Job) -> None:
        """Everything of a job."""
        shutil.rmtree(self.inputs_of(job.id), ignore_errors=True)
        self.preview(job.id).unlink(missing_ok=True)
        for path in self.clips.glob(f"{_checked(job.id)}-*"):
            path.unlink(missing_ok=True)

    def remove_attempt(self, job: Job) -> None:
        """What this attempt wrote, which came too late."""
        for path in self.clips.glob(f"{_checked(job.id)}-{job.attempt}.*"):
            path.unlink(missing_ok=True)

    def flush(self) -> None:
        """Returns when the names of clips are on the disk, as their contents are."""
        flush(self.clips)

    def remove_parts(self) -> None:
        """Removes what killed processes had begun to write."""
        for folder in (self.clips, self.previews, self.colours):
            remove_left_overs(folder)

    def remove_strays(self, is_known: Callable[[str], bool], is_result: Callable[[str, int], bool]) -> list[str]:
        """Removes what no job knows: of processes that were killed between a file and its job.

        Args:
            is_known: whether there is a job of that id.
            is_result: whether a job of that id has, or is making, its clip in that attempt.

        Returns:
            Names of what was removed.
        """
        gone = []
        for path in _entries(self.inputs, self.previews):
            job_id = path.name.removesuffix(".webp")
            if _ID.fullmatch(job_id) and _is_old(path) and not is_known(job_id):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                gone.append(path.name)
        for path in _entries(self.uploads):
            if _is_old(path):
                shutil.rmtree(path, ignore_errors=True)
                gone.append(path.name)
        for path in _entries(self.clips):
            match = re.match(rf"({_ID.pattern})-(\d{{1,9}})\.", path.name)
            if match and not is_result(match[1], int(match[2])):
                path.unlink(missing_ok=True)
                gone.append(path.name)
        return gone

    def num_bytes(self) -> int:
        """Of what was sent and made; the database is beside it."""
        folders = (self.inputs, self.clips, self.previews)
        return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


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


def _entries(*folders: Path) -> Iterable[Path]:
    return [path for folder in folders if folder.is_dir() for path in folder.iterdir()]


def _with_paths(request: ClipRequest, place: Callable[[Path], Path]) -> ClipRequest:
    paths = {name: getattr(request, name) for name in _INPUTS}
    named = {name: place(path) for name, path in paths.items() if path is not None}
    return replace(request, **named, reference_path=tuple(place(path) for path in request.reference_path))
