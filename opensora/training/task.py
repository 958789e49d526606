"""What recipes build and trainers run: a task, and what stands around it, each in a role of its own.

A task owns the module, makes a batch from nothing but a step's place in the run (`prepare`), and turns it into loss
terms (`loss`). The trainer knows neither videos nor diffusion.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from opensora.data.batch import BatchShape
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError


class TrainingTask(ABC):
    """What is trained, towards what.

    Attributes:
        module: holds every trainable parameter; its state dict is what checkpoints and the moving average keep.
    """

    module: nn.Module

    @abstractmethod
    def prepare(self, key: BatchKey) -> Any:
        """A batch, on the device, that depends on `key` alone."""

    @abstractmethod
    def loss(self, batch: Any, key: BatchKey) -> dict[str, Tensor]:
        """Loss terms, each (B,), already weighted; the trainer minimises the mean of their sum.

        Terms whose name starts with "_" are reported and not minimised.
        """

    @abstractmethod
    def export(self, module: Any, folder: Path) -> None:
        """Writes the weights of `module`, a copy of the task's, as a folder that the rest of the package loads."""

    def export_frozen(self, folder: Path) -> None:  # noqa: B027
        """Writes what a checkpoint lacks of a model, before the first step; nothing if it can be none."""


class TrainingData:
    """Where a task's batches come from, as far as a trainer is concerned; this one has nothing to be told."""

    def open(self, cache: Path) -> None:
        """Work before the first step, such as encoding latents; results kept in `cache` serve a resumed run.

        The weights are those that training began with, also in a run that is resumed.
        """

    def prefetch(self, keys: Sequence[BatchKey]) -> None:
        """Batches that will be prepared next, in this order: reading them may begin."""

    def cancel_prefetch(self) -> None:
        """Nothing more will be prepared: what was to be read need not be."""

    def figures(self) -> dict[str, float]:
        """Counts worth logging besides losses, such as clips that could not be read; those of all ranks are added."""
        return {}


class Partition:
    """How a module is divided, within a step and over ranks.

    Attributes:
        blocks: its repeated parts: units of compilation, sharding and activation checkpointing.
        gathered: parts that ranks gather one after the other. Ranks meet at each of them, so all must run it equally
            often in a step, whatever their batches hold.
        stacks: the blocks once more, one kind after another, where each takes what the one before returns; one that is
            like others stands for them in plans.
    """

    def __init__(self, blocks: Sequence[nn.Module] = (), gathered: Sequence[nn.Module] | None = None) -> None:
        self.blocks = list(blocks)
        self.gathered = self.blocks if gathered is None else list(gathered)
        self.stacks = [self.blocks]

    def split_sequences(self, group: ProcessGroup) -> None:
        """From now on the ranks of `group` compute each batch together, a part of its tokens each.

        Every rank of the group prepares the same batch and returns the same losses. Gradients are those of the mean of
        all ranks' losses, as autograd hands them through the collectives: the trainer averages them over all ranks.

        Raises:
            OpenSoraError: this network cannot be split.
        """
        raise OpenSoraError("this task cannot split a clip over ranks; set loop.sequence_parallel=1")


class Critic(ABC):
    """A network that is trained against a task's module, by an optimiser of its own.

    Attributes:
        module: the network.
    """

    module: nn.Module

    @abstractmethod
    def loss(self, batch: Any, key: BatchKey) -> dict[str, Tensor]:
        """Like a task's, for the critic, after the task's own step on the same batch."""


class Preview(ABC):
    """What is made now and then to watch a training."""

    def check(self) -> None:  # noqa: B027
        """Before the first step.

        Raises:
            OpenSoraError: what it needs is not there.
        """

    @abstractmethod
    def show(self, module: Any, folder: Path, step: int) -> dict[str, float]:
        """Writes samples of `module`, a copy of the task's, into `folder`; returns figures to log."""


def no_groups(batch: Any) -> dict[str, list[str]]:
    """For batches whose samples are all alike."""
    return {}


@dataclass
class TrainingSetup:
    """All that a trainer runs.

    Attributes:
        task: what is trained.
        data: where its batches come from.
        partition: how its module is divided.
        not_matrices: names of matrix parameters that AdamW takes (first and last layers, embeddings).
        frozen: networks that are used and not trained, by name; never sharded, saved or averaged.
        frozen_fingerprint: of what is not trained of the task's module, where that lies in memory otherwise than it was
            read; None where it does not.
        critic: trained against the task's module; None for none.
        preview: how the training is watched; None for not at all.
        groups: what each of a batch's samples belongs to, for figures by group: {"bucket": [...], "t": [...]}.
    """

    task: TrainingTask
    data: TrainingData = field(default_factory=TrainingData)
    partition: Partition = field(default_factory=Partition)
    not_matrices: set[str] = field(default_factory=set)
    frozen: Mapping[str, nn.Module] = field(default_factory=dict)
    frozen_fingerprint: str | None = None
    critic: Critic | None = None
    preview: Preview | None = None
    groups: Callable[[Any], dict[str, list[str]]] = no_groups


class TaskPlan(ABC):
    """A task on torch's meta device, and batches without content for it.

    Attributes:
        setup: the task and what stands around it; its data are not opened.
    """

    setup: TrainingSetup

    @abstractmethod
    def shapes(self) -> list[BatchShape]:
        """Every size that batches may have."""

    @abstractmethod
    def meta_batch(self, shape: BatchShape) -> Any:
        """A batch of that size without any content, on the module's device."""

    def frozen_workloads(self, shape: BatchShape) -> dict[str, Callable[[], Any]]:
        """What each frozen network does to prepare a batch of that size, on no content, by its name."""
        return {}


class TaskConfig(Protocol):
    """A dataclass that describes a task and builds it."""

    def build(self, device: str) -> TrainingSetup: ...


@runtime_checkable
class PlannableConfig(Protocol):
    """A description of a task whose batches are known beforehand."""

    def plan(self) -> TaskPlan: ...
