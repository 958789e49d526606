"""What a training run is: an objective and the loop around it."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

from opensora.errors import OpenSoraError
from opensora.training.objective import Objective
from opensora.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class LoopConfig:
    """The loop around an objective.

    Attributes:
        steps: optimiser steps in all.
        seed: root of every random draw.
        microbatches: batches accumulated into one step.
        precision: "bf16" runs matrix products under autocast; weights stay float32.
        compile: compile the repeated blocks of the network; faster after a first step of many seconds. A compiled run
            resumes up to rounding only: its kernels depend on the batch shapes that the process has met.
        ema_decay: decay of the moving average of the weights.
        max_grad_norm: gradients are scaled down to this global norm.
        max_bad_steps: non-finite steps in a row after which the run stops; each is skipped and counted.
        log_every, checkpoint_every, preview_every: steps between figures, checkpoints, samples (0 = never).
        keep_checkpoints: newest checkpoints kept.
        optimizer: rates and decay.
    """

    steps: int
    seed: int = 0
    microbatches: int = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    ema_decay: float = 0.998
    max_grad_norm: float = 1.0
    max_bad_steps: int = 10
    log_every: int = 20
    checkpoint_every: int = 200
    preview_every: int = 0
    keep_checkpoints: int = 2
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "microbatches", "max_bad_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise OpenSoraError(f"loop.{name} is {getattr(self, name)}; give 1 or more")
        for name in ("log_every", "checkpoint_every", "preview_every"):
            if getattr(self, name) < 0:
                raise OpenSoraError(f"loop.{name} is {getattr(self, name)}; give a number of steps, or 0 for never")
        if not 0 <= self.ema_decay < 1:
            raise OpenSoraError(f"loop.ema_decay is {self.ema_decay}; give a number in [0, 1)")


class ObjectiveConfig(Protocol):
    """A dataclass that describes an objective and builds it."""

    def build(self, device: str) -> Objective: ...


@dataclass(frozen=True)
class Recipe:
    """A complete training configuration.

    Attributes:
        name: recipe name, also the default name of the run's folder.
        objective: what is trained, on what, towards what.
        loop: for how long and how.
    """

    name: str
    objective: ObjectiveConfig
    loop: LoopConfig
