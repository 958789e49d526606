"""What a run would take before it is started: memory of a rank by parts, work and communication of a step, time.

The task is built without data on the meta device (`plan()`), its losses and their backward pass are traced as they
would run, and so is the work of frozen networks that prepare a batch. What ranks share and send follows `parallel.py`.

Letters: B clips, T latent frames, S patches of a frame, D features.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from opensora.data.batch import BatchShape
from opensora.distributed.sequence_parallel import bytes_switched
from opensora.errors import OpenSoraError
from opensora.planning.devices import Device
from opensora.planning.planner import ACCELERATOR, CPU, Surcharge
from opensora.training.config import Recipe
from opensora.training.plan_networks import Parameters, PlannedNetworks, repeatable

FLOAT32, BFLOAT16 = 4, 2  # bytes


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
                "give a multiple as `world_size`, or change the setting"
            )
        self.device, self.world_size, self.mfu = device, world_size, mfu
        self.loop = recipe.loop
        self.networks = PlannedNetworks(recipe)

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
            "optimizer": round(networks.optimizer_bytes(loop) * share),
            "average": round(trained * share),
            "critic": networks.critic_bytes,
            "frozen": networks.frozen_bytes,
        }
        step = networks.step(shape, loop.activation_checkpointing, loop.precision, self.is_sharded, self.device.is_cpu)
        preparation = networks.preparation_bytes(shape)
        sharing = loop.sequence_parallel
        communication = self._communication_bytes()
        # Gradients of a step's first batch grow while activations shrink; later ones find them all there.
        kept_share = share * FLOAT32 / self._gathered_bytes if self.is_sharded else share
        moments = [
            alive / sharing + (gradients if loop.microbatches > 1 else ready * kept_share)
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
        """Changes that each make a run fit that does not, with the options that make them; of each kind the smallest.

        What costs time alone comes before what costs devices.
        """
        found = [next((way for way in kind if way[1].fits()), None) for kind in self._ways()]
        fitting = [way for way in found if way is not None]
        if not fitting and self._can_recompute("full"):  # then together with something else
            again = self.changed(activation_checkpointing="full").ways_to_fit()
            fitting = [(["loop.activation_checkpointing=full", *options], plan) for options, plan in again]
        return fitting

    def _ways(self) -> Iterator[Iterator[tuple[list[str], "TrainingPlan"]]]:
        """Kinds of changes, each from small to large."""
        loop, size = self.loop, self.world_size
        yield (
            ([f"loop.activation_checkpointing={what}"], self.changed(activation_checkpointing=what))
            for what in ("selective", "full")
            if self._can_recompute(what)
        )
        if loop.sharding == "none" and size > 1:
            yield iter([(["loop.sharding=full"], self.changed(sharding="full"))])
        if self.networks.depth:
            yield (
                (
                    [f"loop.sequence_parallel={ranks}", *([f"`world_size` {ranks}"] if size % ranks else [])],
                    self.changed(sequence_parallel=ranks, world_size=ranks if size % ranks else size),
                )
                for ranks in (2, 4, 8)
                if ranks > loop.sequence_parallel
            )
        if loop.sharding == "full":
            sizes = [size * 2**power for power in range(1, 8)]
            yield (([f"`world_size` {size}"], self.changed(world_size=size)) for size in sizes)

    def _can_recompute(self, what: str) -> bool:
        """Whether that would be computed again that is not yet."""
        order = ("none", "selective", "full")
        return bool(self.networks.blocks) and order.index(what) > order.index(self.loop.activation_checkpointing)

    def smaller_batches(self) -> dict[str, int]:
        """Clips that the largest batches may have at most, by label, where they have more; 0 if even one is too much.

        Estimated from what each clip adds, then traced.
        """
        fitting = {}
        for shape in self.networks.largest:
            size, memory = shape.batch_size, self.memory_of(shape)
            while size and memory.total > self.device.memory_bytes:
                of_clips = max(memory.activations, memory.preparation) * (1 + self.surcharge.share_of_activations)
                share = 1 - (memory.total - self.device.memory_bytes) / of_clips
                size = min(size - 1, max(0, math.floor(size * share)))
                memory = self.memory_of(replace(shape, batch_size=size)) if size else memory
            if size < shape.batch_size:
                fitting[shape.label] = size
        return fitting

    def _communication_bytes(self) -> int:
        """Buffers: of sharded weights, the block that computes and the next one, each also on its way; gradients of
        the block that is done and of the one before, on their way in float32."""
        if self.world_size == 1:
            return 0
        networks = self.networks
        if not self.is_sharded:
            return min(2**24, networks.trained_numbers) * FLOAT32
        module, blocks = networks.gathered_bytes(self._gathered_bytes)
        return module - sum(blocks) + 4 * max(blocks, default=0) + 2 * networks.largest_trained_block * FLOAT32

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
        again = round(repeatable(work) * networks.recomputed_share(loop, self.is_sharded, self.device.is_cpu))
        frozen = networks.frozen_flops(shape)
        tokens, switched = None, 0
        if work.tokens is not None:
            tokens = 1
            for size in work.tokens[:-1]:
                tokens *= size
            if sharing > 1:
                passes = 2 + (loop.activation_checkpointing == "full")
                value = BFLOAT16 if loop.precision == "bf16" else FLOAT32
                switched = passes * bytes_switched(*networks.switched(work.tokens), networks.depth, sharing, value)
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
        module, blocks = networks.gathered_bytes(self._gathered_bytes)
        gathered = module + sum(blocks)  # blocks once more for the backward pass
        return round(others * (many * gathered + networks.trained_numbers * FLOAT32))

    def _sending_s(self, cost: BatchCost) -> float | None:
        weights_gb_s = self.device.slowest_link_gb_s(self.world_size)
        clips_gb_s = self.device.slowest_link_gb_s(self.loop.sequence_parallel)
        if self.world_size == 1:
            return 0.0
        if weights_gb_s is None or clips_gb_s is None:
            return None
        return (cost.sent_bytes / weights_gb_s + cost.switched_bytes / clips_gb_s) / 1e9
