"""What the program does to share a machine, and how to leave it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opensora.tuning import LARGE_PAGES, TUNABLES, WAITING, allowed_cores, tune

ASKED = """
import json, os, sys
from opensora.__main__ import main
import opensora.cli.main
opensora.cli.main.main = lambda: print(json.dumps([dict(os.environ), "torch" in sys.modules, sys.argv]))
main()
"""
NAMES = (*WAITING, "OMP_NUM_THREADS", TUNABLES)
IS_GLIBC = sys.platform == "linux" and bool(os.confstr("CS_GNU_LIBC_VERSION"))


def environment_of(*args: str, **given: str) -> dict[str, str]:
    """What OpenMP will find when the program loads it."""
    command = [sys.executable, "-c", ASKED, *args]
    found = subprocess.run(command, env={"PATH": "/bin", **given}, capture_output=True, text=True, check=True)
    environment, has_torch, argv = json.loads(found.stdout)
    assert not has_torch and "--no-tuning" not in argv
    return {name: value for name, value in environment.items() if name in NAMES}


def test_the_program_sets_how_threads_wait_and_pages_are_large_before_they_are_there() -> None:
    tuned = environment_of("models")
    assert tuned.items() >= WAITING.items()
    assert tuned.get(TUNABLES) == (LARGE_PAGES if IS_GLIBC else None)
    assert environment_of("models", "--no-tuning") == environment_of("--help") == {}


def test_what_a_user_has_set_stays() -> None:
    given = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3", TUNABLES: "glibc.malloc.check=0"}
    assert environment_of("models", **given).items() >= given.items()


SEARCHES = """
import gc, sys
from opensora.__main__ import main
import opensora.cli.main
searches = []
gc.callbacks.append(lambda phase, info: searches.append(phase))
def work():
    kept = [[] for _ in range(200_000)]  # as many as a library makes
    print(searches.count("start"))
opensora.cli.main.main = work
main()
"""


def test_what_stays_is_not_searched_for_garbage_again_and_again() -> None:
    searches = {
        args: int(subprocess.run([sys.executable, "-c", SEARCHES, *args], capture_output=True, check=True).stdout)
        for args in (("models",), ("models", "--no-tuning"))
    }
    assert 10 * searches["models",] < searches["models", "--no-tuning"]


COMES_AND_GOES = """
import re, sys
from opensora.tuning import give_memory_back

def own_mb():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

if sys.argv[1] == "give back":
    give_memory_back()
b"x" * (30 << 20)  # from which glibc learns to keep what is smaller
before, kept = own_mb(), []
for _ in range(20):
    weights = [b"x" * (8 << 20) for _ in range(4)]
    kept.append(b"x" * (1 << 16))
    weights.pop(2)
    weights = None
    held = [b"x" * (5 << 20) for _ in range(4)]
    kept.append(held.pop())
    held = None
print(own_mb() - before - sum(len(one) for one in kept) / 2**20)
"""


@pytest.mark.skipif(not IS_GLIBC, reason="of glibc")
def test_what_is_freed_is_given_back() -> None:
    held = {
        way: float(subprocess.run([sys.executable, "-c", COMES_AND_GOES, way], capture_output=True, check=True).stdout)
        for way in ("give back", "keep")
    }
    assert held["give back"] < 5 < 20 < held["keep"]


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "300000 100000\n"}, 3),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "6400000 100000\n"}, None),  # all there are
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "soon\n"}, None),
        ({}, None),
    ],
)
def test_a_container_has_the_cores_of_its_quota(
    files: dict[str, str], cores: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert allowed_cores(tmp_path) == cores


def test_who_calls_it_late_is_told() -> None:
    with pytest.warns(UserWarning, match=r"call opensora\.tune\(\) before"):
        tune({})
