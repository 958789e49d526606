"""Trains the network behind `evaluation.motion_encoder`: about 13 minutes of one CPU core.

Scenes of moving textures and clips of the toy world are shown at odd times, shaken, cut and made to flicker. From each
two frames the network is to tell where things go, and from the features of a clip how it moves as a whole, what was
done to it and how strongly. Whatever tells that is in the features; what is shown need not be.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.distributed.seeding import BatchKey
from opensora.evaluation.motion_encoder import MotionEncoder, pool
from opensora.toybox.disturbances import DISTURBANCES, disturb, draw_times
from opensora.toybox.specs import ATTRIBUTES, FULL_WORLD, World, sample_specs
from opensora.toybox.textures import SIDE_PX, draw_scenes
from opensora.toybox.world import render
from opensora.training.config import LoopConfig, Recipe
from opensora.training.optimizer import OptimizerConfig
from opensora.training.task import TrainingSetup, TrainingTask

LARGEST_FLOW_PX = 8.0
"""What moves farther from frame to frame counts as moving so far: shuffled frames may be far apart."""

MOTIONS = 9
"""Figures of `describe_flow`."""

_NO_LABEL = -100


@dataclass(frozen=True)
class MotionBatch:
    """Clips and what is known of them.

    Attributes:
        video: (B, 3, T, 64, 64) in [-1, 1].
        flow: (B, 2, T - 1, 8, 8) in px; NaN where it is not known.
        motions: (B, 9), see `describe_flow`; NaN where they are not known.
        strengths: (B, number of disturbances).
        labels: (B,) motion of toy clips; -100 for all others.
    """

    video: Tensor
    flow: Tensor
    motions: Tensor
    strengths: Tensor
    labels: Tensor


def describe_flow(flow: Tensor) -> Tensor:
    """How clips move as a whole.

    Args:
        flow: (B, 2, P, h, w) in px a frame; NaN where it is not known.

    Returns:
        (B, 9), each about one in size: mean motion (2), speed, growth and turning, how unlike the motion is from place
        to place and from pair to pair, how far it turns back, the share of pairs at rest. NaN for clips of which more
        is not known than the one pair across a cut.
    """
    flow = flow.clamp(-LARGEST_FLOW_PX, LARGEST_FLOW_PX)
    x, y = ((torch.arange(side) - (side - 1) / 2) / side for side in (flow.shape[-1], flow.shape[-2]))
    u, v = flow.unbind(1)
    whole = flow.nanmean(dim=(3, 4))  # (B, 2, P)
    speed = flow.square().sum(dim=1).sqrt()
    growth, turn = u * x + v * y[:, None], v * x - u * y[:, None]
    unlike_places = (flow - whole[..., None, None]).square().nanmean(dim=(1, 2, 3, 4)).sqrt()
    mean = whole.nanmean(dim=2)
    unlike_pairs = (whole - mean[..., None]).square().nanmean(dim=(1, 2)).sqrt()
    back = -(whole[:, :, 1:] * whole[:, :, :-1]).sum(dim=1).clamp(max=0).nanmean(dim=1)
    rest = torch.where(whole[:, 0].isnan(), torch.nan, (speed.amax(dim=(2, 3)) < 0.05).float()).nanmean(dim=1)
    columns = [mean[:, 0], mean[:, 1], speed.nanmean(dim=(1, 2, 3)), 4 * growth.nanmean(dim=(1, 2, 3))]
    columns += [4 * turn.nanmean(dim=(1, 2, 3)), unlike_places, unlike_pairs, back.sqrt(), 2 * rest]
    unknown = whole[:, 0].isnan().sum(dim=1, keepdim=True) > 1
    return (torch.stack(columns, dim=1) / 2).masked_fill(unknown, torch.nan)


class EncoderWithHeads(nn.Module):
    """A motion encoder and what it is asked while it is trained.

    Attributes:
        encoder: what is kept.
        flow_head: flow in px of each cell of a pair.
        clip_head: motions, strengths of disturbances and logits of toy motions, of features.
    """

    def __init__(self, dim: int, features: int) -> None:
        super().__init__()
        self.outputs = (MOTIONS, len(DISTURBANCES), len(ATTRIBUTES["motion"]))
        self.encoder = MotionEncoder(dim=dim, features=features)
        self.flow_head = nn.Conv2d(4 * dim, 2, 1)
        self.clip_head = nn.Linear(features, sum(self.outputs))

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Flow (B, 2, P, 8, 8), motions, strengths and logits, of a video (B, 3, P + 1, 64, 64); float32."""
        maps = self.encoder.pair_maps(video)
        flow = self.flow_head(maps.flatten(0, 1)).unflatten(0, maps.shape[:2]).transpose(1, 2)
        told = self.clip_head(self.encoder.summarise(pool(maps)))
        return flow.float(), *told.float().split(self.outputs, dim=1)


class MotionTask(TrainingTask):
    """Flow of every pair, motion and disturbances of every clip."""

    def __init__(self, config: "MotionTaskConfig", device: str) -> None:
        self.config, self.device = config, device
        self.module = self.network = EncoderWithHeads(config.dim, config.features)
        nn.Module.to(self.module, device)

    def prepare(self, key: BatchKey) -> MotionBatch:
        generator = key.generator("clips")
        num_frames = int(torch.randint(4, self.config.most_frames + 1, (), generator=generator))
        num_toys = round(self.config.toy_share * self.config.batch_size)
        times, strengths = draw_times(self.config.batch_size, num_frames, generator)
        scenes, flow = draw_scenes(self.config.batch_size - num_toys, generator).render(times[num_toys:])
        toys, labels = self._toy_clips(times[:num_toys], generator)
        flow = torch.cat([flow.new_full((num_toys, *flow.shape[1:]), torch.nan), flow])
        labels = torch.cat([labels, labels.new_full((len(scenes),), _NO_LABEL)])
        # In any order, so that a clip may be cut to one of the other kind.
        order = torch.randperm(len(times), generator=generator)
        video, flow, more = disturb(torch.cat([toys, scenes])[order], flow[order], generator)
        strengths = {name: values[order] for name, values in strengths.items()} | more
        labels = labels[order].masked_fill(strengths["cut"] > 0, _NO_LABEL)
        told = torch.stack([strengths[name] for name in DISTURBANCES], dim=1)
        batch = (video, flow, describe_flow(flow), told, labels)
        return MotionBatch(*(values.to(self.device) for values in batch))

    def _toy_clips(self, times: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clips (B, 3, T, 64, 64) of the toy world at times (B, T), and the labels (B,) of their motions."""
        specs = sample_specs(len(times), int(torch.randint(2**62, (), generator=generator)), self.config.world)
        source, _ = render(specs, 2 * times.shape[1] + 1, SIDE_PX, SIDE_PX)
        frames = times.round().long()[:, None, :, None, None].expand(-1, 3, -1, SIDE_PX, SIDE_PX)
        return source.gather(2, frames), torch.tensor([spec.labels()["motion"] for spec in specs])

    def loss(self, batch: MotionBatch, key: BatchKey) -> dict[str, Tensor]:
        flow, motions, strengths, logits = self.network(batch.video)
        wanted = batch.flow.clamp(-LARGEST_FLOW_PX, LARGEST_FLOW_PX)
        toy_motion = F.cross_entropy(logits, batch.labels, reduction="none", ignore_index=_NO_LABEL)
        return {
            "flow": 0.5 * known_error(flow, wanted),
            "motions": 2.0 * known_error(motions, batch.motions),
            "disturbances": 8.0 * known_error(strengths, batch.strengths),
            "toy_motion": toy_motion,
        }

    def export(self, module: EncoderWithHeads, folder: Path) -> None:
        """Writes the encoder in half precision, without the heads; it is run in float32."""
        trained = module.encoder
        encoder = MotionEncoder(**{k: v for k, v in trained.config.items() if not k.startswith("_")})
        encoder.load_state_dict(trained.state_dict())
        nn.Module.to(encoder, torch.float16)
        encoder.save_pretrained(folder)


def known_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean smooth error of each clip where `wanted` is known, 0 where nothing is: (B, ...) -> (B,)."""
    known = wanted.isfinite()
    errors = F.smooth_l1_loss(found, torch.where(known, wanted, found.detach()), reduction="none", beta=0.25)
    return errors.flatten(1).sum(dim=1) / known.flatten(1).sum(dim=1).clamp_min(1)


@dataclass(frozen=True)
class MotionTaskConfig:
    """What the motion encoder is and what it is trained on.

    Attributes:
        world: where toy clips come from.
        toy_share: of the batch that are toy clips; the others are scenes of textures.
        batch_size: clips a step.
        most_frames: clips have 4 to so many frames, all of a batch alike.
        dim: width of the first layer.
        features: D.
    """

    world: World = field(default_factory=lambda: FULL_WORLD)
    toy_share: float = 0.25
    batch_size: int = 24
    most_frames: int = 14
    dim: int = 24
    features: int = 64

    def build(self, device: str) -> TrainingSetup:
        first_and_last = {"encoder.pair_tower.convolutions.0.weight", "flow_head.weight", "clip_head.weight"}
        return TrainingSetup(MotionTask(self, device), not_matrices=first_and_last)


def motion_encoder() -> Recipe:
    """The motion encoder that comes with the package."""
    optimizer = OptimizerConfig(muon_lr=0.02, lr=2e-3, betas=(0.9, 0.99), warmup_steps=20, decay=0.5)
    return Recipe(
        name="motion_encoder",
        objective=MotionTaskConfig(),
        loop=LoopConfig(steps=1100, ema_decay=0.99, optimizer=optimizer),
    )
