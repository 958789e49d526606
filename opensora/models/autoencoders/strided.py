"""3D convolutions of a stride, right for narrow clips too.

Where the result is one column wide, kernels of torch 2.13 for bfloat16 on CPUs with AMX read memory that was never
written (https://github.com/pytorch/pytorch/issues/169688). Such results are small, so they are computed in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.models.autoencoders.layout import is_half_on_cpu


def conv3d(
    clip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """`F.conv3d` of (B, D, T, h, w); its arguments."""
    columns = (clip.shape[4] + 2 * padding[2] - weight.shape[4]) // stride[2] + 1
    if columns > 1 or stride[2] == 1 or not is_half_on_cpu(clip):
        return F.conv3d(clip, weight, bias, stride, padding, groups=groups)
    bias = None if bias is None else bias.float()
    return F.conv3d(clip.float(), weight.float(), bias, stride, padding, groups=groups).to(clip.dtype)


class StridedConv3d(nn.Conv3d):
    """See above; (B, D, T, h, w) -> (B, D', T', h', w')."""

    padding: tuple[int, int, int]

    @classmethod
    def like(cls, conv: nn.Conv3d) -> "StridedConv3d":
        """The same convolution with the same weights, which are not copied."""
        edges: Any = (conv.kernel_size, conv.stride, conv.padding)
        with torch.device("meta"):  # draws no random numbers
            made = cls(conv.in_channels, conv.out_channels, *edges)
        made.weight, made.bias = conv.weight, conv.bias
        return made

    def forward(self, input: Tensor) -> Tensor:
        return conv3d(input, self.weight, self.bias, self.stride, self.padding, self.groups)
