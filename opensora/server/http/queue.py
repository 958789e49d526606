"""The queue of all videos."""

from fastapi import APIRouter
from pydantic import BaseModel, Field

from opensora.server.http.access import Owner, Service
from opensora.server.http.errors import answers
from opensora.server.http.video import Video, video_of
from opensora.server.jobs import QueueSummary

router = APIRouter(prefix="/v1/queue", tags=["queue"])


class QueueState(BaseModel):
    """The queue at a glance."""

    is_paused: bool = Field(description="Nothing is begun.")
    num_waiting: int = Field(description="Videos of all keys that wait or are being made.")
    most_waiting: int = Field(description="That may.")
    version: int = Field(description="Of the last change of any video.")


class QueuedVideo(BaseModel):
    """A video that waits, or is being made."""

    place: int = Field(description="Videos of all keys that are before it.")
    video: Video


class Queue(QueueState):
    """The queue, and in it the videos of this key, in the order in which they are begun."""

    data: list[QueuedVideo]


def state_of(service: Service, summary: QueueSummary) -> QueueState:
    """The queue at a glance."""
    waiting = sum(summary.states.get(state, 0) for state in ("queued", "in_progress"))
    return QueueState(
        is_paused=summary.is_paused,
        num_waiting=waiting,
        most_waiting=service.settings.queue.most_waiting,
        version=summary.version,
    )


@router.get("", responses=answers())
def retrieve_queue(service: Service, owner: Owner) -> Queue:
    """List the videos that wait, in the order in which they are begun."""
    state = state_of(service, service.summary())
    videos = [QueuedVideo(place=place, video=video_of(job)) for place, job in service.queue(owner)]
    return Queue(**state.model_dump(), data=videos)


@router.post("/pause", responses=answers())
def pause_queue(service: Service, owner: Owner) -> QueueState:
    """Begin nothing until the queue goes on; what is being made is finished."""
    return state_of(service, service.pause(owner))


@router.post("/resume", responses=answers())
def resume_queue(service: Service, owner: Owner) -> QueueState:
    """Let the queue go on."""
    return state_of(service, service.pause(owner, False))
