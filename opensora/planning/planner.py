"""How much memory a clip takes, stage by stage, and which choices make it fit.

Four choices trade something for memory. Two of them change no result: decoding fewer frames at once, and one branch of
guidance after the other. Offloading keeps each network in memory only while it works, which takes time to bring it in;
half precision rounds. So they are tried in this order: what costs less comes first.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from opensora.pipeline import OpenSoraPipeline
from opensora.planning.stages import COMPONENT_OF, Choices, Clip, alike, network_of, run_stage
from opensora.planning.tracing import Tracer, weight_bytes


@dataclass(frozen=True)
class Surcharge:
    """What a process takes of a device's memory besides weights and activations.

    Attributes:
        fixed_bytes: whatever the clip.
        share_of_activations: for memory that an allocator holds and cannot use.
    """

    fixed_bytes: int
    share_of_activations: float

    def total_bytes(self, weight_bytes: int, activation_bytes: int) -> int:
        """Weights, activations and what comes on top."""
        return weight_bytes + round(activation_bytes * (1 + self.share_of_activations)) + self.fixed_bytes


# Python and the libraries, estimated; freed memory goes back to the system.
CPU = Surcharge(fixed_bytes=800 * 2**20, share_of_activations=0.0)
# Not measured: the driver's context and its libraries' workspaces, and a margin for the caching allocator.
ACCELERATOR = Surcharge(fixed_bytes=700 * 2**20, share_of_activations=0.1)


@dataclass(frozen=True)
class StageMemory:
    """What one stage takes.

    Attributes:
        name: "text", "denoise" or "decode".
        weight_bytes: of its network.
        activation_bytes: everything else at its worst moment.
    """

    name: str
    weight_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """With its network in memory and no other."""
        return self.weight_bytes + self.activation_bytes


class Planner:
    """Answers for one model and one clip; what was traced once is remembered.

    Args:
        tracer: in whose world the pipeline's networks are.
        pipeline: from `meta_pipeline`.
        clip: what is to be made.
        surcharge: of the device it is made on.

    Raises:
        OpenSoraError: a size the model cannot make.
    """

    def __init__(self, tracer: Tracer, pipeline: OpenSoraPipeline, clip: Clip, surcharge: Surcharge = CPU) -> None:
        clip.size.check(pipeline.size_rule())
        self.surcharge = surcharge
        self._tracer, self._pipeline, self._clip = tracer, pipeline, clip
        self._default_micro_batch_size: int | None = pipeline.autoencoder.micro_batch_size
        self._traced = functools.cache(self._trace)

    def default(self, dtype: torch.dtype) -> Choices:
        """What the model does by itself."""
        return Choices(dtype, micro_batch_size=self._default_micro_batch_size)

    def stages(self, choices: Choices) -> tuple[StageMemory, ...]:
        """Every stage's memory, in the order in which they run."""
        return tuple(self._traced(stage, self._deciding(stage, choices)) for stage in COMPONENT_OF)

    def peak(self, choices: Choices) -> tuple[int, int]:
        """Bytes of weights and of activations at the worst moment."""
        stages = self.stages(choices)
        if choices.offload:
            worst = max(stages, key=lambda stage: stage.total_bytes)
            return worst.weight_bytes, worst.activation_bytes
        return sum(stage.weight_bytes for stage in stages), max(stage.activation_bytes for stage in stages)

    def needed_bytes(self, choices: Choices) -> int:
        """What a device must have, surcharge included."""
        return self.surcharge.total_bytes(*self.peak(choices))

    def find(self, memory_bytes: int, dtypes: Sequence[torch.dtype]) -> Choices | None:
        """The first of `alternatives` that a device of so much memory can do; None if it can do none."""
        return next((way for way in self.alternatives(dtypes) if self.needed_bytes(way) <= memory_bytes), None)

    def alternatives(self, dtypes: Sequence[torch.dtype]) -> Iterator[Choices]:
        """All choices there are, what costs less first.

        Args:
            dtypes: precisions, the preferred one first.
        """
        sequential = (False, True) if self._clip.guided else (False,)
        for dtype, offload, one_by_one in itertools.product(dtypes, (False, True), sequential):
            for micro_batch_size in self._micro_batch_sizes():
                yield Choices(dtype, offload, one_by_one, micro_batch_size)

    def smallest(self, choices: Choices, *, offload: bool = True) -> Choices:
        """The choices that take the least memory in the same precision."""
        *_, last = self._micro_batch_sizes()
        return replace(choices, offload=offload, sequential_guidance=self._clip.guided, micro_batch_size=last)

    def _micro_batch_sizes(self) -> Iterator[int | None]:
        """The model's own, then halves of it, down to 1."""
        yield self._default_micro_batch_size
        size = min(self._default_micro_batch_size or self._clip.size.num_frames, self._clip.size.num_frames)
        while size > 1:
            size //= 2
            yield size

    def _deciding(self, stage: str, choices: Choices) -> Choices:
        """The choices without those that make no difference to a stage."""
        sequential = choices.sequential_guidance and stage == "denoise" and self._clip.guided
        micro_batch_size = choices.micro_batch_size if stage == "decode" else self._default_micro_batch_size
        return Choices(choices.dtype, sequential_guidance=sequential, micro_batch_size=micro_batch_size)

    def _trace(self, stage: str, choices: Choices) -> StageMemory:
        network = network_of(self._pipeline, stage, choices)
        activation_bytes = self._tracer.peak_bytes(
            lambda: run_stage(self._pipeline, stage, self._clip, choices), alike(self._pipeline, stage)
        )
        return StageMemory(stage, weight_bytes(network), activation_bytes)
