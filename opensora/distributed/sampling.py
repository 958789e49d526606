"""One clip sampled by several ranks: some share its tokens, and two or three may share the branches of guidance.

Every rank runs the same loop on the same noise. Ranks that share tokens each return the whole prediction (see
`sequence_parallel`). Ranks that share guidance compute some branches each, tell each other, and then guide and step
alike; rank k of every group that shares tokens belongs together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from opensora.errors import OpenSoraError


@dataclass(frozen=True)
class SamplingRanks:
    """How the ranks of torch.distributed share a clip.

    Attributes:
        sequence: the ranks that share this rank's tokens; None where they are not shared.
        branches: the ranks that share the branches of guidance; None where each rank computes all.
    """

    sequence: ProcessGroup | None
    branches: ProcessGroup | None

    def own(self, names: Sequence[str], rank: int | None = None) -> tuple[str, ...]:
        """The branches of guidance that a rank computes: as many as every other, some of them twice if need be.

        Args:
            names: all branches.
            rank: among those that share them; None for this one.
        """
        if self.branches is None:
            return tuple(names)
        each = math.ceil(len(names) / self.branches.size())
        start = min((self.branches.rank() if rank is None else rank) * each, len(names) - each)
        return tuple(names[start : start + each])

    def exchange(self, predictions: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """All branches' predictions, of which this rank has computed its `own`."""
        if self.branches is None:
            return dict(predictions)
        mine = torch.stack([predictions[name] for name in self.own(names)])
        parts = [torch.empty_like(mine) for _ in range(self.branches.size())]
        dist.all_gather(parts, mine, group=self.branches)
        found: dict[str, Tensor] = {}
        for rank, part in enumerate(parts):
            found |= dict(zip(self.own(names, rank), part, strict=True))
        return {name: found[name] for name in names}

    def follow_first(self, sample: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The sample of rank 0; `generators` go on where those of rank 0 are."""
        sample = sample.contiguous()
        dist.broadcast(sample, src=0)
        states = [generator.get_state() for generator in generators]
        dist.broadcast_object_list(states, src=0)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        return sample


def sequence_ranks(num_ranks: int, *, guidance: bool, sequence: int | None) -> int:
    """How many of the ranks share a clip's tokens, with the arguments of `sampling_ranks`.

    Raises:
        OpenSoraError: the number of ranks is another.
    """
    groups = (2, 3) if guidance else (1,)  # that share the branches
    if sequence is None:
        sequence = max(1, num_ranks // next((count for count in groups if num_ranks % count == 0), groups[0]))
    if sequence < 1 or num_ranks not in [count * sequence for count in groups]:
        wanted = ["parallel guidance"] * guidance + [f"sequence parallelism over {sequence}"] * (sequence != 1)
        expected = " or ".join(str(count * max(1, sequence)) for count in groups)
        raise OpenSoraError(
            f"{' and '.join(wanted) or 'one process'} takes {expected} ranks, this run has "
            f"{num_ranks}; start as many with torchrun --nproc-per-node"
        )
    return sequence


def sampling_ranks(*, guidance: bool, sequence: int | None) -> SamplingRanks:
    """Divides the initialised ranks; called by all of them.

    Args:
        guidance: the branches of guidance on two ranks or on three, or on as many groups of them.
        sequence: ranks that share a clip's tokens; None for all there are, or with `guidance` for half of them, or a
            third where they are odd.

    Raises:
        OpenSoraError: the number of ranks is another.
    """
    sequence = sequence_ranks(
        dist.get_world_size() if dist.is_initialized() else 1, guidance=guidance, sequence=sequence
    )
    group = pair = None
    if sequence > 1:
        group, _ = dist.new_subgroups(sequence)
    if guidance:
        ranks = range(dist.get_world_size())
        pair, _ = dist.new_subgroups_by_enumeration([list(ranks[first::sequence]) for first in range(sequence)])
    assert not isinstance(group, int) and not isinstance(pair, int)
    return SamplingRanks(group, pair)
