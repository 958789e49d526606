"""A job as its owner sees it: OpenAI's `Video` object, and what else there is to know."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from opensora.generation.request import FILES, ClipRequest
from opensora.server.defaults import asked_fps, asked_frames, asked_size
from opensora.server.jobs import Job, Kind
from opensora.server.service import VARIANTS
from opensora.settings import to_dict

Status = Literal["queued", "in_progress", "completed", "failed"]
_DEFAULTS = {name: value for name, value in vars(ClipRequest("")).items() if name not in ("prompt", "model", *FILES)}


class VideoError(BaseModel):
    """Why there is no clip."""

    code: str = Field(description='"invalid_request", "cancelled", "worker_lost" or "internal_error".')
    message: str


class VideoProgress(BaseModel):
    """How far the clip is."""

    stage: str = Field(description='"queued", "loading", "reading", "encoding", "denoising", "decoding", "writing".')
    step: int = Field(description="Steps of the loop that are done.")
    num_steps: int = Field(description="Steps of the loop; 0 while it is not known.")
    loop: int = Field(description="Number of the loop, from 0.")
    num_loops: int = Field(description="Of a long video; 1 for a clip.")
    num_previews: int = Field(description="Previews so far; each takes the place of the one before.")


class VideoResult(BaseModel):
    """The clip that was made."""

    num_bytes: int
    height: int
    width: int
    num_frames: int
    fps: float
    making_s: float = Field(description="Seconds that it took, loading aside.")


class Video(BaseModel):
    """A clip that was asked for. The fields up to `error` are OpenAI's."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status = Field(description='A cancelled video is "failed" here; `state` tells.')
    progress: int = Field(description="Percent of the steps, 100 when the clip is there.")
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    size: str = Field(description="WIDTHxHEIGHT; as asked for until the clip is there.")
    seconds: str = Field(description="That it plays; as asked for until the clip is there.")
    remixed_from_video_id: str | None
    error: VideoError | None
    state: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    kind: Kind
    parent: str | None = Field(description="The video that it came from.")
    format: str
    priority: int
    is_held: bool
    attempt: int = Field(description="How often a worker began it.")
    started_at: float | None
    finished_at: float | None
    progress_details: VideoProgress
    result: VideoResult | None
    request: dict[str, Any] = Field(description="Fields that were asked for, besides prompt and model.")
    inputs: list[str] = Field(description="Fields that were sent as files.")
    links: dict[str, str] = Field(description="What there is of it, by name.")
    version: int = Field(description="Grows with every change of any video.")


class VideoList(BaseModel):
    """Videos, page by page."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """A video that is gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


def video_of(job: Job) -> Video:
    """The object of a job."""
    result, error, request = job.result, job.error, job.request
    height, width = (result.height, result.width) if result else asked_size(request)
    details = job.progress
    return Video(
        id=job.id,
        model=request.model_name,
        status="failed" if job.state in ("cancelled", "deleted") else job.state,
        progress=100 if job.state == "completed" else details.percent,
        created_at=int(job.created_at),
        completed_at=int(job.finished_at) if job.state == "completed" and job.finished_at is not None else None,
        expires_at=None if job.expires_at is None else int(job.expires_at),
        prompt=request.prompt,
        size=f"{width}x{height}",
        seconds=f"{result.duration_s if result else _asked_s(request):g}",
        remixed_from_video_id=job.parent if job.kind == "remix" else None,
        error=None if error is None else VideoError(code=error.code, message=error.message),
        state="cancelled" if job.state == "deleted" else job.state,
        kind=job.kind,
        parent=job.parent,
        format=job.format,
        priority=job.priority,
        is_held=job.is_held,
        attempt=job.attempt,
        started_at=job.started_at,
        finished_at=job.finished_at,
        progress_details=VideoProgress.model_validate(details, from_attributes=True),
        result=None if result is None else VideoResult.model_validate(result, from_attributes=True),
        request=_asked(request),
        inputs=[name for name in FILES if getattr(request, name)],
        links=_links(job),
        version=job.version,
    )


def deleted_of(job_id: str) -> VideoDeleted:
    """What is told of a job that is gone."""
    return VideoDeleted(id=job_id)


def _asked_s(request: ClipRequest) -> float:
    fps = asked_fps(request)
    return asked_frames(request) / fps if fps else 0.0


def _asked(request: ClipRequest) -> dict[str, Any]:
    """What differs from a request that asks for nothing; files aside, whose names are the server's."""
    values = vars(request)
    return {name: to_dict(values[name]) for name, default in _DEFAULTS.items() if values[name] != default}


def _links(job: Job) -> dict[str, str]:
    own = f"/v1/videos/{job.id}"
    links = {"self": own}
    if job.state == "in_progress" and job.progress.num_previews:
        links["preview"] = f"{own}/preview"
    if job.state == "completed":
        links["content"] = f"{own}/content"
        links |= {name: f"{own}/content?variant={name}" for name in VARIANTS if name != "video"}
    return links
