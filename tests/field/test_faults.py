"""What goes wrong around a command: full disks, closed streams, signals, left-overs, folders that are gone."""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny_pipeline import make_pipeline
from tiny_regression import recipe

from opensora.checkpoints.conversion import convert
from opensora.cli.main import main
from opensora.cli.models import Models
from opensora.cli.surroundings import with_home
from opensora.containers.tensors import StoredTensors
from opensora.data.scan import Journal
from opensora.data.shards import write_shard
from opensora.distributed.checkpoint import newest_checkpoint
from opensora.errors import OpenSoraError, Terminated
from opensora.files import append_text, check_writable, remove_left_overs, replacing, replacing_folder
from opensora.generation.clip import Clip
from opensora.manifest import ClipRow, write_manifest
from opensora.media import write
from opensora.media.write import write_video
from opensora.settings import save_settings
from opensora.training.interrupts import stopping_between_steps
from opensora.training.metrics import Metrics
from opensora.training.trainer import Trainer

PROMPT = "a small red ball rolls left over the grass"
DEAD = 2**22 + 1
"""No process has this number, as none is higher than 2^22."""


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("opensora: ")]
    assert len(lines) == 1 and "Traceback" not in error
    return lines[0]


# ---- the disk is full ------------------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")
VIDEO = np.zeros((3, 16, 16, 3), np.uint8)


def write_adapter_file(path: Path) -> None:
    with replacing(path) as temporary:
        save_file({"x": torch.zeros(9)}, temporary)


WRITERS = {
    "a clip": lambda folder: write_video(folder / "a.mp4", VIDEO, 8),
    "numbered frames": lambda folder: write_video(folder / "a.frames", VIDEO, 8),
    "a record": lambda folder: save_settings({"seed": 1}, folder / "a.json"),
    "a manifest": lambda folder: write_manifest(folder / "a.csv", [ClipRow(folder / "a.mp4", "x", 9, 8, 8, 8.0)]),
    "a shard": lambda folder: write_shard(folder / "a.safetensors", {"x": torch.zeros(9)}, {}),
    "an adapter": lambda folder: write_adapter_file(folder / "a.safetensors"),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_disk_that_is_full_when_all_is_written(tmp_path, what, monkeypatch):
    """The last moment to notice: network disks tell only then."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(FULL))
    with pytest.raises(OpenSoraError, match=r"^output [^\n]* cannot be written: No space left on device$"):
        WRITERS[what](tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [FULL, SafetensorError("I/O error: No space left on device (os error 28)")])
def test_a_disk_that_is_full_while_a_library_writes(tmp_path, error):
    with (
        pytest.raises(OpenSoraError, match=r"No space left on device$"),
        replacing(tmp_path / "new" / "a") as temporary,
    ):
        (temporary.parent / ".tmpAbCdEf").write_text("half, as safetensors leaves it")
        raise error
    assert names(tmp_path) == ["new"]
    with pytest.raises(KeyError), replacing(tmp_path / "a"):
        raise KeyError  # a mistake of ours shows where it is


def test_a_disk_that_is_full_while_lines_are_added(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    journal = Journal(tmp_path / "journal", "count")
    metrics = Metrics(tmp_path, 0)
    metrics.path = journal.path = full
    (tmp_path / "a.mp4").touch()
    for action in (
        lambda: append_text(full, "x"),
        lambda: journal.note([(tmp_path / "a.mp4", "broken")]),
        lambda: metrics.write(1, {"loss": 1.0}),
    ):
        with pytest.raises(OpenSoraError, match="cannot be written: No space left on device; make room"):
            action()
    metrics.close()


def test_clip_and_record_go_together(tmp_path, monkeypatch):
    from field.test_saving import RECORD

    path = Clip(VIDEO, 8, RECORD).save(tmp_path / "a.mp4")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_, **__):
        raise FULL

    monkeypatch.setattr(write, "_write_stream", full)
    with pytest.raises(OpenSoraError, match="No space left"):
        Clip(VIDEO + 9, 8, RECORD).save(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_clips_that_were_written_are_told(pipe, tmp_path, capsys, monkeypatch):
    save = Clip.save

    def full_at_the_third(clip, path, **options):
        if "-2" in path.name:
            raise OpenSoraError(f"output {path} cannot be written: No space left on device")
        return save(clip, path, **options)

    monkeypatch.setattr(Clip, "save", full_at_the_third)
    assert main(["generate", PROMPT, "--num-videos", "4", "--output", "a.mp4"]) == 2
    assert error_line(capsys).endswith("No space left on device; 2 of 4 clips were written, up to a-1.mp4")
    assert names(tmp_path) == ["a-0.mp4", "a-0.mp4.json", "a-1.mp4", "a-1.mp4.json"]


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Terminated(15), 143), (MemoryError(), 2)])
def test_clips_that_were_written_are_told_whatever_ends_the_rest(pipe, tmp_path, capsys, monkeypatch, stop, code):
    save = Clip.save

    def stopped(clip, path, **options):
        if "-1" in path.name:
            raise stop
        return save(clip, path, **options)

    monkeypatch.setattr(Clip, "save", stopped)
    assert main(["generate", PROMPT, "--num-videos", "2", "--output", "a.mp4"]) == code
    assert error_line(capsys).endswith("1 of 2 clips were written, up to a-0.mp4")


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_too_little_memory_is_one_line_that_names_what_to_change(pipe, monkeypatch, capsys, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(Clip, "save", fails)
    assert main(["generate", PROMPT, "--output", "a.mp4"]) == 2
    assert "out of memory; choose fewer frames, a smaller size" in error_line(capsys)


# ---- left-overs ------------------------------------------------------------------------------------------------------


def test_left_overs_of_killed_processes_go_with_the_next_file(tmp_path):
    """Of files, of folders, and of whatever libraries put beside them; those of living processes stay."""
    (tmp_path / f".a.mp4.{DEAD}.part").write_text("half")
    (tmp_path / f".model.{DEAD}-0a1b2c3d.part" / "folder.part").mkdir(parents=True)
    (tmp_path / f".b.csv.{os.getppid()}.part").write_text("of a living process")
    (tmp_path / ".hidden").touch()
    (tmp_path / f"visible.{DEAD}.part").touch()
    with replacing(tmp_path / "c.txt") as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == [f".b.csv.{os.getppid()}.part", ".hidden", "c.txt", f"visible.{DEAD}.part"]


def test_a_lock_tells_who_lives_where_numbers_do_not(tmp_path):
    """Numbers of processes are reused, and are others' in other containers."""
    theirs, gone = tmp_path / f".a.{DEAD}-1.part", tmp_path / f".a.{os.getpid()}-2.part"
    for folder in (theirs, gone):
        folder.mkdir()
        (folder / "lock").touch()
    with (theirs / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert remove_left_overs(tmp_path) == [theirs]
        assert names(tmp_path) == [theirs.name, f"{theirs.name}/lock"]
    assert remove_left_overs(tmp_path) == [] == names(tmp_path)


def test_a_killed_writer_leaves_nothing_behind_the_next(tmp_path):
    process = os.fork()
    if not process:
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert len(list(tmp_path.iterdir())) == 1
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "whole"


def test_an_interruption_waits_until_the_temporary_is_gone(tmp_path, monkeypatch):
    remove, calls = shutil.rmtree, iter([KeyboardInterrupt])

    def interrupted(path, **options):
        for error in calls:
            raise error
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == ["a.txt"]


def test_names_as_long_as_can_be(tmp_path):
    for name in ("a" * 255, "一" * 85):
        check_writable(tmp_path / name)
        with replacing(tmp_path / name) as temporary:
            temporary.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"


def test_a_folder_gives_way_to_a_whole_one_only(tmp_path):
    path = tmp_path / "model"
    with replacing_folder(path) as folder:
        (folder / "old").touch()
    with pytest.raises(KeyboardInterrupt), replacing_folder(path, overwrite=True):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["model", "model/old"]
    with replacing_folder(path, overwrite=True) as folder:
        (folder / "deeper").mkdir()
        (folder / "deeper" / "new").touch()
    assert names(tmp_path) == ["model", "model/deeper", "model/deeper/new"]


def test_two_conversions_into_one_folder(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "tiny")
    output = tmp_path / "out"
    with replacing_folder(output) as of_the_first:
        (of_the_first / "x").touch()
        with pytest.raises(OpenSoraError, match=r"is being written by another process \(\d+\); wait for it, or choose"):
            convert(tmp_path / "tiny", output)
    assert names(output) == ["x"]
    with pytest.raises(OpenSoraError, match="was written by another process meanwhile"):
        with replacing_folder(tmp_path / "late") as folder:
            (folder / "x").touch()
            (tmp_path / "late" / "of somebody").mkdir(parents=True)


# ---- where output goes -----------------------------------------------------------------------------------------------


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("gone")
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, why in [
        ("file/a.mp4", "Not a directory"),
        ("loop/a.mp4", "is a link that leads nowhere"),
        ("nowhere/a.mp4", "is a link that leads nowhere"),
        ("pipe.mp4", "is a device or a pipe"),
        ("new/" + "a" * 256, "name too long"),
        ("a\0.mp4", "null"),
        ("\ud800.mp4", "surrogates not allowed"),
    ]:
        with pytest.raises(OpenSoraError, match=r"^output [^\n]*$") as error:
            check_writable(tmp_path / name)
        assert why in str(error.value)
    with pytest.raises(OpenSoraError, match="is a device or a pipe"):
        check_writable("/dev/null")
    assert names(tmp_path) == ["file", "loop", "nowhere", "pipe.mp4"]


@pytest.mark.parametrize("name", ["new\nline.mp4", os.fsdecode(b"\xff\xfe.mp4"), "-dash.mkv", "一.gif"])
def test_names_of_any_bytes(pipe, tmp_path, capfdbinary, name):
    assert main(["generate", PROMPT, f"--output={name}"]) == 0
    assert capfdbinary.readouterr().out == os.fsencode(name) + b"\n"
    assert names(tmp_path) == sorted([name, f"{name}.json"])
    assert main(["generate", "--from", f"./{name}", "--output", "again.png"]) == 0


def test_home_is_home_wherever_a_path_begins(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for word, meant in [
        ("~/a.mp4", "/home/me/a.mp4"),
        ("--output=~/a.mp4", "--output=/home/me/a.mp4"),
        ("objective.data.manifest=~/clips.csv", "objective.data.manifest=/home/me/clips.csv"),
        ("~/a.png;~/b.png", "/home/me/a.png;/home/me/b.png"),
        ("~nobody-is-called-so/x", "~nobody-is-called-so/x"),
        ("a ball rolls ~ left", "a ball rolls ~ left"),
        ("a~/b", "a~/b"),
    ]:
        assert with_home(word) == meant


def test_output_below_home(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert main(["generate", PROMPT, "--output=~/a.mp4"]) == 0
    assert (tmp_path / "home" / "a.mp4").exists() and not (tmp_path / "~").exists()


def test_a_working_folder_that_was_removed(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for args in (
        ["generate", PROMPT],
        ["models"],
        ["train", "v1_2_debug"],
        ["data", "manifest", "x", "--output", "y.csv"],
    ):
        assert main(args) == 2
        assert "the working folder cannot be used (No such file or directory)" in error_line(capsys)
    assert main(["--version"]) == 0


# ---- what may not be read --------------------------------------------------------------------------------------------


def test_weights_without_permission_are_not_called_damaged(tmp_path, monkeypatch):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(OpenSoraError, match="may not be read: permission denied; change its permissions") as error:
        StoredTensors([tmp_path / "x.safetensors"])
    assert "damaged" not in str(error.value)


def test_a_checkpoint_without_permission_is_not_passed_over(tmp_path, monkeypatch):
    Trainer(recipe(steps=2, checkpoint_every=1), tmp_path).run()
    monkeypatch.setattr(os, "access", lambda path, mode: "step-00000002" not in str(path))
    with pytest.raises(PermissionError, match="permission denied"):
        newest_checkpoint(tmp_path / "checkpoints")


# ---- streams and signals ---------------------------------------------------------------------------------------------


def run(args: list[str], **streams) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "opensora", *args]
    return subprocess.run(command, timeout=120, env={**os.environ, "PYTHONUNBUFFERED": ""}, **streams)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("args", [["--help"], ["models", "--json"]])
def test_standard_output_that_is_full(args):
    with Path("/dev/full").open("w") as full:
        ended = run(args, stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 2
    assert ended.stderr == b"opensora: standard output cannot be written: No space left on device\n"


def test_a_table_into_a_pipe_that_is_closed():
    reader, writer = os.pipe()
    os.close(reader)
    ended = run(["inspect", "toybox"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_standard_output_that_is_closed(tmp_path):
    ended = run(["models"], stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert ended.returncode == 2
    assert ended.stderr == b"opensora: standard output is closed, so nothing could be told; /dev/null would do\n"


def test_standard_error_that_is_closed_or_full_stops_nothing(tmp_path):
    """And what was meant for it does not go to standard output."""
    assert run(["modles"], stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2)).returncode == 2
    with contextlib.suppress(FileNotFoundError), Path("/dev/full").open("w") as full:
        ended = run(["modles"], stdout=subprocess.PIPE, stderr=full)
        assert (ended.returncode, ended.stdout) == (2, b"")


@pytest.fixture
def heard():
    """Signals as a terminal sends them, also where the tests run in the background and ignore them."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_leave_no_half_file(pipe, tmp_path, monkeypatch, capsys, number, code):
    def stopped(path, *_, **__):
        path.write_bytes(b"half")
        os.kill(os.getpid(), number)

    monkeypatch.setattr(write, "_write_stream", stopped)
    assert main(["generate", PROMPT, "--output", "a.mp4"]) == code
    assert error_line(capsys) in ("opensora: interrupted", "opensora: terminated")
    assert names(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "as it was before"


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_training_ends_between_steps_and_says_by_which_signal(tmp_path, number):
    trainer = Trainer(recipe(), tmp_path)
    trainer.on_step = lambda step, steps, figures: os.kill(os.getpid(), number) if step == 2 else None
    with pytest.raises(Terminated, match="stopped after step 2") as stop, stopping_between_steps(trainer):
        trainer.run()
    assert stop.value.number == number


def test_ctrl_c_while_the_program_is_imported():
    """Sent by what is imported first, so that it comes at the same moment every time."""
    code = (
        "import builtins, os, signal, sys\n"
        "from opensora.__main__ import main\n"
        "real = builtins.__import__\n"
        "def importing(name, *rest):\n"
        "    if name == {!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = importing\n"
        "sys.argv[1:] = ['models']\n"
        "sys.exit(main())"
    )
    for target in ("opensora.cli.main", "opensora.cli.parsing"):
        command = [sys.executable, "-c", code.format(target)]
        hears = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731 (also in the background)
        ended = subprocess.run(command, capture_output=True, timeout=120, preexec_fn=hears)
        assert (ended.returncode, ended.stderr) == (130, b"opensora: interrupted\n")


def test_an_interrupt_that_a_library_made_another_error_of_is_one(monkeypatch, capsys):
    def read(self) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type 'Storage'") from None

    monkeypatch.setattr(Models, "run", read)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "opensora: interrupted\n"
    monkeypatch.setattr(Models, "run", lambda self: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):  # a mistake of ours shows where it is
        main(["models"])
