"""A worker whose clips are noise, made at once: `python -m stand_in_worker`, for tests of everything around a clip.

It imports no torch, so it is there in a second. The prompt says what happens: "hangs" goes on until it is cancelled,
"dies" takes the process along, "fails" cannot be made, "errs" is a mistake of ours.
"""

import os
import signal
import threading

import numpy as np

from opensora.errors import OpenSoraError
from opensora.generation.progress import Cancelled
from opensora.generation.request import ClipRequest
from opensora.media.write import write_video
from opensora.server.child import ChildSettings
from opensora.server.folder import ServerFolder
from opensora.server.jobs import Job, JobProgress, JobResult
from opensora.server.pictures import write_pictures
from opensora.server.watch import JobWatch
from opensora.server.worker import main

NUM_STEPS, STEP_S, FPS = 8, 0.02, 8.0


def frames_of(request: ClipRequest) -> np.ndarray:
    """What the clip of a request shows: uint8, (T, H, W, 3)."""
    shape = (int(request.num_frames or 5), request.height or 32, request.width or 32, 3)
    return np.random.default_rng(request.seed).integers(0, 256, shape, dtype=np.uint8)


class StandIn:
    """In place of `opensora.server.maker.ClipMaker`."""

    def __init__(self, told: ChildSettings) -> None:
        self.folder = ServerFolder(told.server.folder)

    def make(self, job: Job, watch: JobWatch) -> JobResult:
        prompt, step = job.request.prompt, 0
        if "dies" in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        if "fails" in prompt:
            raise OpenSoraError("`fps` is 0, expected more")
        if "errs" in prompt:
            raise ZeroDivisionError
        while step < NUM_STEPS or "hangs" in prompt:
            if watch.is_over():
                raise Cancelled
            watch.show(JobProgress("denoising", min(step + 1, NUM_STEPS - 1), NUM_STEPS))
            threading.Event().wait(STEP_S)
            step += 1
        return self._write(job)

    def _write(self, job: Job) -> JobResult:
        frames, path = frames_of(job.request), self.folder.new_clip(job)
        write_video(path, frames, FPS)
        num_frames, height, width, _ = frames.shape
        name, num_bytes = self.folder.name_of(path), path.stat().st_size
        result = JobResult(name, num_bytes, height, width, num_frames, FPS, NUM_STEPS * STEP_S)
        self.folder.record(result).write_text('{"prompt": "noise"}')
        write_pictures(frames, self.folder.thumbnail(result), self.folder.spritesheet(result))
        self.folder.flush(job)
        return result


if __name__ == "__main__":
    main(StandIn)
