"""Work in several processes: all of it is done, mistakes come back in words, and nobody is left behind."""

import os
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import lab_work
import pytest

from opensora.errors import OpenSoraError
from opensora.lab.workers import results_of


@pytest.mark.multi
def test_two_processes_share_the_work() -> None:
    done = list(results_of(lab_work.start_squares, range(20), 2))
    assert sorted(square for square, _ in done) == [number * number for number in range(20)]
    assert os.getpid() not in {process for _, process in done}


def test_one_worker_is_this_process_and_keeps_the_order() -> None:
    assert list(results_of(lab_work.start_squares, range(3), 1)) == [(n * n, os.getpid()) for n in range(3)]


@pytest.mark.multi
@pytest.mark.parametrize(
    ("start", "kind", "words"),
    [
        (lab_work.start_refusing, OpenSoraError, "^[01] is no good$"),
        (lab_work.start_dying, OpenSoraError, "ended from outside"),
        (lab_work.start_failing, RuntimeError, "ZeroDivisionError"),
    ],
)
def test_what_goes_wrong_in_a_process_is_told_here(start, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        list(results_of(start, range(2), 2))


def is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(") ")[2][:1] not in "ZX"


@pytest.mark.multi
@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked up in /proc")
def test_workers_end_when_the_process_that_started_them_is_killed(tmp_path: Path) -> None:
    code = f"""
import functools, pathlib, signal, lab_work
from opensora.lab.workers import results_of

def tasks():
    signal.pause()  # so the worker waits for a task
    yield

if __name__ == "__main__":
    list(results_of(functools.partial(lab_work.start_noting, pathlib.Path({str(tmp_path)!r})), tasks(), 2))
"""
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    until(lambda: any(tmp_path.glob("*.pid")))
    workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    parent.kill()
    parent.wait()
    until(lambda: not any(is_alive(worker) for worker in workers))


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        wait([], timeout=0.05)
