"""The networks of a diffusion transformer's training: the transformer, and all that it reads or is read through."""

from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from opensora.pipeline import OpenSoraPipeline
from opensora.training.diffusion.adaptation import build_transformer, choose_trained
from opensora.training.diffusion.lora import LoRAConfig, add_adapter
from opensora.training.diffusion.settings import DiffusionSettings
from opensora.training.diffusion.text import Captions
from opensora.training.muon import hidden_matrices
from opensora.training.parts import build_part
from opensora.training.task import Partition


class DiffusionNetworks:
    """The networks as a run begins with them.

    Args:
        settings: which they are.
        device: where those go that are not trained; "meta" builds all of them without weights.

    Attributes:
        module: the transformer, and the text encoder where that is trained along.
        frozen: the others, by name.
        defaults: how a pipeline of these networks samples, as keywords of `OpenSoraPipeline`.
        scheduler: samples from the transformer.
        noise_process: what the transformer is trained with.
    """

    def __init__(self, settings: DiffusionSettings, device: str) -> None:
        self.defaults: dict[str, Any] = {**settings.data.defaults(), **settings.defaults}
        frozen_dtype = getattr(torch, settings.frozen_dtype)
        self.autoencoder = build_part(settings.autoencoder, "autoencoder", device, frozen_dtype)
        self.scheduler, noise_process = settings.diffusion.build(self.autoencoder)
        self.noise_process = noise_process.to(device)
        self.transformer = build_transformer(
            settings.architecture, settings.transformer, settings.init_from, settings.new_parts, device
        )
        self.captions = Captions(
            settings.text,
            settings.init_from,
            network=self.transformer,
            clean=self.defaults.get("clean_prompts", False),
            device=device,
            dtype=frozen_dtype,
        )
        if isinstance(settings.train, LoRAConfig):
            add_adapter(self.transformer, settings.train)
        else:
            choose_trained(self.transformer, settings.train, freeze_text_embedder=settings.freeze_text_embedder)
        self.module = nn.ModuleDict({"transformer": self.transformer})
        self.frozen: dict[str, nn.Module] = {"autoencoder": self.autoencoder}
        if self.captions.encoder is not None:
            (self.module if self.captions.trained else self.frozen)["text_encoder"] = self.captions.encoder

    @property
    def not_matrices(self) -> set[str]:
        """Names of the parameters of the module that are no matrices between two hidden layers."""
        return {name for name, _ in self.module.named_parameters()} - hidden_matrices(self.module)

    @property
    def frame_interval(self) -> int:
        """How much slower than they are told to be the clips of the model play."""
        return self.defaults.get("frame_interval", 1)

    def text_encoder(self, module: nn.ModuleDict) -> nn.Module:
        """The encoder among the trained networks, or the frozen one, which is loaded if it is not here yet."""
        return module["text_encoder"] if "text_encoder" in module else self.captions.load()

    def pipeline(self, module: nn.ModuleDict, **changes: Any) -> OpenSoraPipeline:
        """A pipeline, which by default makes clips like those it was trained on.

        Args:
            module: the trained networks, or a copy of them.
            changes: keywords of `OpenSoraPipeline` to take the place of these.
        """
        parts = {
            "transformer": module["transformer"],
            "scheduler": self.scheduler,
            "autoencoder": self.autoencoder,
            "text_encoder": self.text_encoder(module),
            "tokenizer": self.captions.tokenizer,
        }
        return OpenSoraPipeline(**{**parts, **self.defaults, **changes})


class TransformerPartition(Partition):
    """A transformer's blocks, and its tokens among ranks."""

    def __init__(self, transformer: Any) -> None:
        super().__init__(list(transformer.blocks))
        self.transformer = transformer

    def split_sequences(self, group: ProcessGroup) -> None:
        self.transformer.enable_sequence_parallel(group)
