"""What a server does under load: `python -m benchmarks serving` prints the figures of docs/serving.md.

A server of its own with the bundled model, on this machine, which its clients share:

    status   64 clients ask for the state of a job once a second while clips are made: how long answers take
    events   200 streams are open: how long until the last of them knows that a clip is there
    memory   of each process after the first jobs and after 1,000
    queue    jobs come at random for a while: half and 99 of 100 are there after so many seconds, beside what
             `opensora plan serving` says of the same times
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from opensora.planning.serving import DAY_S, forecast
from opensora.server.jobs import Job
from opensora.server.settings import IDLE_S, ServerSettings
from opensora.server.store import store_of

PARTS = ("status", "events", "memory", "queue")
PROMPT = "a small red ball rolls left over the grass"
SMALL = {"prompt": PROMPT, "num_inference_steps": 1, "num_frames": 5}
"""A clip that takes a moment."""
MANY = 5_000


@dataclass(frozen=True)
class Served:
    """A server that runs.

    Attributes:
        port: that it listens on.
        supervisor: its process.
        folder: of its files.
    """

    port: int
    supervisor: psutil.Process
    folder: Path

    def ask(self, method: str, path: str, body: dict | None = None) -> dict:
        """One request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        return ask(connection, method, path, body)

    def add(self, **wishes: object) -> str:
        """Sends a small job, and returns its id."""
        return self.ask("POST", "/v1/videos", {**SMALL, **wishes})["id"]

    def jobs(self) -> list[Job]:
        """Of the store."""
        store = store_of(ServerSettings(self.folder))
        jobs = store.jobs(limit=MANY)
        store.close()
        return jobs

    def wait(self) -> list[Job]:
        """Until all jobs are done."""
        while True:
            jobs = self.jobs()
            if not any(job.is_waiting for job in jobs):
                return jobs
            time.sleep(0.2)


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: dict | None = None) -> dict:
    """One request over a connection that stays."""
    headers = {"Content-Type": "application/json"} if body else {}
    connection.request(method, path, json.dumps(body) if body else None, headers)
    answer = connection.getresponse()
    text = answer.read()
    if answer.status >= 400:
        raise RuntimeError(f"{method} {path}: {answer.status} {text[:300]!r}")
    return json.loads(text)


@contextlib.contextmanager
def serving() -> Iterator[Served]:
    """A server in a temporary folder, with the bundled model loaded."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "server"
        limits = ["--most-waiting", str(MANY), "--most-of-key", str(MANY)]
        command = [sys.executable, "-m", "opensora", "serve", "--folder", str(folder), "--port", "0", *limits]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        said = iter(process.stderr.readline, "")
        port = next(int(line.split("127.0.0.1:")[1].split(";")[0]) for line in said if "listening at" in line)
        threading.Thread(target=lambda: [None for _ in said], daemon=True).start()
        served = Served(port, psutil.Process(process.pid), folder)
        try:
            _ready(served)
            served.add()
            served.wait()
            yield served
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def _ready(served: Served) -> None:
    while True:
        with contextlib.suppress(OSError, RuntimeError):
            served.ask("GET", "/readyz")
            return
        time.sleep(0.1)


def measure_status(served: Served, num_clients: int, duration_s: float, num_jobs: int = 200) -> str:
    """How long answers take while clips are made."""
    ids = [served.add(num_inference_steps=20, seed=seed) for seed in range(num_jobs)]
    until, took = time.monotonic() + duration_s, []

    def poll(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        time.sleep(number / num_clients)  # as clients do, not all at once
        while time.monotonic() < until:
            began = time.monotonic()
            ask(connection, "GET", f"/v1/videos/{ids[number % len(ids)]}")
            took.append(time.monotonic() - began)
            time.sleep(max(0.0, 1 - (time.monotonic() - began)))

    threads = [threading.Thread(target=poll, args=(number,)) for number in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    is_working = any(job.state == "in_progress" for job in served.jobs())
    for job_id in ids:
        served.ask("POST", f"/v1/videos/{job_id}/cancel")
    served.wait()
    half, most, all_but = np.percentile(took, (50, 95, 99)) * 1000
    return (
        f"status: {num_clients} clients, {len(took)} answers in {duration_s:g} s while clips were made"
        f"{'' if is_working else ' (they were all done before the end)'}: "
        f"p50 {half:.1f} ms, p95 {most:.1f} ms, p99 {all_but:.1f} ms"
    )


def measure_events(served: Served, num_streams: int) -> str:
    """How long until all streams know that a clip is there."""
    delays = asyncio.run(_delays_of_events(served, num_streams))
    return (
        f"events: {num_streams} streams, told of a clip that is there after p50 {np.percentile(delays, 50):.2f} s, "
        f"all of them after {max(delays):.2f} s"
    )


async def _delays_of_events(served: Served, num_streams: int) -> list[float]:
    streams = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(num_streams)]
    for _, writer in streams:
        writer.write(b"GET /v1/events HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n")
        await writer.drain()
    await asyncio.gather(*(reader.readuntil(b"\r\n\r\n") for reader, _ in streams))
    job_id = await asyncio.to_thread(served.add)

    async def told(reader: asyncio.StreamReader) -> float:
        while True:
            line = (await reader.readline()).decode()
            if job_id in line and '"completed"' in line:
                return time.time()

    times = await asyncio.wait_for(asyncio.gather(*(told(reader) for reader, _ in streams)), 120)
    for _, writer in streams:
        writer.close()
    finished = next(job.finished_at for job in served.jobs() if job.id == job_id)
    assert finished is not None
    return [max(0.0, seen - finished) for seen in times]


def measure_memory(served: Served, num_jobs: int) -> str:
    """What each process has after the first and after all jobs."""
    first = num_jobs // 10
    before: dict[str, float] = {}
    for count in (first, num_jobs - first):
        for seed in range(count):
            served.add(seed=seed)
        served.wait()
        after = _resident_mb(served)
        before = before or after
    rows = ", ".join(f"{name} {before[name]:.0f} -> {size:.0f} MB" for name, size in after.items())
    return f"memory: resident after {first} and after {num_jobs} jobs: {rows}"


def _resident_mb(served: Served) -> dict[str, float]:
    processes = {"supervisor": served.supervisor}
    for child in served.supervisor.children():
        processes["worker" if "worker" in " ".join(child.cmdline()) else "api"] = child
    return {name: process.memory_info().rss / 2**20 for name, process in sorted(processes.items())}


def measure_queue(served: Served, num_jobs: int, load: float, seed: int) -> str:
    """Waits of jobs that come at random, beside the forecast from their own times."""
    probes = [served.add(seed=number) for number in range(20)]
    service_s = _service_s(served.wait(), probes)
    random = np.random.default_rng(seed)
    gap_s = float(service_s.mean()) / load
    ids, began = [], time.monotonic()
    for number, at_s in enumerate(np.cumsum(random.exponential(gap_s, num_jobs))):
        time.sleep(max(0.0, began + at_s - time.monotonic()))
        ids.append(served.add(seed=number))
    jobs = {job.id: job for job in served.wait()}
    came = [jobs[job_id].created_at for job_id in ids]
    responses = [(jobs[job_id].finished_at or 0) - jobs[job_id].created_at for job_id in ids]
    half, nearly_all = np.percentile(responses, (50, 99))
    rate = (len(ids) - 1) / (max(came) - min(came)) * DAY_S
    told = forecast(_service_s(list(jobs.values()), ids), rate, 1, IDLE_S)
    return (
        f"queue: {num_jobs} jobs, a worker busy {told.load:.0%} of the time: there within p50 {half:.2f} s, "
        f"p99 {nearly_all:.2f} s; forecast {told.response_s[0]:.2f} s, {told.response_s[1]:.2f} s"
    )


def _service_s(jobs: list[Job], ids: list[str]) -> np.ndarray:
    return np.array([(job.finished_at or 0) - (job.started_at or 0) for job in jobs if job.id in set(ids)])


def main(args: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser("python -m benchmarks serving", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them when left out")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--duration-s", type=float, default=30)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--queue-jobs", type=int, default=200)
    parser.add_argument("--load", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(args)
    wanted = asked.parts or PARTS
    with serving() as served:
        if "status" in wanted:
            print(measure_status(served, asked.clients, asked.duration_s), flush=True)
        if "events" in wanted:
            print(measure_events(served, asked.streams), flush=True)
        if "memory" in wanted:
            print(measure_memory(served, asked.jobs), flush=True)
        if "queue" in wanted:
            print(measure_queue(served, asked.queue_jobs, asked.load, asked.seed), flush=True)
