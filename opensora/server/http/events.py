"""What changes, as it changes: one stream for each page, all of them fed by one reader of the store.

An event's id is the version of its change. Whoever comes again with the last one (Last-Event-ID) is told what changed
meanwhile. A client that does not keep up is let go, and comes again like that.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from opensora.server.database import StoreAway
from opensora.server.http.access import Owner, Service
from opensora.server.http.errors import answers
from opensora.server.http.queue import QueueState, state_of
from opensora.server.http.video import deleted_of, video_of
from opensora.server.jobs import Job
from opensora.server.service import JobService

LOOK_S = 0.25
"""Between two looks for changes."""
HEARTBEAT_S = 15.0
MOST_BEHIND = 256
"""Events that may wait for a client."""

router = APIRouter(prefix="/v1/events", tags=["events"])


@dataclass(frozen=True)
class _Told:
    """An event as it is sent; of a job, the version that it tells."""

    text: bytes
    version: int | None = None


@dataclass(eq=False)
class _Listener:
    """One stream: what waits to be sent, None for its end, and whose jobs those are."""

    owner: str | None
    waiting: asyncio.Queue[_Told | None] = field(default_factory=lambda: asyncio.Queue(MOST_BEHIND))

    def put(self, told: _Told | None) -> bool:
        """Whether there is room."""
        try:
            self.waiting.put_nowait(told)
        except asyncio.QueueFull:
            return False
        return True


class Changes:
    """Tells all streams of an app what changes.

    Args:
        service: whose store is read.
    """

    def __init__(self, service: JobService) -> None:
        self._service = service
        self._listeners: set[_Listener] = set()
        self._version, self._is_paused, self._is_over = 0, False, False

    @property
    def num_listeners(self) -> int:
        """Streams that are open."""
        return len(self._listeners)

    async def run(self) -> None:
        """Reads what changes until it is cancelled."""
        self._version, self._is_paused = await self._surely_head()
        while True:
            await asyncio.sleep(LOOK_S)
            with contextlib.suppress(StoreAway):  # then it is asked again
                await self._look()

    def end(self) -> None:
        """Lets all streams end."""
        self._is_over = True
        for listener in list(self._listeners):
            self._drop(listener)

    async def stream(self, owner: str | None, since: int | None) -> AsyncIterator[bytes]:
        """Events for one client, and comments while there are none.

        Args:
            owner: whose jobs it may see.
            since: version that it has seen; None for all that there is.
        """
        listener = _Listener(owner)
        self._listeners.add(listener)
        try:
            version, is_paused, missed = await run_in_threadpool(self._missed, owner, since)
            begun, now = version if since is None else min(since, version), {"version": version, "is_paused": is_paused}
            yield format_sse_event(event="ready", id=str(begun), data_str=json.dumps(now))
            for event in missed:
                yield event
            while not self._is_over:
                try:
                    told = await asyncio.wait_for(listener.waiting.get(), HEARTBEAT_S)
                except TimeoutError:
                    yield b": nothing new\n\n"
                    continue
                if told is None:
                    return
                if told.version is None or told.version > version:  # the others were missed, and told
                    yield told.text
        finally:
            self._listeners.discard(listener)

    async def _surely_head(self) -> tuple[int, bool]:
        while True:
            with contextlib.suppress(StoreAway):
                return await run_in_threadpool(self._service.store.head)
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        version, is_paused = await run_in_threadpool(self._service.store.head)
        if version == self._version:
            return
        while jobs := await run_in_threadpool(self._service.store.changed, self._version):
            for job in jobs:
                self._tell(_Told(_event_of(job), job.version), job.owner)
                self._version = job.version
        self._version = max(self._version, version)
        if is_paused != self._is_paused:
            self._is_paused = is_paused
            state = state_of(self._service, await run_in_threadpool(self._service.summary))
            self._tell(_Told(_queue_event(self._version, state)))

    def _tell(self, told: _Told, owner: str | None = None) -> None:
        """Everybody, or an owner and those who see everything."""
        for listener in [each for each in self._listeners if owner is None or each.owner in (None, owner)]:
            if not listener.put(told):
                self._drop(listener)

    def _drop(self, listener: _Listener) -> None:
        """Ends a stream, after what it was told already."""
        self._listeners.discard(listener)
        while not listener.put(None):
            listener.waiting.get_nowait()

    def _missed(self, owner: str | None, since: int | None) -> tuple[int, bool, list[bytes]]:
        """The version that a client begins with, whether the queue is paused, and what it has missed until then."""
        version, is_paused = self._service.store.head()
        if since is None or since > version:  # of another store
            return version, is_paused, []
        events: list[bytes] = []
        while jobs := self._service.store.changed(since):
            events += [_event_of(job) for job in jobs if owner in (None, job.owner)]
            since = jobs[-1].version
        return max(since, version), is_paused, events


def _event_of(job: Job) -> bytes:
    if job.state == "deleted":
        return format_sse_event(
            event="video.deleted", id=str(job.version), data_str=deleted_of(job.id).model_dump_json()
        )
    return format_sse_event(event="video", id=str(job.version), data_str=video_of(job).model_dump_json())


def _queue_event(version: int, state: QueueState) -> bytes:
    return format_sse_event(event="queue", id=str(version), data_str=state.model_dump_json())


@router.get(
    "",
    response_class=StreamingResponse,
    responses=answers()
    | {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Events, for ever."}},
)
async def stream_events(
    request: Request,
    service: Service,
    owner: Owner,
    last_event_id: Annotated[str | None, Header(description="Of the last event that was seen.")] = None,
    after: Annotated[int | None, Query(ge=0, description="The same, for those who cannot send a header.")] = None,
) -> StreamingResponse:
    """Be told what changes: `video` with the object, `video.deleted`, `queue`; first of all `ready`."""
    since = int(last_event_id) if last_event_id is not None and last_event_id.isdecimal() else after
    changes: Changes = request.app.state.changes
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(changes.stream(owner, since), media_type="text/event-stream", headers=headers)
