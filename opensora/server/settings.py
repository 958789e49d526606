"""What a server is told when it starts, and hands on to its processes."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from opensora import limits
from opensora.contents import read_text
from opensora.errors import OpenSoraError
from opensora.generation.request import DEFAULT_MODEL
from opensora.limits import check_count
from opensora.server.jobs import QueueLimits

IDLE_S = 0.2
"""A worker that has nothing to do looks into the queue so often."""
LEAST_SECRET = 16
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Key:
    """Who may ask for clips.

    Attributes:
        owner: a name; jobs belong to it.
        secret: what comes in the Authorization header. Logs and records never hold it.
    """

    owner: str
    secret: str = field(repr=False)


@dataclass(frozen=True)
class InputLimits:
    """How much may be sent.

    Attributes:
        image_bytes, clip_bytes: of a file.
        field_bytes: of a field of a form.
        num_fields: of a form.
        num_files: of a form.
        body_bytes: of a form, all of it.
        prompt_characters: of a prompt.
        pixels: of a frame that is sent.
        clip_pixels: height x width x frames of a clip that is made.
        read_s: that a worker may take to read the files of a job.
        head_s: that the first line and the headers of a request may take to arrive.
        body_s: that its body may take.
    """

    image_bytes: int = 20 * 10**6
    clip_bytes: int = 100 * 10**6
    field_bytes: int = 64 * 1024
    num_fields: int = 100
    num_files: int = 16
    body_bytes: int = 250 * 10**6
    prompt_characters: int = 4_000
    pixels: int = 50 * 10**6
    clip_pixels: int = 500 * 10**6
    read_s: float = 60.0
    head_s: float = 20.0
    body_s: float = 60.0


def check_clip_pixels(height: int, width: int, num_frames: int, most: int) -> None:
    """Raises `OpenSoraError` for a clip that is larger than one may be."""
    if height * width * num_frames > most:
        raise OpenSoraError(
            f"{num_frames} frames of {height}x{width} are {height * width * num_frames:,} pixels, expected at most "
            f"{most:,}; ask for a shorter or smaller clip"
        )


@dataclass(frozen=True)
class ServerSettings:
    """A server: its API, and the workers that it starts.

    Attributes:
        folder: of its files, see `folder.ServerFolder`; shared by all hosts.
        store: URL of the database; None for SQLite in the folder.
        models: that clips can be asked of; the first is that of requests which name none.
        devices: a worker for each; "" for the accelerator, or the CPU where there is none.
        max_memory_bytes: what models in memory may take, of each device; None for what is there.
        host, port: where the API listens; port 0 for any that is free.
        keys: who may ask; () for everybody, on a loopback address only.
        hosts: names, besides those of the loopback, that requests may come to (Host and Origin).
        fetch_hosts: hosts that pictures and clips may be fetched from; () for none.
        runs: folder of training runs that the page shows; None for none.
        has_api: this machine answers requests; otherwise it only works.
        logs_prompts: the log tells them.
        queue: how much may wait.
        inputs: how much may be sent.
        lease_s: a worker that says nothing for so long is given up.
        keep_s: clips are removed so long after they were made; None for never.
        quota_bytes: of the folder; the oldest clips go when there are more. None for no limit.
    """

    folder: Path
    store: str | None = None
    models: tuple[str, ...] = (DEFAULT_MODEL,)
    devices: tuple[str, ...] = ("",)
    max_memory_bytes: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[Key, ...] = ()
    hosts: tuple[str, ...] = ()
    fetch_hosts: tuple[str, ...] = ()
    runs: Path | None = None
    has_api: bool = True
    logs_prompts: bool = False
    queue: QueueLimits = field(default_factory=QueueLimits)
    inputs: InputLimits = field(default_factory=InputLimits)
    lease_s: float = 30.0
    keep_s: float | None = None
    quota_bytes: int | None = None

    def check(self) -> None:
        """Finds what no server can be, and what would let anybody in.

        Raises:
            OpenSoraError: the first mistake.
        """
        if self.host not in LOOPBACK and not self.keys:
            raise OpenSoraError(
                f"`host` is {self.host}, where other machines can reach it; give `key_file`, or listen at 127.0.0.1"
            )
        if not 0 <= self.port < 2**16:
            raise OpenSoraError(f"`port` is {self.port}, expected 0 (any that is free) to 65535")
        if self.keep_s is not None and not 0 < self.keep_s < math.inf:
            raise OpenSoraError(f"`keep_hours` is {self.keep_s / 3600:g}, expected a number above 0")
        for name, most in (("most_waiting", self.queue.most_waiting), ("most_of_key", self.queue.most_of_owner)):
            check_count(f"`{name}`", most, limits.CLIPS)


def read_keys(path: Path) -> tuple[Key, ...]:
    """Keys of a file with a line `OWNER:SECRET` for each; empty lines and those that begin with # are none.

    Raises:
        OpenSoraError: no such file, or a line that is no key.
    """
    keys: list[Key] = []
    for number, line in enumerate(read_text(path, "the file of keys").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        owner, _, secret = line.strip().partition(":")
        if not re.fullmatch(r"[\w.-]{1,64}", owner) or len(secret) < LEAST_SECRET:
            raise OpenSoraError(
                f"{path}: line {number} is no key; expected OWNER:SECRET with {LEAST_SECRET} characters or more"
            )
        if owner in {key.owner for key in keys} or secret in {key.secret for key in keys}:
            raise OpenSoraError(f"{path}: line {number} repeats an owner or a secret; give each its own")
        keys.append(Key(owner, secret))
    if not keys:
        raise OpenSoraError(f"{path} holds no key; write a line OWNER:SECRET")
    return tuple(keys)
