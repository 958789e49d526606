"""What a plan knows of a recipe's networks: their sizes, and what was traced of them, remembered for every question."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from opensora.data.batch import BatchShape
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.codec import VideoCodec
from opensora.planning.autocast import MetaAutocast
from opensora.planning.frozen import FrozenNetworks
from opensora.planning.step import Step, Work, count_work, layers_of, trace_step
from opensora.planning.tracing import weight_bytes
from opensora.training.adamw8 import BYTES_OF_A_NUMBER
from opensora.training.config import LoopConfig, Recipe
from opensora.training.parallel import wrap_blocks
from opensora.training.task import PlannableConfig

TRACED_SHAPES = 2  # of the largest batches, whose worst decides


@dataclass(frozen=True)
class Parameters:
    """Of one network.

    Attributes:
        name: "transformer", "autoencoder", ...
        trained, frozen: how many.
    """

    name: str
    trained: int
    frozen: int


class PlannedNetworks:
    """A task's networks without data, and what was traced of them; remembered for every plan."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        if not isinstance(recipe.objective, PlannableConfig):
            raise OpenSoraError(f"{recipe.name} does not say which batches it has, so there is nothing to plan")
        self.task_plan = recipe.objective.plan()
        self.setup, self.shapes = self.task_plan.setup, self.task_plan.shapes()
        self.blocks = self.setup.partition.blocks
        self.module = module = self.setup.task.module
        self.module_bytes = weight_bytes(module)
        self.trained_numbers = _trained_numbers(module)
        self.largest_trained_block = max((_trained_numbers(block) for block in self.blocks), default=0)
        self.depth = sum(len(layers_of(stack)) for stack in self.setup.partition.stacks)
        self.critic = None if self.setup.critic is None else self.setup.critic.module
        self.frozen = self.setup.frozen
        # Weights, gradients and both of AdamW's moments.
        self.critic_bytes = 0 if self.critic is None else 4 * weight_bytes(self.critic)
        self.frozen_bytes = sum(weight_bytes(network) for network in self.frozen.values())
        self._frozen = FrozenNetworks(self.frozen.values())
        self._work: dict[BatchShape, Work] = {}
        self._steps: dict[Any, Step] = {}
        self._frozen_flops: dict[Any, int] = {}

    def parameters(self) -> list[Parameters]:
        critic = {} if self.critic is None else {"critic": self.critic}
        networks = {**dict(self.module.named_children()), **self.frozen, **critic}
        counted = []
        for name, network in networks.items():
            trained = _trained_numbers(network)
            everything = sum(p.numel() for p in network.parameters())
            counted.append(Parameters(name, trained, everything - trained))
        return counted

    def gathered_bytes(self, of_one: int) -> tuple[int, list[int]]:
        """Of the module and of each of its blocks when ranks have gathered it: eight bits stay eight bits.

        Args:
            of_one: bytes of any other weight then.
        """

        def of(module: nn.Module) -> int:
            return sum(p.numel() * (of_one if p.is_floating_point() else 1) for p in module.parameters())

        return of(self.module), [of(block) for block in self.blocks]

    def optimizer_bytes(self, loop: LoopConfig) -> int:
        """What the optimiser accumulates: Muon one number for each of a matrix, AdamW two for each of the rest.

        They are float32, or in eight bits where that is asked for.
        """
        total = 0.0
        for name, parameter in self.module.named_parameters():
            is_matrix = parameter.ndim >= 2
            if loop.optimizer.state_bits == 8 and is_matrix:
                of_one = BYTES_OF_A_NUMBER
            else:
                muon = loop.optimizer.matrices == "muon" and is_matrix and name not in self.setup.not_matrices
                of_one = torch.float32.itemsize * (1 if muon else 2)
            total += parameter.numel() * of_one if parameter.requires_grad else 0
        return round(total)

    @cached_property
    def largest(self) -> list[BatchShape]:
        """The sizes that may be the worst, those with the most tokens or pixels first."""

        def size(shape: BatchShape) -> int:
            return shape.batch_size * shape.num_frames * shape.height * shape.width

        def tokens(shape: BatchShape) -> int:
            found = self.work(shape).tokens
            return size(shape) if found is None else torch.Size(found[:-1]).numel()

        return sorted(self.shapes, key=tokens, reverse=True)[:TRACED_SHAPES]

    def work(self, shape: BatchShape) -> Work:
        """Of one batch."""
        if shape not in self._work:
            self._work[shape] = count_work(lambda: self._loss(shape), *self.setup.partition.stacks)
        return self._work[shape]

    def switched(self, tokens: Sequence[int]) -> tuple[int, int, int, int]:
        """What ranks that share a clip switch, see `VideoTransformer.switched`."""
        transformer: Any = self.module["transformer"]  # type: ignore[index]
        return transformer.switched(tokens)

    def step(self, shape: BatchShape, recompute: Any, precision: str, sharded: bool, on_cpu: bool) -> Step:
        """Of one batch, traced."""
        key = (shape, recompute, precision, sharded, on_cpu)
        if key not in self._steps:
            autocast = MetaAutocast(enabled=precision == "bf16", on_accelerator=not on_cpu)
            dtype = torch.bfloat16 if sharded and precision == "bf16" else torch.float32
            with _recomputing(self.blocks, recompute), _gathered(self.module, dtype):
                self._steps[key] = trace_step(lambda: self._loss(shape), self.module, self.blocks, autocast)
        return self._steps[key]

    def recomputed_share(self, loop: LoopConfig, sharded: bool, on_cpu: bool) -> float:
        """Of the work that may be computed again, what is."""
        if loop.activation_checkpointing == "none":
            return 0.0
        shape = self.largest[0]
        work = self.work(shape)
        step = self.step(shape, loop.activation_checkpointing, loop.precision, sharded, on_cpu)
        return max(0, step.flops - work.forward - work.backward) / max(1, repeatable(work))

    def frozen_flops(self, shape: BatchShape) -> int:
        """Of frozen networks that prepare one batch: as many as for one clip, clip by clip."""
        key = (shape.num_frames, shape.height, shape.width)
        if key not in self._frozen_flops:
            with _undivided(self.frozen.values()):
                workloads = self.task_plan.frozen_workloads(replace(shape, batch_size=1)).values()
                self._frozen_flops[key] = sum(self._frozen.trace(workload).flops for workload in workloads)
        return shape.batch_size * self._frozen_flops[key]

    def preparation_bytes(self, shape: BatchShape) -> int:
        """The most that any frozen network takes while it prepares a batch."""
        workloads = self.task_plan.frozen_workloads(shape).values()
        return max((self._frozen.trace(workload).activation_bytes for workload in workloads), default=0)

    def _loss(self, shape: BatchShape) -> Tensor:
        terms = self.setup.task.loss(self.task_plan.meta_batch(shape), BatchKey(0, 0))
        return torch.stack([term.mean() for name, term in terms.items() if not name.startswith("_")]).sum()


def _trained_numbers(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def repeatable(work: Work) -> int:
    """The forward pass of layers, or of everything where there are none that are alike."""
    return work.in_layers or work.forward


@contextmanager
def _recomputing(blocks: Sequence[nn.Module], what: Any) -> Iterator[None]:
    """Blocks as the trainer wraps them."""
    wrap_blocks(blocks, what, compiled=False)
    try:
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


@contextmanager
def _gathered(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Weights in the precision in which they are gathered; those in eight bits are gathered as they are."""
    before = [(parameter, parameter.data) for parameter in module.parameters() if parameter.is_floating_point()]
    for parameter, data in before:
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


@contextmanager
def _undivided(networks: Any) -> Iterator[None]:
    """Autoencoders take all frames at once, which computes the same with fewer calls."""
    autoencoders = [network for network in networks if isinstance(network, VideoCodec)]
    before = [autoencoder.micro_batch_size for autoencoder in autoencoders]
    for autoencoder in autoencoders:
        autoencoder.micro_batch_size = None
    try:
        yield
    finally:
        for autoencoder, size in zip(autoencoders, before, strict=True):
            autoencoder.micro_batch_size = size
