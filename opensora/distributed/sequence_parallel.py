"""Sequence parallelism: the tokens of a clip on the ranks of a group, sharded along whichever axis does not attend.

A rank holds some patches of all frames. Attention along time, attention to the text, modulation and MLP need nothing of
other patches and run as they are. For attention within a frame the shards switch: every rank gives away its patches of
other ranks' frames and gets all patches of its own frames, attends, and switches back (dynamic sequence parallelism,
https://arxiv.org/abs/2403.10266): two all-to-alls for each pair of attention in space and in time. Sizes that the ranks
do not divide are padded on the sharded axis; attention never runs along that one, so it needs no mask, and the padding
is cut off before the axis attends.

Which patches a rank holds is as good as free. Consecutive ones serve attention along time at one patch; where time
attends within windows of patches, each rank holds whole windows, and nothing more is exchanged than without them. Where
all tokens attend to all, text among them, each rank holds a part of the text and a part of the video, and it is the
heads of an attention that are gathered: queries, keys and values of some heads of all tokens on each.

Gradients. Every rank is given the same latents, returns the whole prediction and computes its own loss from it. What
backward leaves on the ranks is such that its mean over the group is the gradient of the mean of their losses, for
parameters and for inputs: with one loss on all ranks, the gradient that one process has. This is what data parallelism
does with its ranks, so one mean over all ranks of data x sequence (FSDP's and DDP's own) is right for both.

Letters: N ranks of the group, B samples, T frames, S patches of a frame, D features of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


@dataclass(frozen=True)
class Shards:
    """How the tokens of one forward lie on the ranks: some patches of all frames on each.

    Attributes:
        group: the ranks.
        num_patches: S, without padding.
        held: numbers of the patches that lie on the ranks, as many on each, one rank after the other; S, which comes
            last, for padding. None for consecutive patches, ceil(S / N) on each.
    """

    group: dist.ProcessGroup
    num_patches: int
    held: Tensor | None = None
    _places: Tensor | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Notes where every patch lies among those of all ranks, (S,)."""
        places = None if self.held is None else self.held.argsort()[: self.num_patches]
        object.__setattr__(self, "_places", places)

    @property
    def patches_per_rank(self) -> int:
        """With padding, so that all ranks hold as many."""
        return -(-(self.num_patches if self.held is None else len(self.held)) // self.group.size())

    def split(self, tokens: Tensor) -> Tensor:
        """This rank's patches: (B, T, S, D) -> (B, T, S / N, D)."""
        return self._laid_out(tokens, 2).narrow(2, self.group.rank() * self.patches_per_rank, self.patches_per_rank)

    def gather(self, patches: Tensor) -> Tensor:
        """All patches, on every rank: (B, T, S / N, D) -> (B, T, S, D)."""
        everyones = self._exchange(patches.expand(self.group.size(), *patches.shape))  # (N, B, T, S / N, D)
        return self._in_order(everyones.movedim(0, 2).flatten(2, 3), 2)

    def in_whole_frames(self, function: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
        """`function` of all patches of a frame, computed where the frame lies meanwhile.

        What is said of frames here goes for whatever attends by itself: for the heads of one attention as well.

        Args:
            function: from (M, S, D) to (M, S, E), frame by frame; M is the rank's share of the B * T frames.
            patches: (B, T, S / N, D), those of this rank.

        Returns:
            (B, T, S / N, E).
        """
        ranks, (batch, num_frames) = self.group.size(), patches.shape[:2]
        frames_per_rank = -(-batch * num_frames // ranks)

        outgoing = _pad(patches.flatten(0, 1), 0, ranks * frames_per_rank).unflatten(0, (ranks, -1))
        incoming = self._exchange(outgoing)  # (N, M, S / N, D), the patches of each rank
        frames = function(self._in_order(incoming.transpose(0, 1).flatten(1, 2), 1))

        outgoing = self._laid_out(frames, 1).unflatten(1, (ranks, -1)).transpose(0, 1)
        incoming = self._exchange(outgoing)  # (N, M, S / N, D), the frames of each rank
        return incoming.flatten(0, 1)[: batch * num_frames].unflatten(0, (batch, num_frames))

    def _laid_out(self, tokens: Tensor, axis: int) -> Tensor:
        """All patches as they lie on the ranks, one rank after the other, zeros where a rank has padding."""
        if self.held is None:
            return _pad(tokens, axis, self.patches_per_rank * self.group.size())
        return _pad(tokens, axis, self.num_patches + 1).index_select(axis, self.held)

    def _in_order(self, tokens: Tensor, axis: int) -> Tensor:
        """The inverse of that."""
        if self._places is None:
            return tokens.narrow(axis, 0, self.num_patches)
        return tokens.index_select(axis, self._places)

    def _exchange(self, parts: Tensor) -> Tensor:
        """Part i of (N, ...) goes to rank i, and what rank i sent here takes its place; its own adjoint."""
        return all_to_all_single_autograd(parts.contiguous(), None, None, self.group)


class JointShards:
    """How a sequence of text, then video, lies on the ranks: each has a part of both, its text first.

    Args:
        group: the ranks.
        num_text, num_video: tokens.
        device: where the tokens are.

    Attributes:
        text, video: how each of them lies by itself.
        both: how the whole sequence lies.
    """

    def __init__(self, group: dist.ProcessGroup, num_text: int, num_video: int, device: torch.device) -> None:
        self.text, self.video = Shards(group, num_text), Shards(group, num_video)
        total, parts = num_text + num_video, []
        for tokens in torch.arange(total, device=device).split([num_text, num_video]):
            share = -(-len(tokens) // group.size())
            parts.append(F.pad(tokens, (0, group.size() * share - len(tokens)), value=total).view(-1, share))
        self.both = Shards(group, total, torch.cat(parts, dim=1).flatten())

    def split(self, text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's tokens, of (B, L, ...) and (B, N, ...)."""
        return self.text.split(text[:, None])[:, 0], self.video.split(video[:, None])[:, 0]

    def gather(self, video: Tensor) -> Tensor:
        """The whole video, on every rank, of this rank's tokens."""
        return self.video.gather(video[:, None])[:, 0]


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
