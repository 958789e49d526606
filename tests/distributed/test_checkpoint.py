"""Checkpoints: whole or not there, on any ranks, and never a way to run someone's code."""

import json
import pickle
import resource
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from exploit import Exploit
from ranks import run_ranks
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from opensora.distributed.checkpoint import (
    Checkpoints,
    list_checkpoints,
    newest_checkpoint,
    read_counters,
    read_names,
    read_tensors,
)
from opensora.distributed.mesh import Mesh, build_mesh
from opensora.errors import OpenSoraError

ALONE = Mesh()


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "module/matrix": torch.randn(5, 3),
        "module/kernel": torch.randn(3, 5, 2).permute(2, 0, 1),
        "module/half": torch.randn(7).bfloat16(),
        "module/none": torch.zeros(0, 3),
        "optimizer/step": torch.tensor(3.0),
        "module/flags": torch.tensor([True, False]),
    }


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor] | None = None, keep: int = 2) -> Path:
    checkpoints = Checkpoints(folder, ALONE, keep)
    checkpoints.save(step, some_tensors() if tensors is None else tensors, {"batches": 2 * step})
    checkpoints.wait()
    return list_checkpoints(folder)[-1]


def read(path: Path, like: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    tensors = {name: torch.zeros_like(value) for name, value in (like or some_tensors()).items()}
    read_tensors(path, tensors, ALONE)
    return tensors


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert path.name == "step-00000007"
    assert read_counters(path) == {"step": 7, "batches": 14}
    tensors = some_tensors()
    assert sorted(read_names(path)) == sorted(tensors)
    for name, value in read(path).items():
        assert value.dtype == tensors[name].dtype
        assert torch.equal(value, tensors[name]), name


def test_training_may_go_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(1000)}
    checkpoints = Checkpoints(tmp_path, ALONE, 1)
    checkpoints.save(1, tensors, {})
    tensors["weight"] += 1
    checkpoints.wait()
    assert torch.equal(read(list_checkpoints(tmp_path)[0], tensors)["weight"], torch.ones(1000))


def test_the_newest_are_kept_and_nothing_else_is_left(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000003", "step-00000004"]


def test_what_a_killed_run_left_is_never_read_and_removed(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    half = tmp_path / ".step-00000006.part"
    half.mkdir()
    (half / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == (path, [])
    Checkpoints(tmp_path, ALONE, 2)
    assert list(tmp_path.iterdir()) == [path]


def damage(path: Path, how: str) -> None:
    """What disks and people do to checkpoints."""
    (weights,) = path.glob("*.safetensors")
    index = path / "index.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif how == "missing":
        weights.unlink()
    elif how == "header":
        weights.write_bytes(b"\xff" * weights.stat().st_size)
    elif how == "no index":
        index.unlink()
    elif how == "empty index":
        index.write_text("")
    elif how == "other index":
        index.write_text(json.dumps(["step", 3]))


DAMAGES = ["truncated", "missing", "header", "no index", "empty index", "other index"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_passed_over(tmp_path: Path, how: str) -> None:
    whole, damaged = save(tmp_path, 3), save(tmp_path, 6)
    damage(damaged, how)
    path, damages = newest_checkpoint(tmp_path)
    assert path == whole
    (told,) = damages
    assert str(damaged) in told and "damaged" in told and "\n" not in told


def test_a_damaged_checkpoint_is_replaced_by_the_one_of_the_same_step(tmp_path: Path) -> None:
    damaged = save(tmp_path, 6)
    damage(damaged, "truncated")
    assert newest_checkpoint(save(tmp_path, 6).parent) == (damaged, [])


def test_with_damaged_checkpoints_alone_nothing_begins_anew_silently(tmp_path: Path) -> None:
    damage(save(tmp_path, 3), "truncated")
    with pytest.raises(OpenSoraError, match=r"no whole checkpoint in .*damaged .*restore one from a copy"):
        newest_checkpoint(tmp_path)


def test_no_checkpoint_is_no_mistake(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nothing") == (None, [])


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(2), "b": torch.zeros(3)},
        {"a": torch.zeros(2), "c": torch.zeros(2), "b": torch.zeros(2)},
        {"a": torch.zeros(2)},
    ],
)
def test_tensors_of_another_network_are_refused(tmp_path: Path, other: dict[str, torch.Tensor]) -> None:
    path = save(tmp_path, 1, {"a": torch.zeros(2), "b": torch.zeros(2)})
    with pytest.raises(OpenSoraError, match="belongs to another network"):
        read_tensors(path, other, ALONE)


def test_no_pickle_is_written_and_none_is_opened(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    bomb = pickle.dumps(Exploit(tmp_path / "ran"))
    for name in (".metadata", "__0_0.distcp", "weights.pt"):
        (path / name).write_bytes(bomb)
    assert newest_checkpoint(tmp_path)[0] == path
    read(path)
    (path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(bomb)
    (path / "index.json").write_text(json.dumps({"step": 1, "files": {}}))
    with pytest.raises(OpenSoraError):
        newest_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_half_written(tmp_path: Path) -> None:
    whole = save(tmp_path, 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        checkpoints = Checkpoints(tmp_path, ALONE, 2)
        checkpoints.save(6, {"weight": torch.zeros(10_000)}, {})
        with pytest.raises(OpenSoraError, match=r"checkpoint of step 6 cannot be written to .*\(File too large\)"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [whole]
    assert save(tmp_path, 6).name == "step-00000006"


def test_a_mistake_of_ours_in_the_writing_thread_is_not_swallowed(tmp_path: Path, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("opensora.distributed.checkpoint.flush_folder", fail)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    checkpoints = Checkpoints(tmp_path, ALONE, 2)
    checkpoints.save(1, some_tensors(), {})
    with pytest.raises(ZeroDivisionError):
        checkpoints.wait()


# --- several ranks ----------------------------------------------------------------------------------------------------


def spread(tensors: dict[str, torch.Tensor], mesh: Mesh) -> dict[str, torch.Tensor]:
    """The tensors as several ranks keep them: shares of most, all of those named "module/half"."""
    if mesh.weights is None:
        return tensors
    return {
        name: value if name == "module/half" or value.ndim == 0 else distribute_tensor(value, mesh.weights, [Shard(0)])
        for name, value in tensors.items()
    }


def save_on_ranks(folder: Path) -> None:
    mesh = build_mesh("cpu", 1)
    checkpoints = Checkpoints(folder, mesh, 2)
    checkpoints.save(4, spread(some_tensors(), mesh), {"batches": 8})
    checkpoints.wait()


def read_on_ranks(path: Path) -> bool:
    mesh = build_mesh("cpu", 1)
    expected = some_tensors()
    tensors = spread({name: torch.zeros_like(value) for name, value in expected.items()}, mesh)
    read_tensors(path, tensors, mesh)
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}
    return all(torch.equal(whole[name], value) for name, value in expected.items())


@pytest.mark.multi
@pytest.mark.parametrize("writers", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path: Path, writers: int) -> None:
    run_ranks(writers, save_on_ranks, tmp_path)
    path, damages = newest_checkpoint(tmp_path)
    assert path is not None and not damages
    for readers in (1, 2, 4):
        assert run_ranks(readers, read_on_ranks, path) == [True] * readers


def fill_the_disk_of_rank_1(folder: Path) -> str:
    mesh = build_mesh("cpu", 1)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    checkpoints = Checkpoints(folder, mesh, 2)
    checkpoints.save(6, spread({"weight": torch.zeros(10_000)}, mesh), {})
    with pytest.raises(OpenSoraError) as error:
        checkpoints.wait()
    return str(error.value)


@pytest.mark.multi
def test_a_rank_that_cannot_write_fails_the_checkpoint_of_all(tmp_path: Path) -> None:
    messages = run_ranks(2, fill_the_disk_of_rank_1, tmp_path)
    assert messages[0] == messages[1]
    assert "checkpoint of step 6" in messages[0] and "File too large" in messages[0]
    assert not list(tmp_path.iterdir())


def test_all_checkpoints_that_are_to_be_kept_are_kept(tmp_path: Path) -> None:
    """Fewer than `keep` are none too many."""
    checkpoints = Checkpoints(tmp_path, ALONE, keep=3)
    for step in range(1, 6):
        checkpoints.save(step, {"x": torch.ones(2)}, {})
        checkpoints.wait()
        first = max(1, step - 2)
        assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{k:08d}" for k in range(first, step + 1)]


def test_an_interrupt_while_a_checkpoint_is_read_does_not_condemn_it(tmp_path: Path, monkeypatch) -> None:
    """torch makes an error of its own of whatever ends a read, Ctrl-C included."""
    path = save(tmp_path, 1)

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.distributed.checkpoint.HuggingFaceStorageReader.read_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(path)
