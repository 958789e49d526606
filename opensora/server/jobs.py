"""What a queue holds: a clip that somebody asked for, from the moment it is accepted until it expires."""

from dataclasses import dataclass, field
from typing import Literal

from opensora.generation.request import ClipRequest

State = Literal["queued", "in_progress", "completed", "failed", "cancelled", "deleted"]
WAITING: tuple[State, ...] = ("queued", "in_progress")
"""Of jobs that still cost something."""
Kind = Literal["create", "remix", "extend", "edit"]


@dataclass(frozen=True)
class JobProgress:
    """How far a job is, as its worker said last.

    Attributes:
        stage: "loading" while the model is, then as `generation.engine.Progress`.
        step, num_steps, loop, num_loops: likewise.
        num_previews: pictures that were written of it so far; each takes the place of the one before.
    """

    stage: str = "queued"
    step: int = 0
    num_steps: int = 0
    loop: int = 0
    num_loops: int = 1
    num_previews: int = 0

    @property
    def percent(self) -> int:
        """Of the steps of all loops, from 0 to 100; 100 only when the clip is there."""
        if not self.num_steps:
            return 0
        done = (self.loop + self.step / self.num_steps) / self.num_loops
        return min(99, int(100 * done))


@dataclass(frozen=True)
class JobResult:
    """A clip that was made.

    Attributes:
        file: name in the folder of clips; its record lies beside it.
        num_bytes: of the file.
        height, width: in pixels.
        num_frames: of it.
        fps: that it plays at.
        making_s: that its worker took, loading aside.
    """

    file: str
    num_bytes: int
    height: int
    width: int
    num_frames: int
    fps: float
    making_s: float

    @property
    def duration_s(self) -> float:
        """That it plays."""
        return self.num_frames / self.fps


@dataclass(frozen=True)
class JobError:
    """Why there is no clip.

    Attributes:
        code: a word for programs: "invalid_request", "cancelled", "worker_lost", "internal_error".
        message: a line for people.
    """

    code: str
    message: str


@dataclass(frozen=True)
class Job:
    """One clip, and what became of it.

    Attributes:
        id: cannot be guessed, and may stand in a file name.
        request: what to make; its files lie in the server's folder and are named relative to it.
        owner: name of the key that it was asked for with; "" where there are no keys.
        kind: what it was asked for as.
        format: of the file, see `media.write.FORMATS`.
        parent: the job that it came from, if it did.
        state: "cancelled" as soon as somebody says so; its worker notices at the next step.
        priority: higher ones are made first,
        position: of those alike the one with the least; None for the end of the queue, where it is given a number.
        is_held: it waits until somebody lets it go.
        attempt: how often a worker began it,
        num_lost: and how often it was lost meanwhile.
        worker: that has it, or had it last.
        lease_until: when it is anybody's again, in seconds since 1970; its worker puts that off.
        progress, result, error: what there is of it.
        created_at, started_at, finished_at, expires_at: in seconds since 1970.
        version: grows with every change of any job: what changed after a version is what has a higher one.
    """

    id: str
    request: ClipRequest
    owner: str = ""
    kind: Kind = "create"
    format: str = "mp4"
    parent: str | None = None
    state: State = "queued"
    priority: int = 0
    position: float | None = None
    is_held: bool = False
    attempt: int = 0
    num_lost: int = 0
    worker: str | None = None
    lease_until: float | None = None
    progress: JobProgress = field(default_factory=JobProgress)
    result: JobResult | None = None
    error: JobError | None = None
    created_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None
    expires_at: float | None = None
    version: int = 0

    @property
    def is_waiting(self) -> bool:
        """It is still to be made, or being made."""
        return self.state in WAITING


@dataclass(frozen=True)
class QueueLimits:
    """How much may wait.

    Attributes:
        most_waiting: jobs of all owners,
        most_of_owner: of each.
        most_lost: workers that may be lost over a job before it fails.
    """

    most_waiting: int = 64
    most_of_owner: int = 8
    most_lost: int = 3


@dataclass(frozen=True)
class QueueSummary:
    """The queue at a glance.

    Attributes:
        states: number of jobs by state.
        is_paused: nothing is begun.
        oldest_waiting_at: when the job that waits longest came, in seconds since 1970.
        version: of the last change.
    """

    states: dict[str, int]
    is_paused: bool
    oldest_waiting_at: float | None
    version: int
