"""The fuzz test: thousands of command lines and inputs that are wrong, none of which may end in anything but one line.

    make fuzz                        3,000 cases
    make fuzz CASES=50000 SEED=7     more of them, other ones
    make fuzz CASE=1234              one case again, with what it says

Every case runs in a process of its own, forked from one that has imported everything: 4 GB of address space, 20 s. It
passes if it ends with 0, or with 2 and one line on stderr, leaves no half-written file, and of a command that was
refused nothing at all. The same seed makes the same cases.
"""

import argparse
import gc
import importlib
import os
import pkgutil
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

MEMORY_BYTES = 4 * 2**30
WALL_S = 20
LONGEST_LINE = 2_000  # of an error; what came is quoted, but not ten megabytes of it
LEAVES_NOTHING = ("generate", "inspect", "convert", "plan", "models", "latents")
_STARTED = time.monotonic()


@dataclass(frozen=True)
class Verdict:
    """What became of a case: "" or what is wrong with it; its exit code; what it printed; seconds of the processor."""

    wrong: str
    code: int
    out: str
    err: str
    cpu_s: float


def import_everything() -> None:
    """Once, so that the processes of the cases need not."""
    import torch

    torch.set_num_threads(1)
    import opensora

    for module in pkgutil.walk_packages(opensora.__path__, "opensora."):
        importlib.import_module(module.name)
    from transformers import AutoTokenizer, T5EncoderModel

    assert AutoTokenizer and T5EncoderModel
    gc.freeze()  # else every process copies what it looks through for garbage


def run_case(number: int, seed: int, base: Path, folder: Path, wall_s: int = WALL_S) -> Verdict:
    """Runs one case in an empty folder and judges it."""
    from fuzz.cases import make_case

    case = make_case(number, seed, base)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "in").mkdir(parents=True)
    case.prepare(base, folder / "in")
    before = _listing(folder / "in")
    child = os.fork()
    if child == 0:
        _run_child(case.args, folder, wall_s)
    _, status, used = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGALRM and wall_s == WALL_S and 0.5 < used.ru_utime + used.ru_stime < WALL_S / 2:
        return run_case(number, seed, base, folder, 6 * WALL_S)  # it waited for other programs rather than worked
    out, err = ((folder / name).read_text(errors="replace") for name in ("out", "err"))
    new = sorted(_listing(folder / "in") - before)
    return Verdict(judge(code, err, new, case.args[:1]), code, out, err, used.ru_utime + used.ru_stime)


def judge(code: int, err: str, new: list[str], command: list[str]) -> str:
    """What is wrong with how a command ended; "" if nothing is."""
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip()]
    if code in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL):
        return f"still ran after {WALL_S} s, in {_place(lines)}"
    if "Traceback (most recent call last)" in err:
        return f"traceback: {_error(lines)} in {_place(lines)}"
    if code not in (0, 2):
        return f"ended with {code}"
    if code == 2 and not (lines and lines[-1].startswith("opensora: ")):
        return "refused without a line that says so"
    if code == 2 and (sum(line.startswith("opensora: ") for line in lines) > 1 or len(lines[-1]) > LONGEST_LINE):
        return f"refused in more than a line (of {len(lines[-1])} characters)"
    if re.search(r"<class |Got errors|object at 0x|Error\(", err):
        return "an error that speaks Python"
    if parts := [name for name in new if re.search(r"\.(part|probe|lock)$|/\.", name)]:
        return f"left over: {parts[0]}"
    if code == 2 and new and command[0] in LEAVES_NOTHING:
        return f"refused, but wrote {new[0]}"
    return ""


def _run_child(args: list[str], folder: Path, wall_s: int) -> None:
    """Becomes the command; never returns."""
    import faulthandler

    import torch

    code = 1
    try:
        for name, stream in (("out", 1), ("err", 2)):
            opened = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder / "in")
        torch.set_num_threads(1)  # torch makes its pool anew after a fork; two threads of ours would race for it
        faulthandler.dump_traceback_later(wall_s - 1)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.alarm(wall_s)
        resource.setrlimit(resource.RLIMIT_CPU, (WALL_S, WALL_S))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        from opensora.cli.main import main

        code = main(args)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _listing(folder: Path) -> set[str]:
    return {os.path.relpath(os.path.join(root, name), folder) for root, _, names in os.walk(folder) for name in names}  # noqa: PTH118


def _error(lines: list[str]) -> str:
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit|Warning)\b", line)]
    return (errors or lines)[-1][:160]


def _place(lines: list[str]) -> str:
    """The last line of our own in a traceback."""
    ours = [m for line in lines if (m := re.search(r'File "[^"]*/(opensora/[^"]+)", line (\d+) in (\w+)', line))]
    ours = ours or [m for line in lines if (m := re.search(r'/(opensora/[^"]+\.py)", line (\d+), in (\w+)', line))]
    if not ours:
        return "?"
    first = ours[0] if "Timeout" in lines[0] else ours[-1]
    return f"{first[1]}:{first[2]} ({first[3]})"


# --- campaigns --------------------------------------------------------------------------------------------------------


def campaign(cases: range, seed: int, jobs: int, work: Path) -> dict[int, Verdict]:
    """Runs all cases, `jobs` at a time; returns those that failed."""
    base = work / "base"
    reports: list[int] = []
    for job in range(jobs):
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(reading)
            _run_share(cases[job::jobs], seed, base, work / f"job{job}", writing)
        os.close(writing)
        reports.append(reading)
    failed: dict[int, Verdict] = {}
    codes: Counter[int] = Counter()
    shown = 0.0
    with_lines = [os.fdopen(reading, encoding="utf-8", errors="replace") for reading in reports]
    while with_lines:
        for report in list(with_lines):
            line = report.readline()
            if not line:
                with_lines.remove(report)
                continue
            number, code, cpu_s, wrong = line.rstrip("\n").split("\t", 3)
            codes[int(code)] += 1
            if wrong:
                failed[int(number)] = Verdict(wrong, int(code), "", "", float(cpu_s))
                print(f"case {number}: {wrong}", flush=True)
        if time.monotonic() - shown > 15:
            shown = time.monotonic()
            print(
                f"[{shown - _STARTED:4.0f} s] {codes.total()} of {len(cases)} cases, {len(failed)} failed", flush=True
            )
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    ends = ", ".join(f"{count} with {code}" for code, count in sorted(codes.items()))
    print(f"{codes.total()} cases of seed {seed} in {time.monotonic() - _STARTED:.0f} s ended: {ends}")
    if codes.total() < len(cases):
        failed[-1] = Verdict(f"{len(cases) - codes.total()} cases were never run", 1, "", "", 0)
    return failed


def _run_share(numbers: range, seed: int, base: Path, folder: Path, writing: int) -> None:
    """One job's cases; never returns, lest the folder be removed under the other jobs."""
    try:
        for number in numbers:
            verdict = run_case(number, seed, base, folder)
            wrong = " ".join(verdict.wrong.split())
            os.write(writing, f"{number}\t{verdict.code}\t{verdict.cpu_s:.2f}\t{wrong}\n".encode("utf-8", "replace"))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def main() -> int:
    """Runs a campaign, or one case of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one alone and show what it prints")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="opensora-fuzz-") as name:
        work = Path(name)
        os.environ |= {"HOME": name, "HF_HOME": f"{name}/hf", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        import_everything()
        from fuzz.bases import build
        from fuzz.cases import make_case

        build(work / "base")
        print(f"[{time.monotonic() - _STARTED:4.0f} s] inputs are made", flush=True)
        if options.case is not None:
            case = make_case(options.case, options.seed, work / "base")
            verdict = run_case(options.case, options.seed, work / "base", work / "job")
            print(f"opensora {case.args}\n  {case.said}\nended with {verdict.code} after {verdict.cpu_s:.1f} s CPU")
            print(
                f"--- stdout\n{verdict.out[-4000:]}\n--- stderr\n{verdict.err[-8000:]}\n---\n{verdict.wrong or 'fine'}"
            )
            return bool(verdict.wrong)
        failed = campaign(range(options.cases), options.seed, options.jobs, work)
    print(f"{len(failed)} failed")
    for wrong, count in Counter(re.sub(r"\d{3,}|'[^']*'", "_", v.wrong) for v in failed.values()).most_common():
        some = [number for number, v in failed.items() if re.sub(r"\d{3,}|'[^']*'", "_", v.wrong) == wrong]
        print(f"  {count:4d}  {wrong}\n        make fuzz SEED={options.seed} CASE={some[0]}   (also {some[1:6]})")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
