"""The runner: every case at a tiny size, what it writes, and command lines that are wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measuring
from benchmarks.__main__ import main
from benchmarks.cases import neighbour
from benchmarks.cases.scaling import straight_line
from benchmarks.catalogue import CASES, TABLES, case, table
from benchmarks.comparison import Figures, Measured, Way
from opensora.tuning import LARGE_PAGES, TUNABLES

ROOT = Path(__file__).parents[2]
QUICK = ["step", "autoencoder", "text", "train", "kernels", "scaling"]
COMMANDS = ["startup", "clip"]


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    monkeypatch.setattr(measuring, "PROBE_SIDE", 32)


def run(folder: Path, *args: str, rounds: int = 2) -> dict:
    """What a run writes."""
    assert main([*args, "--size", "tiny", "--rounds", str(rounds), "--output", str(folder / "out.json")]) == 0
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", QUICK)
def test_a_case_runs_end_to_end(name, dtype, tmp_path, capsys):
    written = run(tmp_path, name, "--dtype", dtype)
    assert written["dtype"] == dtype and written["torch"] == torch.__version__
    assert written["threads"] == torch.get_num_threads() and written["machine"]["processor"]
    assert written["command"][:4] == ["python", "-m", "benchmarks", name]
    assert {comparison["case"] for comparison in written["comparisons"]} == {name}
    printed = capsys.readouterr().out
    for comparison in written["comparisons"]:
        assert comparison["name"] in printed and min(comparison["probe_tflops"]) > 0
        for way, measured in comparison["ways"].items():
            assert f"| {way} |" in printed
            assert len(measured["seconds"]) == len(measured["cpu_seconds"]) == 2 and min(measured["seconds"]) > 0
            assert measured["counts"]["flops"] > 0
        for pair, values in comparison["ratios"].items():
            first, second = (comparison["ways"][way]["seconds"] for way in pair.split(" / "))
            assert values == [a / b for a, b in zip(first, second, strict=True)]


def test_ours_is_measured_against_plain_and_against_its_own_products(tmp_path):
    for comparison in run(tmp_path, "step", "train", "autoencoder", "text")["comparisons"]:
        ways = comparison["ways"]
        assert {"ours / plain", "ours / floor"} <= comparison["ratios"].keys()
        assert ways["floor"]["counts"]["flops"] <= ways["ours"]["counts"]["flops"] <= ways["plain"]["counts"]["flops"]
        if comparison["case"] == "step":
            assert ways["ours"]["counts"]["bytes"] < ways["plain"]["counts"]["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_case_of_commands_runs_end_to_end(name, tmp_path):
    (comparison,) = run(tmp_path, name, rounds=1)["comparisons"]
    assert all(len(way["seconds"]) == 1 and min(way["seconds"]) > 0 for way in comparison["ways"].values())
    if name == "clip":
        assert all(min(way["figures"]["s of it sampling"]) > 0 for way in comparison["ways"].values())
        assert len(comparison["ratios"]) == 1


def test_a_clip_is_measured_alone_and_beside_busy_processes(tmp_path, monkeypatch):
    """With a clip that takes no time, and one core."""
    started, made = [], []

    class Counting(subprocess.Popen):
        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            started.append(self)

    def make_clip(setting, options):
        made.append((options[:1] == ("--no-tuning",), sum(process.poll() is None for process in started)))
        return Figures({"s of it sampling": 1.0})

    monkeypatch.setattr(neighbour.subprocess, "Popen", Counting)
    monkeypatch.setattr(neighbour, "make_clip", make_clip)
    monkeypatch.setattr(neighbour.os, "sched_getaffinity", lambda _: {0}, raising=False)
    (comparison,) = run(tmp_path, "neighbour", rounds=1)["comparisons"]
    assert made[4:] == [(False, 0), (False, 1), (True, 0), (True, 1)]
    assert len(started) == 4 and all(process.poll() is not None for process in started)
    assert len(comparison["ratios"]) == 2
    assert all(way["figures"] == {"s of it sampling": [1.0]} for way in comparison["ways"].values())


def test_every_case_is_tried_here():
    assert set(CASES) == {*QUICK, *COMMANDS, "neighbour"}
    assert all("tiny" in case(name).SIZES and next(iter(case(name).SIZES)) != "tiny" for name in CASES)


def test_every_table_explains_itself(capsys):
    for name in TABLES:
        with pytest.raises(SystemExit) as ended:
            table(name).main(["--help"])
        assert ended.value.code == 0
        assert f"python -m benchmarks {name}" in capsys.readouterr().out


def test_list_names_cases_sizes_and_tables(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in (*CASES, *TABLES)) and "[240p, 144p, bundled, tiny]" in listed


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["setp"], "unknown case 'setp'; did you mean step?"),
        (["step", "memory"], "memory has options of its own; run it by itself: python -m benchmarks memory --help"),
        (["step", "--size", "8k"], "case step has no size '8k'; give one of 240p, 144p, bundled, tiny"),
        (["step", "--rounds", "0"], "argument --rounds: '0' given, expected a whole number from 1"),
        (["step", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["step", "--fast"], "unrecognized arguments: --fast"),
        (["list", "more"], "unrecognized arguments: more"),
        (["step", "--output", "."], "output . is a folder; name a file in it"),
    ],
)
def test_a_mistake_is_one_line(args, said, capsys):
    assert main(args) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith(f"benchmarks: {said}")


def test_a_picture_of_all_comparisons(tmp_path):
    path = tmp_path / "out.png"
    assert main(["text", "scaling", "--size", "tiny", "--rounds", "1", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "train"])
def test_compiled_blocks_are_measured_where_that_is_asked(name, tmp_path):
    (comparison,) = run(tmp_path, name, "--compile", rounds=1)["comparisons"]
    assert comparison["ways"]["ours, compiled"]["counts"] == {}  # nothing is dispatched that could be counted
    assert {"ours, compiled / ours", "ours, compiled / plain"} <= comparison["ratios"].keys()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc reads its settings")
@pytest.mark.parametrize(("allocator", "before"), [("tuned", None), ("default", LARGE_PAGES)])
def test_an_allocator_is_there_from_the_start(allocator, before, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    environment |= {} if before is None else {TUNABLES: before}
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks", "text", "--size", "tiny", "--rounds", "1", "--threads", "1"]
    command += ["--allocator", allocator, "--output", str(output)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True)
    written = json.loads(output.read_text())
    assert written["allocator"] == (LARGE_PAGES if allocator == "tuned" else "as it is") and written["threads"] == 1


def test_ways_take_turns_and_ratios_are_those_of_a_round(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(measuring, "_cpu_seconds", lambda: 10 * clock[0])
    monkeypatch.setattr(measuring, "probe", lambda dtype: 1.0)

    def way(name, seconds):
        def work():
            order.append(name)
            clock[0] += seconds * (1 + order.count(name))  # the machine grows slower
            return Figures(part=seconds)

        return work

    comparison = measuring.Comparison("a", {"one": way("one", 2.0), "two": way("two", 1.0)}, [("one", "two")])
    measured = measuring.measure("case", "size", comparison, 3, torch.float32)
    assert sorted(order[:2]) == ["one", "two"]  # warming up
    assert order[2:] == ["one", "two", "two", "one", "one", "two"]
    assert measured.ratios == measured.cpu_ratios == {"one / two": [2.0, 2.0, 2.0]}
    assert measured.ways["two"].cpu_seconds == [10 * seconds for seconds in measured.ways["two"].seconds]
    assert measured.ways["one"].figures == {"part": [2.0, 2.0, 2.0]}


def test_the_straight_line_and_what_is_furthest_from_it():
    work = [1e12, 2e12, 4e12, 16e12]

    def measured(seconds):
        ways = {
            f"{n}": Way(seconds=[s], counts={"flops": int(w)})
            for n, (w, s) in enumerate(zip(work, seconds, strict=True))
        }
        return straight_line(Measured("scaling", "tiny", "a", ways, {}, {}, (1.0, 1.0)))

    exact = measured([3.5, 4.0, 5.0, 11.0])
    assert exact.figures["line"] == pytest.approx({"seconds": 3.0, "seconds per TFLOP": 0.5})
    assert abs(exact.figures["largest deviation"]) < 1e-9
    bent = measured([3.5, 4.0, 7.5, 11.0])
    assert bent.figures["where"] == "2" and bent.figures["largest deviation"] > 0.1
    assert "over 16 times the work" in bent.words
