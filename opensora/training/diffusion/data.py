"""Where a diffusion transformer's training gets its latents from."""

from collections.abc import Sequence
from pathlib import Path

from opensora.data.batch import DataContext, LatentBatch, Source
from opensora.distributed.seeding import BatchKey
from opensora.training.diffusion.networks import DiffusionNetworks
from opensora.training.diffusion.settings import DiffusionSettings
from opensora.training.task import TrainingData


class LatentData(TrainingData):
    """Latents of clips, from any source, opened for the networks of a run.

    Attributes:
        source: None until it is opened.
    """

    def __init__(self, settings: DiffusionSettings, networks: DiffusionNetworks) -> None:
        self.settings, self.networks = settings, networks
        self.source: Source | None = None

    def open(self, cache: Path) -> None:
        context = DataContext(
            autoencoder=self.networks.autoencoder,
            sample_posterior=self.settings.sample_posterior,
            keep_video=self.settings.takes_pixels is not None or self.networks.known_alone,
            frame_interval=self.networks.frame_interval,
            cache=cache,
            captions=self.networks.captions,
        )
        self.source = self.settings.data.open(context)

    def batch(self, key: BatchKey) -> LatentBatch:
        """The clips of a place in the run."""
        assert self.source is not None, "open it first"
        return self.source.batch(key)

    def prefetch(self, keys: Sequence[BatchKey]) -> None:
        if self.source is not None:
            self.source.prefetch(keys)

    def cancel_prefetch(self) -> None:
        if self.source is not None:
            self.source.cancel_prefetch()

    def figures(self) -> dict[str, float]:
        if self.source is None:
            return {}
        captions = self.networks.captions
        emptied = {"emptied_captions": float(captions.num_emptied)} if captions.num_emptied else {}
        return {**self.source.figures(), "cut_captions": float(captions.num_cut), **emptied}
