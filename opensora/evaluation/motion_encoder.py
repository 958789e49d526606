"""What happens in time in a clip, as a vector: features that know motion and its faults, and hardly what is shown.

A small network of our own. It looks at each two frames in a row: their mean, their difference, and where gradients say
that things go. It pools what it finds over all places, follows that from pair to pair, and pools again, over time. It
was trained to tell how everything moves and what is wrong with it in procedural scenes and the toy world (`opensora
train motion_encoder`), and saw no real clip.

Frames are taken as they come: a clip shown at half the rate moves twice as far from frame to frame and has other
features. So compare clips of one frame rate, and of about one length.

Letters: B clips, T frames, P = T - 1 pairs of frames, D features.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.models.portable_config import PortableModelMixin

WEIGHTS = Path(__file__).parent / "weights" / "motion"

_FRAMES_AT_ONCE = 64
_CELL_PX = 8
_SCALES = (2, 4)


def gradient_flow(before: Tensor, after: Tensor) -> Tensor:
    """Where things go between two frames, by least squares on gradients (Lucas and Kanade, 1981), at two scales.

    Each scale, a half and a quarter of the picture, is right for what moves by up to a pixel or two of its own.

    Args:
        before, after: (N, 3, H, W), both sides multiples of 8.

    Returns:
        (N, 8, H / 8, W / 8), of each scale: motion in pixels of that scale, x first, within -2 and 2; how much there
        is to see it by, and how much of the change it leaves unexplained, both 0 or more and about one at most.
    """
    maps = []
    for scale in _SCALES:
        first, second = (F.avg_pool2d(frames, scale) for frames in (before, after))
        padded = F.pad((first + second) / 2, (1, 1, 1, 1), mode="replicate")
        x = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
        y = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
        t = second - first
        products = [(p * q).mean(dim=1) for p, q in ((x, x), (x, y), (y, y), (x, t), (y, t), (t, t))]
        side = _CELL_PX // scale
        # Windows of two cells a side, one around each cell.
        xx, xy, yy, xt, yt, tt = F.avg_pool2d(torch.stack(products, dim=1), 2 * side, side, side // 2).unbind(1)
        xx, yy = xx + 1e-4, yy + 1e-4  # where there is nothing to see, nothing moves
        inverse = 1 / (xx * yy - xy.square())
        u, v = (xy * yt - yy * xt) * inverse, (xy * xt - xx * yt) * inverse
        left = (tt + u * xt + v * yt).clamp_min(0)
        maps += [u.clamp(-2, 2), v.clamp(-2, 2), (xx + yy).sqrt(), left.sqrt()]
    return torch.stack(maps, dim=1)


class PairTower(nn.Module):
    """What happens between two frames, in each cell of eight by eight pixels.

    Args:
        dim: width of the first layer; maps have four times as many channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        ins, outs = (6, dim, 2 * dim, 2 * dim, 4 * dim + 4 * len(_SCALES)), (dim, 2 * dim, 2 * dim, 4 * dim, 4 * dim)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(ins[i], outs[i], 5 if i == 0 else 3, stride, padding=2 if i == 0 else 1)
            for i, stride in enumerate((2, 2, 1, 2, 1))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in outs)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Frames (N, 3, H, W), each with the one after it -> (N, 4 dim, H / 8, W / 8)."""
        pairs = torch.cat([(before + after) / 2, after - before], dim=1)
        hidden_states = pairs.contiguous(memory_format=torch.channels_last)
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            if i == len(self.convolutions) - 1:
                hidden_states = torch.cat([hidden_states, gradient_flow(before, after)], dim=1)
            hidden_states = F.silu(norm(convolution(hidden_states)))
        return hidden_states


class MotionEncoder(PortableModelMixin):
    """Clips to vectors of what happens in time.

    Args:
        dim: width of the first layer.
        features: D.
        size: the shorter side of frames as the network sees them, in pixels.
    """

    @register_to_config
    def __init__(self, dim: int = 24, features: int = 64, size: int = 64) -> None:
        super().__init__()
        self.pair_tower = PairTower(dim)
        self.over_time = nn.ModuleList(
            nn.Conv1d(width, 4 * dim, 3, dilation=reach, padding=reach, padding_mode="replicate")
            for width, reach in ((8 * dim, 1), (4 * dim, 1), (4 * dim, 2))
        )
        self.head = nn.Linear(12 * dim, features)

    def resize(self, video: Tensor) -> Tensor:
        """Scales a video (B, 3, T, H, W) to the height and width that the network sees, each a multiple of 8."""
        size, (batch, _, num_frames, height, width) = self.config["size"], video.shape
        scale = size / min(height, width)
        target = tuple(max(size, round(side * scale / 8) * 8) for side in (height, width))
        if (height, width) == target:
            return video
        frames = video.transpose(1, 2).flatten(0, 1)
        frames = F.interpolate(frames, target, mode="bilinear", antialias=True, align_corners=False)
        return frames.unflatten(0, (batch, num_frames)).transpose(1, 2)

    def pair_maps(self, video: Tensor) -> Tensor:
        """What the pairs of a video (B, 3, T, H, W) of the network's size show: (B, P, 4 dim, H / 8, W / 8)."""
        frames = video.transpose(1, 2)
        before, after = (part.flatten(0, 1) for part in (frames[:, :-1], frames[:, 1:]))
        return self.pair_tower(before, after).unflatten(0, (len(video), -1))

    def summarise(self, pooled: Tensor) -> Tensor:
        """Features (B, D) of pairs pooled over places (B, P, 8 dim)."""
        hidden_states = F.silu(self.over_time[0](pooled.transpose(1, 2)))
        for convolution in self.over_time[1:]:
            hidden_states = hidden_states + F.silu(convolution(hidden_states))
        spread = hidden_states.var(dim=2, correction=0).add(1e-4).sqrt()
        over_time = torch.cat([hidden_states.mean(dim=2), spread, hidden_states.amax(dim=2)], dim=1)
        return F.layer_norm(self.head(over_time), (self.config["features"],))

    def forward(self, video: Tensor) -> Tensor:
        """Reads clips.

        Args:
            video: (B, 3, T, H, W) in [-1, 1], T >= 2.

        Returns:
            (B, D), each of mean 0 and deviation 1.

        Raises:
            OpenSoraError: `video` is not a batch of RGB clips of two or more frames.
        """
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] < 2:
            raise OpenSoraError(
                f"the motion encoder got shape {tuple(video.shape)}; pass (batch, 3, frames, height, width), 2 frames "
                "or more"
            )
        # A frame more than pairs, so that parts of a long clip share the frames at their ends.
        starts = range(0, video.shape[2] - 1, _FRAMES_AT_ONCE)
        parts = [pool(self.pair_maps(self.resize(video[:, :, i : i + _FRAMES_AT_ONCE + 1]))) for i in starts]
        return self.summarise(torch.cat(parts, dim=1))


def pool(maps: Tensor) -> Tensor:
    """Largest and mean over all places: (B, P, C, h, w) -> (B, P, 2 C)."""
    return torch.cat([maps.amax(dim=(3, 4)), maps.mean(dim=(3, 4))], dim=2)


@torch.no_grad()
def motion_features(video: Tensor) -> Tensor:
    """What happens in time in clips, by the network that comes with the package, on the video's device.

    Args:
        video: (B, 3, T, H, W) in [-1, 1], T >= 2, of any size.

    Returns:
        (B, 64), float32.

    Raises:
        OpenSoraError: `video` is not a batch of RGB clips of two or more frames.
    """
    encoder = _bundled(video.device)
    return torch.cat([encoder(clip) for clip in video.float().split(1)])


@functools.cache
def _bundled(device: torch.device) -> MotionEncoder:
    return load_motion_encoder(WEIGHTS, device)


def load_motion_encoder(folder: Path = WEIGHTS, device: str | torch.device = "cpu") -> MotionEncoder:
    """A motion encoder in float32; the one that comes with the package by default.

    Raises:
        OpenSoraError: `folder` holds none.
    """
    if not (folder / "config.json").exists():
        raise OpenSoraError(f"no motion encoder in {folder}; train one with `opensora train motion_encoder`")
    encoder = MotionEncoder.from_pretrained(folder, torch_dtype=torch.float32)
    nn.Module.to(encoder, device)
    return encoder.eval()
