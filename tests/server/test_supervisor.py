"""The processes of a server: others take the place of those that are killed, and none outlives its supervisor."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server.test_worker import until

from opensora.generation.request import ClipRequest
from opensora.server.jobs import Job
from opensora.server.settings import ServerSettings
from opensora.server.store import JobStore, new_id, store_of

pytestmark = [
    pytest.mark.multi,
    pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked up in /proc"),
]

SUPERVISOR = """
import sys
from pathlib import Path
from opensora.server.settings import ServerSettings
from opensora.server.store import store_of
from opensora.server.supervisor import Supervisor

settings = ServerSettings(Path(sys.argv[1]), devices=("", ""), store=sys.argv[2] or None)
print("started", flush=True)
try:
    Supervisor(settings, store_of(settings), None, worker="stand_in_worker").run(lambda: None)
except KeyboardInterrupt:
    pass
"""


def workers_of(supervisor: int) -> list[int]:
    """Processes that it started."""
    tasks = Path(f"/proc/{supervisor}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(") ")[2][:1] not in "ZX"


class Running:
    """A supervisor in a process of its own."""

    def __init__(self, folder: Path, store_url: str) -> None:
        self.settings = ServerSettings(folder, store=store_url)
        self.store: JobStore = store_of(self.settings)
        self._command = [sys.executable, "-c", SUPERVISOR, str(folder), store_url]
        self.start()

    def start(self) -> None:
        paths = os.pathsep.join(filter(None, sys.path))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdout and self.process.stdout.readline() == b"started\n"

    @property
    def workers(self) -> list[int]:
        return workers_of(self.process.pid)

    def add(self, prompt: str = "a ball", **wishes) -> Job:
        return self.store.add(Job(new_id(), ClipRequest(prompt, **wishes)))

    def state(self, job: Job) -> str:
        return self.store.get(job.id).state


@pytest.fixture
def running(tmp_path: Path, store_url: str) -> Iterator[Running]:
    running = Running(tmp_path / "server", store_url)
    yield running
    running.process.kill()
    running.process.wait()
    until(lambda: not any(map(is_alive, running.workers)))
    running.store.close()


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_an_attempt(running: Running) -> None:
    hanging = running.add("it hangs")
    until(lambda: running.store.get(hanging.id).progress.step)
    others = [running.add(seed=seed) for seed in range(4)]
    for worker in running.workers:
        os.kill(worker, signal.SIGKILL)
    until(lambda: running.store.get(hanging.id).attempt == 2)
    until(lambda: all(running.state(job) == "completed" for job in others))
    assert running.store.get(hanging.id).num_lost == 1


@pytest.mark.slow
def test_a_job_that_kills_its_workers_fails_and_others_are_made(running: Running) -> None:
    deadly, other = running.add("it dies"), running.add()
    until(lambda: running.state(deadly) == "failed")
    until(lambda: running.state(other) == "completed")
    assert running.store.get(deadly.id).error.code == "worker_lost"


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_supervisor_and_jobs_wait_for_the_next(running: Running, end: signal.Signals) -> None:
    job = running.add("it hangs")
    until(lambda: running.store.get(job.id).progress.step)
    workers = running.workers
    assert len(workers) == 2
    running.process.send_signal(end)
    running.process.wait()
    until(lambda: not any(map(is_alive, workers)))
    back = running.store.get(job.id)
    assert (back.state, back.num_lost) == ("queued", 0)
    running.start()
    until(lambda: running.store.get(job.id).state == "in_progress")


@pytest.mark.slow
@pytest.mark.parametrize(("options", "words"), [(["--model", "nosuch"], "nosuch"), (["--device", "cuda:99"], "cuda")])
def test_a_server_that_cannot_work_says_so_and_ends(options: list[str], words: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "opensora", "serve", "--folder", str(tmp_path / "server"), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    said = [line for line in ended.stderr.splitlines() if not line.startswith("listening")]
    assert ended.returncode == 2 and words in said[0]
    assert said[1:] == []
