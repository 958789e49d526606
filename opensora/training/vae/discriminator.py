"""A critic of short clips: it says of every patch in space and time whether it is real (Isola et al., 2017, in 3D).

Letters: B clips, T frames, H, W pixels, D channels inside.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from opensora.errors import OpenSoraError


@dataclass(frozen=True)
class DiscriminatorConfig:
    """A critic, and when and how much the autoencoder listens to it.

    Attributes:
        dim: D, channels after the first convolution.
        depth: halvings of height and width; the frames of patches grow alike from the second on.
        start: step from which both are trained against each other.
        weight: of the adversarial loss, times the ratio of gradients (see `adaptive_weight`).
        architecture: "patch" for `PatchDiscriminator`, whose judgement of a clip does not depend on the others of its
            batch; "patchgan" for `PatchGAN`, that of Open-Sora 1.3 and 2.0.
        dropout: share of features that "patchgan" leaves out in training; None for a network without such layers.
    """

    dim: int = 64
    depth: int = 3
    start: int = 0
    weight: float = 0.5
    architecture: Literal["patch", "patchgan"] = "patch"
    dropout: float | None = None

    def __post_init__(self) -> None:
        if self.depth < 1 or self.dim < 1:
            raise OpenSoraError(
                f"a discriminator of depth {self.depth} and dim {self.dim} given; both must be 1 or more"
            )
        if self.dropout is not None and self.architecture == "patch":
            raise OpenSoraError("dropout given, but a discriminator of architecture patch has none; leave it out")

    def build(self) -> "PatchDiscriminator | PatchGAN":
        """The critic, with weights drawn anew."""
        if self.architecture == "patchgan":
            return PatchGAN(self.dim, self.depth, self.dropout)
        return PatchDiscriminator(self.dim, self.depth)


class PatchDiscriminator(nn.Module):
    """Convolutions over space and time that end in one logit a patch; works on single frames too.

    Args:
        dim: D, channels after the first convolution; doubled at every halving, up to 8 D.
        depth: halvings of height and width.
    """

    def __init__(self, dim: int = 64, depth: int = 3) -> None:
        super().__init__()
        widths = [dim * min(2**level, 8) for level in range(depth + 1)]
        self.first = _PatchConvolution(3, widths[0], time_stride=1, space_stride=2)
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        for level in range(1, depth + 1):
            stride = 2 if level < depth else 1
            self.layers.append(_PatchConvolution(widths[level - 1], widths[level], stride, stride))
            self.norms.append(nn.GroupNorm(min(8, dim), widths[level]))
        self.last = _PatchConvolution(widths[-1], 1, time_stride=1, space_stride=1)

    def forward(self, video: Tensor) -> Tensor:
        """Video (B, 3, T, H, W) in [-1, 1] -> logits (B, 1, t, h, w); high where it looks real."""
        hidden_states = F.leaky_relu(self.first(video), 0.2)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            hidden_states = F.leaky_relu(norm(layer(hidden_states)), 0.2)
        return self.last(hidden_states)


class PatchGAN(nn.Module):
    """The critic of Open-Sora 1.3 and 2.0, with batch norm; parameter names are the published ones.

    Args:
        dim: D, channels after the first convolution; doubled at every layer, up to 8 D.
        depth: halvings of height and width, of which the first two halve time as well.
        dropout: share of features left out after every norm; None for no such layers.
    """

    def __init__(self, dim: int = 64, depth: int = 3, dropout: float | None = None) -> None:
        super().__init__()
        widths = [dim * min(2**level, 8) for level in range(depth + 1)]
        layers: list[nn.Module] = [nn.Conv3d(3, widths[0], 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, depth + 1):
            stride = (2 if level == 1 else 1, 2, 2) if level < depth else 1
            layers.append(nn.Conv3d(widths[level - 1], widths[level], 3, stride, padding=1, bias=False))
            layers += [nn.BatchNorm3d(widths[level]), nn.LeakyReLU(0.2)]
            if dropout is not None:
                layers.append(nn.Dropout(dropout))
        self.main = nn.Sequential(*layers, nn.Conv3d(widths[-1], 1, 3, padding=1))

    def forward(self, video: Tensor) -> Tensor:
        """Video (B, 3, T, H, W) in [-1, 1] -> logits (B, 1, t, h, w); high where it looks real."""
        return self.main(video)


class _PatchConvolution(nn.Conv3d):
    """3 frames by 4 x 4 positions."""

    def __init__(self, in_channels: int, out_channels: int, time_stride: int, space_stride: int) -> None:
        stride = (time_stride, space_stride, space_stride)
        super().__init__(in_channels, out_channels, (3, 4, 4), stride=stride, padding=(1, 1, 1))
