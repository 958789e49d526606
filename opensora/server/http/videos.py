"""The videos of an owner: ask for them, look after them, and fetch what was made."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from opensora.errors import OpenSoraError
from opensora.generation.request import ClipRequest
from opensora.server.http.access import Owner, Service
from opensora.server.http.bodies import Sent, sent_by
from opensora.server.http.documents import clip_body, small_body
from opensora.server.http.errors import answers
from opensora.server.http.fetching import Fetcher
from opensora.server.http.fields import Asked, asked_by, prompt_of
from opensora.server.http.video import Video, VideoDeleted, VideoList, deleted_of, video_of
from opensora.server.jobs import Job, State
from opensora.server.service import EDIT_STRENGTH, MOST_PRIORITY, JobService, NewJob, Variation
from opensora.settings import build_value, nearest_name

router = APIRouter(prefix="/v1/videos", tags=["videos"])

IdempotencyKey = Annotated[
    str | None, Header(max_length=255, description="A request that comes again with it gets the first video back.")
]
POLL_MS = {"queued": 1000, "in_progress": 500}
"""After which a client should ask again."""
_NEW = answers(404, 408, 409, 413, 415, 429)
_SMALL = answers(404, 408, 409, 413, 415)
_CHANGED = answers(404, 409)


# Ask for them.


@router.post("", openapi_extra=clip_body(), responses=_NEW)
async def create_video(
    request: Request, service: Service, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Video:
    """Ask for a clip."""
    return await _made(request, service, lambda asked: service.create(owner, _new(asked, idempotency_key)))


@router.post("/extensions", openapi_extra=clip_body(video=True), responses=_NEW)
async def create_extension(
    request: Request, service: Service, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Video:
    """Ask for a clip that goes on where another ends: a video of this server, or a file."""

    def make(asked: Asked) -> Job:
        if asked.video is not None:
            return service.extend(owner, asked.video, _variation(asked, idempotency_key))
        _check_given(asked, "extend")
        return service.create(owner, _new(asked, idempotency_key, "extend"))

    return await _made(request, service, make, video="extend")


@router.post("/edits", openapi_extra=clip_body(video=True), responses=_NEW)
async def create_edit(
    request: Request, service: Service, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Video:
    """Ask for another clip, denoised again after a prompt: a video of this server, or a file."""

    def make(asked: Asked) -> Job:
        if asked.video is not None:
            return service.edit(owner, asked.video, _variation(asked, idempotency_key))
        _check_given(asked, "edit")
        return service.create(owner, _new(asked, idempotency_key, "edit"))

    return await _made(request, service, make, video="edit")


@router.post("/{video_id}/remix", openapi_extra=clip_body(), responses=_NEW)
async def remix_video(
    video_id: str, request: Request, service: Service, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Video:
    """Ask for the same clip after another prompt; fields that come with it differ as well."""
    return await _made(
        request, service, lambda asked: service.remix(owner, video_id, _variation(asked, idempotency_key))
    )


@router.post("/{video_id}/extend", openapi_extra=clip_body(), responses=_NEW)
async def extend_video(
    video_id: str, request: Request, service: Service, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Video:
    """Ask for a clip that goes on where this one ends."""
    return await _made(
        request, service, lambda asked: service.extend(owner, video_id, _variation(asked, idempotency_key))
    )


@router.post("/{video_id}/edit", openapi_extra=clip_body(), responses=_NEW)
async def edit_video(
    video_id: str, request: Request, service: Service, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Video:
    """Ask for this clip, denoised again after a prompt."""
    return await _made(
        request, service, lambda asked: service.edit(owner, video_id, _variation(asked, idempotency_key))
    )


# Look after them.


@router.get("", responses=answers(404))
def list_videos(
    service: Service,
    owner: Owner,
    after: Annotated[str | None, Query(description="Begin behind this video.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="By the time they were asked for.")] = "desc",
    state: Annotated[tuple[State, ...], Query(description="Of these states only.")] = (),
) -> VideoList:
    """List videos, page by page."""
    jobs = service.jobs(owner, states=state, after=after, limit=limit + 1, newest_first=order == "desc")
    page = jobs[:limit]
    return VideoList(
        data=[video_of(job) for job in page],
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(jobs) > limit,
    )


@router.get("/{video_id}", response_model=Video, responses=answers(404))
async def retrieve_video(video_id: str, service: Service, owner: Owner) -> Response:
    """Tell how far a video is."""
    job = await run_in_threadpool(service.get, owner, video_id)
    headers = {"openai-poll-after-ms": str(POLL_MS[job.state])} if job.state in POLL_MS else {}
    # Asked for more often than all else together, so nothing checks again what is one already.
    return Response(video_of(job).model_dump_json(), media_type="application/json", headers=headers)


@router.delete("/{video_id}", responses=answers(404))
def delete_video(video_id: str, service: Service, owner: Owner) -> VideoDeleted:
    """Remove a video and its files; if it is being made, that stops."""
    service.delete(owner, video_id)
    return deleted_of(video_id)


@router.post("/{video_id}/cancel", responses=answers(404))
def cancel_video(video_id: str, service: Service, owner: Owner) -> Video:
    """Stop a video; one that is done stays as it is."""
    return video_of(service.cancel(owner, video_id))


@router.post("/{video_id}/retry", responses=_CHANGED)
def retry_video(video_id: str, service: Service, owner: Owner) -> Video:
    """Have a video that failed or was cancelled wait again."""
    return video_of(service.retry(owner, video_id))


@router.post("/{video_id}/hold", responses=_CHANGED)
def hold_video(video_id: str, service: Service, owner: Owner) -> Video:
    """Leave a waiting video until it is released."""
    return video_of(service.hold(owner, video_id))


@router.post("/{video_id}/release", responses=_CHANGED)
def release_video(video_id: str, service: Service, owner: Owner) -> Video:
    """Let a video go that is held."""
    return video_of(service.hold(owner, video_id, False))


_PRIORITY = {"type": "integer", "minimum": -MOST_PRIORITY, "maximum": MOST_PRIORITY}


@router.post("/{video_id}/priority", openapi_extra=small_body(priority=_PRIORITY), responses=_SMALL)
async def prioritize_video(video_id: str, request: Request, service: Service, owner: Owner) -> Video:
    """Say how soon a waiting video is begun: those of higher priority first."""
    priority = await _field(request, service, "priority", int)
    return video_of(await run_in_threadpool(service.prioritize, owner, video_id, priority))


@router.post("/{video_id}/move", openapi_extra=small_body(before={"type": ["string", "null"]}), responses=_SMALL)
async def move_video(video_id: str, request: Request, service: Service, owner: Owner) -> Video:
    """Have a waiting video begun before another one; before none, as the last."""
    before = await _field(request, service, "before", str | None)
    return video_of(await run_in_threadpool(service.move, owner, video_id, before))


# What they are made of.


async def _made(request: Request, service: JobService, make: Callable[[Asked], Job], video: str | None = None) -> Video:
    """Reads a body and has a job made of it."""
    limits = service.settings.inputs
    async with sent_by(request, limits, service.folder.uploads) as sent:

        def work(sent: Sent) -> Video:
            fetcher = Fetcher(sent.folder, service.settings.fetch_hosts, limits)
            return video_of(make(asked_by(sent, fetcher, video=video)))

        return await run_in_threadpool(work, sent)


def _new(asked: Asked, key: str | None, kind: Literal["create", "extend", "edit"] = "create") -> NewJob:
    request = ClipRequest(prompt_of(asked), **asked.changes)
    return NewJob(request, asked.format or "mp4", asked.priority or 0, key, kind)


def _variation(asked: Asked, key: str | None) -> Variation:
    return Variation(prompt_of(asked), asked.changes, asked.format, asked.priority or 0, key)


def _check_given(asked: Asked, name: str) -> None:
    if name not in asked.changes:
        raise OpenSoraError("`video` is missing; send a file, or the id of a video")
    if name == "edit":
        asked.changes.setdefault("strength", EDIT_STRENGTH)


async def _field(request: Request, service: JobService, name: str, annotation: Any) -> Any:
    """The only field of a body."""
    async with sent_by(request, service.settings.inputs, service.folder.uploads) as sent:
        for key in [*sent.fields, *(key for key, _ in sent.files)]:
            if key != name:
                raise OpenSoraError(f"unknown field `{key}`{nearest_name(key, [name])}")
        if name not in sent.fields:
            raise OpenSoraError(f"`{name}` is missing")
        return build_value(annotation, sent.fields[name], f"`{name}`")
