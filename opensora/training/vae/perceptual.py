"""How different two pictures look: the distance of what a network trained on ImageNet sees in them, as a loss.

Two choices: EfficientNet-Lite0, whose weights come in a package of their own (`evaluation/efficientnet.py`), and LPIPS
(Zhang et al., 2018) where its package is installed.

Letters: B clips, T frames, H, W pixels, D channels of a feature map.
"""

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.evaluation.efficientnet import EfficientNetFeatures, with_published_weights
from opensora.evaluation.features import PerceptualDistance

PerceptualNetwork = Literal["efficientnet", "lpips"]


class LPIPSDistance(nn.Module):
    """LPIPS as its package computes it, frame by frame.

    Args:
        network: what `lpips.LPIPS` made.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LPIPSDistance":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Videos (B, 3, T, H, W) in [-1, 1] -> (B,), the mean over frames."""
        frames = [video.transpose(1, 2).flatten(0, 1) for video in (a, b)]
        return self.network(*frames).flatten().unflatten(0, (a.shape[0], -1)).mean(dim=1)


class VGGFeatures(nn.Module):
    """What LPIPS looks at, VGG16's five maps, for plans: shapes and work of the real ones, without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        channels = 3
        for count, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            widths = [channels, *[width] * count]
            layers = (nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise(widths))
            self.stages.append(nn.ModuleList(layers))
            channels = width

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> five maps (N, D, h, w), each half as large as the one before."""
        hidden_states, maps = pictures, []
        for index, stage in enumerate(self.stages):
            hidden_states = F.max_pool2d(hidden_states, 2) if index else hidden_states
            for layer in stage.children():
                hidden_states = F.relu(layer(hidden_states))
            maps.append(hidden_states)
        return maps


def build_perceptual(network: PerceptualNetwork, device: str) -> nn.Module:
    """The frozen network on a device; without weights on "meta".

    Raises:
        OpenSoraError: its package is not installed.
    """
    if device == "meta":
        with torch.device("meta"):
            return PerceptualDistance(VGGFeatures() if network == "lpips" else EfficientNetFeatures())
    if network == "lpips":
        return _build_lpips().to(device)
    try:
        features = with_published_weights(EfficientNetFeatures())
    except OpenSoraError as error:
        raise OpenSoraError(f"{error}, or set objective.perceptual_weight=0") from None
    return PerceptualDistance(features).to(device)


def _build_lpips() -> LPIPSDistance:
    try:
        import lpips  # type: ignore
    except ImportError as error:
        raise OpenSoraError(
            f"objective.perceptual=lpips needs the package lpips ({error}); install it, or use efficientnet"
        ) from error
    return LPIPSDistance(lpips.LPIPS(net="vgg", verbose=False))
