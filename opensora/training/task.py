"""The seam between the trainer and what is trained.

An objective owns the modules, makes a batch from nothing but a step's place in the run (`prepare`), and turns it into
loss terms (`loss`). The trainer knows neither videos nor diffusion.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from opensora.data.batch import BatchShape
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError


class TrainingTask(ABC):
    """What is trained, on what, towards what.

    Attributes:
        module: holds every trainable parameter; its state dict is what checkpoints and the moving average keep.
        not_matrices: names of matrix parameters that AdamW takes (first and last layers, embeddings).
        frozen: networks that are used and not trained, by name; never sharded, saved or averaged.
        critic: a network that is trained against the module, by an optimiser of its own, on `critic_loss`.
    """

    module: nn.Module
    not_matrices: set[str] = set()
    frozen: dict[str, nn.Module] = {}
    critic: nn.Module | None = None

    @abstractmethod
    def prepare(self, key: BatchKey) -> Any:
        """A batch, on the device, that depends on `draw` alone."""

    @abstractmethod
    def loss(self, batch: Any, key: BatchKey) -> dict[str, Tensor]:
        """Loss terms, each (B,), already weighted; the trainer minimises the mean of their sum.

        Terms whose name starts with "_" are reported and not minimised.
        """

    def critic_loss(self, batch: Any, key: BatchKey) -> dict[str, Tensor]:
        """Like `loss`, for the critic, after the module's own step on the same batch."""
        raise NotImplementedError

    def groups(self, batch: Any) -> dict[str, list[str]]:
        """What each of the B samples belongs to, for figures group by group: {"bucket": [...], "t": [...]}."""
        return {}

    def prefetch(self, keys: Sequence[BatchKey]) -> None:  # noqa: B027
        """Batches that will be prepared next, in this order: reading them may begin."""

    def cancel_prefetch(self) -> None:  # noqa: B027
        """Nothing more will be prepared: what was announced need not be read."""

    def figures(self) -> dict[str, float]:
        """Counts worth logging besides losses, such as clips that could not be read; those of all ranks are added."""
        return {}

    def set_up(self, cache: Path) -> None:  # noqa: B027
        """Work before the first step, such as encoding latents; results kept in `cache` serve a resumed run.

        The weights are those that training began with, also in a run that is resumed.
        """

    def blocks(self) -> list[nn.Module]:
        """The repeated parts of the module: units of compilation, sharding and activation checkpointing."""
        return []

    def split_sequences(self, group: ProcessGroup | None) -> None:
        """From now on the ranks of `group` compute each batch together, a part of its tokens each; None: alone again.

        Every rank of the group prepares the same batch and returns the same losses. Gradients are those of the mean of
        all ranks' losses, as autograd hands them through the collectives: the trainer averages them over all ranks.

        Raises:
            OpenSoraError: this objective's network cannot be split.
        """
        if group is not None:
            raise OpenSoraError(f"{type(self).__name__} cannot split a clip over ranks; set loop.sequence_parallel=1")

    def sharded_parts(self) -> list[nn.Module]:
        """Parts of the module that ranks gather one after the other; the blocks, where nothing else is said.

        Ranks meet at each of them, so all must run it equally often in a step, whatever their batches hold.
        """
        return self.blocks()

    def shapes(self) -> list[BatchShape]:
        """Every size that batches may have, for plans."""
        return []

    def meta_batch(self, shape: BatchShape) -> Any:
        """A batch of that size without any content, on the module's device, for plans."""
        raise NotImplementedError

    def frozen_workloads(self, shape: BatchShape) -> dict[str, Callable[[], Any]]:
        """What each frozen network does to prepare a batch of that size, on no content, by its name; for plans."""
        return {}

    def preview(self, folder: Path, step: int) -> dict[str, float]:
        """Writes samples of the current weights into `folder`; returns figures to log. Nothing by default."""
        return {}

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes the current weights as a folder that the rest of the package loads."""
