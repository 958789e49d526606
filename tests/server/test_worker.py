"""A worker and its jobs: what it makes, what it is told, and what it leaves behind."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server.api_server import files_of
from stand_in_worker import StandIn, frames_of

from opensora.files import holding
from opensora.generation.request import ClipRequest
from opensora.media.frames import ClipFile
from opensora.server import housekeeping
from opensora.server.child import ChildSettings
from opensora.server.folder import UPLOADS_S, ServerFolder
from opensora.server.jobs import Job
from opensora.server.settings import ServerSettings
from opensora.server.store import JobStore, new_id, store_of
from opensora.server.worker import Worker

PATIENCE_S = 60


def until(condition: Callable[[], object]) -> None:
    """Waits for something that another thread does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        threading.Event().wait(0.01)


class Server:
    """A folder, its store, and a worker that a test starts."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings, self.folder = settings, ServerFolder(settings.folder)
        self.folder.make()
        self.store: JobStore = store_of(settings)
        self.stopped = threading.Event()
        maker = StandIn(ChildSettings(settings, "w"))
        self.worker = Worker("w", self.store, self.folder, maker, settings, self.stopped)
        self.thread = threading.Thread(target=self.worker.run)

    def add(self, prompt: str = "a ball", **wishes) -> Job:
        return self.store.add(Job(new_id(), ClipRequest(prompt, **wishes)))

    def work(self) -> None:
        """Until all jobs are done."""
        self.thread.start()
        until(lambda: not self.store.queue())
        self.stop()

    def stop(self) -> None:
        self.stopped.set()
        if self.thread.ident is not None:
            self.thread.join()

    def files(self) -> set[str]:
        """See `files_of`."""
        return files_of(self.folder)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(ServerSettings(tmp_path / "server"))
    yield server
    server.stop()
    server.store.close()


def test_clips_are_made_with_their_pictures(server: Server) -> None:
    jobs = [server.add(seed=seed, num_frames=5 + seed) for seed in range(3)]
    server.work()
    for job in map(server.store.get, (job.id for job in jobs)):
        assert job and job.state == "completed" and job.result
        clip = ClipFile(server.folder.clip(job.result))
        assert clip.num_frames() == job.result.num_frames == 5 + job.request.seed
        shown, wanted = next(clip.frames([0])).astype(float), frames_of(job.request)[0]
        others = [frames_of(other.request)[0] for other in jobs if other.id != job.id]
        # The codec is lossy, and noise the worst it can be given: the right clip is the one that is nearest.
        assert all(np.abs(shown - wanted).mean() < np.abs(shown - other).mean() for other in others)
        assert server.folder.thumbnail(job.result).exists() and server.folder.spritesheet(job.result).exists()
        assert server.folder.record(job.result).exists()
    assert len(server.files()) == 3 * 4


def test_what_cannot_be_made_says_why(server: Server) -> None:
    wrong, mistake, right = server.add("it fails"), server.add("it errs"), server.add()
    server.work()
    errors = {job.id: job.error for job in server.store.jobs()}
    assert (errors[wrong.id].code, errors[wrong.id].message) == ("invalid_request", "`fps` is 0, expected more")
    assert errors[mistake.id].code == "internal_error" and "ZeroDivision" not in errors[mistake.id].message
    assert server.store.get(right.id).state == "completed"


def test_to_cancel_stops_it_at_the_next_step(server: Server) -> None:
    job, other = server.add("it hangs"), server.add()
    server.thread.start()
    until(lambda: server.store.get(job.id).progress.step)
    server.store.cancel(job.id)
    until(lambda: server.store.get(other.id).state == "completed")
    assert server.store.get(job.id).state == "cancelled"
    server.stop()
    assert all(job.id not in name for name in server.files())


def test_a_deleted_job_stops_and_leaves_nothing(server: Server) -> None:
    job, other = server.add("it hangs"), server.add()
    server.thread.start()
    until(lambda: server.store.get(job.id).progress.step)
    housekeeping.remove_job(server.store, server.folder, server.store.get(job.id))
    until(lambda: server.store.get(other.id).state == "completed")
    server.stop()
    assert server.store.get(job.id) is None and all(job.id not in name for name in server.files())


def test_a_worker_that_stops_puts_its_job_back(server: Server) -> None:
    job = server.add("it hangs")
    server.thread.start()
    until(lambda: server.store.get(job.id).progress.step)
    server.stop()
    back = server.store.get(job.id)
    assert (back.state, back.num_lost, back.worker) == ("queued", 0, None)


def test_the_time_of_a_clip_is_over(server: Server) -> None:
    server.settings = replace(server.settings, keep_s=-1.0)
    server.worker.settings = server.settings
    job = server.add()
    server.work()
    assert housekeeping.keep_house(server.store, server.folder, server.settings) == [job.id]
    assert server.store.get(job.id) is None and server.files() == set()


def test_the_oldest_clips_go_when_there_are_too_many(server: Server) -> None:
    jobs = [server.add(seed=seed) for seed in range(3)]
    server.work()
    sizes = [server.store.get(job.id).result.num_bytes for job in jobs]
    quota = server.folder.num_bytes() - 1
    gone = housekeeping.keep_house(server.store, server.folder, replace(server.settings, quota_bytes=quota))
    assert gone == [jobs[0].id] and sizes[0] > 1
    assert [job.id for job in server.store.jobs(newest_first=False)] == [jobs[1].id, jobs[2].id]


def test_hosts_keep_house_one_at_a_time(server: Server) -> None:
    """Each would remove as much as is too much for all."""
    jobs = [server.add(seed=seed) for seed in range(2)]
    server.work()
    full = replace(server.settings, quota_bytes=server.folder.num_bytes() - 1)
    with holding(server.folder.housekeeping_lock) as is_held:
        assert is_held and housekeeping.keep_house(server.store, server.folder, full) == []
    assert housekeeping.keep_house(server.store, server.folder, full) == [jobs[0].id]


def test_a_clip_that_is_deleted_meanwhile_costs_no_other(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [server.add(seed=seed) for seed in range(3)]
    server.work()
    listed = server.store.jobs

    def deleted_meanwhile(*args: Any, **kwargs: Any) -> list[Job]:
        oldest = listed(*args, **kwargs)
        monkeypatch.setattr(server.store, "jobs", listed)
        housekeeping.remove_job(server.store, server.folder, oldest[0])
        return oldest

    full = replace(server.settings, quota_bytes=server.folder.num_bytes() - 1)
    monkeypatch.setattr(server.store, "jobs", deleted_meanwhile)
    assert housekeeping.keep_house(server.store, server.folder, full) == [jobs[0].id]
    assert [job.id for job in server.store.jobs(newest_first=False)] == [jobs[1].id, jobs[2].id]


def test_files_that_no_job_knows_go_and_others_stay(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    job = server.add()
    server.work()
    kept = server.files()
    stranger = new_id()
    server.folder.clips_of(stranger).mkdir()
    (server.folder.clips_of(stranger) / "1.mp4").touch()
    (server.folder.clips_of(job.id) / "7.mp4").touch()
    server.folder.inputs_of(stranger).mkdir()
    (server.folder.inputs_of(stranger) / "0.png").touch()
    (server.folder.clips / "notes.txt").write_text("not ours")
    server.folder.remove_strays(server.store.attempts)
    # What was sent may still be waiting for the rest of its request.
    assert server.files() == kept | {"clips/notes.txt", f"inputs/{stranger}/0.png"}
    now = time.time()
    monkeypatch.setattr("opensora.server.folder.time.time", lambda: now + UPLOADS_S + 1)
    server.folder.remove_strays(server.store.attempts)
    assert server.files() == kept | {"clips/notes.txt"}


def test_a_clip_of_another_job_that_is_written_meanwhile_stays(server: Server) -> None:
    job = server.add()

    def asked(ids: Sequence[str]) -> dict[str, int | None]:
        known = server.store.attempts(ids)
        (server.folder.clips_of(job.id) / "1.mp4").touch()  # its worker claims it, and is quick
        return known

    server.folder.clips_of(job.id).mkdir()
    assert server.folder.remove_strays(asked) == []
    assert server.files() == {f"clips/{job.id}/1.mp4"}


def test_the_store_is_asked_as_seldom_about_many_clips_as_about_few(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    attempts = server.store.attempts
    monkeypatch.setattr(server.store, "attempts", lambda ids: asked.append(len(ids)) or attempts(ids))
    for _ in range(300):
        server.folder.clips_of(new_id()).mkdir()
    assert len(server.folder.remove_strays(server.store.attempts)) == 300
    assert asked == [300]


def test_names_from_outside_are_no_paths(server: Server) -> None:
    for name in ("../../etc/passwd", "video_", "video_" + "g" * 32, "video_" + "0" * 33, "video_" + "0" * 32 + "\n"):
        with pytest.raises(ValueError, match="no id of a job"):
            server.folder.inputs_of(name)
        with pytest.raises(ValueError, match="no id of a job"):
            server.folder.preview(name)


def test_a_request_names_files_relative_to_the_folder(server: Server) -> None:
    root = server.folder.path
    request = ClipRequest("a ball", image=root / "inputs/a/0.png", reference_path=(root / "inputs/a/1.mp4",))
    stored = server.folder.relative(request)
    assert stored.image == Path("inputs/a/0.png") and stored.reference_path == (Path("inputs/a/1.mp4"),)
    assert server.folder.rooted(stored) == request
