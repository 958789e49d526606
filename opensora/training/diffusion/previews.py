"""What is generated now and then to watch a training, and written where the run keeps its previews."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opensora.data.batch import DataConfig
from opensora.data.bucket_config import BucketConfig
from opensora.data.cached import CachedLatents
from opensora.data.clips import ClipSource, ManifestClips
from opensora.errors import OpenSoraError
from opensora.evaluation.held_out import clips_of_model, manifest_portions
from opensora.evaluation.judge import load_judge
from opensora.evaluation.loss import held_out_losses
from opensora.evaluation.toybox import contact_sheet, generate, held_out_samples, share_right
from opensora.media.write import write_video
from opensora.pipeline import OpenSoraPipeline
from opensora.toybox.specs import EASY_WORLD, World
from opensora.training.task import Preview


@dataclass(frozen=True)
class JudgedPrompts:
    """Held-out prompts of the toybox, read by its judge.

    Attributes:
        num_prompts: how many.
        world: what appears in them.
    """

    num_prompts: int = 40
    world: World = EASY_WORLD

    def show(
        self, pipeline: OpenSoraPipeline, folder: Path, step: int, trained_on: ManifestClips | None
    ) -> dict[str, float]:
        """Writes a contact sheet; returns the share of the prompts' words that the judge reads off the clips."""
        if not self.num_prompts:
            return {}
        samples = held_out_samples(self.num_prompts, world=self.world)
        pipeline.set_progress_bar_config(disable=True)
        clips = generate(pipeline, samples)
        shown = [(sample.prompt, clip) for sample, clip in zip(samples, clips, strict=True)]
        contact_sheet(shown[:8], folder / f"step-{step:08d}.png")
        read = load_judge(device=str(pipeline.device)).read(clips)
        shares = share_right([sample.wanted for sample in samples], read)
        return {f"judge_{name}": share for name, share in shares.items()}


@dataclass(frozen=True)
class Prompts:
    """Clips of prompts of one's own, each from the same noise every time.

    Attributes:
        prompts: one clip each.
        seed: of the first clip; that of the next is one higher.
    """

    prompts: tuple[str, ...]
    seed: int = 42

    def __post_init__(self) -> None:
        if not self.prompts:
            raise OpenSoraError("objective.preview.prompts is empty; give at least one, or preview=none")

    def show(
        self, pipeline: OpenSoraPipeline, folder: Path, step: int, trained_on: ManifestClips | None
    ) -> dict[str, float]:
        """Writes an mp4 for every prompt."""
        pipeline.set_progress_bar_config(disable=True)
        config = pipeline.config
        for number, prompt in enumerate(self.prompts):
            noise = torch.Generator().manual_seed(self.seed + number)
            frames = pipeline(prompt, generator=noise, output_type="pt").frames[0]  # (T, 3, H, W)
            folder.mkdir(parents=True, exist_ok=True)
            video = frames.transpose(0, 1) * 2 - 1
            write_video(folder / f"step-{step:08d}-{number}.mp4", video, config.fps / config.frame_interval)
        return {}


@dataclass(frozen=True)
class HeldOutLosses:
    """The loss on clips that are not trained on, at ten fixed timesteps, size by size; see `evaluation.loss`.

    Attributes:
        manifest: table of the clips.
        buckets: their sizes, see `data.buckets`.
        num_clips: at most so many of each size.
        frame_interval: every how manieth frame of a video is taken; None for as in
            training: all of them where no table is trained on.
        prompts: clips to generate besides.
    """

    manifest: Path
    buckets: BucketConfig
    num_clips: int = 40
    frame_interval: int | None = None
    prompts: Prompts | None = None

    def clips(self, model_interval: int, trained_on: ManifestClips | None) -> ManifestClips:
        """The clips, told and captioned like those that are trained on, or else as the model is when it samples.

        Args:
            model_interval: `frame_interval` of the model.
            trained_on: the table that the run trains on; None if there is none.
        """
        if trained_on is None:
            return clips_of_model(model_interval, self.manifest, self.buckets, frame_interval=self.frame_interval or 1)
        interval = trained_on.frame_interval if self.frame_interval is None else self.frame_interval
        return replace(
            trained_on, manifest=self.manifest, buckets=self.buckets, frame_interval=interval, text_required=True
        )

    def check(self, model_interval: int, trained_on: ManifestClips | None) -> None:
        """Before the first step.

        Raises:
            OpenSoraError: no such table, none of its clips has any of the sizes, or a file is missing.
        """
        source = ClipSource(self.clips(model_interval, trained_on))
        for row in source.rows:
            if not row.path.exists():
                raise OpenSoraError(f"{row.path} does not exist; leave it out of {self.manifest}")

    def show(
        self, pipeline: OpenSoraPipeline, folder: Path, step: int, trained_on: ManifestClips | None
    ) -> dict[str, float]:
        """The mean loss of every size, as `held_out/SIZE`."""
        figures = {} if self.prompts is None else self.prompts.show(pipeline, folder, step, trained_on)
        portions = manifest_portions(pipeline, self.clips(pipeline.config.frame_interval, trained_on), self.num_clips)
        results = held_out_losses(pipeline, (portion.load() for portion in portions))
        figures |= {"held_out_cut_captions": float(results.cut_captions)} if results.cut_captions else {}
        return {**figures, **{f"held_out/{label}": loss for label, loss in results.means().items()}}


def clips_trained_on(data: DataConfig) -> ManifestClips | None:
    """The table of clips that a run trains on, or that its cache was made of; None where there is no table."""
    if isinstance(data, CachedLatents):
        return None if data.folder is None else data.made_of()
    return data if isinstance(data, ManifestClips) else None


class PipelinePreview(Preview):
    """What is made with a pipeline of the current weights.

    Args:
        watched: what that is.
        make_pipeline: makes a pipeline of a copy of the trained networks.
        frame_interval: of the pipeline.
        trained_on: the table that the run trains on; None if there is none.
    """

    def __init__(
        self,
        watched: JudgedPrompts | Prompts | HeldOutLosses,
        make_pipeline: Callable[[Any], OpenSoraPipeline],
        frame_interval: int,
        trained_on: ManifestClips | None,
    ) -> None:
        self.watched, self.make_pipeline = watched, make_pipeline
        self.frame_interval, self.trained_on = frame_interval, trained_on

    def check(self) -> None:
        if isinstance(self.watched, HeldOutLosses):
            self.watched.check(self.frame_interval, self.trained_on)

    def show(self, module: Any, folder: Path, step: int) -> dict[str, float]:
        return self.watched.show(self.make_pipeline(module), folder, step, self.trained_on)
