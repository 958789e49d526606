"""Checkpoints of a run: written by all of its ranks while training goes on, whole or not there, read on any ranks.

A checkpoint is a folder `step-00001000/` of safetensors files, some for each rank, as torch's distributed checkpoints
(DCP) lay them out, and `index.json` with the run's counters and the size of every file; nothing in it is a pickle. It
is written under a temporary name, flushed to disk, and renamed when every rank is done, so that a process killed at any
moment leaves the previous one as the newest. Any number of ranks reads it, each what it needs.
"""

import errno
import json
import os
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from opensora.contents import describe_value, read_object
from opensora.distributed.mesh import Mesh
from opensora.errors import OpenSoraError
from opensora.files import flush_folder

BYTES_PER_FILE = 2**30  # a file is put together in memory before it is written


class Checkpoints:
    """The checkpoints of a run; one at a time is written beside the training.

    Args:
        folder: where they lie.
        mesh: the ranks, all of which make the same calls.
        keep: newest checkpoints kept.
    """

    def __init__(self, folder: Path, mesh: Mesh, keep: int) -> None:
        self.folder, self.mesh, self.keep = folder, mesh, keep
        _expect_one_process()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        if mesh.is_first:
            for killed in folder.glob(".step-*.part"):  # what a killed run left half-written or half-removed
                shutil.rmtree(killed)
        mesh.wait()

    def save(self, step: int, tensors: Mapping[str, Tensor], counters: Mapping[str, int]) -> None:
        """Begins to write a checkpoint; returns when the tensors are copied, and may be changed again.

        Args:
            step: of the run.
            tensors: by name; sharded ones are written share by share, others by one of the ranks.
            counters: what else there is to remember.

        Raises:
            OpenSoraError: the checkpoint before could not be written.
        """
        self.wait()
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self.thread = threading.Thread(target=self._write, args=(step, copies, dict(counters)), daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Returns when no rank is writing a checkpoint any more.

        Raises:
            OpenSoraError: the last one could not be written; on all ranks.
        """
        self.join()
        if self.error is not None and not isinstance(self.error, OpenSoraError):
            raise self.error
        messages = [message for message in self.mesh.gather(self.error and str(self.error)) if message]
        if messages:
            raise OpenSoraError(messages[0])

    def join(self) -> None:
        """Returns when this rank is not writing any more, whatever came of it."""
        if self.thread is not None:
            self.thread.join()

    def _write(self, step: int, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """All of it, in a thread of its own."""
        path = self.folder / f"step-{step:08d}"
        partial = self.folder / f".{path.name}.part"
        try:
            dcp.save(
                tensors,
                storage_writer=dcp.HuggingFaceStorageWriter(
                    str(partial), fqn_to_index_mapping=assign_files(tensors), save_distributed=True
                ),
                planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self.mesh.writing,
                no_dist=self.mesh.num_ranks == 1,
            )
            if self.mesh.is_first:  # the others' files are written and flushed, or dcp.save had raised
                sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
                (partial / "index.json").write_text(json.dumps({"step": step, **counters, "files": sizes}, indent=1))
                flush_folder(partial)
                if path.exists():  # a damaged one, which was passed over
                    remove(path)
                partial.rename(path)
                flush_folder(self.folder)
                whole = list_checkpoints(self.folder)
                newer = [other for other in whole if other.name > path.name]  # damaged ones, which were passed over
                for other in (*newer, *whole[: max(0, len(whole) - len(newer) - self.keep)]):
                    remove(other)
        except (CheckpointException, OSError, SafetensorError) as failure:
            if self.mesh.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            self.error = OpenSoraError(
                f"the checkpoint of step {step} cannot be written to {self.folder} ({reason(failure)}); "
                "make room or give access, then the same command goes on from the checkpoint before"
            )
        except BaseException as failure:  # told by `wait`, not by the thread
            self.error = failure


def assign_files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which of a rank's files, from 1, each tensor goes to."""
    files, size = {}, 0
    for name, tensor in tensors.items():
        files[name] = size // BYTES_PER_FILE + 1
        size += tensor.numel() * tensor.element_size()
    return files


def remove(path: Path) -> None:
    """Removes a checkpoint so that it is never seen in part."""
    hidden = path.rename(path.with_name(f".{path.name}.removed.part"))
    shutil.rmtree(hidden)


def reason(failure: BaseException) -> str:
    """Why a checkpoint could not be written or read, in a few words; the first rank's reason if several have one.

    Raises:
        KeyboardInterrupt: that was it, and nothing is wrong with the checkpoint.
    """
    if isinstance(failure, CheckpointException):
        failure = next(iter(failure.failures.values()))[0]
    if isinstance(failure, KeyboardInterrupt):
        raise failure
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror
    return (str(failure) or type(failure).__name__).splitlines()[0]


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to their end, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def check_checkpoint(path: Path) -> None:
    """Proves that a checkpoint is as it was written, as far as sizes and headers tell.

    Raises:
        OpenSoraError: it is not.
        PermissionError: nobody can tell.
    """
    for file in (path, *path.glob("*")):
        if not os.access(file, os.R_OK):
            raise PermissionError(errno.EACCES, "permission denied; change its permissions (chmod u+r)", str(file))
    try:
        index = read_object(path / "index.json")
        for name, size in index["files"].items():
            found = (path / name).stat().st_size
            if found != size:
                raise OpenSoraError(f"{name} has {found} bytes and was written with {size}")
        dcp.HuggingFaceStorageReader(str(path)).read_metadata()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise OpenSoraError(f"{path} is damaged ({reason(error)})") from error


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is not damaged, and what is wrong with those that are newer.

    Raises:
        OpenSoraError: there are checkpoints and all are damaged.
    """
    damages: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            check_checkpoint(path)
        except OpenSoraError as damage:
            damages.append(str(damage))
        else:
            return path, damages
    if damages:
        raise OpenSoraError(
            f"no whole checkpoint in {folder}: {damages[0]}; restore one from a copy; another `output` would begin anew"
        )
    return None, []


def read_counters(path: Path, names: Sequence[str] = ()) -> dict[str, int]:
    """What `Checkpoints.save` was given as `counters`, and the step.

    Raises:
        OpenSoraError: one of `names`, or the step, is missing or no whole number.
    """
    index = read_object(path / "index.json")
    for name in ("step", *names):
        value = index.get(name)
        if type(value) is not int or value < 0:
            what = f"{name} is {describe_value(value)}, expected a whole number"
            raise OpenSoraError(f"{path / 'index.json'} is damaged: {what}; delete {path.name} to go on from another")
    return {name: value for name, value in index.items() if name != "files"}


def read_names(path: Path) -> list[str]:
    """Names of a checkpoint's tensors."""
    return list(dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata)


class WholeTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint in one piece each, read when they are asked for, by one process alone.

    Args:
        path: of the checkpoint.

    Raises:
        OpenSoraError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        check_checkpoint(path)
        metadata = dcp.HuggingFaceStorageReader(str(path)).read_metadata()
        self._path = path
        self._entries = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._files: dict[str, list[tuple[Path, torch.Size]]] = {}
        for index, stored in (metadata.storage_data or {}).items():
            place = (Path(stored.relative_path), torch.Size(index.offset or ()))
            self._files.setdefault(index.fqn, []).append(place)

    def shape_of(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor."""
        entry = self._entries[name]
        return tuple(entry.size), entry.properties.dtype

    def files_of(self, name: str) -> list[Path]:
        """Where its shares lie."""
        return [file for file, _ in self._files[name]]

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self.shape_of(name)
        whole = torch.empty(shape, dtype=dtype)
        for file, offset in self._files[name]:
            try:
                with safe_open(file, framework="pt") as opened:
                    share = opened.get_tensor(name)
            except (OSError, SafetensorError) as failure:
                raise OpenSoraError(f"{self._path} is damaged ({reason(failure)})") from None
            place = tuple(slice(start, start + size) for start, size in zip(offset, share.shape, strict=True))
            whole[place] = share
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read_tensors(path: Path, tensors: Mapping[str, Tensor], mesh: Mesh) -> None:
    """Reads a checkpoint into tensors of the same names, each rank its shares.

    Raises:
        OpenSoraError: names or shapes are others.
    """
    stored = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    others = sorted(set(stored) ^ set(tensors))
    shapes = {name: entry.size for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    others += [name for name in tensors if name in shapes and shapes[name] != tensors[name].shape]
    if others:
        raise OpenSoraError(
            f"{path} belongs to another network: it differs in {others[0]!r} and {len(others) - 1} others; "
            "use the recipe it was made with, or another `output`"
        )
    _expect_one_process()
    try:
        dcp.load(
            dict(tensors),
            storage_reader=dcp.HuggingFaceStorageReader(str(path)),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=mesh.control,
            no_dist=mesh.num_ranks == 1,
        )
    except (CheckpointException, SafetensorError) as failure:
        advice = "delete it to go on from the one before"
        raise OpenSoraError(f"{path} cannot be read ({reason(failure)}); {advice}") from None


def _expect_one_process() -> None:
    """DCP warns every time of a process without a group, which is how most runs here are."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
