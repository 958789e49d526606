"""Whether the server lives, whether it can work, and figures of it for Prometheus."""

import time
from collections.abc import Iterator
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opensora.server.http.access import Owner, Service
from opensora.server.http.errors import answers
from opensora.server.http.events import Changes
from opensora.server.jobs import State
from opensora.server.service import JobService

STATES: tuple[State, ...] = ("queued", "in_progress", "completed", "failed", "cancelled")

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """It does."""

    status: Literal["ok"] = "ok"


@router.get("/healthz", responses=answers())
async def healthz() -> Health:
    """Tell whether the process answers."""
    return Health()


@router.get("/readyz", responses=answers())
def readyz(service: Service) -> Health:
    """Tell whether the store answers."""
    service.store.head()
    return Health()


@router.get(
    "/metrics",
    response_class=Response,
    responses=answers() | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Figures."}},
)
def metrics(request: Request, service: Service, owner: Owner) -> Response:
    """Tell figures, as Prometheus reads them."""
    return Response(generate_latest(request.app.state.figures.registry), media_type=CONTENT_TYPE_LATEST)


class Figures:
    """What is counted of one app.

    Args:
        service: whose queue is told.
        changes: whose streams are counted.
    """

    def __init__(self, service: JobService, changes: Changes) -> None:
        self.registry = CollectorRegistry()
        labels = ["method", "route", "status"]
        self.requests = Counter("opensora_requests", "Requests by endpoint.", labels, registry=self.registry)
        self.seconds = Histogram(
            "opensora_request_seconds", "Until an answer began.", ["route"], registry=self.registry
        )
        self.registry.register(_OfTheQueue(service, changes))


class _OfTheQueue(Collector):
    """Read when they are asked for."""

    def __init__(self, service: JobService, changes: Changes) -> None:
        self._service, self._changes = service, changes

    def collect(self) -> Iterator[Metric]:
        summary = self._service.summary()
        videos = GaugeMetricFamily("opensora_jobs", "Videos by state.", labels=["state"])
        for state in STATES:
            videos.add_metric([state], summary.states.get(state, 0))
        oldest = summary.oldest_waiting_at
        waited = 0.0 if oldest is None else max(0.0, time.time() - oldest)
        yield videos
        yield GaugeMetricFamily("opensora_queue_paused", "1 while nothing is begun.", value=float(summary.is_paused))
        yield GaugeMetricFamily("opensora_oldest_waiting_seconds", "Of the video that waits longest.", value=waited)
        yield GaugeMetricFamily("opensora_streams", "Streams of events.", value=float(self._changes.num_listeners))

    def describe(self) -> Iterator[Metric]:
        """Of nothing, so that the store is not asked before there is a scrape."""
        return iter(())


class Counted:
    """Middleware: counts requests by endpoint, and how long their answers took to begin.

    Args:
        app: behind it.
        figures: where they are counted.
    """

    def __init__(self, app: ASGIApp, figures: Figures) -> None:
        self.app, self.figures = app, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands everything on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = _route(scope)
                self.figures.requests.labels(scope["method"], route, message["status"]).inc()
                self.figures.seconds.labels(route).observe(time.monotonic() - began)
            await send(message)

        await self.app(scope, receive, counted)


def _route(scope: Scope) -> str:
    """The endpoint as it is declared, so that ids are not counted one by one."""
    route: Any = scope.get("route")
    return getattr(route, "path", "other")
