"""The clips that an autoencoder is trained and measured on."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from opensora.data.batch import ClipBatch, DataContext, Source
from opensora.data.clips import ManifestClips
from opensora.distributed.seeding import BatchKey, derive_seed
from opensora.manifest import tables_of
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.training.task import TrainingData
from opensora.training.vae.clips import Cut, CutClips
from opensora.training.vae.frame_latents import FrameLatents, frame_latents
from opensora.training.vae.latent_space import measure_scaling_factor
from opensora.training.vae.settings import VAESettings


class AutoencoderData(TrainingData):
    """Clips of a run, cut as it wants them; or frame latents that were encoded once.

    Args:
        settings: of the training.
        autoencoder: what is trained.
        factor_is_known: whether a scaling factor belongs to the autoencoder already.
        device: of the batches.

    Attributes:
        cached: the frame latents that alone are trained on, once the data are open; None where clips are.
    """

    def __init__(
        self, settings: VAESettings, autoencoder: VideoAutoencoder, factor_is_known: bool, device: str
    ) -> None:
        self.settings, self.autoencoder, self.device = settings, autoencoder, device
        self.factor_is_known = factor_is_known
        self.cached: FrameLatents | None = None

    @cached_property
    def source(self) -> Source:
        return self._cut(self.settings.data.open(DataContext()), self.settings.cut)

    @torch.no_grad()
    def open(self, cache: Path) -> None:
        """Measures the scaling factor where none is known; stage `frames` makes its own at the end."""
        settings = self.settings
        if not self.factor_is_known and settings.stage != "frames":
            measure_scaling_factor(self.autoencoder, self.measured_videos(), self.measured_on(), cache)
        if settings.cache_latents:
            encoded = [frame_latents(self.autoencoder, clips) for clips in self.measured_clips()]
            masks = [latents.object_mask for latents in encoded if latents.object_mask is not None]
            latents = torch.cat([latents.latents for latents in encoded])
            self.cached = FrameLatents(latents, torch.cat(masks) if masks else None)

    def clips(self, key: BatchKey) -> ClipBatch:
        """The clips of a place in the run, on the device."""
        return self.source.batch(key).to(self.device)

    def cached_latents(self, key: BatchKey) -> FrameLatents:
        """What of the cached latents the step of a place in the run learns from."""
        assert self.cached is not None, "open the data first"
        count, _, num_frames = self.cached.latents.shape[:3]
        rows = torch.randint(count, (self.source.shapes()[0].batch_size,), generator=key.generator("clips"))
        kept = self.settings.cut.num_frames(num_frames, key.generator("length"))
        mask = self.cached.object_mask
        return FrameLatents(self.cached.latents[rows, :, :kept], None if mask is None else mask[rows, :, :kept])

    def prefetch(self, keys: Sequence[BatchKey]) -> None:
        if not self.settings.cache_latents:  # else nobody would ask for what is read
            self.source.prefetch(keys)

    def cancel_prefetch(self) -> None:
        self.source.cancel_prefetch()

    def figures(self) -> dict[str, float]:
        return self.source.figures()

    def measured_clips(self) -> Iterator[ClipBatch]:
        """Training clips, whole, batch by batch, `num_clips` at least."""
        whole = self._cut(self.settings.data.open(DataContext()), Cut(crop=self.settings.cut.crop))
        seen, position = 0, 0
        while seen < self.settings.num_clips:
            clips = whole.batch(BatchKey(derive_seed("measure"), position)).to(self.device)
            yield clips
            seen, position = seen + len(clips.video), position + 1

    def measured_videos(self) -> Iterator[Tensor]:
        return (clips.video for clips in self.measured_clips())

    def measured_on(self) -> str:
        """What the latent space is measured on, for whoever reads the checkpoint."""
        data = self.settings.data
        manifest = data.manifest if isinstance(data, ManifestClips) else None
        tables = ", ".join(table.name for table, _ in tables_of(manifest)) if manifest else ""
        return f"{self.settings.num_clips} clips of {tables or 'the toybox'}"

    def held_out_clips(self) -> Iterator[ClipBatch]:
        """Whole clips that are never trained on; none where nobody named any."""
        data, held_out = self.settings.data, self.settings.held_out
        if held_out is None and isinstance(data, ManifestClips):
            return
        source = (held_out or data).open(DataContext(split="held_out"))
        whole = self._cut(source, Cut(crop=self.settings.cut.crop))
        for position in range(self.settings.preview_batches):
            yield whole.batch(BatchKey(derive_seed("preview"), position)).to(self.device)

    def _cut(self, source: Source, cut: Cut) -> CutClips:
        return CutClips(source, cut, self.autoencoder.spatial_factor)
