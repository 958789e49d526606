"""Training a diffusion transformer of the family: any generation, any noise process, from any source of latents.

`prepare` draws everything random: which clips, their latents, how they are worded, which frames are conditioning,
noise, time, which captions are dropped. `loss` corrupts the latents, asks the transformer, and compares.

Letters: B clips, C latent channels, T latent frames, h, w latent cells, L text tokens, D width of the text.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.checkpoints.published import BUNDLED, published_name
from opensora.conditioning.masks import draw_frame_masks
from opensora.data.batch import LatentBatch
from opensora.denoiser import predict
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.models.text.conditioner import TextStates, TextTokens
from opensora.settings import to_dict
from opensora.training.diffusion.batch import DiffusionBatch
from opensora.training.diffusion.data import LatentData
from opensora.training.diffusion.export import copies, origin_of_latents, save_pipeline
from opensora.training.diffusion.lora import LoRAConfig, export_adapter, without_adapter
from opensora.training.diffusion.networks import DiffusionNetworks
from opensora.training.diffusion.settings import DiffusionSettings
from opensora.training.diffusion.text import CachedText, TrainedText
from opensora.training.task import TrainingTask

TIME_BINS = 10


class DiffusionTask(TrainingTask):
    """A transformer learns to undo the corruption of clips; see `DiffusionSettings`.

    Args:
        settings: of the training.
        networks: of the run.
        data: gives latents.
        device: of the batches.
    """

    def __init__(self, settings: DiffusionSettings, networks: DiffusionNetworks, data: LatentData, device: str) -> None:
        self.settings, self.networks, self.data, self.device = settings, networks, data, device
        self.module: nn.ModuleDict = networks.module

    def prepare(self, key: BatchKey) -> DiffusionBatch:
        settings, device = self.settings, self.device
        clips = self.data.batch(key).to(device)
        size, num_frames = len(clips.latents), clips.latents.shape[2]
        frame_mask = None
        if settings.frame_masks and num_frames > 1:
            rng = random.Random(key.generator("strategies").initial_seed())
            frame_mask = draw_frame_masks(settings.frame_masks, size, num_frames, rng, key.generator("given")).to(
                device
            )
        noise = torch.randn(clips.latents.shape, generator=key.generator("noise"))
        drop_text = torch.rand(size, generator=key.generator("drop")) < settings.drop_text
        return DiffusionBatch(
            clips,
            noise=noise.to(device),
            t=self.networks.noise_process.draw_times(
                size,
                height=float(clips.conditions.height[0]),  # type: ignore[index]
                width=float(clips.conditions.width[0]),  # type: ignore[index]
                num_frames=int(clips.conditions.num_frames),
                generator=key.generator("t"),
            ).to(device),
            text=self.text(clips),
            drop_text=drop_text.to(device),
            frame_mask=frame_mask,
        )

    def text(self, clips: LatentBatch) -> TextStates | TextTokens:
        """Of the captions, on the device; tokens where the encoder is trained along."""
        if isinstance(self.settings.text, CachedText):
            if clips.text is None:
                raise OpenSoraError(
                    "these latents came without text states; compute them beforehand, or choose another objective.text"
                )
            return clips.text.to(self.device)
        tokens = self.networks.captions.tokens(clips.captions).to(self.device)
        if self.networks.captions.trained:
            return tokens
        with torch.no_grad():
            return self.networks.captions.encode(tokens)

    def loss(self, batch: DiffusionBatch, key: BatchKey) -> dict[str, Tensor]:
        noisy = self.networks.noise_process.corrupt(batch.clips.latents, batch.noise, batch.t, batch.frame_mask)
        prediction = self.predict(noisy, self.networks.noise_process.timesteps(batch.t), batch)
        terms = self.networks.noise_process.losses(
            prediction,
            clean=batch.clips.latents,
            noisy=noisy,
            noise=batch.noise,
            t=batch.t,
            frame_mask=batch.frame_mask,
            weights=self.weights(batch),
        )
        if isinstance(self.settings.train, LoRAConfig) and self.settings.train.preserve:
            with torch.no_grad(), without_adapter(self.networks.transformer):
                before = self.predict(noisy, self.networks.noise_process.timesteps(batch.t), batch)
            change = (prediction - before)[:, : batch.clips.latents.shape[1]].abs().flatten(1).mean(1)
            terms["change"] = self.settings.train.preserve * change
        return terms

    def predict(self, noisy: Tensor, timestep: Tensor, batch: DiffusionBatch) -> Tensor:
        """The transformer's float32 output for noisy latents; (B, C or 2C, T, h, w)."""
        text = batch.text if isinstance(batch.text, TextStates) else self.networks.captions.encode(batch.text)
        text = replace(text, dropped=batch.drop_text)
        return predict(self.networks.transformer, noisy, timestep, text, batch.clips.conditions, batch.frame_mask)

    def weights(self, batch: DiffusionBatch) -> Tensor | None:
        """Loss weight of every latent cell, 1 on average, (B, 1, T, h, w); None for 1 everywhere."""
        if batch.clips.object_mask is None or not self.settings.object_weight:
            return None
        weights = 1 + self.settings.object_weight * batch.clips.object_mask
        return weights / weights.mean()

    def groups(self, batch: DiffusionBatch) -> dict[str, list[str]]:
        """Each clip's size, and the tenth of the time that it was corrupted to."""
        timesteps = self.networks.noise_process.timesteps(batch.t)
        tenths = (timesteps * TIME_BINS / 1000).long().clamp(0, TIME_BINS - 1).tolist()
        return {
            "bucket": [batch.clips.label] * len(tenths),
            "t": [f"{tenth / TIME_BINS:.1f}-{(tenth + 1) / TIME_BINS:.1f}" for tenth in tenths],
        }

    def export(self, module: Any, folder: Path) -> None:
        if isinstance(self.settings.train, LoRAConfig):
            self.export_adapter(module, folder, self.settings.train)
            return
        with_text_encoder = isinstance(self.settings.text, TrainedText) or self.settings.text.exported
        networks: dict[str, nn.Module] = {"transformer": module["transformer"]}
        if with_text_encoder:
            networks["text_encoder"] = self.networks.text_encoder(module)
        parts: dict[str, Any] = copies(networks, getattr(torch, self.settings.export_dtype))
        parts["autoencoder"] = self.networks.autoencoder  # as the latents were made with it
        pipeline = self.networks.pipeline(module, **parts, trained_on=origin_of_latents(parts["autoencoder"]))
        save_pipeline(pipeline, folder, with_text_encoder=with_text_encoder)

    def export_adapter(self, module: Any, folder: Path, lora: LoRAConfig) -> None:
        settings = self.settings
        training = {
            "lora": to_dict(lora),
            "diffusion": {"type": type(settings.diffusion).__name__, **to_dict(settings.diffusion)},
            "frame_masks": settings.frame_masks,
            "drop_text": settings.drop_text,
            "trained_on": origin_of_latents(self.networks.autoencoder),
        }
        base = str(settings.init_from)  # a name, or a folder, of which the last part is told
        base = base if base in BUNDLED else published_name(base) or Path(base).name
        export_adapter(module["transformer"], lora, folder, base=base, training=training)
