"""Sequence parallelism: the tokens of a clip on the ranks of a group, sharded along whichever axis does not attend.

A rank holds some patches of all frames. Attention along time, attention to the text, modulation and MLP need nothing of
other patches and run as they are. For attention within a frame the shards switch: every rank gives away its patches of
other ranks' frames and gets all patches of its own frames, attends, and switches back (dynamic sequence parallelism,
https://arxiv.org/abs/2403.10266): two all-to-alls for each pair of attention in space and in time. Sizes that the ranks
do not divide are padded on the sharded axis; attention never runs along that one, so it needs no mask, and the padding
is cut off before the axis attends.

Gradients. Every rank is given the same latents, returns the whole prediction and computes its own loss from it. What
backward leaves on the ranks is such that its mean over the group is the gradient of the mean of their losses, for
parameters and for inputs: with one loss on all ranks, the gradient that one process has. This is what data parallelism
does with its ranks, so one mean over all ranks of data x sequence (FSDP's and DDP's own) is right for both.

Letters: N ranks of the group, B samples, T frames, S patches of a frame, D features of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


@dataclass(frozen=True)
class Shards:
    """How the tokens of one forward lie on the ranks: ceil(S / N) patches of all frames on each.

    Attributes:
        group: the ranks.
        num_patches: S, without padding.
    """

    group: dist.ProcessGroup
    num_patches: int

    @property
    def patches_per_rank(self) -> int:
        """ceil(S / N)."""
        return -(-self.num_patches // self.group.size())

    def split(self, tokens: Tensor) -> Tensor:
        """This rank's patches: (B, T, S, D) -> (B, T, S / N, D)."""
        padded = _pad(tokens, 2, self.patches_per_rank * self.group.size())
        return padded.narrow(2, self.group.rank() * self.patches_per_rank, self.patches_per_rank)

    def gather(self, patches: Tensor) -> Tensor:
        """All patches, on every rank: (B, T, S / N, D) -> (B, T, S, D)."""
        everyones = self._exchange(patches.expand(self.group.size(), *patches.shape))  # (N, B, T, S / N, D)
        return everyones.movedim(0, 2).flatten(2, 3)[:, :, : self.num_patches]

    def in_whole_frames(self, function: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
        """`function` of all patches of a frame, computed where the frame lies meanwhile.

        Args:
            function: from (M, S, D) to the same shape, frame by frame; M is the rank's share of the B * T frames.
            patches: (B, T, S / N, D), those of this rank.

        Returns:
            Shape of `patches`.
        """
        ranks, (batch, num_frames) = self.group.size(), patches.shape[:2]
        frames_per_rank = -(-batch * num_frames // ranks)

        outgoing = _pad(patches.flatten(0, 1), 0, ranks * frames_per_rank).unflatten(0, (ranks, -1))
        incoming = self._exchange(outgoing)  # (N, M, S / N, D), the patches of each rank
        frames = function(incoming.transpose(0, 1).flatten(1, 2)[:, : self.num_patches])

        outgoing = _pad(frames, 1, ranks * self.patches_per_rank).unflatten(1, (ranks, -1)).transpose(0, 1)
        incoming = self._exchange(outgoing)  # (N, M, S / N, D), the frames of each rank
        return incoming.flatten(0, 1)[: batch * num_frames].unflatten(0, (batch, num_frames))

    def _exchange(self, parts: Tensor) -> Tensor:
        """Part i of (N, ...) goes to rank i, and what rank i sent here takes its place; its own adjoint."""
        return all_to_all_single_autograd(parts.contiguous(), None, None, self.group)


def _pad(tokens: Tensor, axis: int, length: int) -> Tensor:
    """Zeros at the end of an axis."""
    missing = length - tokens.shape[axis]
    return F.pad(tokens, (0, 0) * (tokens.ndim - 1 - axis) + (0, missing)) if missing else tokens


def bytes_switched(
    batch: int, num_frames: int, num_patches: int, hidden_size: int, depth: int, ranks: int, bytes_per_value: int = 2
) -> int:
    """Bytes that each rank sends, and receives, in one forward of a transformer whose tokens are sharded.

    Two switches for each attention in space, padding included. Backward sends as many again, and blocks that are
    computed again for it, with all that is in them, as many a third time. The prediction that is gathered at the end is
    left out: it is thinner than one of the 2 * depth switches by the ratio of a patch's values to `hidden_size`.

    Args:
        batch, num_frames, num_patches, hidden_size: B, T, S, D of the tokens.
        depth: attentions in space, that is `depth` of every model of the family.
        ranks: N.
        bytes_per_value: of the dtype that tokens have.
    """
    frames_per_rank, patches_per_rank = -(-batch * num_frames // ranks), -(-num_patches // ranks)
    return 2 * depth * (ranks - 1) * frames_per_rank * patches_per_rank * hidden_size * bytes_per_value
