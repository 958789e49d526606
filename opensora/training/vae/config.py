"""A stage of an autoencoder's training, put together from its settings."""

from dataclasses import dataclass
from typing import Any

import torch

from opensora.data.batch import BatchShape, ClipBatch
from opensora.training.parts import META
from opensora.training.task import Partition, TaskPlan, TrainingSetup
from opensora.training.vae.data import AutoencoderData
from opensora.training.vae.latent_space import build_autoencoder
from opensora.training.vae.perceptual import build_perceptual
from opensora.training.vae.previews import Reconstructions
from opensora.training.vae.settings import VAESettings
from opensora.training.vae.stages import DecodersTask, FramesTask, LatentsTask, PictureCritic, PixelsTask
from opensora.training.vae.task import VAETask, blocks_of
from opensora.training.vae.whole import WholeTask, blocks_of_network, check_kind

_PICTURE_TASKS: dict[str, Any] = {
    "frames": FramesTask,
    "pixels": PixelsTask,
    "decoders": DecodersTask,
    "whole": WholeTask,
}


@dataclass(frozen=True)
class VAETaskConfig(VAESettings):
    """One stage of autoencoder training; see `VAESettings`."""

    def build(self, device: str) -> TrainingSetup:
        return self._setup(device)[0]

    def plan(self) -> "VAEPlan":
        return VAEPlan(*self._setup(META))

    def _setup(self, device: str) -> tuple[TrainingSetup, AutoencoderData]:
        autoencoder, factor_is_known = build_autoencoder(self, device)
        check_kind(self, autoencoder)
        autoencoder.micro_batch_size = self.micro_batch_size
        data = AutoencoderData(self, autoencoder, factor_is_known, device)
        task, frozen, critic = self._task(data, device)
        setup = TrainingSetup(
            task,
            data,
            # How often a block runs depends on a batch's length, which ranks draw each for itself.
            Partition(blocks_of_network(autoencoder) if self.stage == "whole" else blocks_of(autoencoder), gathered=()),
            not_matrices=task.not_matrices,
            frozen=frozen,
            critic=critic,
            preview=Reconstructions(data, frames_alone=self.stage == "frames"),
            groups=task.groups,
        )
        return setup, data

    def _task(
        self, data: AutoencoderData, device: str
    ) -> tuple[VAETask, dict[str, torch.nn.Module], PictureCritic | None]:
        """The task of the stage, what it uses and does not train, and its critic."""
        if self.stage == "latents":
            return LatentsTask(self, data.autoencoder, data), {}, None
        perceptual = build_perceptual(self.perceptual, device) if self.perceptual_weight else None
        discriminator = None
        if self.discriminator is not None:
            with torch.device(device):
                discriminator = self.discriminator.build()
        task = _PICTURE_TASKS[self.stage](self, data.autoencoder, data, perceptual, discriminator)
        critic = None
        if discriminator is not None and self.discriminator is not None:
            critic = PictureCritic(task, discriminator, self.discriminator.start)
        return task, {} if perceptual is None else {"perceptual": perceptual}, critic


class VAEPlan(TaskPlan):
    """Batches of every size, without content."""

    def __init__(self, setup: TrainingSetup, data: AutoencoderData) -> None:
        self.setup, self.data = setup, data

    def shapes(self) -> list[BatchShape]:
        return self.data.source.shapes()

    def meta_batch(self, shape: BatchShape) -> ClipBatch:
        return ClipBatch.meta(shape, META)
