"""What a training run is: a task and the loop around it."""

from dataclasses import dataclass, field
from typing import Literal

from opensora.errors import OpenSoraError
from opensora.training.optimizer import OptimizerConfig
from opensora.training.task import TaskConfig
from opensora.training.trackers import TrackerName

NO_PREVIEW = (
    "objective.preview is none, so nothing is shown; name prompts by 'objective.preview.prompts=[\"a cat\"]', or leave "
    "loop.preview_every out"
)


def critic_optimizer() -> OptimizerConfig:
    """What discriminators are usually trained with: short memory, no schedule."""
    return OptimizerConfig(matrices="adamw", lr=1e-4, betas=(0.5, 0.9), warmup_steps=0, decay=0.0)


@dataclass(frozen=True)
class LoopConfig:
    """The loop around a task.

    Attributes:
        steps: optimiser steps in all.
        seed: root of every random draw.
        microbatches: batches accumulated into one step.
        precision: "bf16" runs matrix products under autocast; weights stay float32.
        compile: compile the repeated blocks of the network; faster after a first step of many seconds. A compiled run
            resumes up to rounding only: its kernels depend on the batch shapes that the process has met.
        activation_checkpointing: what of a block is computed again in the backward pass to save memory: "full" all of
            it, "selective" what is cheap (results of matrix products and attention are kept), "none" nothing.
        sharding: where several ranks train together. "full": each keeps its share of weights, gradients, averages and
            optimiser state, and gathers a block when it computes it (FSDP). "none": each keeps all of them.
        sequence_parallel: ranks that share each clip, a part of its tokens each; divides the number of ranks.
        ema_decay: decay of the moving average of the weights.
        ema_warmup: begin the average at min(ema_decay, (1 + step) / (10 + step)), so that early averages follow the
            weights; without it the decay is constant, as in the published models' training.
        max_grad_norm: gradients are scaled down to this global norm.
        max_bad_steps: non-finite steps in a row after which the run stops; each is skipped and counted.
        log_every, checkpoint_every, preview_every: steps between figures, checkpoints, samples (0 = never).
        keep_checkpoints: newest checkpoints kept.
        prefetch: batches that the data are told of ahead of time.
        trackers: what shows figures and previews besides the run's own files, see `trackers`.
        peak_tflops: what one device can do, in 10^12 operations a second; with it the share in use (MFU) is logged.
        optimizer: rates and decay.
        critic: the same for the critic, where the task has one.
    """

    steps: int
    seed: int = 0
    microbatches: int = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    sharding: Literal["full", "none"] = "full"
    sequence_parallel: int = 1
    ema_decay: float = 0.998
    ema_warmup: bool = True
    max_grad_norm: float = 1.0
    max_bad_steps: int = 10
    log_every: int = 20
    checkpoint_every: int = 200
    preview_every: int = 0
    keep_checkpoints: int = 2
    prefetch: int = 4
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    peak_tflops: float | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: OptimizerConfig = field(default_factory=critic_optimizer)

    def __post_init__(self) -> None:
        for name in ("steps", "microbatches", "sequence_parallel", "max_bad_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise OpenSoraError(f"loop.{name} is {getattr(self, name)}; give 1 or more")
        for name in ("log_every", "checkpoint_every", "preview_every"):
            if getattr(self, name) < 0:
                raise OpenSoraError(f"loop.{name} is {getattr(self, name)}; give a number of steps, or 0 for never")
        if self.prefetch < 0:
            raise OpenSoraError(f"loop.prefetch is {self.prefetch}; give 0 or more")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise OpenSoraError(f"loop.peak_tflops is {self.peak_tflops:g}; give a number above 0")
        if not self.max_grad_norm > 0:
            raise OpenSoraError(f"loop.max_grad_norm is {self.max_grad_norm}; give a number above 0")
        if not 0 <= self.ema_decay < 1:
            raise OpenSoraError(f"loop.ema_decay is {self.ema_decay}; give a number in [0, 1)")

    def idle(self) -> dict[str, str]:
        """Settings that change nothing, and why; see `overrides.apply_overrides`."""
        idle = {}
        if not 0 < self.checkpoint_every < self.steps:
            idle["keep_checkpoints"] = f"of {self.steps} steps, loop.checkpoint_every={self.checkpoint_every} keeps one"
        if not self.ema_decay:
            idle["ema_warmup"] = "loop.ema_decay is 0, so there is no average"
        if self.preview_every > self.steps:
            idle["preview_every"] = f"the run has {self.steps} steps; give fewer"
        return idle


@dataclass(frozen=True)
class Recipe:
    """A complete training configuration.

    Attributes:
        name: recipe name, also the default name of the run's folder.
        objective: what is trained, on what, towards what.
        loop: for how long and how.
    """

    name: str
    objective: TaskConfig
    loop: LoopConfig

    def idle(self) -> dict[str, str]:
        """Settings that change nothing, and why; see `overrides.apply_overrides`."""
        idle = {}
        if self.loop.preview_every and getattr(self.objective, "preview", self) is None:
            idle["loop.preview_every"] = NO_PREVIEW
        if not self.loop.preview_every:
            never = "loop.preview_every is 0, so previews never come; give a number of steps"
            idle |= {"objective.preview_batches": never}
            if getattr(self.objective, "preview", None) is not None:
                idle["objective.preview"] = never
        if getattr(self.objective, "discriminator", None) is None:
            idle["loop.critic"] = "nothing is trained against the model; objective.discriminator is none"
        return idle
