"""The ranks of a run: which share a clip, which have data of their own, and the small things they tell each other.

Ranks are numbered so that neighbours share a clip: with n sequence ranks, rank k is sequence rank k % n of data rank
k // n. One process without `torchrun` is a mesh of one rank that talks to nobody and starts no process group.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opensora.errors import OpenSoraError

T = TypeVar("T")

PATIENCE = timedelta(hours=2)  # for what one rank does alone while the others wait: encoding, previews, the export


@dataclass(frozen=True)
class Mesh:
    """Where this process stands among the ranks.

    Attributes:
        rank: of this process, from 0.
        num_ranks: processes in all.
        num_sequence_ranks: of them, those that share each clip.
        weights: all ranks in one row, for sharded weights; None for a single rank.
        sequence: the ranks that share this rank's clips; None where clips are not shared.
        control: for a few numbers on the CPU between steps.
        writing: for checkpoints, which are written beside the training.
    """

    rank: int = 0
    num_ranks: int = 1
    num_sequence_ranks: int = 1
    weights: DeviceMesh | None = None
    sequence: ProcessGroup | None = None
    control: ProcessGroup | None = None
    writing: ProcessGroup | None = None

    @property
    def num_data_ranks(self) -> int:
        """How many ranks, or groups of them, have batches of their own."""
        return self.num_ranks // self.num_sequence_ranks

    @property
    def data_rank(self) -> int:
        """Whose batches this rank sees, from 0."""
        return self.rank // self.num_sequence_ranks

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns when every rank has come here."""
        if self.num_ranks > 1:
            dist.barrier(self.control)

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        if self.num_ranks == 1:
            return list(flags)
        shared = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(shared, dist.ReduceOp.MAX, self.control)
        return [bool(flag) for flag in shared]

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in order; anything that pickles."""
        if self.num_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value, self.control)
        return values

    @contextlib.contextmanager
    def first_rank_first(self) -> Iterator[None]:
        """The body runs on the first rank, then on the others, which find what the first has left in its folders."""
        if not self.is_first:
            self.wait()
        try:
            yield
        finally:
            if self.is_first:
                self.wait()


def build_mesh(device: str, num_sequence_ranks: int) -> Mesh:
    """The mesh of the initialised process group, or of one rank if there is none; called by all ranks.

    Args:
        device: "cpu", "cuda:3": where tensors are computed.
        num_sequence_ranks: ranks that share each clip.

    Raises:
        OpenSoraError: the number of ranks is no multiple of `num_sequence_ranks`.
    """
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    if num_ranks % num_sequence_ranks:
        ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
        raise OpenSoraError(
            f"loop.sequence_parallel is {num_sequence_ranks} and the run has {ranks}; "
            "start a multiple with torchrun --nproc-per-node, or change the setting"
        )
    if num_ranks == 1:
        return Mesh()
    sequence, _ = dist.new_subgroups(num_sequence_ranks) if num_sequence_ranks > 1 else (None, [])
    assert not isinstance(sequence, int)
    return Mesh(
        rank=dist.get_rank(),
        num_ranks=num_ranks,
        num_sequence_ranks=num_sequence_ranks,
        weights=init_device_mesh(torch.device(device).type, (num_ranks,), mesh_dim_names=("shard",)),
        sequence=sequence,
        control=patient_group(),
        writing=patient_group(),
    )


def patient_group() -> ProcessGroup:
    """A group of all ranks on the CPU."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, ProcessGroup)
    return group


@dataclass(frozen=True)
class Launch:
    """A process as torchrun started it.

    Attributes:
        rank: of this process, from 0.
        num_ranks: processes in all.
        store: what all of them can read and write; None for a process that was started alone.
    """

    rank: int = 0
    num_ranks: int = 1
    store: dist.Store | None = None

    def is_first_to_say(self, reason: str) -> bool:
        """Whether no rank has yet ended for this reason: what all of them run into is told once."""
        if self.store is None:
            return True
        self.store.set("a rank has ended", "")
        return self.store.compare_set(f"ended: {reason}", "", str(self.rank)) == str(self.rank).encode()

    def has_heard(self) -> bool:
        """Whether a rank has ended and told why."""
        return self.store is not None and self.store.check(["a rank has ended"])


@contextlib.contextmanager
def launched() -> Iterator[Launch]:
    """Joins the processes that torchrun started together; outside torchrun this process stays alone.

    `torchrun` tells its processes who they are by environment variables; they are read here and nowhere else.
    """
    if not dist.is_torchelastic_launched():
        yield Launch()
        return
    rank, local_rank, num_ranks = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise OpenSoraError(
                f"torchrun started more than {torch.cuda.device_count()} processes on a machine with so many GPUs; "
                "give --nproc-per-node gpu"
            )
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, _, _ = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)
    try:
        yield Launch(rank, num_ranks, store)
    finally:
        dist.destroy_process_group()


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on the first process, for all of those that work together; alone, what it returns."""
    if not (dist.is_available() and dist.is_initialized()):
        return make()
    values = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]  # pyright: ignore[reportReturnType]
