"""The networks of a diffusion transformer's training: the transformer, and all that it reads or is read through."""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from opensora.checkpoints.source import find_part
from opensora.data.clips import ManifestClips
from opensora.errors import OpenSoraError
from opensora.files import replacing_folder
from opensora.geometry import VideoSize
from opensora.models.int8 import round_to_int8
from opensora.pipeline import OpenSoraPipeline
from opensora.training.diffusion.adaptation import build_transformer, choose_trained
from opensora.training.diffusion.export import origin_of_latents
from opensora.training.diffusion.few_steps import GuidedTeacher
from opensora.training.diffusion.lora import LoRAConfig, add_adapter, base_fingerprint
from opensora.training.diffusion.settings import DiffusionSettings
from opensora.training.diffusion.teacher import Teacher
from opensora.training.diffusion.text import Captions
from opensora.training.frozen_parts import fingerprint_of_frozen, save_frozen_part
from opensora.training.muon import hidden_matrices
from opensora.training.parts import META, build_part
from opensora.training.task import Partition


class DiffusionNetworks:
    """The networks as a run begins with them.

    Args:
        settings: which they are.
        device: where those go that are not trained; "meta" builds all of them without weights.

    Attributes:
        module: the transformer, and the text encoder where that is trained along.
        frozen: the others, by name.
        known_alone: frames are shown that were encoded alone.
        teacher: whose answers are learnt; None where the clips are.
        walker: a teacher whose path is learnt in few steps; None for none.
        defaults: how a pipeline of these networks samples, as keywords of `OpenSoraPipeline`.
        scheduler: samples from the transformer.
        noise_process: what the transformer is trained with.
        base_fingerprint: of the weights that an adapter is trained beside, as they were read.
        frozen_fingerprint: of all weights of `module` that are not trained, as they were read; both are None where
            those lie in memory as they were read.
    """

    def __init__(self, settings: DiffusionSettings, device: str) -> None:
        self.defaults: dict[str, Any] = {**settings.data.defaults(), **settings.defaults}
        frozen_dtype = getattr(torch, settings.frozen_dtype)
        self.autoencoder = build_part(settings.autoencoder, "autoencoder", device, frozen_dtype)
        self._check_size()
        self.scheduler, noise_process = settings.diffusion.build(self.autoencoder)
        self.noise_process = noise_process.to(device)
        check_last_layer(settings, type(self.scheduler).__name__)
        self.transformer = build_transformer(
            settings.architecture, settings.transformer, settings.init_from, settings.new_parts, device
        )
        channels, made = self.transformer.config.in_channels, self.autoencoder.latent_channels
        if channels != made:
            raise OpenSoraError(
                f"the {type(self.transformer).__name__} to be trained works on {channels} latent channels, "
                f"objective.autoencoder makes {made}; take both of one model"
            )
        if settings.known_frames and not self.transformer.reads_channels:
            raise OpenSoraError(
                "objective.known_frames are shown beside the noise, which a "
                f"{type(self.transformer).__name__} does not read; use objective.frame_masks"
            )
        self.known_alone = bool(settings.known_frames) and self.transformer.known_frames_alone
        if self.known_alone and not isinstance(settings.data, ManifestClips):
            raise OpenSoraError(
                f"a {type(self.transformer).__name__} is shown frames that were encoded alone, and "
                f"{type(settings.data).__name__} are latents; use {shown_in_place(settings)}, or "
                "objective.data.type=ManifestClips"
            )
        if settings.frame_masks and not self.transformer.reads_frame_mask:
            raise OpenSoraError(
                "objective.frame_masks put known frames in place of the noise, where a "
                f"{type(self.transformer).__name__} reads none; use objective.known_frames"
            )
        self.captions = Captions(
            settings.text,
            settings.init_from,
            network=self.transformer,
            clean=self.defaults.get("clean_prompts", False),
            device=device,
            dtype=frozen_dtype,
        )
        self.teacher: Teacher | None = None
        self.walker: GuidedTeacher | None = None
        if settings.teacher is not None and settings.few_steps is not None:
            self.walker = GuidedTeacher(
                settings.teacher,
                settings.few_steps,
                self.scheduler,
                self.transformer,
                device=device,
                dtype=frozen_dtype,
            )
            self.defaults |= self.walker.defaults()
        elif settings.teacher is not None:
            trains_text = self.captions.trained
            self.teacher = Teacher(settings.teacher, trains_text=trains_text, device=device, dtype=frozen_dtype)
        if isinstance(settings.train, LoRAConfig):
            add_adapter(self.transformer, settings.train)
        else:
            choose_trained(self.transformer, settings.train, freeze_text_embedder=settings.freeze_text_embedder)
        self.module = nn.ModuleDict({"transformer": self.transformer})
        self.frozen: dict[str, nn.Module] = {"autoencoder": self.autoencoder}
        for place, encoder in self.captions.encoders.items():
            (self.module if self.captions.trained else self.frozen)[place] = encoder
        if settings.drop_pooled is not None and self.captions.null_prompt is None:
            raise OpenSoraError(
                f"a {type(self.transformer).__name__} learns one null text; leave objective.drop_pooled out"
            )
        if (teacher := self.walker or self.teacher) is not None:
            self.frozen["teacher"] = teacher.networks
        self.base_fingerprint: str | None = None
        self.frozen_fingerprint: str | None = None
        if isinstance(settings.train, LoRAConfig) and settings.train.base_dtype == "int8":
            if device != META:
                self.base_fingerprint = base_fingerprint(self.transformer)
                self.frozen_fingerprint = fingerprint_of_frozen(self.module)
            round_to_int8(self.transformer)

    def _check_size(self) -> None:
        """Finds before the first step that the clips of the exported pipeline would have an impossible size.

        Raises:
            OpenSoraError: names the nearest possible one.
        """
        names = ("num_frames", "height", "width")
        if all(name in self.defaults for name in names):
            rule = self.autoencoder.size_rule(self.defaults.get("max_frames"))
            VideoSize(*(self.defaults[name] for name in names)).check(rule)

    @property
    def not_matrices(self) -> set[str]:
        """Names of the parameters of the module that are no matrices between two hidden layers."""
        return {name for name, _ in self.module.named_parameters()} - hidden_matrices(self.module)

    @property
    def frame_interval(self) -> int:
        """How much slower than they are told to be the clips of the model play."""
        return self.defaults.get("frame_interval", 1)

    def text_encoders(self, module: nn.ModuleDict) -> dict[str, nn.Module]:
        """The encoder among the trained networks, or the frozen ones, which are loaded if they are not here yet."""
        return {"text_encoder": module["text_encoder"]} if "text_encoder" in module else self.captions.load()

    def pipeline(self, module: nn.ModuleDict, **changes: Any) -> OpenSoraPipeline:
        """A pipeline, which by default makes clips like those it was trained on.

        Args:
            module: the trained networks, or a copy of them.
            changes: keywords of `OpenSoraPipeline` to take the place of these.
        """
        encoders = {} if "text_encoder" in changes else self.text_encoders(module)
        parts = {
            "transformer": module["transformer"],
            "scheduler": self.scheduler,
            "autoencoder": self.autoencoder,
            **encoders,
            **self.captions.tokenizers,
        }
        return OpenSoraPipeline(**{**parts, **self.defaults, **changes})

    def save_frozen(self, folder: Path) -> None:
        """Writes what a checkpoint lacks of a pipeline, see `containers.runs`; of a frozen encoder, where it is."""
        encoders, tokenizers = self.captions.outline()
        origin = origin_of_latents(self.autoencoder)
        pipeline = self.pipeline(self.module, **encoders, **tokenizers, trained_on=origin)
        origins = self.captions.origins
        with replacing_folder(folder, overwrite=True) as temporary:
            for name, part in pipeline.components.items():
                if name in self.module or name in origins:
                    save_configuration(part, temporary / name)
                elif hasattr(part, "save_pretrained"):
                    part.save_pretrained(temporary / name)
            pipeline.save_config(temporary)
            save_frozen_part(self.module, temporary, trained=list(self.module), origins=origins)


def shown_in_place(settings: DiffusionSettings) -> str:
    """The setting with which no frames are encoded alone; an adapter cannot change how its model is shown any."""
    changes = settings.transformer is not None and not isinstance(settings.train, LoRAConfig)
    return "objective.transformer.known_frames_alone=false" if changes else "objective.known_frames={}"


def check_last_layer(settings: DiffusionSettings, scheduler: str) -> None:
    """Refuses to begin a last layer anew that has learnt to predict what this training is towards.

    Raises:
        OpenSoraError: the model that training starts from is sampled by the same scheduler.
    """
    another_space = "first_layer" in settings.new_parts  # of latents, whose velocity the last layer has not learnt
    if "last_layer" not in settings.new_parts or another_space or settings.init_from is None:
        return
    try:
        known = find_part(settings.init_from, "scheduler", on_disk=False).class_name
    except OpenSoraError:  # not there yet, which a plan does not mind, and reading the weights tells
        return
    if known is not None and known[1] == scheduler:
        others = ",".join(part for part in settings.new_parts if part != "last_layer") or "[]"
        raise OpenSoraError(
            f"{settings.init_from} was trained for the same {scheduler}, and objective.new_parts would begin its "
            f"last_layer anew; leave that out: objective.new_parts={others}"
        )


def save_configuration(network: Any, folder: Path) -> None:
    """Writes the configuration of a network of diffusers or transformers, without its weights."""
    network.save_config(folder) if hasattr(network, "save_config") else network.config.save_pretrained(folder)


class TransformerPartition(Partition):
    """A transformer's blocks, and its tokens among ranks."""

    def __init__(self, transformer: Any) -> None:
        super().__init__(list(transformer.blocks))
        self.transformer = transformer
        self.stacks = [list(alike) for _, alike in itertools.groupby(self.blocks, key=type)]

    def split_sequences(self, group: ProcessGroup) -> None:
        self.transformer.enable_sequence_parallel(group)
