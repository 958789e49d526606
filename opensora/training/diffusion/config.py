"""A diffusion transformer's training, put together from its settings."""

from dataclasses import dataclass

from opensora.data.clips import ManifestClips
from opensora.errors import OpenSoraError
from opensora.training.diffusion.data import LatentData
from opensora.training.diffusion.networks import DiffusionNetworks, TransformerPartition
from opensora.training.diffusion.plan import DiffusionPlan
from opensora.training.diffusion.previews import PipelinePreview, clips_trained_on
from opensora.training.diffusion.settings import DiffusionSettings
from opensora.training.diffusion.task import DiffusionTask
from opensora.training.parts import META
from opensora.training.task import TrainingSetup


@dataclass(frozen=True)
class DiffusionTaskConfig(DiffusionSettings):
    """Which transformer learns to undo which corruption of which clips; see `DiffusionSettings`."""

    def build(self, device: str) -> TrainingSetup:
        if isinstance(self.data, ManifestClips) and self.data.manifest is None:
            raise OpenSoraError(
                "no clips to train on: name their table by objective.data.manifest=FILE; "
                "opensora data manifest makes one of a folder"
            )
        return self._setup(DiffusionNetworks(self, device), device)

    def plan(self) -> DiffusionPlan:
        networks = DiffusionNetworks(self, META)
        return DiffusionPlan(self, self._setup(networks, META), networks)

    def _setup(self, networks: DiffusionNetworks, device: str) -> TrainingSetup:
        data = LatentData(self, networks)
        task = DiffusionTask(self, networks, data, device)
        preview = None
        if self.preview is not None:
            preview = PipelinePreview(
                self.preview, networks.pipeline, networks.frame_interval, clips_trained_on(self.data)
            )
        return TrainingSetup(
            task,
            data,
            TransformerPartition(networks.transformer),
            not_matrices=networks.not_matrices,
            frozen=networks.frozen,
            frozen_fingerprint=networks.frozen_fingerprint,
            preview=preview,
            groups=task.groups,
        )
