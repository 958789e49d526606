"""The toy world's judge: reads shape, colour, size, background and motion off a clip, real or generated.

Two small networks rather than one. The frame network looks at single frames, so it cannot guess a shape from how the
object moves; the motion network looks at how nine frames differ from their mean, so a still background is nothing to
it. Both pool their last feature map by maximum and by mean: an object counts wherever it is.

Letters: B clips, C channels, T frames, K sampled frames, D width.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.models.portable_config import PortableModelMixin
from opensora.toybox.specs import ATTRIBUTES

WEIGHTS = Path(__file__).parent.parent / "toybox" / "weights" / "judge"


class Tower(nn.Module):
    """Convolutions down to 1/8 of the size, then maximum and mean over all places."""

    def __init__(self, in_channels: int, dim: int, outputs: int) -> None:
        super().__init__()
        widths = (in_channels, dim, 2 * dim, 2 * dim, 4 * dim, 4 * dim)
        strides = (2, 2, 1, 2, 1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 5 if i == 0 else 3, stride, padding=2 if i == 0 else 1)
            for i, stride in enumerate(strides)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.head = nn.Linear(8 * dim, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_channels, 64, 64) -> (N, outputs)."""
        hidden_states = images.contiguous(memory_format=torch.channels_last)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden_states = F.silu(norm(convolution(hidden_states)))
        pooled = torch.cat([hidden_states.amax(dim=(2, 3)), hidden_states.mean(dim=(2, 3))], dim=1)
        return self.head(pooled)


class Judge(PortableModelMixin):
    """Reads the attributes of toy clips.

    Args:
        labels: attribute -> its labels in the order of the logits, "motion" among them; the world's own by default.
        dim: D, width of the first layer.
        size: clips are scaled to this height and width, in pixels, first.
        frames_seen: frames that the frame network reads of each clip, evenly spread.
        motion_frames: K, frames that the motion network reads, evenly spread.
    """

    @register_to_config
    def __init__(
        self,
        labels: dict[str, list[str]] | None = None,
        dim: int = 32,
        size: int = 64,
        frames_seen: int = 5,
        motion_frames: int = 9,
    ) -> None:
        super().__init__()
        if labels is None:
            labels = {name: list(values) for name, values in ATTRIBUTES.items()}
            self.register_to_config(labels=labels)
        self.labels = labels
        # Sorted, because a saved configuration does not keep the order of a dictionary.
        self.frame_attributes = sorted(name for name in labels if name != "motion")
        self.frame_tower = Tower(3, dim, sum(len(labels[name]) for name in self.frame_attributes))
        self.motion_tower = Tower(3 * (motion_frames + 1), dim, len(labels["motion"]))

    def resize(self, video: Tensor) -> Tensor:
        """Scales a video (B, 3, T, H, W) to the size that the networks were trained at."""
        size, (batch, channels, num_frames, height, width) = self.config["size"], video.shape
        if (height, width) == (size, size):
            return video
        frames = video.transpose(1, 2).flatten(0, 1)
        frames = F.interpolate(frames, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return frames.view(batch, num_frames, channels, size, size).transpose(1, 2)

    def read_frames(self, frames: Tensor) -> dict[str, Tensor]:
        """Logits (N, labels) of every attribute but motion for single frames (N, 3, size, size)."""
        logits = self.frame_tower(frames)
        parts = logits.split([len(self.labels[name]) for name in self.frame_attributes], dim=1)
        return dict(zip(self.frame_attributes, parts, strict=True))

    def read_motion(self, video: Tensor) -> Tensor:
        """Logits (B, motions) for a video (B, 3, T, size, size) with T >= 2."""
        count, num_frames = self.config["motion_frames"], video.shape[2]
        chosen = torch.linspace(0, num_frames - 1, count).round().long()
        frames = video[:, :, chosen.to(video.device)]
        mean = frames.mean(dim=2)
        return self.motion_tower(torch.cat([(frames - mean.unsqueeze(2)).flatten(1, 2), mean], dim=1))

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """Reads clips.

        Args:
            video: (B, 3, T, H, W) in [-1, 1], T >= 2.

        Returns:
            Attribute -> logits (B, labels); a frame attribute's are the mean over the frames seen.

        Raises:
            OpenSoraError: `video` is not a batch of RGB clips of two or more frames.
        """
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] < 2:
            raise OpenSoraError(
                f"the judge got shape {tuple(video.shape)}; pass (batch, 3, frames, height, width) T >= 2"
            )
        video = self.resize(video)
        count = min(self.config["frames_seen"], video.shape[2])
        chosen = torch.linspace(0, video.shape[2] - 1, count).round().long()
        frames = video[:, :, chosen.to(video.device)].transpose(1, 2)
        logits = self.read_frames(frames.flatten(0, 1))
        read = {name: values.view(len(video), count, -1).mean(dim=1) for name, values in logits.items()}
        return read | {"motion": self.read_motion(video)}

    @torch.no_grad()
    def read(self, video: Tensor) -> list[dict[str, str]]:
        """What each clip of (B, 3, T, H, W) in [-1, 1] shows: attribute -> label."""
        logits = {name: values.argmax(dim=1).tolist() for name, values in self(video).items()}
        return [{name: self.labels[name][logits[name][i]] for name in self.labels} for i in range(len(video))]


def load_judge(folder: Path = WEIGHTS, device: str | torch.device = "cpu") -> Judge:
    """The judge that comes with the package, in float32.

    Raises:
        OpenSoraError: `folder` holds no judge.
    """
    if not (folder / "config.json").exists():
        raise OpenSoraError(f"no judge in {folder}; train one with `opensora train toybox_judge`")
    judge = Judge.from_pretrained(folder, torch_dtype=torch.float32)
    nn.Module.to(judge, device)
    return judge.eval()
