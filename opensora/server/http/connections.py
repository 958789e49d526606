"""Connections to the API: a request that nobody ends, or whose head is larger than 64 KiB, holds none for long."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from opensora.server.http.errors import envelope


def connections_of(head_s: float) -> type[H11Protocol]:
    """A kind of connection that is closed when the head of a request, its headers, takes longer than `head_s`."""

    class Connection(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._end_wait()
            elif self._late is None:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_wait()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            answer = envelope(400, "invalid_request", "the request is no HTTP/1.1, or its head is too large")
            headers = [*answer.raw_headers, (b"connection", b"close")]
            head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (head, h11.Data(bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def _wait(self) -> None:
            self._late = self.loop.call_later(head_s, self.transport.close)

        def _end_wait(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Connection
