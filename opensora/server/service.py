"""What users of a server may do with their jobs: the one place that the API and the studio call.

Every method is told whose key it is called with: `owner` is the name of a key, or None where there are no keys, and
then every job is everybody's. A job of somebody else's is none at all.
"""

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from opensora.checkpoints.published import BUNDLED, published_name
from opensora.contents import describe_kind, kind_of, shown
from opensora.errors import OpenSoraError
from opensora.generation.request import FILES, ClipRequest
from opensora.generation.words import check_bundled_words
from opensora.media.write import FORMATS
from opensora.server.database import NoJob
from opensora.server.defaults import asked_frames, asked_size
from opensora.server.folder import ServerFolder, is_id
from opensora.server.housekeeping import remove_job
from opensora.server.jobs import Job, JobResult, Kind, QueueSummary, State
from opensora.server.settings import ServerSettings, check_clip_pixels
from opensora.server.store import JobStore, new_id
from opensora.settings import nearest_name

CLIP_FORMATS = tuple(name for name in FORMATS if name != "frames")
"""That a clip may be asked for in: one file each."""
MOST_PRIORITY = 10
EDIT_STRENGTH = 0.6
"""Of a clip that is edited by those who name none."""
REFUSED = ("components", "adapters", "device", "calibration", "image_origin")
"""Fields of a request that are the server's: they name its files and devices, or say where a file came from."""
Variant = Literal["video", "thumbnail", "spritesheet", "channels", "metadata"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


class NotReady(OpenSoraError):
    """There is no clip yet, or none any more."""


class TooLarge(OpenSoraError):
    """More than may be sent."""


class UnfitFile(OpenSoraError):
    """A file is neither picture nor video."""


class NotAllowed(OpenSoraError):
    """This key may not do that."""


@dataclass(frozen=True)
class NewJob:
    """A clip that somebody asks for.

    Attributes:
        request: its files may lie anywhere on this machine; they are copied.
        format: of the file, one of `CLIP_FORMATS`.
        priority: from -`MOST_PRIORITY` to `MOST_PRIORITY`; above 0 is for the operator.
        idempotency_key: whoever sends the same once more gets the first job back.
        kind, parent: see `Job`.
    """

    request: ClipRequest
    format: str = "mp4"
    priority: int = 0
    idempotency_key: str | None = None
    kind: Kind = "create"
    parent: str | None = None


@dataclass(frozen=True)
class Variation:
    """A clip that is made from a job that there is.

    Attributes:
        prompt: what it shows.
        changes: fields of the request that differ as well.
        format: of the file; None for that of the other job.
        priority, idempotency_key: see `NewJob`.
    """

    prompt: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    format: str | None = None
    priority: int = 0
    idempotency_key: str | None = None


class JobService:
    """The jobs of a server, as their owners see them.

    Args:
        settings: of the server.
        store: the jobs.
    """

    def __init__(self, settings: ServerSettings, store: JobStore) -> None:
        self.settings, self.store = settings, store
        self.folder = ServerFolder(settings.folder)
        self.folder.make()

    # New jobs.

    def create(self, owner: str | None, new: NewJob) -> Job:
        """Takes a job, after everything is checked that needs no model.

        Raises:
            OpenSoraError: what no clip can be, or another model than those of the server.
            TooLarge: a file has more bytes than it may.
            UnfitFile: a file is neither picture nor video.
            NotAllowed: the priority is the operator's.
            QueueFull: as many jobs wait as may.
            KeyUsed: the idempotency key came with another request.
        """
        request = self._checked(new)
        if new.priority > 0:
            self._check_operator(owner, "a priority above 0")
        job_id = new_id()
        try:
            request = self.folder.relative(self._with_files(request, job_id))
            ClipRequest.from_json(request.to_json())  # what cannot be read back must not be stored
            job = Job(job_id, request, owner or "", new.kind, new.format, new.parent, priority=new.priority)
            taken = self.store.add(job, new.idempotency_key)
        except BaseException:
            shutil.rmtree(self.folder.inputs_of(job_id), ignore_errors=True)
            raise
        if taken.id == job_id:
            self._log(taken)
        else:
            shutil.rmtree(self.folder.inputs_of(job_id), ignore_errors=True)
        return taken

    def _log(self, job: Job) -> None:
        whose = f" by {job.owner}" if job.owner else ""
        what = f": {shown(job.request.prompt, 1000)}" if self.settings.logs_prompts else ""
        print(f"opensora: {job.id} was asked for{whose}{what}", file=sys.stderr, flush=True)

    def remix(self, owner: str | None, job_id: str, variation: Variation) -> Job:
        """The same clip after another prompt; of a job in any state.

        Raises:
            NoJob: there is no such job.
            OpenSoraError: as `create`.
        """
        parent = self.get(owner, job_id)
        return self._derive(owner, parent, "remix", self.folder.rooted(parent.request), variation)

    def extend(self, owner: str | None, job_id: str, variation: Variation) -> Job:
        """A clip that goes on where the clip of a job ends; otherwise as `remix`.

        Raises:
            NotReady: there is no clip.
        """
        parent = self.get(owner, job_id)
        request = replace(_without_frames(parent.request), extend=self.folder.clip(_result_of(parent)))
        return self._derive(owner, parent, "extend", request, variation)

    def edit(self, owner: str | None, job_id: str, variation: Variation) -> Job:
        """The clip of a job, denoised again after a prompt; otherwise as `remix`.

        Raises:
            NotReady: there is no clip.
        """
        parent = self.get(owner, job_id)
        clip = self.folder.clip(_result_of(parent))
        request = replace(_without_frames(parent.request), edit=clip, strength=EDIT_STRENGTH, num_frames=None)
        return self._derive(owner, parent, "edit", request, variation)

    def _derive(self, owner: str | None, parent: Job, kind: Kind, request: ClipRequest, variation: Variation) -> Job:
        now = variation
        request = replace(request, **{"refined_prompt": None, **now.changes, "prompt": now.prompt})
        new = NewJob(request, now.format or parent.format, now.priority, now.idempotency_key, kind, parent.id)
        return self.create(owner, new)

    # Jobs that there are.

    def get(self, owner: str | None, job_id: str) -> Job:
        """Raises `NoJob` if there is none of this owner's."""
        job = self.store.get(job_id) if is_id(job_id) else None
        if job is None or (owner is not None and job.owner != owner):
            raise NoJob(job_id)
        return job

    def jobs(
        self,
        owner: str | None,
        *,
        states: tuple[State, ...] = (),
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
    ) -> list[Job]:
        """Jobs by the time they came, see `JobStore.jobs`.

        Raises:
            NoJob: `after` is none of this owner's.
        """
        if after is not None:
            self.get(owner, after)
        return self.store.jobs(owner=owner, states=states, after=after, limit=limit, newest_first=newest_first)

    def queue(self, owner: str | None) -> list[tuple[int, Job]]:
        """This owner's jobs that wait or are being made, and how many others are begun before each."""
        return [(place, job) for place, job in enumerate(self.store.queue()) if owner is None or job.owner == owner]

    def summary(self) -> QueueSummary:
        """The queue of all owners at a glance."""
        return self.store.summary()

    def cancel(self, owner: str | None, job_id: str) -> Job:
        """See `JobStore.cancel`; raises `NoJob`."""
        return self.store.cancel(self.get(owner, job_id).id)

    def delete(self, owner: str | None, job_id: str) -> None:
        """Removes a job in any state, and its files; raises `NoJob`."""
        remove_job(self.store, self.folder, self.get(owner, job_id))

    def retry(self, owner: str | None, job_id: str) -> Job:
        """See `JobStore.retry`; raises `NoJob`, `NotPossible`."""
        return self.store.retry(self.get(owner, job_id).id)

    def hold(self, owner: str | None, job_id: str, is_held: bool = True) -> Job:
        """See `JobStore.hold`; raises `NoJob`, `NotPossible`."""
        return self.store.hold(self.get(owner, job_id).id, is_held)

    def prioritize(self, owner: str | None, job_id: str, priority: int) -> Job:
        """See `JobStore.prioritize`; raises `NoJob`, `NotPossible`, `NotAllowed`."""
        _check_priority(priority)
        job = self.get(owner, job_id)
        if priority > 0:
            self._check_operator(owner, "a priority above 0")
        return self.store.prioritize(job.id, priority)

    def move(self, owner: str | None, job_id: str, before: str | None) -> Job:
        """See `JobStore.move`; raises `NoJob`, `NotPossible`."""
        job = self.get(owner, job_id)
        return self.store.move(job.id, None if before is None else self.get(owner, before).id)

    def pause(self, owner: str | None, is_paused: bool = True) -> QueueSummary:
        """See `JobStore.pause`; raises `NotAllowed`."""
        self._check_operator(owner, "pausing the queue")
        self.store.pause(is_paused)
        return self.store.summary()

    # Their files.

    def content(self, owner: str | None, job_id: str, variant: Variant = "video") -> Path:
        """A file of a clip that was made.

        Raises:
            NoJob: there is no such job.
            NotReady: it has no clip.
        """
        job = self.get(owner, job_id)
        result = _result_of(job)
        paths = {
            "video": self.folder.clip,
            "thumbnail": self.folder.thumbnail,
            "spritesheet": self.folder.spritesheet,
            "channels": self.folder.channels,
            "metadata": self.folder.record,
        }
        return paths[variant](result)

    def preview(self, owner: str | None, job_id: str) -> Path:
        """What a clip looks like that is being made, as an animated WebP.

        Raises:
            NoJob: there is no such job.
            NotReady: there is no picture of it.
        """
        path = self.folder.preview(self.get(owner, job_id).id)
        if not path.is_file():
            raise NotReady("there is no preview of this video: it is not being made, or has no latents yet")
        return path

    # What is checked.

    def _checked(self, new: NewJob) -> ClipRequest:
        """The request with its model named."""
        limits = self.settings.inputs
        request = new.request
        for name in ("prompt", "negative_prompt", "refined_prompt"):
            length = len(getattr(request, name) or "")
            if length > limits.prompt_characters:
                raise OpenSoraError(
                    f"`{name}` has {length:,} characters, expected at most {limits.prompt_characters:,}"
                )
        for name in REFUSED:
            if getattr(request, name):
                raise OpenSoraError(f"`{name}` is the server's to choose; leave it out")
        if new.format not in CLIP_FORMATS:
            raise OpenSoraError(f"unknown `format` {new.format!r}{nearest_name(new.format, CLIP_FORMATS)}")
        _check_priority(new.priority)
        separated = request.separated()
        if separated.reference_path != request.reference_path:
            raise OpenSoraError("`prompt` names files of the server; send them as `reference_path`")
        request = replace(separated, model=self._model(request.model))
        request.check(new.format)
        if request.model in BUNDLED:
            check_bundled_words(request.model, [*request.texts(), *filter(None, [request.negative_prompt])])
        _check_size(request, limits.clip_pixels)
        return request

    def _model(self, name: str | None) -> str:
        models = self.settings.models
        if name is None:
            return models[0]
        meant = published_name(name)
        for model in models:
            if name == model or (meant is not None and meant == published_name(model)):
                return model
        raise OpenSoraError(f"unknown `model` {name!r}; this server has {', '.join(models)}")

    def _check_operator(self, owner: str | None, what: str) -> None:
        keys = self.settings.keys
        if owner is not None and keys and owner != keys[0].owner:
            raise NotAllowed(f"{what} is for the operator, whose key is the first of the server's")

    def _with_files(self, request: ClipRequest, job_id: str) -> ClipRequest:
        """Its files as copies of the job's own, so that nothing else is needed any more."""
        return request.with_files(lambda name, path: self._take(name, path, self.folder.inputs_of(job_id)))

    def _take(self, name: str, path: Path, folder: Path) -> Path:
        """Links or copies a file under the name of its content, which tells repeated requests from others."""
        limits = self.settings.inputs
        kind = kind_of(path)
        if kind not in ("image", "video"):
            raise UnfitFile(f"`{name}` is {describe_kind(kind)}, expected a picture or a video")
        most = limits.image_bytes if kind == "image" else limits.clip_bytes
        if path.stat().st_size > most:
            raise TooLarge(f"`{name}` has {path.stat().st_size:,} bytes, expected at most {most:,}")
        with path.open("rb") as file:
            own = folder / f"{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}.{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            try:
                os.link(path, own)
            except FileExistsError:
                raise
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, own)
        return own


def _without_frames(request: ClipRequest) -> ClipRequest:
    """Its settings, but for the frames that it was made from."""
    frames = dict.fromkeys((*FILES, "strength", "input_fps", "mask_strategy", "align", "cond_type"))
    long = dict.fromkeys(("loop", "condition_frame_length", "condition_frame_edit"))
    settings: dict[str, Any] = {**frames, **long, "backwards": False, "reference_path": ()}
    return replace(request, **settings)


def _result_of(job: Job) -> JobResult:
    if job.state != "completed" or job.result is None:
        raise NotReady(f"the video is {job.state.replace('_', ' ')}; only a completed one has content")
    return job.result


def _check_priority(priority: int) -> None:
    if abs(priority) > MOST_PRIORITY:
        raise OpenSoraError(f"`priority` is {priority}, expected -{MOST_PRIORITY} to {MOST_PRIORITY}")


def _check_size(request: ClipRequest, most: int) -> None:
    """As far as that is known; the worker knows the rest."""
    check_clip_pixels(*asked_size(request), asked_frames(request) * request.num_loops, most)
