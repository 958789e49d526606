"""What a network trained on ImageNet sees in frames: a vector of each, and how far apart it finds two videos.

The vector says what is in a frame and how it looks, hardly where it is. Whole sets of clips are compared by it, and a
clip's last frame with its first. The distance compares feature maps position by position: frames against their
reference.

Letters: B clips, T frames, H, W pixels, D = 1280 features.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.evaluation.efficientnet import EfficientNetEmbedding, EfficientNetFeatures, with_published_weights

# Height and width of what the network was trained on.
_SIDE_PX = 224
_FRAMES_AT_ONCE = 4  # their maps fit into a cache


@torch.no_grad()
def frame_features(video: Tensor) -> Tensor:
    """A vector of each frame, by EfficientNet-Lite0, on the video's device.

    Frames are resized to 224 x 224 whatever their shape (bilinear, averaged over what shrinks), so that features of
    small and large clips can be held against each other.

    Args:
        video: (B, 3, T, H, W) in [-1, 1].

    Returns:
        (B, T, 1280), float32, none of them negative.

    Raises:
        OpenSoraError: the package of weights is not installed.
    """
    network = _embedding(video.device)
    frames = video.transpose(1, 2).flatten(0, 1)
    features = [
        network(F.interpolate(part.float(), (_SIDE_PX, _SIDE_PX), mode="bilinear", antialias=True))
        for part in frames.split(_FRAMES_AT_ONCE)
    ]
    return torch.cat(features).unflatten(0, (video.shape[0], video.shape[2]))


@functools.cache
def _embedding(device: torch.device) -> EfficientNetEmbedding:
    return with_published_weights(EfficientNetEmbedding()).to(device)


class PerceptualDistance(nn.Module):
    """Distance of two videos, frame by frame, in the feature maps of a frozen network.

    Every map's channels are scaled to length 1 at each position; squared differences are summed over channels,
    averaged over positions and over maps (as LPIPS does without learnt weights; Zhang et al., 2018).

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


@functools.cache
def perceptual_distance(device: torch.device) -> PerceptualDistance:
    """That of EfficientNet-Lite0 with its published weights.

    Raises:
        OpenSoraError: the package of weights is not installed.
    """
    return PerceptualDistance(with_published_weights(EfficientNetFeatures())).to(device)
