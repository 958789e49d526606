"""Clips of the toybox world as training data: rendered on demand, or encoded once into captioned latents."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensora.data.batch import BatchShape, ClipBatch, DataContext, LatentBatch, Source, batch_conditions
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.files import replacing
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.clip_conditions import ClipConditions
from opensora.toybox.captions import Language, caption
from opensora.toybox.specs import EASY_WORLD, ClipSpec, World, sample_specs
from opensora.toybox.world import GROWTH, render
from opensora.weights import fingerprint


@dataclass(frozen=True)
class ToyboxClips:
    """A stream of clips.

    Attributes:
        world: what may appear in them.
        num_frames, height, width: T, H, W.
        fps: frames a second that the clips are meant to be played at.
    """

    world: World = EASY_WORLD
    num_frames: int = 17
    height: int = 64
    width: int = 64
    fps: int = 8

    def specs(
        self, n: int, generator: torch.Generator, split: Literal["train", "held_out"] = "train"
    ) -> list[ClipSpec]:
        """`n` clip descriptions drawn with `generator`."""
        seed = int(torch.randint(2**62, (1,), generator=generator))
        return sample_specs(n, seed, self.world, split)

    def conditions(self, size: int, frame_interval: int = 1) -> ClipConditions:
        """What a model of this `frame_interval` is told of `size` clips: rate times interval, as in sampling."""
        rates = [self.fps * frame_interval] * size
        return batch_conditions(rates, num_frames=self.num_frames, height=self.height, width=self.width)

    def batch(
        self, specs: Sequence[ClipSpec], captions: list[str], frame_interval: int = 1, device: str = "cpu"
    ) -> ClipBatch:
        """These clips, rendered, with masks of their objects."""
        video, mask = render(specs, self.num_frames, self.height, self.width, device)
        conditions = self.conditions(len(captions), frame_interval)
        return ClipBatch(video, captions, conditions, f"{self.num_frames}f", object_mask=mask)


@dataclass(frozen=True)
class OtherLength:
    """Clips of another length than most.

    Attributes:
        num_frames: T; 1 for images.
        share: of all steps, each of which has clips of one length.
    """

    num_frames: int
    share: float


@dataclass(frozen=True)
class ToyboxLatents:
    """Clips of the toybox, encoded once before the first step and worded anew whenever they are drawn.

    Attributes:
        clips: what they show, and their usual length.
        num_clips: clips of the usual length.
        other_lengths: clips of other lengths, which some steps have.
        num_clips_of_other_lengths: clips of each.
        batch_size: B, clips a step.
        chinese: share of the captions that are in Chinese, the others being in English; None for none.
        plain: share of the captions in the plain wording of evaluations; None for none but by chance.
        motion_weights: motion -> how often its clips are drawn, relative to those of motions that are not named.
    """

    clips: ToyboxClips = field(default_factory=ToyboxClips)
    num_clips: int = 20_000
    other_lengths: tuple[OtherLength, ...] = ()
    num_clips_of_other_lengths: int = 5_000
    batch_size: int = 48
    chinese: float | None = None
    plain: float | None = None
    motion_weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_clips", "num_clips_of_other_lengths", "batch_size"):
            if getattr(self, name) < 1:
                raise OpenSoraError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("chinese", "plain"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise OpenSoraError(f"{name} is {share:g}; give a share from 0 to 1")
        total = sum(length.share for length in self.other_lengths)
        if total > 1 or any(length.share < 0 for length in self.other_lengths):
            raise OpenSoraError(f"other_lengths have shares that sum to {total:g}; expected shares from 0 to 1 in all")

    def carried_over(self) -> dict[str, Any]:
        """What clips of a table take over where they take the place of these: sizes and batches."""
        clips = self.clips
        return {"buckets": {f"{clips.height}x{clips.width}": {str(clips.num_frames): (1.0, self.batch_size)}}}

    def shapes(self) -> list[BatchShape]:
        """The sizes that batches have."""
        clips, rest = self.clips, 1 - sum(length.share for length in self.other_lengths)
        lengths = [(clips.num_frames, rest), *((length.num_frames, length.share) for length in self.other_lengths)]
        return [
            BatchShape(f"{frames}f", self.batch_size, frames, clips.height, clips.width, share)
            for frames, share in lengths
        ]

    def defaults(self) -> dict[str, Any]:
        """Size and rate of the usual clips, under the names of the pipeline's defaults."""
        return {name: getattr(self.clips, name) for name in ("num_frames", "height", "width", "fps")}

    def open(self, context: DataContext) -> "ToyboxSource":
        """The clips, encoded with the autoencoder or read from the cache."""
        assert context.autoencoder is not None and context.cache is not None
        wanted = [(self.clips, self.num_clips)]
        for length in self.other_lengths:
            wanted.append((replace(self.clips, num_frames=length.num_frames), self.num_clips_of_other_lengths))
        latents = [CaptionedLatents.load_or_encode(context.cache, clips, context.autoencoder, n) for clips, n in wanted]
        return ToyboxSource(self, [clips for clips, _ in wanted], latents, context.frame_interval)


class ToyboxSource(Source):
    """Batches of encoded toybox clips.

    Args:
        config: what they are.
        clips: those of each of its lengths.
        latents: the same, encoded.
        frame_interval: of the model, see `DataContext`.
    """

    def __init__(
        self, config: ToyboxLatents, clips: list[ToyboxClips], latents: "list[CaptionedLatents]", frame_interval: int
    ) -> None:
        self.config, self.clips, self.latents, self.frame_interval = config, clips, latents, frame_interval

    def shapes(self) -> list[BatchShape]:
        return self.config.shapes()

    def batch(self, key: BatchKey) -> LatentBatch:
        rng = random.Random(key.generator("frames").initial_seed())
        shapes = self.shapes()
        (which,) = rng.choices(range(len(shapes)), [shape.share for shape in shapes])
        size = self.config.batch_size
        latents, object_mask, captions = self.latents[which].sample(size, key.generator("clips"), self.config)
        return LatentBatch(
            latents=latents,
            captions=captions,
            conditions=self.clips[which].conditions(size, self.frame_interval),
            label=shapes[which].label,
            object_mask=object_mask,
        )


@dataclass(frozen=True)
class ToyboxVideos:
    """Clips of the toybox, rendered when they are needed.

    Attributes:
        clips: what they show.
        batch_size: B, clips a step.
    """

    clips: ToyboxClips = field(default_factory=ToyboxClips)
    batch_size: int = 8

    def carried_over(self) -> dict[str, Any]:
        """What clips of a table take over where they take the place of these: sizes and batches."""
        clips = self.clips
        return {"buckets": {f"{clips.height}x{clips.width}": {str(clips.num_frames): (1.0, self.batch_size)}}}

    def shapes(self) -> list[BatchShape]:
        """The size that batches have."""
        clips = self.clips
        return [BatchShape(f"{clips.num_frames}f", self.batch_size, clips.num_frames, clips.height, clips.width, 1.0)]

    def defaults(self) -> dict[str, Any]:
        """None: what is trained on these makes no clips."""
        return {}

    def open(self, context: DataContext) -> "RenderedClips":
        """The clips of a split."""
        return RenderedClips(self, context.split)


class RenderedClips(Source):
    """Batches of rendered clips, with masks of their objects and without captions."""

    def __init__(self, config: ToyboxVideos, split: Literal["train", "held_out"]) -> None:
        self.config = config
        self.split: Literal["train", "held_out"] = split

    def shapes(self) -> list[BatchShape]:
        return self.config.shapes()

    def batch(self, key: BatchKey) -> ClipBatch:
        clips, size = self.config.clips, self.config.batch_size
        return clips.batch(clips.specs(size, key.generator("clips"), self.split), [""] * size)


class CaptionedLatents:
    """Clips encoded once; each draw words them anew.

    Args:
        specs: N clip descriptions.
        latents: (N, C, T, h, w), normalised, half precision.
        object_mask: (N, 1, T, h, w) uint8, 1 where an object touches the latent cell.
    """

    def __init__(self, specs: list[ClipSpec], latents: Tensor, object_mask: Tensor) -> None:
        self.specs, self.latents, self.object_mask = specs, latents, object_mask

    def sample(
        self, n: int, generator: torch.Generator, config: ToyboxLatents | None = None
    ) -> tuple[Tensor, Tensor, list[str]]:
        """`n` clips with repetition, freshly captioned, all drawn with `generator`: latents, object mask, captions.

        `config` says which clips are drawn how often, and how they are worded.
        """
        config = config or ToyboxLatents()
        if config.motion_weights:
            weights = torch.tensor([config.motion_weights.get(spec.motion, 1.0) for spec in self.specs])
            rows = torch.multinomial(weights, n, replacement=True, generator=generator)
        else:
            rows = torch.randint(len(self.specs), (n,), generator=generator)
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        languages: list[Language] = [
            "zh" if config.chinese and rng.random() < config.chinese else "en" for _ in range(n)
        ]
        captions = [
            caption(self.specs[row], rng, language, config.plain or 0.0)
            for row, language in zip(rows.tolist(), languages, strict=True)
        ]
        return self.latents[rows].float(), self.object_mask[rows].float(), captions

    @classmethod
    def load_or_encode(cls, cache: Path, clips: ToyboxClips, autoencoder: VideoCodec, n: int) -> "CaptionedLatents":
        """The first `n` training clips of seed 0; encoded once into `cache`, with what they depend on.

        A cache made with other clips or another autoencoder is made again.
        """
        specs = sample_specs(n, 0, clips.world, "train")
        made_from = json.dumps(
            {
                "clips": asdict(clips),
                "n": n,
                "growth": GROWTH,
                "autoencoder": fingerprint(autoencoder.state_dict()),
                "latent_space": autoencoder.latent_space.to_dict(),
            }
        )
        path = cache / f"latents-{clips.num_frames}f.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("made_from") == made_from:
                    return cls(specs, file.get_tensor("latents"), file.get_tensor("object_mask"))
        latents, object_mask = encode_specs(specs, clips, autoencoder)
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file({"latents": latents, "object_mask": object_mask}, partial, {"made_from": made_from})
        return cls(specs, latents, object_mask)


@torch.no_grad()
def encode_specs(
    specs: list[ClipSpec], clips: ToyboxClips, autoencoder: VideoCodec, batch_size: int = 50
) -> tuple[Tensor, Tensor]:
    """Normalised latents (the posterior's mean, float16) and object masks (uint8) of rendered clips, on the CPU."""
    latents, masks = [], []
    device = str(autoencoder.device)
    for start in range(0, len(specs), batch_size):
        part = specs[start : start + batch_size]
        video, mask = render(part, clips.num_frames, clips.height, clips.width, device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            encoded = autoencoder.encode_video(video)
        latents.append(encoded.half().cpu())
        masks.append(latent_cells(mask, autoencoder).cpu())
    return torch.cat(latents).contiguous(), torch.cat(masks).contiguous()


def latent_cells(mask: Tensor, autoencoder: VideoCodec) -> Tensor:
    """Latent cells that an object covers to more than a tenth at some time; (B, 1, T, h, w) uint8."""
    space, num_frames = autoencoder.spatial_factor, mask.shape[2]
    cells = F.avg_pool3d(mask, (1, space, space))
    spans = (autoencoder.frame_span(k, num_frames) for k in range(autoencoder.latent_frames(num_frames)))
    at_some_time = [cells[:, :, start:end].amax(dim=2) for start, end in spans]
    return (torch.stack(at_some_time, dim=2) > 0.1).to(torch.uint8)
