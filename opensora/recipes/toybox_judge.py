"""Trains the toy world's judge: about seven minutes of one CPU core.

It is trained on the triples that generators are trained on, never on the held-out ones, and on clips made a little
worse (noise, blur, colour shifts, blotches), so that it reads imperfect clips for what they show.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.distributed.seeding import BatchKey
from opensora.evaluation.judge import Judge
from opensora.toybox.specs import World, sample_specs
from opensora.toybox.world import render
from opensora.training.config import LoopConfig, Recipe
from opensora.training.optimizer import OptimizerConfig
from opensora.training.task import TrainingSetup, TrainingTask

NOT_MATRICES = {
    f"{tower}.{layer}.weight" for tower in ("frame_tower", "motion_tower") for layer in ("head", "convolutions.0")
}


@dataclass(frozen=True)
class JudgeBatch:
    """Clips (B, 3, T, H, W) in [-1, 1], the frames (2B, 3, H, W) drawn from them, and the clips' labels (B,)."""

    video: Tensor
    frames: Tensor
    labels: dict[str, Tensor]


def spoil(video: Tensor, generator: torch.Generator) -> Tensor:
    """Makes clips a little worse, each in its own way.

    Args:
        video: (B, 3, T, H, W) in [-1, 1].
        generator: source of every draw.

    Returns:
        The same shape, still mostly in [-1, 1].
    """
    batch, _, num_frames, height, width = video.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(batch, 1, 1, 1, 1).uniform_(low, high, generator=generator)

    # Blur: clips are mixed with a version of themselves at half or a third of the size.
    factor = 2 + int(torch.randint(2, (), generator=generator))
    frames = video.transpose(1, 2).flatten(0, 1)
    coarse = F.interpolate(frames, (height // factor, width // factor), mode="bilinear", align_corners=False)
    coarse = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    coarse = coarse.view(batch, num_frames, 3, height, width).transpose(1, 2)
    worse = torch.lerp(video, coarse, uniform(-0.5, 0.7).clamp(0))
    # Colour: contrast, brightness and a cast per clip, then blotches that change from frame to frame.
    cast = torch.empty(batch, 3, 1, 1, 1).uniform_(-0.05, 0.05, generator=generator)
    worse = worse * uniform(0.9, 1.08) + uniform(-0.06, 0.06) + cast
    blotches = torch.randn(batch, 3 * num_frames, 8, 8, generator=generator)
    blotches = F.interpolate(blotches, (height, width), mode="bilinear", align_corners=False)
    worse.addcmul_(blotches.view(video.shape), uniform(-0.05, 0.1).clamp(0))
    return worse.addcmul_(torch.randn(video.shape, generator=generator), uniform(-0.05, 0.1).clamp(0))


class JudgeTask(TrainingTask):
    """Cross-entropy of every attribute of procedural clips."""

    def __init__(self, config: "JudgeTaskConfig", device: str) -> None:
        self.config, self.device = config, device
        self.module = self.judge = Judge(dim=config.dim)
        torch.nn.Module.to(self.judge, device)

    def prepare(self, key: BatchKey) -> JudgeBatch:
        generator = key.generator("clips")
        seed = int(torch.randint(2**62, (), generator=generator))
        specs = sample_specs(self.config.batch_size, seed, self.config.world)
        size, count = self.judge.config["size"], self.judge.config["motion_frames"]
        video, _ = render(specs, num_frames=count, height=size, width=size)
        video = spoil(video, generator)
        rows = torch.arange(len(specs)).repeat(2)
        frames = video[rows, :, torch.randint(count, rows.shape, generator=generator)]
        labels = [spec.labels() for spec in specs]
        columns = {name: torch.tensor([row[name] for row in labels]) for name in self.judge.labels}
        return JudgeBatch(
            video.to(self.device), frames.to(self.device), {k: v.to(self.device) for k, v in columns.items()}
        )

    def loss(self, batch: JudgeBatch, key: BatchKey) -> dict[str, Tensor]:
        logits = self.judge.read_frames(batch.frames)
        losses = {}
        for name, values in logits.items():
            labels = batch.labels[name].repeat(2)
            losses[name] = F.cross_entropy(values.float(), labels, reduction="none").view(2, -1).mean(dim=0)
        motion = self.judge.read_motion(batch.video).float()
        losses["motion"] = F.cross_entropy(motion, batch.labels["motion"], reduction="none")
        return losses

    def export(self, module: Judge, folder: Path) -> None:
        """Writes the judge in bfloat16; it is run in float32."""
        judge = Judge(**{k: v for k, v in module.config.items() if not k.startswith("_")})
        judge.load_state_dict(module.state_dict())
        torch.nn.Module.to(judge, torch.bfloat16)  # the `to` of diffusers warns of a list that is empty here
        judge.save_pretrained(folder)


@dataclass(frozen=True)
class JudgeTaskConfig:
    """What the judge is and what it is trained on.

    Attributes:
        world: where clips come from.
        batch_size: clips a step; two frames of each go to the frame network.
        dim: width of the judge's first layers.
    """

    world: World = field(default_factory=World)
    batch_size: int = 48
    dim: int = 32

    def build(self, device: str) -> TrainingSetup:
        return TrainingSetup(JudgeTask(self, device), not_matrices=NOT_MATRICES)


def toybox_judge() -> Recipe:
    """The judge that comes with the package."""
    optimizer = OptimizerConfig(muon_lr=0.02, lr=2e-3, betas=(0.9, 0.99), warmup_steps=20, decay=0.5)
    return Recipe(
        name="toybox_judge",
        objective=JudgeTaskConfig(),
        loop=LoopConfig(steps=1200, ema_decay=0.99, optimizer=optimizer),
    )
