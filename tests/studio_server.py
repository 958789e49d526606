"""`opensora studio` in processes of its own, for tests of its page."""

import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

from opensora.generation.request import ClipRequest
from opensora.server.folder import ServerFolder
from opensora.server.jobs import Job, JobProgress, JobResult
from opensora.server.settings import Key, ServerSettings, read_keys
from opensora.server.store import JobStore, new_id, store_of

_SUPERVISOR = """
import sys
from pathlib import Path
from opensora.server.settings import ServerSettings, read_keys
from opensora.server.store import store_of
from opensora.server.supervisor import Supervisor, listen

folder, worker, port, keys = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
settings = ServerSettings(
    folder, models=("toybox", "toybox-iddpm"), runs=folder / "runs", keys=read_keys(Path(keys)) if keys else ()
)
listening = listen("127.0.0.1", port)
print(listening.getsockname()[1], flush=True)
try:
    Supervisor(
        settings, store_of(settings), listening, worker=worker, api="opensora.studio.process"
    ).run(lambda: None)
except KeyboardInterrupt:
    pass
"""


class StudioServer:
    """A server with its page.

    Args:
        folder: of its files.
        worker: module of the one that makes clips.
        keys: file of its keys.

    Attributes:
        url: of the page.
    """

    def __init__(self, folder: Path, worker: str = "stand_in_worker", keys: Path | None = None) -> None:
        self._arguments, self._port = (str(folder), worker), 0
        self._keys = keys
        self.folder = ServerFolder(folder)
        self.folder.make()
        own: tuple[Key, ...] = () if keys is None else read_keys(keys)
        self.store: JobStore = store_of(ServerSettings(folder, keys=own))
        self.start()

    def start(self) -> None:
        """Starts it, at the address that it had; returns when it answers."""
        paths = os.pathsep.join(filter(None, sys.path))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _SUPERVISOR, *self._arguments, str(self._port), str(self._keys or "")]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert self._process.stdout is not None
        self._port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self._port}/"
        with urllib.request.urlopen(f"{self.url}healthz", timeout=180):  # waits until somebody takes the call
            pass

    def num_streams(self) -> int:
        """Pages that listen to events."""
        with urllib.request.urlopen(f"{self.url}metrics") as figures:
            return int(float(re.search(rb"^opensora_streams (\S+)", figures.read(), re.MULTILINE)[1]))

    def stop(self) -> None:
        """Ends it in order."""
        self._process.terminate()
        self._process.wait(60)

    def close(self) -> None:
        """Ends it for good."""
        self.stop()
        self.store.close()

    def add(self, prompt: str, **wishes: object) -> Job:
        """A job that the API would not take, such as one that hangs."""
        return self.store.add(Job(new_id(), ClipRequest(prompt, model="toybox", **wishes)))

    def add_clips(self, like: Job, num: int) -> None:
        """Jobs that are done, whose clips are copies of another one's."""
        made = self.store.get(like.id)
        assert made is not None and made.result is not None
        for number in range(num):
            job = self.store.add(Job(new_id(), ClipRequest(f"copy {number} of a clip", model="toybox"), is_held=True))
            shutil.copytree(self.folder.clips_of(like.id), self.folder.clips_of(job.id))
            result = JobResult(**{**vars(made.result), "file": made.result.file.replace(like.id, job.id)})
            done = {"state": "completed", "result": result, "progress": JobProgress("completed"), "attempt": 1}
            self.store.change(job.id, lambda held, now, done=done: Job(**{**vars(held), **done, "finished_at": now}))
