"""A process that makes clips: it claims a job, makes it, and writes the clip before it says that it is there.

One process for each device. The main thread makes clips; a second one tells the store how far they are, notices that a
job was cancelled, and holds the lease. Whatever happens to this process, the job it had is begun again by another:

    claim -> load -> read files -> sample -> clip on the disk (temporary name, fsync, rename) -> completed
"""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar

from opensora.errors import OpenSoraError
from opensora.generation.progress import Cancelled
from opensora.server.child import REFUSED, ChildSettings, told_settings, told_to_stop
from opensora.server.database import StoreAway
from opensora.server.folder import ServerFolder
from opensora.server.jobs import Job, JobError, JobResult
from opensora.server.settings import IDLE_S, ServerSettings
from opensora.server.store import JobStore, store_of
from opensora.server.watch import JobWatch

Result = TypeVar("Result")

AWAY_S = 1.0
"""Until a store that is away is asked again."""
NICE = 5


class Maker(Protocol):
    """What makes clips: `maker.ClipMaker`."""

    def make(self, job: Job, watch: JobWatch) -> JobResult:
        """Makes the clip of a job: its file is on the disk when this returns.

        Raises:
            OpenSoraError: it cannot be made.
            Cancelled: `watch.is_over` said so.
        """
        ...


class Worker:
    """Makes one job after the other until it is told to stop.

    Args:
        name: of this process, different from all others.
        store: the jobs.
        folder: their files.
        maker: of clips.
        settings: of the server.
        stopped: set from outside: what is being made goes back to the queue.
    """

    def __init__(
        self,
        name: str,
        store: JobStore,
        folder: ServerFolder,
        maker: "Maker",
        settings: ServerSettings,
        stopped: threading.Event,
    ) -> None:
        self.name, self.store, self.folder, self.maker = name, store, folder, maker
        self.settings, self.stopped = settings, stopped

    def run(self) -> None:
        """Returns when it is told to stop."""
        while not self.stopped.is_set():
            job = self._surely(lambda: self.store.claim(self.name, self.settings.lease_s, self.settings.models))
            if job is None:
                self.stopped.wait(IDLE_S)
            else:
                self.work(job)

    def _surely(self, change: Callable[[], Result]) -> Result | None:
        """Has the store changed, however long it is away; None if this process is to stop meanwhile."""
        while True:
            try:
                return change()
            except StoreAway as error:
                _say(f"{self.name}: {error}")
                if self.stopped.wait(AWAY_S):
                    return None

    def work(self, job: Job) -> None:
        """Makes one job, and says what became of it."""
        with JobWatch(self.store, job, self.settings, self.stopped) as watch:
            try:
                result = self.maker.make(job, watch)
            except Cancelled:
                if self.stopped.is_set():
                    self._surely(lambda: self.store.put_back(job))
            except OpenSoraError as error:
                here = f"{self.folder.inputs_of(job.id)}/"  # which is nobody's business
                self._fail(job, "invalid_request", " ".join(str(error).split()).replace(here, ""))
            except Exception:
                traceback.print_exc()
                self._fail(job, "internal_error", "the worker made a mistake; its log tells which")
            else:
                # Where nobody could say, the clip stays: whoever keeps house knows later whether it is the job's.
                if self._surely(lambda: self.store.complete(job, result, self.settings.keep_s)) is False:
                    self.folder.remove_attempt(job)
        self.folder.preview(job.id).unlink(missing_ok=True)

    def _fail(self, job: Job, code: str, message: str) -> None:
        self._surely(lambda: self.store.fail(job, JobError(code, message)))


def _say(text: str) -> None:
    print(f"opensora: {text}", file=sys.stderr, flush=True)


def main(maker_of: Callable[[ChildSettings], Maker] | None = None) -> None:
    """What the process does, see `child`.

    Args:
        maker_of: what makes the clips; None for models of this machine.
    """
    told = told_settings()
    stopped = told_to_stop()
    with suppress(OSError):
        os.nice(NICE)  # answers of the API go before steps of a clip
    folder = ServerFolder(told.server.folder)
    folder.make()
    if maker_of is None:
        from opensora.server.maker import ClipMaker

        maker_of = ClipMaker.of
    try:
        maker = maker_of(told)
    except OpenSoraError as error:
        _say(" ".join(str(error).split()))
        sys.exit(REFUSED)
    Worker(told.name, store_of(told.server), folder, maker, told.server, stopped).run()


if __name__ == "__main__":
    main()
