"""Processes of a server: each is told its settings through a pipe, and ends when the process that holds the pipe does.

The settings hold keys, so they stand neither in arguments nor in the environment, which other programs can read.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass

from opensora.server.settings import ServerSettings
from opensora.settings import from_dict, to_dict

REFUSED = 2
"""Exit code of a process that cannot work with its settings."""


@dataclass(frozen=True)
class ChildSettings:
    """What one process is told.

    Attributes:
        server: the same for all.
        name: of this process.
        device: of a worker.
        socket: file descriptor that the API listens on.
    """

    server: ServerSettings
    name: str
    device: str = ""
    socket: int | None = None


def start_child(module: str, settings: ChildSettings) -> subprocess.Popen[bytes]:
    """Starts `python -m module`, which reads `settings` with `told_settings`."""
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        pass_fds=() if settings.socket is None else (settings.socket,),
        start_new_session=True,  # Ctrl-C is for the process that started it
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(to_dict(settings)).encode() + b"\n")
    process.stdin.flush()
    return process


def told_settings() -> ChildSettings:
    """What this process was told."""
    return from_dict(ChildSettings, json.loads(sys.stdin.buffer.readline()), where="the settings of a process")


def told_to_stop() -> threading.Event:
    """Set by SIGTERM, and when the process that started this one is gone."""
    stopped = threading.Event()

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        stopped.set()

    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    threading.Thread(target=wait, daemon=True).start()
    return stopped


def own_name(number: int) -> str:
    """Of a worker: no other process has had it."""
    return f"{socket.gethostname()}-{os.getpid()}-{number}"
