"""The seam between the trainer and what is trained.

An objective owns the modules, makes a batch from nothing but a step's place in the run (`prepare`), and turns it into
loss terms (`loss`). The trainer knows neither videos nor diffusion.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.distributed.seeding import generator


@dataclass(frozen=True)
class Draw:
    """Where in a run a batch is drawn: the only source of its randomness."""

    seed: int
    step: int
    rank: int = 0
    microbatch: int = 0

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator for one purpose ("clips", "noise", ...) of this batch."""
        return generator(self.seed, purpose, self.rank, self.step, self.microbatch)


class Objective(ABC):
    """What is trained, on what, towards what.

    Attributes:
        module: holds every trainable parameter; its state dict is what checkpoints and the moving average keep.
        not_matrices: names of matrix parameters that AdamW takes (first and last layers, embeddings).
    """

    module: nn.Module
    not_matrices: set[str] = set()

    @abstractmethod
    def prepare(self, draw: Draw) -> Any:
        """A batch that depends on `draw` alone."""

    @abstractmethod
    def loss(self, batch: Any, draw: Draw) -> dict[str, Tensor]:
        """Loss terms, each (B,), already weighted; the trainer minimises the mean of their sum.

        Terms whose name starts with "_" are reported and not minimised.
        """

    def set_up(self, cache: Path) -> None:  # noqa: B027
        """Work before the first step, such as encoding latents; results kept in `cache` serve a resumed run."""

    def compile_blocks(self) -> None:  # noqa: B027
        """Compiles what is repeated and worth it; nothing by default."""

    def preview(self, folder: Path, step: int) -> dict[str, float]:
        """Writes samples of the current weights into `folder`; returns figures to log. Nothing by default."""
        return {}

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes the current weights as a folder that the rest of the package loads."""
