"""How much memory a clip takes, stage by stage, and which choices make it fit.

Six choices trade something for memory. Two of them change no result: decoding fewer frames at once, and one branch of
guidance after the other. Offloading keeps each network in memory only while it works, or each block, which takes time
to bring them in; tiles that overlap are decoded without knowing of each other; half precision rounds, and weights in
eight bits round more. So they are tried in this order: what costs less comes first.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from opensora.containers.tensors import PORTION_BYTES
from opensora.models.autoencoders.tiles import TiledCodec
from opensora.models.int8 import linear_layers, saved_bytes
from opensora.models.network import blocks_of
from opensora.models.pieces import in_whole
from opensora.offloading import Offload
from opensora.pipeline import OpenSoraPipeline
from opensora.planning.stages import COMPONENT_OF, Choices, Clip, alike, network_of, run_stage
from opensora.planning.tracing import Tracer, weight_bytes

OFFLOADS: tuple[Offload | None, ...] = (None, "networks", "blocks")


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


# Python and the libraries (`python -m benchmarks max-memory`); freed memory goes back to the system.
CPU = Surcharge(fixed_bytes=600 * 2**20, share_of_activations=0.0)
# Not measured: the driver's context and its libraries' workspaces, and a margin for the caching allocator.
ACCELERATOR = Surcharge(fixed_bytes=700 * 2**20, share_of_activations=0.1)


@dataclass(frozen=True)
class StageMemory:
    """What one stage takes.

    Attributes:
        name: "text", "denoise" or "decode".
        weight_bytes: of its network.
        streamed_weight_bytes: of what is there at once where blocks take turns.
        activation_bytes: everything else at its worst moment.
    """

    name: str
    weight_bytes: int
    streamed_weight_bytes: int
    activation_bytes: int

    def bytes(self, offload: Offload | None) -> tuple[int, int]:
        """Of weights and of activations, of this stage alone."""
        return self.streamed_weight_bytes if offload == "blocks" else self.weight_bytes, self.activation_bytes


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
            return max((stage.bytes(choices.offload) for stage in stages), key=sum)
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
        ways = itertools.product(dtypes, self._tile_frames(), OFFLOADS, sequential, self._micro_batch_sizes())
        for dtype, tile_frames, offload, one_by_one, micro_batch_size in ways:
            yield Choices(dtype, offload, one_by_one, micro_batch_size, tile_frames)

    def smallest(self, choices: Choices) -> Choices:
        """The choices that take the least memory in the same precision."""
        (*_, last), (*_, tile) = self._micro_batch_sizes(), self._tile_frames()
        one_by_one = self._clip.guided
        return replace(
            choices, offload="blocks", sequential_guidance=one_by_one, micro_batch_size=last, tile_frames=tile
        )

    def _micro_batch_sizes(self) -> Iterator[int | None]:
        """The model's own, then halves of it, down to 1; of autoencoders that work in tiles they bound nothing."""
        yield self._default_micro_batch_size
        if isinstance(self._pipeline.autoencoder, TiledCodec):
            return
        size = min(self._default_micro_batch_size or self._clip.size.num_frames, self._clip.size.num_frames)
        while size > 1:
            size //= 2
            yield size

    def _tile_frames(self) -> Iterator[int | None]:
        """The model's own, then fewer; how few they may be, the autoencoder says."""
        yield None
        autoencoder = self._pipeline.autoencoder
        if isinstance(autoencoder, TiledCodec):
            own = autoencoder.config["tile_sample_frames"] or self._clip.size.num_frames
            fewest = autoencoder.fewest_tile_frames
            yield from (fewest * times for times in (4, 2, 1) if fewest * times < own)

    def _deciding(self, stage: str, choices: Choices) -> Choices:
        """The choices without those that make no difference to a stage."""
        sequential = choices.sequential_guidance and stage == "denoise" and self._clip.guided
        micro_batch_size = choices.micro_batch_size if stage == "decode" else self._default_micro_batch_size
        tile_frames = choices.tile_frames if stage == "decode" else None
        return Choices(choices.dtype, None, sequential, micro_batch_size, tile_frames)

    def _trace(self, stage: str, choices: Choices) -> StageMemory:
        network = network_of(self._pipeline, stage, choices)
        with contextlib.nullcontext() if self.surcharge is CPU else in_whole():
            activation_bytes = self._tracer.peak_bytes(
                lambda: run_stage(self._pipeline, stage, self._clip, choices), alike(self._pipeline, stage)
            )
        if stage == "decode":
            return StageMemory(stage, weight_bytes(network), weight_bytes(network), activation_bytes)
        networks = list(network) if isinstance(network, nn.ModuleList) else [network]
        if choices.dtype == torch.int8:  # the weights of one layer at a time are there in both precisions
            layers = [layer for each in networks for layer in linear_layers(each).values()]
            activation_bytes += max(layer.weight.nbytes for layer in layers)
        sizes = [stored_weight_bytes(each, int8=choices.dtype == torch.int8) for each in networks]
        return StageMemory(stage, sum(whole for whole, _ in sizes), sum(part for _, part in sizes), activation_bytes)


def stored_weight_bytes(network: nn.Module, *, int8: bool = False) -> tuple[int, int]:
    """Memory of a network's weights, and of those that are there at once where blocks take turns.

    These are what is outside of blocks, the two largest blocks that follow each other, and the part of a file that is
    being read.
    """
    blocks = list(blocks_of(network).values())
    sizes = [weight_bytes(block) - (saved_bytes(block) if int8 else 0) for block in blocks]
    rest = weight_bytes(network) - sum(map(weight_bytes, blocks))
    if len(blocks) < 2:
        return rest + sum(sizes), rest + sum(sizes)
    together = max(first + second for first, second in itertools.pairwise(sizes))
    return rest + sum(sizes), rest + together + min(max(sizes), PORTION_BYTES)
