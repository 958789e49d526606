"""An API in this process, and clips for it that nobody has to make."""

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from fastapi import FastAPI
from PIL import Image
from stand_in_worker import frames_of
from starlette.testclient import TestClient

from opensora.media.write import write_video
from opensora.server.api import ApiServer
from opensora.server.app import create_app
from opensora.server.folder import ServerFolder
from opensora.server.jobs import Job, JobProgress, JobResult
from opensora.server.pictures import write_pictures
from opensora.server.service import JobService
from opensora.server.settings import ServerSettings
from opensora.server.store import JobStore, store_of
from opensora.server.supervisor import listen

PROMPT = "a red ball rolls left over the grass"
OTHER_PROMPT = "a blue ball rolls left over the grass"
FPS = 8.0


class Api:
    """A server without workers."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.store: JobStore = store_of(settings)
        self.app: FastAPI = create_app(settings, self.store)
        self.service: JobService = self.app.state.service
        self.folder = self.service.folder

    def client(self, secret: str | None = None) -> TestClient:
        """Who asks it."""
        headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        return TestClient(self.app, base_url="http://localhost:8000", headers=headers, raise_server_exceptions=False)

    def begin(self) -> Job:
        """A worker takes the next job, and is half done."""
        job = self.store.claim("w", 30.0)
        assert job is not None
        self.store.renew(job, 30.0, JobProgress("denoising", 5, 10, num_previews=1))
        Image.new("RGB", (8, 8)).save(self.folder.preview(job.id), format="WEBP")
        return job

    def finish(self, job: Job) -> Job:
        """It is done."""
        frames, path = frames_of(job.request), self.folder.new_clip(job)
        write_video(path, frames, FPS, format=job.format)
        num_frames, height, width, _ = frames.shape
        result = JobResult(self.folder.name_of(path), path.stat().st_size, height, width, num_frames, FPS, 0.5)
        self.folder.record(result).write_text(json.dumps({"prompt": job.request.prompt}))
        write_pictures(frames, self.folder.thumbnail(result), self.folder.spritesheet(result))
        Image.new("L", (8, 8)).save(self.folder.channels(result))
        assert self.store.complete(job, result)
        done = self.store.get(job.id)
        assert done is not None
        return done

    def make_all(self) -> None:
        """Everything that waits."""
        while any(job.state == "queued" and not job.is_held for job in self.store.queue()):
            self.finish(self.begin())

    def files(self) -> set[str]:
        """See `files_of`."""
        return files_of(self.folder)


def files_of(folder: ServerFolder) -> set[str]:
    """All below a server's folder, the database and locks aside."""
    paths = (path.relative_to(folder.path) for path in folder.path.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "sqlite" not in path.name and path.suffix != ".lock"}


@contextmanager
def live(api: Api) -> Iterator[str]:
    """The API on a socket, as its own process has it: "http://127.0.0.1:PORT"."""
    listening = listen("127.0.0.1", 0)
    server = ApiServer(api.app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def picture(size: tuple[int, int] = (64, 64), format: str = "PNG") -> bytes:
    """A small one."""
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, format=format)
    return file.getvalue()


def clip(folder: Path) -> bytes:
    """A small mp4."""
    path = folder / "sent.mp4"
    write_video(path, np.full((5, 32, 32, 3), 90, dtype=np.uint8), FPS)
    return path.read_bytes()


def error_of(response) -> tuple[int, str, str]:
    """Status, code and message of an answer that is no success, in the one form that they have."""
    body = response.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert response.headers["content-type"] == "application/json"
    message = body["error"]["message"]
    assert message and "\n" not in message
    return response.status_code, body["error"]["code"], message
