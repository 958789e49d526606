"""Kills commands at seeded moments and fills the disk under them, again and again, and counts what that costs.

    PYTHONPATH=tests python -m faults.campaign --moments 200 --sizes 50 --cold 12 --seed 0 --jobs 2

A moment is a time of a command's run, or one of its writes: the k-th file opened for writing, folder made, name given
or taken away. Commands run in processes forked from one that has imported all, so that a case costs what the command
does. After each case the same command runs to its end. The verdict on a case is a list of faults:

    lost        what was whole before is no more, or what is there under its name, or was reported, is not whole
    left over   after the next run something temporary is there
    different   what the next run made is not, to the bit, what a run makes that nobody disturbs
    words       something else than one line on stderr, or another exit code than its kind has
"""

import argparse
import gc
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faults.commands import COMMANDS, Command, make_given
from faults.processes import DISK_BYTES, count_writes, end_of, mount_disk, on_writes, resize, start

Tree = dict[str, bytes]
"""Path of each file below a folder -> its content."""

NOT_COMPARED = ("tensorboard/", "metrics.jsonl", "run/history.json")
"""They tell times, and how often a model was exported."""
IMPORTED = (
    "opensora.pipeline",
    "opensora.recipes",
    "opensora.checkpoints.conversion",
    "opensora.generation.engine",
    "opensora.data.scan",
    "opensora.training.trainer",
    "opensora.training.diffusion.precompute",
    "opensora.training.interrupts",
    "opensora.evaluation.held_out",
    "opensora.cli.generate",
    "opensora.cli.convert",
    "opensora.cli.data",
    "opensora.cli.train",
    "opensora.cli.evaluate",
    "torch.utils.tensorboard",
)
"""What commands import when they need it."""


@dataclass
class Verdict:
    """What came of a case."""

    case: str
    faults: list[str] = field(default_factory=list)
    disturbed: bool = True


# --- a folder of cases ------------------------------------------------------------------------------------------------


class Place:
    """A folder in which the cases of one job run, one after the other.

    Attributes:
        case: the current folder of a case.
        told: where its words go.
    """

    def __init__(self, folder: Path, told: Path) -> None:
        self.case, self.told = folder / "case", told
        folder.mkdir(parents=True, exist_ok=True)
        code = end_of(start(lambda: make_given(folder / "given"), self.told))
        assert code == 0, self.words(2)
        self.expected: dict[str, tuple[Tree, Tree, float, int, int]] = {}

    def words(self, number: int) -> str:
        return self.told.with_suffix(f".{number}").read_text(errors="replace")

    def run(self, args: Sequence[str], trap: Callable[[], None] = lambda: None) -> int:
        """Starts a command in the folder of the case."""

        def action() -> int:
            import torch

            from opensora.cli.main import main

            torch.set_num_threads(1)  # after a fork by one thread, before several find the pool of threads broken
            os.chdir(self.case)
            return main(args)

        return start(action, self.told, trap)

    def prepare(self, command: Command) -> None:
        """The folder as it is before the command runs."""
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        for args in command.before:
            assert end_of(self.run(args)) == 0, self.words(2)

    def reference(self, name: str) -> tuple[Tree, Tree, float, int, int]:
        """Of a run that nobody disturbs: files before and after, its seconds, its writes, and the bytes it writes."""
        if name not in self.expected:
            self.prepare(COMMANDS[name])
            before = tree(self.case)
            count = self.told.with_suffix(".count")
            started = time.monotonic()
            code = end_of(self.run(COMMANDS[name].args, lambda: count_writes(self.case.parent, count)))
            assert code == 0, f"{name}: {code} {self.words(2)}"
            after, seconds = tree(self.case), time.monotonic() - started
            self.expected[name] = before, after, seconds, int(count.read_text()), sum(map(len, after.values()))
        return self.expected[name]


def tree(folder: Path) -> Tree:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- verdicts ---------------------------------------------------------------------------------------------------------


def is_temporary(path: str) -> bool:
    return any(part.startswith(".") or part.endswith((".part", ".tmp", ".probe")) for part in Path(path).parts)


def compared(files: Tree) -> Tree:
    """What has to be the same in the end; of checkpoints the tensors, whose order in a file is torch's own affair."""
    kept = {path: content for path, content in files.items() if not any(name in path for name in NOT_COMPARED)}
    return {path: tensors_of(content) if is_of_checkpoint(path) else content for path, content in kept.items()}


def is_of_checkpoint(path: str) -> bool:
    return "checkpoints/step-" in path and path.endswith(".safetensors")


def tensors_of(content: bytes) -> bytes:
    """Names and values of a safetensors file, in order of the names."""
    begin = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:begin])
    entries.pop("__metadata__", None)
    ends = {name: [begin + offset for offset in entry["data_offsets"]] for name, entry in entries.items()}
    return b"".join(name.encode() + content[slice(*ends[name])] for name in sorted(entries))


def what_is_lost(command: Command, files: Tree, before: Tree, after: Tree, reported: Sequence[str]) -> Iterator[str]:
    """Faults of what lies under its final name after a disturbance."""
    for path in compared(before):
        if path not in files:
            yield f"lost: {path} was there and is gone"
    for path, content in compared(files).items():
        if is_temporary(path) or "checkpoints/step-" in path:
            continue
        if path.endswith(command.growing) and command.growing:
            json.loads(content)
        elif content not in (before.get(path), after.get(path)):
            yield f"lost: {path} is not whole ({len(content)} bytes)"
    for line in reported:
        for path in [path for path in after if path.startswith(line.partition("%")[0])]:
            if files.get(path) != after[path]:
                yield f"lost: {path} was reported and is not whole"


def damaged_checkpoints(case: Path) -> Iterator[str]:
    from opensora.distributed.checkpoint import check_checkpoint, list_checkpoints

    for path in list_checkpoints(case / "run" / "checkpoints"):
        try:
            check_checkpoint(path)
        except ValueError as damage:
            yield f"lost: {damage}"


def wrong_words(place: Place, code: int | None, expected: Sequence[int]) -> Iterator[str]:
    said = place.words(2)
    lines = [line for line in said.splitlines() if line.startswith("opensora: ")]
    if code is None:
        yield "words: hangs"
    elif code not in expected:
        yield f"words: exit code {code}, expected {expected}: {said[-300:]}"
    if "Traceback" in said or (code not in (0, None) and code > 0 and len(lines) != 1):
        yield f"words: {said[-300:]!r}"


def next_run(place: Place, name: str) -> Iterator[str]:
    """Faults of the run after a disturbance."""
    _, after, *_ = place.reference(name)
    code = end_of(place.run(COMMANDS[name].args))
    if code == 2 and compared(tree(place.case)) == compared(after):
        return  # the work was done, and is not done over it
    if code != 0:
        yield f"different: the next run ended with {code}: {place.words(2)[-300:]}"
        return
    files = tree(place.case)
    yield from (f"left over: {path}" for path in files if is_temporary(path))
    yield from (f"left over: {p.name}" for p in place.case.rglob(".*") if p.is_dir())
    mine, theirs = compared(files), compared(after)
    for path in sorted(mine.keys() | theirs.keys()):
        if mine.get(path) != theirs.get(path):
            yield f"different: {path}"


def disturbed(place: Place, name: str, code: int | None, expected: Sequence[int]) -> Iterator[str]:
    command, (before, after, *_) = COMMANDS[name], place.reference(name)
    reported = [line for line in place.words(1).splitlines() if line.startswith("clips/")]
    if code != -signal.SIGKILL:
        yield from wrong_words(place, code, expected)
    yield from what_is_lost(command, tree(place.case), before, after, reported)
    yield from damaged_checkpoints(place.case)
    if code != -signal.SIGKILL:
        yield from (f"left over at once: {path}" for path in tree(place.case) if path.endswith(".part"))
    yield from next_run(place, name)


# --- cases ------------------------------------------------------------------------------------------------------------


def killed(place: Place, name: str, number: int, seed: int) -> Verdict:
    """SIGKILL or SIGINT, at a time or at a write."""
    rng = random.Random(f"kill {seed} {number}")
    _, _, seconds, writes, _ = place.reference(name)
    kill, at_write, part = rng.choice((signal.SIGKILL, signal.SIGINT)), rng.random() < 0.6, rng.random()
    place.prepare(COMMANDS[name])
    if at_write:
        which = 1 + int(part * writes)
        trap = lambda: on_writes(place.case.parent, lambda n: os.kill(os.getpid(), kill) if n == which else None)  # noqa: E731
        process = place.run(COMMANDS[name].args, trap)
    else:
        process = place.run(COMMANDS[name].args)
        time.sleep(part * seconds)
        os.kill(process, kill)
    code = end_of(process)
    when = f"write {which} of {writes}" if at_write else f"{part:.0%} of {seconds:.1f} s"
    verdict = Verdict(f"{name}, {kill.name} at {when}", disturbed=code != 0)
    verdict.faults += disturbed(place, name, code, (0, 130))
    return verdict


def filled(place: Place, name: str, number: int, seed: int, disk: Path | None) -> Verdict:
    """So many bytes can be written, of the whole on a disk that is mounted for that, else of any one file."""
    rng = random.Random(f"fill {seed} {number}")
    _, after, _, _, num_bytes = place.reference(name)
    place.prepare(COMMANDS[name])
    if disk is not None:
        room = int(num_bytes * rng.random())
        used = shutil.disk_usage(disk).used
        resize(disk, (used + room + 4095) // 4096 * 4096)
        code = end_of(place.run(COMMANDS[name].args))
        resize(disk, DISK_BYTES)
    else:
        room = int(max(map(len, after.values())) * rng.random())
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))  # noqa: E731
        code = end_of(place.run(COMMANDS[name].args, limit))
    verdict = Verdict(f"{name}, room for {room} of {num_bytes} bytes", disturbed=code != 0)
    verdict.faults += disturbed(place, name, code, (0, 2))
    return verdict


def started_and_stopped(delay_s: float) -> Verdict:
    """Ctrl-C soon after the program is started, in a process that has imported nothing."""
    program = [sys.executable, "-m", "opensora", "models"]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    code = process.returncode
    verdict = Verdict(f"Ctrl-C {delay_s:.3f} s after the start", disturbed=code != 0)
    of_python = "opensora/" not in said  # before it comes to us
    if code not in (0, 130, -signal.SIGINT, 1) or ("Traceback" in said and not of_python):
        verdict.faults.append(f"words: {code} {said[-300:]!r}")
    return verdict


# --- all of it --------------------------------------------------------------------------------------------------------


def run_job(folder: Path, job: int, num_jobs: int, moments: int, sizes: int, seed: int) -> Iterator[Verdict]:
    """A share of the cases."""
    names = list(COMMANDS)
    place = Place(folder / f"job-{job}", folder / f"told-{job}")
    for number in range(job, moments, num_jobs):
        yield killed(place, names[number % len(names)], number, seed)
    if sizes == 0:
        return
    disk = mount_disk(folder / f"disk-{job}")
    place = Place((disk or folder) / f"full-{job}", folder / f"told-{job}")
    for number in range(job, sizes, num_jobs):
        yield filled(place, names[number % len(names)], number, seed, disk)


def run_campaign(folder: Path, moments: int, sizes: int, cold: int, seed: int, num_jobs: int) -> list[Verdict]:
    """All cases; each job is a process."""
    import torch

    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # else every process copies what it looks through for garbage
    torch.set_num_threads(1)
    jobs = []
    for job in range(num_jobs):
        told = folder / f"verdicts-{job}"

        def work(job: int = job, told: Path = told) -> None:
            with told.open("w") as file:
                for verdict in run_job(folder, job, num_jobs, moments, sizes, seed):
                    file.write(json.dumps(vars(verdict)) + "\n")
                    file.flush()

        jobs.append((start(work, folder / f"job-{job}-told"), told))
    verdicts = []
    for job, (process, told) in enumerate(jobs):
        _, status = os.waitpid(process, 0)
        said = (folder / f"job-{job}-told.2").read_text()
        verdicts += [Verdict(**json.loads(line)) for line in told.read_text().splitlines()]
        if status:
            verdicts.append(Verdict(f"job {job}", [f"the campaign itself failed: {said[-2000:]}"]))
    rng = random.Random(seed)
    return verdicts + [started_and_stopped(rng.uniform(0, 0.3)) for _ in range(cold)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--sizes", type=int, default=50)
    parser.add_argument("--cold", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="where it works; a temporary one when left out")
    options = parser.parse_args()
    import tempfile

    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        verdicts = run_campaign(
            Path(folder).resolve(), options.moments, options.sizes, options.cold, options.seed, options.jobs
        )
    for verdict in verdicts:
        for fault in verdict.faults:
            print(f"{verdict.case}: {fault}")
    kinds = Counter(fault.partition(":")[0] for verdict in verdicts for fault in set(verdict.faults))
    came = sum(verdict.disturbed for verdict in verdicts)
    print(
        f"{len(verdicts)} cases, {came} of them ended before their work, in {time.monotonic() - started:.0f} s; "
        f"{kinds['lost']} lost, {kinds['left over'] + kinds['left over at once']} left over, "
        f"{kinds['different']} different, {kinds['words']} in other words than one line"
    )
    return 1 if any(verdict.faults for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
