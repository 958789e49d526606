"""Starts the processes of a server, and others for those that end: a crash costs one attempt, never the queue."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from opensora.errors import OpenSoraError
from opensora.server.child import REFUSED, ChildSettings, own_name, start_child
from opensora.server.folder import ServerFolder
from opensora.server.housekeeping import keep_house
from opensora.server.settings import ServerSettings
from opensora.server.store import JobStore

LOOK_S = 0.1
"""Between two looks at the processes."""
HOUSEKEEPING_S = 30.0
STRAYS_S = 3600.0
"""Between two searches for files that no job knows."""
STOPPING_S = 20.0
"""A process has so long to end in order."""
_QUICK_END_S, _LONGEST_PAUSE_S = 10.0, 30.0


@dataclass
class _Place:
    """A process that should always run, and the one that does."""

    module: str
    is_worker: bool
    device: str = ""
    process: subprocess.Popen[bytes] | None = None
    name: str = ""
    started: float = 0.0
    not_before: float = 0.0
    quick_ends: int = 0
    refused: bool = False


class Supervisor:
    """The processes of a server on this machine.

    Args:
        settings: of the server.
        store: the jobs.
        listening: bound already; it outlives the API's process, so that nobody is refused while another one starts;
            None for a machine that only works.
        worker, api: modules of the processes, started as `python -m`.
    """

    def __init__(
        self,
        settings: ServerSettings,
        store: JobStore,
        listening: socket.socket | None,
        *,
        worker: str = "opensora.server.worker",
        api: str = "opensora.server.api",
    ) -> None:
        self.settings, self.store, self.listening = settings, store, listening
        self.folder = ServerFolder(settings.folder)
        self.folder.make()
        self._places = [_Place(worker, is_worker=True, device=device) for device in settings.devices]
        if listening is not None:
            self._places.append(_Place(api, is_worker=False))
        self._started = 0

    def run(self, on_start: Callable[[], None]) -> int:
        """Runs until it is interrupted; then the processes end in order.

        Args:
            on_start: called when they have been started.

        Returns:
            `child.REFUSED`, when one of them cannot work with its settings, which it has said.
        """
        cleaned = searched = float("-inf")
        try:
            for place in self._places:
                self._start(place)
            on_start()
            while True:
                for place in self._places:
                    self._look_after(place)
                    if place.refused:
                        return REFUSED
                if time.monotonic() - cleaned > HOUSEKEEPING_S:
                    cleaned = time.monotonic()
                    with _told():
                        keep_house(self.store, self.folder, self.settings)
                if time.monotonic() - searched > STRAYS_S:
                    searched = time.monotonic()
                    with _told():
                        self.folder.remove_strays(self.store.attempts)
                time.sleep(LOOK_S)
        finally:
            self._stop()

    def _look_after(self, place: _Place) -> None:
        now = time.monotonic()
        if place.process is not None:
            if place.process.poll() is None:
                return
            code, place.process = place.process.returncode, None
            if place.is_worker:
                with _told():
                    self.store.give_up(place.name)
            if code == REFUSED:
                place.refused = True
                return
            quick = now - place.started < _QUICK_END_S
            place.quick_ends = place.quick_ends + 1 if quick else 0
            place.not_before = now + min(_LONGEST_PAUSE_S, 2.0**place.quick_ends - 1)
            _say(f"{place.name} ended with {code}; another one takes its place")
        if now >= place.not_before:
            self._start(place)

    def _start(self, place: _Place) -> None:
        self._started += 1
        kind = "worker" if place.is_worker else "api"
        place.name, place.started = f"{kind}-{own_name(self._started)}", time.monotonic()
        descriptor = None if place.is_worker or self.listening is None else self.listening.fileno()
        place.process = start_child(
            place.module, ChildSettings(self.settings, place.name, device=place.device, socket=descriptor)
        )

    def _stop(self) -> None:
        running = [place for place in self._places if place.process is not None]
        for place in running:
            assert place.process is not None and place.process.stdin is not None
            with contextlib.suppress(OSError):
                place.process.stdin.close()  # which tells it to
        until = time.monotonic() + STOPPING_S
        for place in running:
            assert place.process is not None
            try:
                place.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                place.process.kill()
                place.process.wait()
                if place.is_worker:
                    with _told():
                        self.store.give_up(place.name)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        OpenSoraError: no such address, or another program listens there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        raise OpenSoraError(
            f"nothing can listen at {host}:{port}: {error.strerror or error}; choose another `host` or `port`"
        ) from error
    listening.set_inheritable(True)
    return listening


@contextlib.contextmanager
def _told():
    """The store may be away for a while, or the disk full: that is said, and tried again later."""
    try:
        yield
    except (OpenSoraError, OSError) as error:
        _say(str(error))


def _say(text: str) -> None:
    print(f"opensora: {text}", file=sys.stderr, flush=True)
