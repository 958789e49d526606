"""What a run would take before it is started: memory of a rank by parts, work and communication of a step, time.

The objective is built without data (`build("meta")`), its losses and their backward pass are traced as they would run,
and so is the work of frozen networks that prepare a batch. What ranks share and send follows `parallel.py`.

Letters: B clips, T latent frames, S patches of a frame, D features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from opensora.data.batch import BatchShape
from opensora.distributed.seeding import Draw
from opensora.distributed.sequence_parallel import bytes_switched
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.planning.autocast import ImaginedAutocast
from opensora.planning.devices import Device
from opensora.planning.frozen import FrozenNetworks
from opensora.planning.planner import ACCELERATOR, CPU, Surcharge
from opensora.planning.step import Step, Work, count_work, layers_of, trace_step
from opensora.planning.tracing import weight_bytes
from opensora.training.config import LoopConfig, Recipe
from opensora.training.objective import Objective
from opensora.training.parallel import wrap_blocks

FLOAT32, BFLOAT16 = 4, 2  # bytes
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


@dataclass(frozen=True)
class Memory:
    """What one rank takes, in bytes.

    Attributes:
        weights: of the trained module, its frozen parameters included.
        gradients: when all of them are ready.
        optimizer: accumulated by it.
        average: moving average of the weights.
        critic: weights, gradients and optimiser of a critic.
        frozen: networks that are used and not trained.
        activations: alive at the worst moment of a training step, gradients of weights left out.
        preparation: alive at the worst moment while frozen networks prepare a batch.
        communication: weights that were gathered and gradients on their way.
        checkpoint: the copy that is written while training goes on, where that is in the same memory.
        surcharge: of the process and its allocator.
        total: needed at the worst moment; not all of the above are there at once.
        worst: label of the batch that decides.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    critic: int
    frozen: int
    activations: int
    preparation: int
    communication: int
    checkpoint: int
    surcharge: int
    total: int
    worst: str


@dataclass(frozen=True)
class BatchCost:
    """What a step of one size of batches takes on each rank.

    Attributes:
        shape: the size.
        tokens: of the batch, None for networks that know none.
        flops: of forward and backward pass, nothing computed twice.
        recomputed_flops: computed again in the backward pass.
        frozen_flops: of frozen networks that prepare the batch.
        sent_bytes: for sharded weights, or for gradients that are averaged.
        switched_bytes: for clips that ranks share.
        seconds: at the stated share of the peak, or while everything is sent if that takes longer; None without a peak.
        sending_s: of all that is sent; None where the speed of links is not known.
    """

    shape: BatchShape
    tokens: int | None
    flops: int
    recomputed_flops: int
    frozen_flops: int
    sent_bytes: int
    switched_bytes: int
    seconds: float | None
    sending_s: float | None

    @property
    def all_flops(self) -> int:
        return self.flops + self.recomputed_flops + self.frozen_flops


class TrainingPlan:
    """Answers for one recipe on one kind of device.

    Args:
        recipe: what would run.
        device: where.
        world_size: ranks.
        mfu: share of the device's peak that everything computed reaches.

    Raises:
        OpenSoraError: ranks that do not fit the recipe, or a recipe whose batches are not known beforehand.
    """

    def __init__(self, recipe: Recipe, device: Device, world_size: int = 1, mfu: float = 0.4) -> None:
        if world_size % recipe.loop.sequence_parallel:
            raise OpenSoraError(
                f"loop.sequence_parallel is {recipe.loop.sequence_parallel} and the run has {world_size} ranks; "
                "give a multiple as --world-size, or change the setting"
            )
        self.device, self.world_size, self.mfu = device, world_size, mfu
        self.loop = recipe.loop
        self.networks = _Networks(recipe)

    def changed(self, **changes: Any) -> "TrainingPlan":
        """The same with another `world_size`, or with other settings of the loop; nothing is built anew."""
        plan = object.__new__(TrainingPlan)
        plan.device, plan.mfu, plan.networks = self.device, self.mfu, self.networks
        plan.world_size = changes.pop("world_size", self.world_size)
        plan.loop = replace(self.loop, **changes)
        return plan

    @property
    def is_sharded(self) -> bool:
        return self.loop.sharding == "full" and self.world_size > 1

    @property
    def num_data_ranks(self) -> int:
        return self.world_size // self.loop.sequence_parallel

    @property
    def peak_tflops(self) -> float | None:
        """Of one device; the recipe knows it where nobody else does."""
        return self.device.peak_tflops or self.loop.peak_tflops

    def parameters(self) -> list[Parameters]:
        """Every network's."""
        return self.networks.parameters()

    # --- memory -------------------------------------------------------------------------------------------------------

    @cached_property
    def memory(self) -> Memory:
        """Of one rank, at the worst of the largest batches."""
        return max((self.memory_of(shape) for shape in self.networks.largest), key=lambda memory: memory.total)

    def memory_of(self, shape: BatchShape) -> Memory:
        """Of one rank whose batches have this size."""
        networks, loop = self.networks, self.loop
        share = 1 / self.world_size if self.is_sharded else 1.0
        trained = networks.trained_numbers * FLOAT32
        gradients = trained * share
        if self.is_sharded and loop.microbatches > 1:
            gradients += trained  # unsharded until the last microbatch
        state = {
            "weights": round(networks.module_bytes * share),
            "optimizer": round(networks.optimizer_numbers(loop) * FLOAT32 * share),
            "average": round(trained * share),
            "critic": networks.critic_bytes,
            "frozen": networks.frozen_bytes,
        }
        step = networks.step(shape, loop.activation_checkpointing, loop.precision, self.is_sharded, self.device.is_cpu)
        preparation = networks.preparation_bytes(shape)
        sharing = loop.sequence_parallel
        communication = self._communication_bytes()
        # Gradients of a step's first batch grow while activations shrink; later ones find them all there.
        moments = [
            alive / sharing + (gradients if loop.microbatches > 1 else min(ready * share, gradients))
            for alive, ready in step.moments()
        ]
        # The first batch is prepared before there are any gradients.
        before = preparation + (gradients if loop.microbatches > 1 else 0)
        worst = max(max(moments) + communication, before, gradients)
        # What a checkpoint remembers is copied first.
        kept = state["weights"] + state["optimizer"] + state["average"] + state["critic"]
        checkpoint = kept if self.device.is_cpu and loop.checkpoint_every else 0
        fixed = sum(state.values()) + checkpoint
        surcharge = self.surcharge.total_bytes(0, round(worst)) - round(worst)
        return Memory(
            gradients=round(gradients),
            activations=round(step.activation_bytes / sharing),
            preparation=preparation,
            communication=communication,
            checkpoint=checkpoint,
            surcharge=surcharge,
            total=round(fixed + worst) + surcharge,
            worst=shape.label,
            **state,
        )

    @property
    def surcharge(self) -> Surcharge:
        return CPU if self.device.is_cpu else ACCELERATOR

    def fits(self) -> bool:
        """Whether a device has as much memory as a rank needs."""
        return self.memory.total <= self.device.memory_bytes

    def ways_to_fit(self) -> list[tuple[list[str], "TrainingPlan"]]:
        """Changes that each make a run fit that does not, with the options that make them.

        What costs time alone comes before what costs devices, and both before what changes the training.
        """
        loop, ways = self.loop, []
        for recompute in ("selective", "full"):
            if self.networks.depth and loop.activation_checkpointing not in ("full", recompute):
                setting = {"activation_checkpointing": recompute}
                ways.append(([f"loop.activation_checkpointing={recompute}"], self.changed(**setting)))
        if loop.sharding == "none" and self.world_size > 1:
            ways.append((["loop.sharding=full"], self.changed(sharding="full")))
        for ranks in (2, 4, 8):
            if self.networks.depth and ranks > loop.sequence_parallel:
                size = max(self.world_size, ranks)
                options = [f"loop.sequence_parallel={ranks}"]
                options += [f"--world-size {size}"] if size > self.world_size else []
                ways.append((options, self.changed(sequence_parallel=ranks, world_size=size)))
        if loop.sharding == "full":
            sizes = [self.world_size * 2**power for power in range(1, 8)]
            ways += [([f"--world-size {size}"], self.changed(world_size=size)) for size in sizes]
        fitting = [(options, plan) for options, plan in ways if plan.fits()]
        if not fitting and self.networks.depth and loop.activation_checkpointing != "full":
            # Together with the first of them.
            again = self.changed(activation_checkpointing="full").ways_to_fit()
            fitting = [(["loop.activation_checkpointing=full", *options], plan) for options, plan in again]
        seen: set[str] = set()  # of each kind the first
        return [
            (options, plan)
            for options, plan in fitting
            if not (
                (kind := " ".join(option.split("=")[0].split(" ")[0] for option in options)) in seen or seen.add(kind)
            )
        ]

    def _communication_bytes(self) -> int:
        """Buffers: of sharded weights, the block that computes and the next one, each also on its way; gradients of
        the block that is done and of the one before, on their way in float32."""
        if self.world_size == 1:
            return 0
        networks, gathered = self.networks, self._gathered_bytes
        if not self.is_sharded:
            return min(2**24, networks.trained_numbers) * FLOAT32
        block = networks.largest_block
        outside = networks.module_numbers - networks.block_numbers
        return outside * gathered + block * (3 * gathered + gathered + 2 * FLOAT32)

    @property
    def _gathered_bytes(self) -> int:
        """Of one weight that was gathered."""
        return BFLOAT16 if self.loop.precision == "bf16" else FLOAT32

    # --- work and time ------------------------------------------------------------------------------------------------

    @cached_property
    def batches(self) -> list[BatchCost]:
        """Costs of every size."""
        return [self.cost(shape) for shape in self.networks.shapes]

    def cost(self, shape: BatchShape) -> BatchCost:
        """A step of batches of this size, all microbatches, on each rank."""
        networks, loop = self.networks, self.loop
        work, many, sharing = networks.work(shape), loop.microbatches, loop.sequence_parallel
        again = round(_repeated(work) * networks.recomputed_share(loop, self.is_sharded, self.device.is_cpu))
        frozen = networks.frozen_flops(shape)
        tokens, switched = None, 0
        if work.tokens is not None:
            tokens = 1
            for size in work.tokens[:-1]:
                tokens *= size
            if sharing > 1:
                passes = 2 + (loop.activation_checkpointing == "full")
                value = BFLOAT16 if loop.precision == "bf16" else FLOAT32
                switched = passes * bytes_switched(*work.tokens, networks.depth, sharing, value)  # type: ignore[misc]
        cost = BatchCost(
            shape=shape,
            tokens=None if tokens is None else tokens * many,
            flops=(work.forward + work.backward) * many // sharing,
            recomputed_flops=again * many // sharing,
            frozen_flops=frozen * many,
            sent_bytes=self._sent_bytes(),
            switched_bytes=switched * many,
            seconds=None,
            sending_s=None,
        )
        sending_s = self._sending_s(cost)
        if self.peak_tflops is None:
            return replace(cost, sending_s=sending_s)
        seconds = cost.all_flops / (self.peak_tflops * 1e12 * self.mfu)
        return replace(cost, seconds=max(seconds, sending_s or 0.0), sending_s=sending_s)

    def mean(self, value: Callable[[BatchCost], float]) -> float:
        """Of all batches by their shares."""
        return sum(cost.shape.share * value(cost) for cost in self.batches)

    def step_s(self) -> float | None:
        """A step's mean duration."""
        return None if self.peak_tflops is None else self.mean(lambda cost: cost.seconds or 0.0)

    def logged_mfu(self) -> float | None:
        """What the run would log: without what is computed again, and without frozen networks."""
        step_s = self.step_s()
        if step_s is None or self.peak_tflops is None:
            return None
        return self.mean(lambda cost: cost.flops) / (step_s * self.peak_tflops * 1e12)

    def _sent_bytes(self) -> int:
        """By each rank in a step, for weights and gradients."""
        others, networks, many = (self.world_size - 1) / self.world_size, self.networks, self.loop.microbatches
        if not self.is_sharded:
            return round(2 * others * networks.trained_numbers * FLOAT32)  # ring: scatter, then gather
        gathered = networks.module_numbers + networks.block_numbers  # blocks once more for the backward pass
        return round(others * (many * gathered * self._gathered_bytes + networks.trained_numbers * FLOAT32))

    def _sending_s(self, cost: BatchCost) -> float | None:
        weights_gb_s = self.device.slowest_link_gb_s(self.world_size)
        clips_gb_s = self.device.slowest_link_gb_s(self.loop.sequence_parallel)
        if self.world_size == 1:
            return 0.0
        if weights_gb_s is None or clips_gb_s is None:
            return None
        return (cost.sent_bytes / weights_gb_s + cost.switched_bytes / clips_gb_s) / 1e9


class _Networks:
    """An objective's networks without data, and what was traced of them; remembered for every plan."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.objective: Objective = recipe.objective.build("meta")
        self.shapes = self.objective.shapes()
        if not self.shapes:
            raise OpenSoraError(f"{recipe.name} does not say which batches it has, so there is nothing to plan")
        module = self.objective.module
        self.module_bytes = weight_bytes(module)
        self.module_numbers = sum(p.numel() for p in module.parameters())
        self.trained_numbers = sum(p.numel() for p in module.parameters() if p.requires_grad)
        blocks = [sum(p.numel() for p in block.parameters()) for block in self.objective.blocks()]
        self.block_numbers, self.largest_block = sum(blocks), max(blocks, default=0)
        self.depth = len(layers_of(self.objective.blocks()))
        critic, self.frozen = self.objective.critic, self.objective.frozen
        # Weights, gradients and both of AdamW's moments.
        self.critic_bytes = 0 if critic is None else 4 * weight_bytes(critic)
        self.frozen_bytes = sum(weight_bytes(network) for network in self.frozen.values())
        self._frozen = FrozenNetworks(self.frozen.values())
        self._work: dict[BatchShape, Work] = {}
        self._steps: dict[Any, Step] = {}
        self._frozen_flops: dict[Any, int] = {}

    def parameters(self) -> list[Parameters]:
        critic = {} if self.objective.critic is None else {"critic": self.objective.critic}
        networks = {**dict(self.objective.module.named_children()), **self.frozen, **critic}
        counted = []
        for name, network in networks.items():
            trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
            everything = sum(p.numel() for p in network.parameters())
            counted.append(Parameters(name, trained, everything - trained))
        return counted

    def optimizer_numbers(self, loop: LoopConfig) -> int:
        """What the optimiser accumulates: Muon one number for each of a matrix, AdamW two for each of the rest."""
        numbers = 0
        for name, parameter in self.objective.module.named_parameters():
            muon = loop.optimizer.matrices == "muon" and parameter.ndim >= 2 and name not in self.objective.not_matrices
            numbers += parameter.numel() * (1 if muon else 2) if parameter.requires_grad else 0
        return numbers

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
            self._work[shape] = count_work(lambda: self._loss(shape), self.objective.blocks())
        return self._work[shape]

    def step(self, shape: BatchShape, recompute: Any, precision: str, sharded: bool, on_cpu: bool) -> Step:
        """Of one batch, traced."""
        key = (shape, recompute, precision, sharded, on_cpu)
        if key not in self._steps:
            autocast = ImaginedAutocast(enabled=precision == "bf16", on_accelerator=not on_cpu)
            dtype = torch.bfloat16 if sharded and precision == "bf16" else torch.float32
            with _recomputing(self.objective.blocks(), recompute), _gathered(self.objective.module, dtype):
                self._steps[key] = trace_step(
                    lambda: self._loss(shape), self.objective.module, self.objective.blocks(), autocast
                )
        return self._steps[key]

    def recomputed_share(self, loop: LoopConfig, sharded: bool, on_cpu: bool) -> float:
        """Of the work that may be computed again, what is."""
        if loop.activation_checkpointing == "none":
            return 0.0
        shape = self.largest[0]
        work = self.work(shape)
        step = self.step(shape, loop.activation_checkpointing, loop.precision, sharded, on_cpu)
        return max(0, step.flops - work.forward - work.backward) / max(1, _repeated(work))

    def frozen_flops(self, shape: BatchShape) -> int:
        """Of frozen networks that prepare one batch: as many as for one clip, clip by clip."""
        key = (shape.num_frames, shape.height, shape.width)
        if key not in self._frozen_flops:
            with _undivided(self.frozen.values()):
                rehearsed = self.objective.rehearse(replace(shape, batch_size=1)).values()
                self._frozen_flops[key] = sum(self._frozen.trace(rehearse).flops for rehearse in rehearsed)
        return shape.batch_size * self._frozen_flops[key]

    def preparation_bytes(self, shape: BatchShape) -> int:
        """The most that any of them takes for one batch, beside the clips themselves."""
        few = max(1, -(-8 // shape.num_frames))  # clips of some micro batches of frames
        sizes = [shape.batch_size] if shape.batch_size <= 2 * few else [few, 2 * few]
        found = [
            {name: self._frozen.trace(rehearse).activation_bytes for name, rehearse in rehearsed.items()}
            for rehearsed in (self.objective.rehearse(replace(shape, batch_size=size)) for size in sizes)
        ]
        if len(found) == 1:
            return max(found[0].values(), default=0)
        # Beyond that every clip adds the same.
        more = (shape.batch_size - 2 * few) / few
        return max((round(b + more * (b - a)) for a, b in zip(*(f.values() for f in found), strict=True)), default=0)

    def _loss(self, shape: BatchShape) -> Tensor:
        terms = self.objective.loss(self.objective.imagine(shape), Draw(0, 0))
        return torch.stack([term.mean() for name, term in terms.items() if not name.startswith("_")]).sum()


def _repeated(work: Work) -> int:
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
    """Weights in the precision in which they are gathered."""
    before = [(parameter, parameter.data) for parameter in module.parameters()]
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
    autoencoders = [network for network in networks if isinstance(network, VideoAutoencoder)]
    before = [autoencoder.micro_batch_size for autoencoder in autoencoders]
    for autoencoder in autoencoders:
        autoencoder.micro_batch_size = None
    try:
        yield
    finally:
        for autoencoder, size in zip(autoencoders, before, strict=True):
            autoencoder.micro_batch_size = size
