"""A process that makes clips: it claims a job, makes it, and writes the clip before it says that it is there.

One process for each device. The main thread makes clips; a second one tells the store how far they are, notices that a
job was cancelled, and holds the lease. Whatever happens to this process, the job it had is begun again by another:

    claim -> load -> read files -> sample -> clip on the disk (temporary name, fsync, rename) -> completed
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from opensora.errors import OpenSoraError
from opensora.server.child import ChildSettings, told_settings, told_to_stop
from opensora.server.database import StoreAway
from opensora.server.folder import ServerFolder
from opensora.server.jobs import Job, JobError, JobProgress, JobResult
from opensora.server.settings import ServerSettings
from opensora.server.store import JobStore, store_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from opensora.generation.clip import Clip
    from opensora.generation.progress import Progress
    from opensora.server.colours import LatentColours
    from opensora.server.engines import Engines

Result = TypeVar("Result")

IDLE_S = 0.2
"""Between two looks at an empty queue."""
NOTICE_S = 0.2
"""Until it is noticed that a job was cancelled, at most."""
NICE = 5
AWAY_S = 1.0
"""Until a store that is away is asked again."""


class Worker:
    """Makes one job after the other until it is told to stop.

    Args:
        name: of this process, different from all others.
        store: the jobs.
        folder: their files.
        engines: loaded models.
        colours: of their latents, for previews.
        settings: of the server.
        stopped: set from outside: what is being made goes back to the queue.
    """

    def __init__(
        self,
        name: str,
        store: JobStore,
        folder: ServerFolder,
        engines: "Engines",
        colours: "LatentColours",
        settings: ServerSettings,
        stopped: threading.Event,
    ) -> None:
        self.name, self.store, self.folder, self.engines = name, store, folder, engines
        self.colours, self.settings, self.stopped = colours, settings, stopped

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
        from opensora.generation.progress import Cancelled

        with _Watch(self, job) as watch:
            try:
                result = self._make(job, watch)
            except Cancelled:
                if self.stopped.is_set():
                    self._surely(lambda: self.store.put_back(job))
            except OpenSoraError as error:
                self._fail(job, "invalid_request", " ".join(str(error).split()))
            except Exception:
                traceback.print_exc()
                self._fail(job, "internal_error", "the worker made a mistake; its log tells which")
            else:
                if not self._surely(lambda: self.store.complete(job, result, self.settings.keep_s)):
                    self.folder.remove_attempt(job)
        self.folder.preview(job.id).unlink(missing_ok=True)

    def _fail(self, job: Job, code: str, message: str) -> None:
        self._surely(lambda: self.store.fail(job, JobError(code, message)))

    def _make(self, job: Job, watch: "_Watch") -> JobResult:
        from opensora.server.pictures import Previews, write_pictures

        request = self.folder.rooted(job.request)
        engine = self.engines.of(request)
        began = time.monotonic()
        with watch.reading(self.settings.inputs.read_s):
            prepared = engine.prepare([request])[0]
        codec, sampling = prepared.pipeline.autoencoder, prepared.sampling
        colours = self.colours.of(codec)
        previews = Previews(self.folder.preview(job.id), colours, sampling.size.num_frames / sampling.file_fps)
        latents: Tensor | None = None

        def tell(progress: "Progress") -> None:
            nonlocal latents
            latents = latents if progress.latents is None else progress.latents
            watch.tell(progress, previews.show(progress))

        clip = engine.make(prepared, on_progress=tell, cancelled=watch.is_over)
        if colours is None and latents is not None and sampling.num_loops == 1:
            self.colours.learn(codec, latents[0], clip.frames)
        watch.say("writing")
        path = clip.save(self.folder.new_clip(job))
        result = _result(clip, path.name, path.stat().st_size, time.monotonic() - began)
        write_pictures(clip, self.folder.thumbnail(result), self.folder.spritesheet(result))
        self.folder.flush()
        return result


class _Watch:
    """Holds the lease of a job while it is made, tells how far it is, and notices that it is not wanted any more."""

    def __init__(self, worker: Worker, job: Job) -> None:
        self.worker, self.job = worker, job
        self._progress = JobProgress("loading")
        self._deadline: float | None = None
        self._ended, self._unwanted = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def is_over(self) -> bool:
        """Whether to stop making it."""
        return self._unwanted.is_set() or self.worker.stopped.is_set()

    def say(self, stage: str) -> None:
        """The job is at this stage."""
        self._progress = replace(self._progress, stage=stage)

    def tell(self, progress: "Progress", num_previews: int) -> None:
        """The job is so far."""
        now = progress
        self._progress = JobProgress(now.stage, now.step, now.num_steps, now.loop, now.num_loops, num_previews)

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
        store, lease_s = self.worker.store, self.worker.settings.lease_s
        told, renewed = self._progress, time.monotonic()
        while not self._ended.wait(NOTICE_S):
            if self._deadline is not None and time.monotonic() > self._deadline:
                most_s = self.worker.settings.inputs.read_s
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
                _say(f"{self.worker.name}: {error}")
                continue
            if not is_ours:
                self._unwanted.set()
                return


def _result(clip: "Clip", file: str, num_bytes: int, making_s: float) -> JobResult:
    num_frames, height, width, _ = clip.frames.shape
    return JobResult(file, num_bytes, height, width, num_frames, clip.fps, making_s)


def _say(text: str) -> None:
    print(f"opensora: {text}", file=sys.stderr, flush=True)


def main(engines_of: "Callable[[ChildSettings], Engines] | None" = None) -> None:
    """What the process does, see `child`.

    Args:
        engines_of: what makes the clips of a worker; None for models of this machine.
    """
    told = told_settings()
    stopped = told_to_stop()
    with suppress(OSError):
        os.nice(NICE)  # answers of the API go before steps of a clip
    from opensora.server.colours import LatentColours

    folder = ServerFolder(told.server.folder)
    folder.make()
    store, colours = store_of(told.server), LatentColours(folder.colours)
    engines = (engines_of or _engines_of)(told)
    Worker(told.name, store, folder, engines, colours, told.server, stopped).run()


def _engines_of(told: ChildSettings) -> "Engines":
    from opensora.server.engines import Engines

    return Engines(told.device or None, told.server.max_memory_bytes)


if __name__ == "__main__":
    main()
