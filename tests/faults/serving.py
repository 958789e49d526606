"""Kills processes of a server while it makes clips: no job may be lost, none made twice, no half file left.

    PYTHONPATH=tests python -m faults.serving --jobs 500 --kills 50 --seed 0
    PYTHONPATH=tests python -m faults.serving --jobs 500 --kills 20 --store postgresql --workers 2

Clients send jobs over HTTP, and send again what got no answer, with the same Idempotency-Key. Each kill is a SIGKILL of
a worker, of the API's process or of the supervisor, when as many clips are there as a seeded number says and a seeded
part of a second later; a supervisor that is gone is started again, as a service manager does. Clips are noise of the
job's seed (`stand_in_worker`), or of the bundled model in one step (`--model`), which makes workers slow to start.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import postgres
import stand_in_worker

from opensora.media.frames import ClipFile
from opensora.server.folder import ServerFolder
from opensora.server.jobs import Job, QueueLimits
from opensora.server.settings import ServerSettings
from opensora.server.store import JobStore, store_of

PROMPT = "a small red ball rolls left over the grass"
KINDS = ("worker", "api", "supervisor")
NUM_CLIENTS = 4
PATIENCE_S = 900
"""Without any new clip."""
_RETRY_S = 0.1

SERVER = """
import signal
import sys
from pathlib import Path
from opensora.server.store import store_of
from opensora.server.settings import ServerSettings
from opensora.server.supervisor import Supervisor, listen
from opensora.settings import from_dict
import json

settings = from_dict(ServerSettings, json.loads(sys.argv[1]), where="settings")
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
with_socket = listen(settings.host, settings.port)
Supervisor(settings, store_of(settings), with_socket, worker=sys.argv[2]).run(lambda: None)
"""


@dataclass
class Verdict:
    """What came of a campaign.

    Attributes:
        kills: of each kind.
        num_attempts: that all jobs took together.
        faults: a line for each; none is the aim.
    """

    kills: Counter[str] = field(default_factory=Counter)
    num_attempts: int = 0
    num_lost: int = 0
    faults: list[str] = field(default_factory=list)


class Server:
    """A supervisor that is started again whenever it is gone.

    Args:
        settings: of the server; its port is free.
        worker: module of the workers.
    """

    def __init__(self, settings: ServerSettings, worker: str) -> None:
        from opensora.settings import to_dict

        self._command = [sys.executable, "-c", SERVER, json.dumps(to_dict(settings)), worker]
        self._stopped = threading.Event()
        self.log = (settings.folder.parent / "log").open("ab")
        self.process = self._start()
        self._thread = threading.Thread(target=self._look_after)
        self._thread.start()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(self._command, stdout=self.log, stderr=self.log, env=environment)

    def _look_after(self) -> None:
        while not self._stopped.wait(_RETRY_S):
            if self.process.poll() is not None:
                self.process = self._start()

    def stop(self) -> None:
        """Ends all processes in order."""
        self._stopped.set()
        self._thread.join()
        self.process.send_signal(signal.SIGINT)
        self.process.wait()
        self.log.close()

    def processes(self, kind: str) -> list[int]:
        """Of workers, of the API, of the supervisor."""
        if kind == "supervisor":
            return [self.process.pid]
        found = []
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in task.read_text().split()]
        return [process for process in found if _is_of(kind, process)]


def _is_of(kind: str, process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return len(words) > 2 and words[2].decode().endswith(kind)


def send(url: str, seed: int) -> str:
    """Sends a job until it is answered, and returns its id."""
    body = {"prompt": PROMPT, "seed": seed, "num_inference_steps": 1, "num_frames": 5, "height": 64, "width": 64}
    headers = {"Content-Type": "application/json", "Idempotency-Key": f"job-{seed}"}
    request = urllib.request.Request(f"{url}/v1/videos", json.dumps(body).encode(), headers)
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)["id"]
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise AssertionError(f"refused with {error.code}: {error.read().decode()}") from error
        except (OSError, ValueError):  # no answer, or half of one
            pass
        time.sleep(_RETRY_S)


def kill_some(server: Server, store: JobStore, num_jobs: int, num_kills: int, seed: int, verdict: Verdict) -> None:
    """Kills processes as clips come in, until all are there."""
    chance = random.Random(seed)
    moments = sorted(chance.randrange(num_jobs) for _ in range(num_kills))
    last, last_time = -1, time.monotonic()
    while (done := store.summary().states.get("completed", 0)) < num_jobs:
        if done != last:
            last, last_time = done, time.monotonic()
        if time.monotonic() - last_time > PATIENCE_S:
            verdict.faults.append(f"no clip came for {PATIENCE_S} s; {done} of {num_jobs} are there")
            return
        if moments and done >= moments[0]:
            moments.pop(0)
            time.sleep(chance.random() / 2)
            kind = chance.choice(KINDS)
            processes = _waited_for(server, kind)
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(processes), signal.SIGKILL)
                verdict.kills[kind] += 1
        time.sleep(_RETRY_S)


def _waited_for(server: Server, kind: str) -> list[int]:
    """Its processes, of which there may be none for a while."""
    while not (processes := server.processes(kind)):
        time.sleep(_RETRY_S)
    return processes


def check(jobs: list[Job], ids: list[str], folder: ServerFolder, verdict: Verdict, *, are_noise: bool) -> None:
    """Compares what there is with what was asked for."""
    known = {job.id: job for job in jobs}
    seeds = Counter(job.request.seed for job in jobs)
    for job_id in ids:
        if job_id not in known:
            verdict.faults.append(f"{job_id} was answered, and is lost")
    verdict.faults += [f"seed {seed} is there {number} times" for seed, number in seeds.items() if number != 1]
    wanted = set()
    for job in jobs:
        verdict.num_attempts += job.attempt
        verdict.num_lost += job.num_lost
        if job.result is None:
            verdict.faults.append(f"{job.id} is {job.state}: {job.error}")
            continue
        files = [folder.clip, folder.record, folder.thumbnail, folder.spritesheet]
        if not are_noise:
            files.append(folder.channels)
        wanted |= {file(job.result) for file in files}
        verdict.faults += [f"{file(job.result).name} is missing" for file in files if not file(job.result).exists()]
        verdict.faults += [f"{job.id}: {fault}" for fault in _faults_of(job, folder, are_noise=are_noise)]
    there = {path for own in (folder.clips, folder.previews) for path in own.rglob("*") if path.is_file()}
    verdict.faults += [f"{path.name} is left over" for path in sorted(there - wanted)]
    verdict.faults += [f"{path.name} is half a file" for path in folder.path.rglob("*.part*")]


def _faults_of(job: Job, folder: ServerFolder, *, are_noise: bool) -> Iterator[str]:
    assert job.result is not None
    path = folder.clip(job.result)
    try:
        clip = ClipFile(path)
        frames = list(clip.frames(range(clip.num_frames())))
    except Exception as error:
        yield f"{path.name} cannot be read: {error}"
        return
    if len(frames) != job.result.num_frames or path.stat().st_size != job.result.num_bytes:
        yield f"{path.name} is not what its job says"
    if are_noise:
        shown, wanted = frames[0].astype(float).ravel(), stand_in_worker.frames_of(job.request)[0].ravel()
        if np.corrcoef(shown, wanted)[0, 1] < 0.3:  # the codec is lossy, and noise the worst it can be given
            yield f"{path.name} shows another job's frames"


def run(
    folder: Path, store_url: str | None, *, num_jobs: int, num_kills: int, num_workers: int, seed: int, with_model: bool
) -> Verdict:
    """One campaign in an empty folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ServerSettings(
        folder / "server",
        store=store_url,
        port=port,
        devices=("",) * num_workers,
        queue=QueueLimits(most_waiting=num_jobs, most_of_owner=num_jobs, most_lost=num_kills + 1),
    )
    store, verdict = store_of(settings), Verdict()
    server = Server(settings, "opensora.server.worker" if with_model else "stand_in_worker")
    try:
        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            sent = [clients.submit(send, f"http://127.0.0.1:{port}", number) for number in range(num_jobs)]
            kill_some(server, store, num_jobs, num_kills, seed, verdict)
        ids = [job.result() for job in sent]
    finally:
        server.stop()
    server_folder = ServerFolder(settings.folder)
    server_folder.remove_strays(store.attempts)
    check(store.jobs(limit=10 * num_jobs), ids, server_folder, verdict, are_noise=not with_model)
    store.close()
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--store", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", action="store_true")
    asked = parser.parse_args()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = None
        if asked.store == "postgresql":
            url = stack.enter_context(postgres.running(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        verdict = run(
            folder,
            url,
            num_jobs=asked.jobs,
            num_kills=asked.kills,
            num_workers=asked.workers,
            seed=asked.seed,
            with_model=asked.model,
        )
    for fault in verdict.faults:
        print(fault)
    kills = ", ".join(f"{number} of {kind}" for kind, number in sorted(verdict.kills.items()))
    print(
        f"{asked.jobs} jobs, killed: {kills}; {verdict.num_attempts} attempts, {verdict.num_lost} of them lost with a "
        f"worker; {len(verdict.faults)} faults, {time.monotonic() - began:.0f} s"
    )
    return 1 if verdict.faults else 0


if __name__ == "__main__":
    sys.exit(main())
