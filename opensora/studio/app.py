"""The application of a server with its page: the API, what the page asks for besides, and Gradio for all else."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import gradio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.routing import Match, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opensora.server.app import create_app
from opensora.server.http.errors import envelope
from opensora.server.settings import ServerSettings
from opensora.server.store import JobStore
from opensora.studio.asking import Asking
from opensora.studio.page import build_page, page_options
from opensora.studio.routes import router
from opensora.studio.runs import NoRun

FILES = Path(__file__).parent / "page"
"""Scripts, styles and texts of the page."""


_ONLY_FROM_HERE = (
    "default-src 'self' blob: data: 'unsafe-inline' 'unsafe-eval'; connect-src 'self' blob: data:; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
"""Whatever Gradio would fetch from elsewhere, the browser does not, and no other site shows the page within its own."""


class _Guarded:
    """Middleware: has the browser keep the page to its server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = _ONLY_FROM_HERE
            await send(message)

        await self.app(scope, receive, guarded)


_NOT_GRADIOS = ("/v1/", "/studio/", "/gradio_api/")


class _Behind(Mount):
    """A mount at the root that leaves the API alone, so that what is wrong with a request there is said by the API.

    Gradio's own API, which asks for no key, is not there at all: the page calls nothing of it.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] == "http" and scope["path"].startswith(_NOT_GRADIOS):
            return Match.NONE, {}
        return super().matches(scope)


def create_studio_app(settings: ServerSettings, store: JobStore) -> FastAPI:
    """The application of a server with its page.

    Args:
        settings: of the server.
        store: the jobs.
    """
    app = create_app(settings, store)
    app.include_router(router)
    app.add_exception_handler(NoRun, _no_run)
    app.mount("/studio/page", StaticFiles(directory=FILES))
    _with_asking(app)
    gradio.mount_gradio_app(app, build_page(), path="/", **page_options())
    mounted = app.routes.pop()
    assert isinstance(mounted, Mount)
    app.routes.append(_Behind(mounted.path, _Guarded(mounted.app)))
    return app


def _with_asking(app: FastAPI) -> None:
    api = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.asking = Asking()
        try:
            async with api(app):
                yield
        finally:
            await app.state.asking.close()

    app.router.lifespan_context = lifespan  # pyright: ignore[reportAttributeAccessIssue]


async def _no_run(_: Request, error: Exception) -> JSONResponse:
    return envelope(404, "not_found", str(error))
