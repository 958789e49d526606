"""The HTTP API: OpenAI's video API and what a queue needs besides, as one FastAPI application."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline

from opensora import __version__
from opensora.server.http import errors, events, files, health, models, queue, videos
from opensora.server.http.access import KnownHosts
from opensora.server.http.events import Changes
from opensora.server.http.health import Counted, Figures
from opensora.server.service import JobService
from opensora.server.settings import ServerSettings
from opensora.server.store import JobStore

ROUTERS = (videos, files, queue, events, models, health)


def create_app(settings: ServerSettings, store: JobStore) -> FastAPI:
    """The application of a server.

    Its `state` holds the `service` that all endpoints call, and `changes`, whose `end` lets streams of events end.

    Args:
        settings: of the server.
        store: the jobs.
    """
    service = JobService(settings, store)
    changes = Changes(service)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        reading = asyncio.create_task(changes.run())
        try:
            yield
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading

    about: dict[str, Any] = {"title": "Open-Sora", "version": __version__, "summary": "Text to video."}
    app = FastAPIOffline(redoc_url=None, static_url="/docs-files", lifespan=lifespan, **about)
    app.state.service, app.state.changes, app.state.figures = service, changes, Figures(service, changes)
    for module in ROUTERS:
        app.include_router(module.router)
    errors.install(app)
    app.add_middleware(KnownHosts, settings=settings)
    app.add_middleware(Counted, figures=app.state.figures)
    app.openapi = lambda: _document(app, needs_key=bool(settings.keys))
    return app


def _document(app: FastAPI, *, needs_key: bool) -> dict[str, Any]:
    """The OpenAPI document; what FastAPI itself would answer with 422 is answered with 400 here."""
    if not app.openapi_schema:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        components = document["components"]
        for endpoint in (endpoint for methods in document["paths"].values() for endpoint in methods.values()):
            endpoint["responses"].pop("422", None)
            if not needs_key:
                endpoint.pop("security", None)
        for name in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(name, None)
        if not needs_key:
            components.pop("securitySchemes", None)
        app.openapi_schema = document
    return app.openapi_schema
