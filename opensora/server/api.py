"""The process that answers requests, see `child`: on a socket that the supervisor listens on already."""

import socket
import threading
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from opensora.server.app import create_app
from opensora.server.child import told_settings, told_to_stop
from opensora.server.http.connections import connections_of
from opensora.server.settings import ServerSettings
from opensora.server.store import JobStore, store_of

ENDING_S = 5
"""Requests under way may take so long to end."""


class ApiServer(uvicorn.Server):
    """Ends streams of events, which have no end of their own, before it waits for requests to end."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=connections_of(app.state.service.settings.inputs.head_s),
                ws="none",
                access_log=False,
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=ENDING_S,
            )
        )
        self._changes = app.state.changes

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._changes.end()
        await super().shutdown(sockets)


def serve(app_of: Callable[[ServerSettings, JobStore], FastAPI] = create_app) -> None:
    """What the process does.

    Args:
        app_of: makes the application.
    """
    told = told_settings()
    stopped = told_to_stop()
    assert told.socket is not None
    app = app_of(told.server, store_of(told.server))
    server = ApiServer(app)

    def end() -> None:
        stopped.wait()
        server.should_exit = True

    threading.Thread(target=end, daemon=True).start()
    server.run(sockets=[socket.socket(fileno=told.socket)])


if __name__ == "__main__":
    serve()
