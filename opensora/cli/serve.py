"""`opensora serve`: clips over HTTP, in the form of OpenAI's video API, from a queue that loses nothing."""

import dataclasses
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from opensora.cli.options import FLAG, check_count, option
from opensora.cli.progress import say
from opensora.errors import OpenSoraError
from opensora.files import owned
from opensora.planning.devices import parse_memory
from opensora.server.jobs import QueueLimits
from opensora.server.settings import ServerSettings, read_keys

HOSTS = "hosts"
HOURS_S = 3600.0
API = "opensora.server.api"


@dataclass(frozen=True)
class ServerOptions:
    """What every server is told: `Serve` and `studio.Studio` say what for."""

    folder: Annotated[Path, option("FOLDER", "outputs/server")] = Path("outputs/server")
    """Where jobs, clips and uploads are kept."""
    host: Annotated[str, option("ADDRESS", "127.0.0.1")] = "127.0.0.1"
    """Another address than the loopback needs --key-file."""
    port: Annotated[int, option("N", "8000")] = 8000
    """0 for any that is free."""
    model: Annotated[tuple[str, ...], option("NAME ...", "toybox"), arg(aliases=["--models"])] = ("toybox",)
    """Models that clips can be asked of; the first is the default."""
    device: Annotated[tuple[str, ...] | None, option("NAME ...", "an accelerator if there is one")] = None
    """A worker process for each; the same twice for two."""
    max_memory: Annotated[str | None, option("24GB", "what the device has")] = None
    """That models and the clip which is made may take, on each device."""
    store: Annotated[str | None, option("URL", "SQLite in the folder")] = None
    """postgresql://USER@HOST/NAME, for workers on several hosts that share the folder."""
    key_file: Annotated[Path | None, option("FILE")] = None
    """Lines OWNER:SECRET; requests need `Authorization: Bearer SECRET`, and see their owner's jobs only."""
    allow_host: Annotated[tuple[str, ...], option("NAME ...")] = ()
    """Names by which a proxy or another machine calls this server."""
    allow_fetch: Annotated[tuple[str, ...], option("HOST ...")] = ()
    """Hosts that pictures and clips may be fetched from by URL."""
    keep_hours: Annotated[float | None, option("H", "for ever")] = None
    """Clips are removed so long after they were made."""
    quota: Annotated[str | None, option("100GB", "none")] = None
    """Of the folder; the oldest clips go when there are more."""
    most_waiting: Annotated[int, option("N", "64")] = 64
    """Jobs that may wait, of all keys,"""
    most_of_key: Annotated[int, option("N", "8")] = 8
    """and of each."""
    log_prompts: Annotated[bool, FLAG] = False
    """The log tells what was asked for."""

    def start(self, settings: ServerSettings, api: str = API, on_start: Callable[[str], None] | None = None) -> int:
        """Starts the processes and looks after them; returns only if one cannot work.

        Args:
            settings: of the server.
            api: module of the process that answers.
            on_start: told at which address.
        """
        try:
            from opensora.server.store import store_of
            from opensora.server.supervisor import Supervisor, listen
        except ImportError as error:
            raise OpenSoraError(f"serving needs {error.name}: pip install 'opensora[serve]'") from None
        with owned(settings.folder / HOSTS / socket.gethostname()):  # one supervisor of a folder on each host
            store = store_of(settings)
            listening = listen(self.host, self.port) if settings.has_api else None
            url = None if listening is None else _url(listening)

            def started() -> None:
                say(f"{'working' if url is None else f'listening at {url}'}; Ctrl-C ends it")
                if on_start is not None and url is not None:
                    on_start(url)

            return Supervisor(settings, store, listening, api=api).run(started)

    def settings(self) -> ServerSettings:
        """What the options come to."""
        check_count("--port", self.port, least=0)
        settings = ServerSettings(
            folder=self.folder.absolute(),
            store=self.store,
            models=self.model,
            devices=self.device or ("",),
            max_memory_bytes=None if self.max_memory is None else parse_memory(self.max_memory, "max_memory"),
            host=self.host,
            port=self.port,
            keys=() if self.key_file is None else read_keys(self.key_file),
            hosts=self.allow_host,
            fetch_hosts=self.allow_fetch,
            logs_prompts=self.log_prompts,
            queue=QueueLimits(most_waiting=self.most_waiting, most_of_owner=self.most_of_key),
            keep_s=None if self.keep_hours is None else self.keep_hours * HOURS_S,
            quota_bytes=None if self.quota is None else parse_memory(self.quota, "quota"),
        )
        settings.check()
        return settings


@dataclass(frozen=True)
class Serve(ServerOptions):
    """Answer requests for clips at an address of this machine, one worker process for each device.

    Jobs and clips are in a folder; whoever starts the server there again goes on where it was.
    """

    no_api: Annotated[bool, FLAG] = False
    """Only work: other hosts answer requests."""

    def run(self) -> int:
        """Returns only if a process cannot work; it ends by Ctrl-C or SIGTERM."""
        return self.start(dataclasses.replace(self.settings(), has_api=not self.no_api))


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
