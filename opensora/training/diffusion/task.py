"""Training a diffusion transformer of the family: any generation, any noise process, from any source of latents.

`prepare` draws everything random: which clips, their latents, how they are worded, which frames are conditioning,
noise, time, which captions are dropped. `loss` corrupts the latents, asks the transformer, and compares.

Letters: B clips, C latent channels, T latent frames, h, w latent cells, L text tokens, D width of the text.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.checkpoints.published import BUNDLED, published_name
from opensora.conditioning.known_frames import NOISE_SHARES, KnownEnds, draw_drops, draw_known_ends, known_mask
from opensora.conditioning.masks import draw_frame_masks
from opensora.containers.runs import ABOUT, FrozenParts
from opensora.contents import shown
from opensora.data.batch import LatentBatch
from opensora.data.degradation import degrade, mix_noise
from opensora.data.encoding import encode_again, encode_ends
from opensora.denoiser import predict
from opensora.diffusion.process import RectifiedFlowProcess
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.files import replacing_folder
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.text.conditioner import TextStates, TextTokens
from opensora.sampling.finite import check_finite
from opensora.settings import save_settings, to_dict
from opensora.training.diffusion.batch import DiffusionBatch
from opensora.training.diffusion.data import LatentData
from opensora.training.diffusion.export import copies, origin_of_latents, save_pipeline
from opensora.training.diffusion.few_steps import GuidedTeacher, pieces
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
        check_finite(clips.latents, f"the latents of the clips {_named(clips.captions)}")
        size, num_frames = len(clips.latents), clips.latents.shape[2]
        frame_mask = None
        if settings.frame_masks and num_frames > 1:
            rng = random.Random(key.generator("strategies").initial_seed())
            frame_mask = draw_frame_masks(settings.frame_masks, size, num_frames, rng, key.generator("given")).to(
                device
            )
        noise = torch.randn(clips.latents.shape, generator=key.generator("noise"))
        drop_text = torch.rand(size, generator=key.generator("drop")) < settings.drop_text
        channels, drop_text = self.known_frames(clips, drop_text, key)
        text, drop_text = self.text(clips, drop_text, key)
        batch = DiffusionBatch(
            replace(clips, video=None),
            noise=noise.to(device),
            t=self.networks.noise_process.draw_times(
                size,
                height=float(clips.conditions.height[0]),  # type: ignore[index]
                width=float(clips.conditions.width[0]),  # type: ignore[index]
                num_frames=int(clips.conditions.num_frames),
                num_latents=num_frames,
                generator=key.generator("t"),
            ).to(device),
            text=text,
            drop_text=drop_text,
            frame_mask=frame_mask,
            channels=channels,
            worse=self.worse(clips, key),
        )
        return batch if self.networks.walker is None else self.in_few_steps(batch, self.networks.walker)

    def in_few_steps(self, batch: DiffusionBatch, teacher: GuidedTeacher) -> DiffusionBatch:
        """The path that a teacher takes from the noise of a batch, cut into the student's steps."""
        process, captions, conditions = self.networks.noise_process, self.networks.captions, batch.clips.conditions
        assert isinstance(process, RectifiedFlowProcess)
        timesteps = teacher.timesteps(
            height=float(conditions.height[0]),  # type: ignore[index]
            width=float(conditions.width[0]),  # type: ignore[index]
            num_frames=int(conditions.num_frames),
            num_latents=batch.noise.shape[2],
        )
        null = None if captions.null_prompt is None else captions.null().to(self.device)
        return pieces(batch, teacher.walk(batch, null, timesteps), timesteps[:: teacher.every], process)

    def worse(self, clips: LatentBatch, key: BatchKey) -> Tensor | None:
        """Latents of the clips, some of which were made worse; None where they are left as they are."""
        if self.settings.degradation is None:
            return None
        assert clips.video is not None
        video = degrade(clips.video, self.settings.degradation, key.generator("degradation"))
        return self.encode_again(video, key, "degraded_posterior")

    def encode_again(self, video: Tensor, key: BatchKey, draws: str) -> Tensor:
        """Latents of clips that were changed, on the device."""
        generator = key.generator(draws) if self.settings.sample_posterior else None
        return encode_again(video, self.networks.autoencoder, generator).to(self.device)

    def known_frames(
        self, clips: LatentBatch, drop_text: Tensor, key: BatchKey
    ) -> tuple[ChannelConditioning | None, Tensor]:
        """What the network is shown beside the noise, if it reads that, and which captions are dropped then.

        A network that reads known frames is always shown some, none of which is known perhaps.
        """
        if not self.networks.transformer.reads_channels:
            return None, drop_text
        rng = random.Random(key.generator("known").initial_seed())
        size, num_frames = len(clips.latents), clips.latents.shape[2]
        ends = draw_known_ends(self.settings.known_frames, size, num_frames, rng, self.latents_of)
        known = known_mask(ends, num_frames)
        without_text, without_frames = draw_drops(self.settings.drop_of_known, known, key.generator("drop_of_known"))
        if self.settings.drop_of_known:
            drop_text = torch.where(known.any(dim=1), without_text, drop_text)
        channels = ChannelConditioning(self.known_latents(clips, ends, key), known.to(self.device))
        unread = self.networks.transformer.without_known_frames(channels)
        return channels.where(~without_frames.to(self.device), unread), drop_text

    def known_latents(self, clips: LatentBatch, ends: Sequence[KnownEnds], key: BatchKey) -> Tensor:
        """What is shown where frames are known; (B, C, T, h, w)."""
        if not any(end.head or end.tail for end in ends):
            return clips.latents
        noisy = torch.tensor([end.noisy for end in ends])
        if noisy.any():
            clips = replace(clips, video=self.with_noise(clips, noisy, key))
        if not self.networks.known_alone:
            return self.known_in_place(clips, noisy, key)
        generator = key.generator("known_posterior") if self.settings.sample_posterior else None
        counts = [(end.head, end.tail) for end in ends]
        return encode_ends(clips, counts, self.networks.autoencoder, generator).to(self.device)

    def known_in_place(self, clips: LatentBatch, noisy: Tensor, key: BatchKey) -> Tensor:
        """Latents of the clips themselves, or of those that have noise in them now."""
        if not noisy.any():
            return clips.latents
        assert clips.video is not None
        latents = clips.latents.clone()
        latents[noisy.to(latents.device)] = self.encode_again(clips.video[noisy], key, "known_posterior")
        return latents

    def with_noise(self, clips: LatentBatch, noisy: Tensor, key: BatchKey) -> Tensor:
        """The video of the clips, some of them with noise in their pixels."""
        video, generator = clips.video, key.generator("known_noise")
        assert video is not None
        low, high = NOISE_SHARES
        shares = low + (high - low) * torch.rand(len(video), generator=generator)
        noise = torch.randn(video.shape, generator=generator)
        shares = torch.where(noisy, shares, 0.0)[:, None, None, None, None].to(video)
        return mix_noise(video, noise, shares)

    def latents_of(self, num_frames: int) -> int:
        """Latent frames of the shortest clip that has so many frames."""
        autoencoder = self.networks.autoencoder
        return autoencoder.latent_frames(autoencoder.size_rule().frames_from(num_frames))

    def text(self, clips: LatentBatch, dropped: Tensor, key: BatchKey) -> tuple[TextStates | TextTokens, Tensor | None]:
        """What is read of the captions, and where the learned null text is read in its place; see `DiffusionBatch`.

        A null text that is an encoded one takes its place here, states and pooled vector each by itself.
        """
        text, captions = self.captioned(clips), self.networks.captions
        if captions.null_prompt is None:
            return text, dropped.to(self.device)
        assert isinstance(text, TextStates)
        share, without_pooled = self.settings.drop_pooled, dropped
        if share is not None:
            without_pooled = torch.rand(len(text), generator=key.generator("drop_pooled")) < share
        null = captions.null().to(self.device)
        return text.replaced(null, dropped.to(self.device), without_pooled.to(self.device)), None

    def captioned(self, clips: LatentBatch) -> TextStates | TextTokens:
        """The text of all captions, on the device; tokens where the encoder is trained along."""
        if isinstance(self.settings.text, CachedText):
            if clips.text is None:
                raise OpenSoraError(
                    "these latents came without text states; compute them beforehand, or choose another objective.text"
                )
            check_finite(clips.text.states, f"the text states in the cache of {_named(clips.captions)}")
            return clips.text.to(self.device)
        tokens = self.networks.captions.tokens(clips.captions).to(self.device)
        if self.networks.captions.trained:
            return tokens
        with torch.no_grad():
            text = self.networks.captions.encode(tokens)
        check_finite(text.states, f"the text states of {_named(clips.captions)}")
        return text

    def loss(self, batch: DiffusionBatch, key: BatchKey) -> dict[str, Tensor]:
        process, teacher = self.networks.noise_process, self.networks.teacher
        begun = batch.clips.latents if batch.worse is None else batch.worse
        noisy = process.corrupt(begun, batch.noise, batch.t, batch.frame_mask)
        prediction = self.predict(noisy, process.timesteps(batch.t), batch)

        def losses(clean: Tensor, noise: Tensor) -> dict[str, Tensor]:
            latents = {"clean": clean, "noisy": noisy, "noise": noise}
            return process.losses(
                prediction, **latents, t=batch.t, frame_mask=batch.frame_mask, weights=self.weights(batch)
            )

        terms = losses(batch.clips.latents, batch.noise)
        if teacher is not None:
            taught = losses(*teacher.answer(noisy, process, batch))
            terms |= {name: term for name, term in taught.items() if name != "vb"}  # the variance is that of clips
        if isinstance(self.settings.train, LoRAConfig) and self.settings.train.preserve:
            with torch.no_grad(), without_adapter(self.networks.transformer):
                before = self.predict(noisy, process.timesteps(batch.t), batch)
            change = (prediction - before)[:, : batch.clips.latents.shape[1]].abs().flatten(1).mean(1)
            terms["change"] = self.settings.train.preserve * change
        return terms

    def predict(self, noisy: Tensor, timestep: Tensor, batch: DiffusionBatch) -> Tensor:
        """The transformer's float32 output for noisy latents; (B, C or 2C, T, h, w)."""
        text = batch.text if isinstance(batch.text, TextStates) else self.networks.captions.encode(batch.text)
        text = replace(text, dropped=batch.drop_text)
        clip, transformer = batch.clips.conditions, self.networks.transformer
        return predict(transformer, noisy, timestep, text, clip, batch.frame_mask, batch.channels)

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
            networks |= self.networks.text_encoders(module)
        parts: dict[str, Any] = copies(networks, getattr(torch, self.settings.export_dtype))
        parts["autoencoder"] = self.networks.autoencoder  # as the latents were made with it
        pipeline = self.networks.pipeline(module, **parts, trained_on=origin_of_latents(parts["autoencoder"]))
        save_pipeline(pipeline, folder, with_text_encoder=with_text_encoder)

    def export_frozen(self, folder: Path) -> None:
        if not isinstance(self.settings.train, LoRAConfig):
            self.networks.save_frozen(folder)
            return
        with replacing_folder(folder, overwrite=True) as temporary:
            self.export_adapter(self.module, temporary, self.settings.train)
            save_settings(FrozenParts(["adapter"]), temporary / ABOUT)

    def export_adapter(self, module: Any, folder: Path, lora: LoRAConfig) -> None:
        settings = self.settings
        training = {
            "lora": {key: value for key, value in to_dict(lora).items() if key != "init_adapter"},
            "diffusion": {"type": type(settings.diffusion).__name__, **to_dict(settings.diffusion)},
            "frame_masks": settings.frame_masks,
            **({"known_frames": settings.known_frames} if settings.known_frames else {}),
            "drop_text": settings.drop_text,
            **({"drop_pooled": settings.drop_pooled} if settings.drop_pooled is not None else {}),
            "trained_on": origin_of_latents(self.networks.autoencoder),
            **({"distilled_from": walker.describe()} if (walker := self.networks.walker) else {}),
        }
        base = str(settings.init_from)  # a name, or a folder, of which the last part is told
        base = base if base in BUNDLED else published_name(base) or Path(base).name
        fingerprint = self.networks.base_fingerprint
        export_adapter(module["transformer"], lora, folder, base=base, training=training, fingerprint=fingerprint)


def _named(captions: Sequence[str]) -> str:
    """Clips by their captions, for messages."""
    return shown(", ".join(repr(caption) for caption in captions), 160)
