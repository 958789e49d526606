"""A diffusion transformer's training without weights and data, for plans."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from opensora.data.batch import BatchShape, ClipBatch, LatentBatch
from opensora.data.clips import ManifestClips
from opensora.data.encoding import whole_cells
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.training.diffusion.batch import DiffusionBatch
from opensora.training.diffusion.networks import DiffusionNetworks
from opensora.training.diffusion.settings import DiffusionSettings
from opensora.training.diffusion.text import FrozenText
from opensora.training.task import TaskPlan, TrainingSetup


class DiffusionPlan(TaskPlan):
    """Batches of every size, without content.

    Args:
        settings: of the training.
        setup: built on the meta device.
        networks: those of the setup.
    """

    def __init__(self, settings: DiffusionSettings, setup: TrainingSetup, networks: DiffusionNetworks) -> None:
        self.settings, self.setup, self.networks = settings, setup, networks

    def shapes(self) -> list[BatchShape]:
        return self.settings.data.shapes()

    def meta_batch(self, shape: BatchShape) -> DiffusionBatch:
        walker, batch = self.networks.walker, self._drawn(shape)
        return batch if walker is None else batch.repeated(walker.settings.num_steps)

    def _drawn(self, shape: BatchShape) -> DiffusionBatch:
        """A batch of clips; what a teacher makes of it is more."""
        networks = self.networks
        device = next(networks.transformer.parameters()).device
        clips = LatentBatch.meta(shape, networks.autoencoder, device)
        size, frames = shape.batch_size, clips.latents.shape[2]
        conditioner = networks.captions.conditioner
        if networks.captions.trained:
            text: Any = conditioner.blank_tokens(size, device)
        else:
            text = conditioner.blank_states(size, device, torch.float32)
            text = replace(text, mask=torch.ones(text.states.shape[:2], dtype=torch.bool, device=device))
        t = networks.noise_process.draw_times(
            size,
            height=shape.height,
            width=shape.width,
            num_frames=shape.num_frames,
            num_latents=frames,
            generator=torch.Generator(),
        )
        learns_null = networks.captions.null_prompt is None
        masked = self.settings.frame_masks and frames > 1
        return DiffusionBatch(
            clips,
            noise=torch.zeros_like(clips.latents),
            t=t.to(device),
            text=text,
            drop_text=torch.zeros(size, dtype=torch.bool, device=device) if learns_null else None,
            frame_mask=torch.zeros(size, frames, dtype=torch.bool, device=device) if masked else None,
            channels=ChannelConditioning.none(clips.latents) if networks.transformer.reads_channels else None,
        )

    def frozen_workloads(self, shape: BatchShape) -> dict[str, Callable[[], Any]]:
        networks = self.networks
        device = next(networks.transformer.parameters()).device
        workloads: dict[str, Callable[[], Any]] = {}
        if isinstance(self.settings.data, ManifestClips):  # other data were encoded before the first step

            def encode() -> Any:
                video = whole_cells(ClipBatch.meta(shape, device).video, networks.autoencoder.spatial_factor)
                posterior = networks.autoencoder.posterior(video)
                return posterior if self.settings.degradation is None else networks.autoencoder.posterior(video)

            workloads["autoencoder"] = encode
        if isinstance(self.settings.text, FrozenText):
            tokens = networks.captions.conditioner.blank_tokens(shape.batch_size, device)
            workloads["text_encoder"] = lambda: networks.captions.encode(tokens)
        if (walker := networks.walker) is not None:
            batch, nothing = self._drawn(shape), networks.captions.null_prompt
            blank = networks.captions.conditioner.blank_states
            null = None if nothing is None else blank(1, device, torch.float32)
            size = {"height": shape.height, "width": shape.width, "num_frames": shape.num_frames}
            timesteps = walker.timesteps(**size, num_latents=batch.noise.shape[2])
            workloads["teacher"] = lambda: walker.walk(batch, null, timesteps)
        return workloads
