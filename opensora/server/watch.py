"""Beside a clip that is made: holds its job's lease, tells how far it is, notices that nobody wants it any more."""

import os
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from opensora.server.database import StoreAway
from opensora.server.jobs import Job, JobError, JobProgress
from opensora.server.settings import ServerSettings
from opensora.server.store import JobStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opensora.generation.progress import Progress

NOTICE_S = 0.2
"""Until it is noticed that a job was cancelled, at most."""


class JobWatch:
    """The job that a worker has, while it makes it.

    Args:
        store: the jobs.
        job: claimed.
        settings: of the server.
        stopped: set when the worker is to stop.
    """

    def __init__(self, store: JobStore, job: Job, settings: ServerSettings, stopped: threading.Event) -> None:
        self.store, self.job, self.settings, self.stopped = store, job, settings, stopped
        self._progress = JobProgress("loading")
        self._deadline: float | None = None
        self._ended, self._unwanted = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "JobWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def is_over(self) -> bool:
        """Whether to stop making it."""
        return self._unwanted.is_set() or self.stopped.is_set()

    def say(self, stage: str) -> None:
        """The job is at this stage."""
        self._progress = replace(self._progress, stage=stage)

    def show(self, progress: JobProgress) -> None:
        """The job is so far; the store learns it soon."""
        self._progress = progress

    def tell(self, progress: "Progress", num_previews: int) -> None:
        """Likewise, in the engine's words."""
        now = progress
        self.show(JobProgress(now.stage, now.step, now.num_steps, now.loop, now.num_loops, num_previews))

    @contextmanager
    def reading(self, most_s: float) -> "Iterator[None]":
        """Within it files are read that may be made to take for ever; then this process ends, and the job fails."""
        self.say("reading")
        self._deadline = time.monotonic() + most_s
        try:
            yield
        finally:
            self._deadline = None

    def _watch(self) -> None:
        store, lease_s = self.store, self.settings.lease_s
        told, renewed = self._progress, time.monotonic()
        while not self._ended.wait(NOTICE_S):
            if self._deadline is not None and time.monotonic() > self._deadline:
                most_s = self.settings.inputs.read_s
                message = f"a file of the request takes longer than {most_s:g} s to read; send a smaller one"
                store.fail(self.job, JobError("invalid_request", message))
                os._exit(1)  # nothing else ends a decoder; the supervisor starts another worker
            progress, now = self._progress, time.monotonic()
            try:
                if progress != told or now - renewed > lease_s / 3:
                    told, renewed = progress, now
                    is_ours = store.renew(self.job, lease_s, progress)
                else:
                    is_ours = store.is_wanted(self.job)
            except StoreAway as error:  # the lease tells whether that took too long
                print(f"opensora: {error}", file=sys.stderr, flush=True)
                continue
            if not is_ours:
                self._unwanted.set()
                return
