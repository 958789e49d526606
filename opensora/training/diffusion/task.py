"""Training a diffusion transformer of the family: any generation, any diffusion, from any source of latents.

`prepare` draws everything random: which clips, their latents, how they are worded, which frames are given, noise, time,
which captions are dropped. `loss` corrupts the latents, asks the transformer, and compares.

Letters: B clips, C latent channels, T latent frames, h, w latent cells, L text tokens, D width of the text.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from opensora.checkpoints.published import BUNDLED, published_name
from opensora.conditioning.masks import check_ratios, draw_frame_masks
from opensora.data.batch import BatchShape, DataContext, LatentBatch, Source
from opensora.data.cached import CachedLatents
from opensora.data.clips import ManifestClips
from opensora.data.encoding import whole_cells
from opensora.data.toybox import ToyboxLatents
from opensora.denoiser import predict
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.models.format import Part
from opensora.models.text.conditioner import TextStates
from opensora.pipeline import OpenSoraPipeline
from opensora.settings import to_dict
from opensora.training.diffusion.adaptation import build_transformer, choose_trained
from opensora.training.diffusion.batch import DiffusionBatch
from opensora.training.diffusion.export import copies, origin_of_latents, save_pipeline
from opensora.training.diffusion.lora import LoRAConfig, add_adapter, export_adapter, without_adapter
from opensora.training.diffusion.noise import IDDPM, Flow
from opensora.training.diffusion.previews import HeldOutLosses, JudgedPrompts, Prompts, clips_trained_on
from opensora.training.diffusion.text import CachedText, Captions, FrozenText, TrainedText
from opensora.training.muon import hidden_matrices
from opensora.training.parts import META, Untrained, build_part
from opensora.training.task import TrainingTask

TIME_BINS = 10


@dataclass(frozen=True)
class DiffusionTaskConfig:
    """Which transformer learns to undo which corruption of which clips.

    Attributes:
        data: where clips or latents come from.
        diffusion: the corruption.
        autoencoder: what makes the latents: a model's name, a folder, or a file.
        text: what encodes captions.
        architecture: class of the transformer, where `transformer` describes it.
        transformer: its keywords; None for those of `init_from`.
        init_from: what to start from: a model's name, a pipeline's folder, or weights of a transformer.
        new_parts: parts of the transformer that may be missing there and begin anew, see `adaptation.start_from`.
        train: "all" of it, what attends along time alone ("temporal"), all the rest ("spatial"), or an adapter beside
            it, which alone is exported then.
        freeze_text_embedder: leave the layers that take in the text as they are.
        sample_posterior: draw latents of clips from the autoencoder's posterior, as all published models were trained;
            otherwise take its mean. The toybox's latents are means.
        frame_masks: strategy -> share of the clips that have frames given so, see `conditioning.masks`.
        drop_text: share of captions replaced by the null text, for classifier-free guidance.
        object_weight: extra weight of errors on latent cells that an object touches, where that is known.
        frozen_dtype: precision of networks that are used and not trained.
        preview: what is generated or measured to watch the training.
        export_dtype: precision of the exported weights but for the autoencoder's, which stay as they were used;
            checkpoints are always float32.
        defaults: how the exported pipeline samples, as keywords of `OpenSoraPipeline`.
    """

    data: ToyboxLatents | ManifestClips | CachedLatents
    diffusion: Flow | IDDPM
    autoencoder: str | Untrained
    text: TrainedText | FrozenText | CachedText
    architecture: str = "STDiT3"
    transformer: dict[str, Any] | None = None
    init_from: str | None = None
    new_parts: tuple[Part, ...] = ()
    train: Literal["all", "temporal", "spatial"] | LoRAConfig = "all"
    freeze_text_embedder: bool = False
    sample_posterior: bool = True
    frame_masks: dict[str, float] = field(default_factory=dict)
    drop_text: float = 0.1
    object_weight: float = 0.0
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    preview: JudgedPrompts | Prompts | HeldOutLosses | None = None
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    defaults: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ratios(self.frame_masks)
        if not 0 <= self.drop_text <= 1:
            raise OpenSoraError(f"objective.drop_text is {self.drop_text}; give a share from 0 to 1")
        if isinstance(self.train, LoRAConfig):
            if self.init_from is None:
                raise OpenSoraError("an adapter is trained beside a model: name it by objective.init_from")
            if isinstance(self.text, TrainedText):
                raise OpenSoraError("an adapter changes the transformer alone; freeze the text encoder: objective.text")
            if self.new_parts:
                raise OpenSoraError("an adapter is trained beside whole weights; leave objective.new_parts out")

    def build(self, device: str) -> "DiffusionTask":
        return DiffusionTask(self, device)


class DiffusionTask(TrainingTask):
    """See `DiffusionTaskConfig`."""

    def __init__(self, config: DiffusionTaskConfig, device: str) -> None:
        self.config, self.device = config, device
        if device != META and isinstance(config.data, ManifestClips) and config.data.manifest is None:
            raise OpenSoraError(
                "no clips to train on: name their table by objective.data.manifest=FILE; "
                "opensora data manifest makes one of a folder"
            )
        self.defaults = {**config.data.defaults(), **config.defaults}
        frozen_dtype = getattr(torch, config.frozen_dtype)
        self.autoencoder = build_part(config.autoencoder, "autoencoder", device, frozen_dtype)
        self.scheduler, noise_process = config.diffusion.build(self.autoencoder)
        self.noise_process = noise_process.to(device)
        self.transformer = build_transformer(
            config.architecture, config.transformer, config.init_from, config.new_parts, device
        )
        self.captions = Captions(
            config.text,
            config.init_from,
            max_tokens=len(self.transformer.null_text),
            clean=self.defaults.get("clean_prompts", False),
            device=device,
            dtype=frozen_dtype,
        )
        if isinstance(config.train, LoRAConfig):
            add_adapter(self.transformer, config.train)
        else:
            choose_trained(self.transformer, config.train, freeze_text_embedder=config.freeze_text_embedder)
        self.module = nn.ModuleDict({"transformer": self.transformer})
        self.frozen = {"autoencoder": self.autoencoder}
        if self.captions.encoder is not None:
            (self.module if self.captions.trained else self.frozen)["text_encoder"] = self.captions.encoder
        self.not_matrices = {n for n, _ in self.module.named_parameters()} - hidden_matrices(self.module)
        self.source: Source | None = None

    # --- batches ------------------------------------------------------------------------------------------------------

    def set_up(self, cache: Path) -> None:
        if isinstance(self.config.preview, HeldOutLosses):
            self.config.preview.check(self.defaults.get("frame_interval", 1), clips_trained_on(self.config.data))
        self.source = self.open_source(cache)

    def open_source(self, cache: Path) -> Source:
        """Where latents come from."""
        context = DataContext(
            autoencoder=self.autoencoder,
            sample_posterior=self.config.sample_posterior,
            frame_interval=self.defaults.get("frame_interval", 1),
            cache=cache,
            captions=self.captions,
        )
        return self.config.data.open(context)

    def prepare(self, key: BatchKey) -> DiffusionBatch:
        assert self.source is not None, "set_up first"
        config, device = self.config, self.device
        clips: LatentBatch = self.source.batch(key).to(device)
        size, num_frames = len(clips.latents), clips.latents.shape[2]
        frame_mask = None
        if config.frame_masks and num_frames > 1:
            rng = random.Random(key.generator("strategies").initial_seed())
            frame_mask = draw_frame_masks(config.frame_masks, size, num_frames, rng, key.generator("given")).to(device)
        noise = torch.randn(clips.latents.shape, generator=key.generator("noise"))
        drop_text = torch.rand(size, generator=key.generator("drop")) < config.drop_text
        text, text_mask = self.text(clips)
        return DiffusionBatch(
            clips,
            noise=noise.to(device),
            t=self.noise_process.draw_times(
                size,
                height=float(clips.conditions.height[0]),  # type: ignore[index]
                width=float(clips.conditions.width[0]),  # type: ignore[index]
                num_frames=int(clips.conditions.num_frames),
                generator=key.generator("t"),
            ).to(device),
            text=text,
            text_mask=text_mask,
            drop_text=drop_text.to(device),
            frame_mask=frame_mask,
        )

    def text(self, clips: LatentBatch) -> tuple[Tensor, Tensor]:
        """Text states, or tokens where the encoder is trained along, and their mask, on the device."""
        if isinstance(self.config.text, CachedText):
            if clips.text_states is None or clips.text_mask is None:
                raise OpenSoraError(
                    "these latents came without text states; compute them beforehand, or choose another objective.text"
                )
            return clips.text_states.to(self.device), clips.text_mask.to(self.device)
        tokens, mask = (tensor.to(self.device) for tensor in self.captions.tokens(clips.captions))
        if self.captions.trained:
            return tokens, mask
        with torch.no_grad():
            return self.captions.encode(tokens, mask), mask

    def prefetch(self, keys: Sequence[BatchKey]) -> None:
        if self.source is not None:
            self.source.prefetch(keys)

    def cancel_prefetch(self) -> None:
        if self.source is not None:
            self.source.cancel_prefetch()

    def figures(self) -> dict[str, float]:
        if self.source is None:
            return {}
        return {**self.source.figures(), "cut_captions": float(self.captions.num_cut)}

    # --- losses -------------------------------------------------------------------------------------------------------

    def loss(self, batch: DiffusionBatch, key: BatchKey) -> dict[str, Tensor]:
        noisy = self.noise_process.corrupt(batch.clips.latents, batch.noise, batch.t, batch.frame_mask)
        prediction = self.predict(noisy, self.noise_process.timesteps(batch.t), batch)
        terms = self.noise_process.losses(
            prediction,
            clean=batch.clips.latents,
            noisy=noisy,
            noise=batch.noise,
            t=batch.t,
            frame_mask=batch.frame_mask,
            weights=self.weights(batch),
        )
        if isinstance(self.config.train, LoRAConfig) and self.config.train.preserve:
            with torch.no_grad(), without_adapter(self.transformer):
                before = self.predict(noisy, self.noise_process.timesteps(batch.t), batch)
            change = (prediction - before)[:, : batch.clips.latents.shape[1]].abs().flatten(1).mean(1)
            terms["change"] = self.config.train.preserve * change
        return terms

    def predict(self, noisy: Tensor, timestep: Tensor, batch: DiffusionBatch) -> Tensor:
        """The transformer's float32 output for noisy latents; (B, C or 2C, T, h, w)."""
        trained = self.captions.trained
        states = self.captions.encode(batch.text, batch.text_mask) if trained else batch.text
        text = TextStates(states, batch.text_mask, dropped=batch.drop_text)
        return predict(self.transformer, noisy, timestep, text, batch.clips.conditions, batch.frame_mask)

    def weights(self, batch: DiffusionBatch) -> Tensor | None:
        """Loss weight of every latent cell, 1 on average, (B, 1, T, h, w); None for 1 everywhere."""
        if batch.clips.object_mask is None or not self.config.object_weight:
            return None
        weights = 1 + self.config.object_weight * batch.clips.object_mask
        return weights / weights.mean()

    def groups(self, batch: DiffusionBatch) -> dict[str, list[str]]:
        """Each clip's size, and the tenth of the time that it was corrupted to."""
        timesteps = self.noise_process.timesteps(batch.t)
        tenths = (timesteps * TIME_BINS / 1000).long().clamp(0, TIME_BINS - 1).tolist()
        return {
            "bucket": [batch.clips.label] * len(tenths),
            "t": [f"{tenth / TIME_BINS:.1f}-{(tenth + 1) / TIME_BINS:.1f}" for tenth in tenths],
        }

    def split_sequences(self, group: ProcessGroup | None) -> None:
        if group is None:
            self.transformer.disable_sequence_parallel()
        else:
            self.transformer.enable_sequence_parallel(group)

    # --- plans --------------------------------------------------------------------------------------------------------

    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.blocks)

    def shapes(self) -> list[BatchShape]:
        return self.config.data.shapes()

    def meta_batch(self, shape: BatchShape) -> DiffusionBatch:
        device = next(self.transformer.parameters()).device
        clips = LatentBatch.meta(shape, self.autoencoder, device)
        size, frames = shape.batch_size, clips.latents.shape[2]
        tokens = (size, self.captions.max_tokens)
        width = self.transformer.null_text.shape[1]
        masked = self.config.frame_masks and frames > 1

        def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(sizes, dtype=dtype, device=device)

        t = self.noise_process.draw_times(
            size, height=shape.height, width=shape.width, num_frames=shape.num_frames, generator=torch.Generator()
        )
        return DiffusionBatch(
            clips,
            noise=torch.zeros_like(clips.latents),
            t=t.to(device),
            text=empty(*tokens, dtype=torch.int64) if self.captions.trained else empty(*tokens, width),
            text_mask=empty(*tokens, dtype=torch.int64) + 1,
            drop_text=empty(size, dtype=torch.bool),
            frame_mask=empty(size, frames, dtype=torch.bool) if masked else None,
        )

    def frozen_workloads(self, shape: BatchShape) -> dict[str, Callable[[], Any]]:
        device = next(self.transformer.parameters()).device
        networks: dict[str, Callable[[], Any]] = {}
        if isinstance(self.config.data, ManifestClips):  # other data were encoded before the first step

            def encode() -> Any:
                video = torch.zeros(shape.batch_size, 3, shape.num_frames, shape.height, shape.width, device=device)
                return self.autoencoder.posterior(whole_cells(video, self.autoencoder.spatial_factor))

            networks["autoencoder"] = encode
        if isinstance(self.config.text, FrozenText):
            tokens = torch.zeros(shape.batch_size, self.captions.max_tokens, dtype=torch.int64, device=device)
            networks["text_encoder"] = lambda: self.captions.encode(tokens, tokens + 1)
        return networks

    # --- results ------------------------------------------------------------------------------------------------------

    def preview(self, folder: Path, step: int) -> dict[str, float]:
        if self.config.preview is None:
            return {}
        return self.config.preview.show(self.pipeline(), folder, step, clips_trained_on(self.config.data))

    def export(self, folder: Path) -> None:
        if isinstance(self.config.train, LoRAConfig):
            self.export_adapter(folder, self.config.train)
            return
        with_text_encoder = isinstance(self.config.text, TrainedText) or self.config.text.exported
        networks: dict[str, nn.Module] = {"transformer": self.transformer}
        if with_text_encoder:
            networks["text_encoder"] = self.captions.load()
        parts: dict[str, Any] = copies(networks, getattr(torch, self.config.export_dtype))
        parts["autoencoder"] = self.autoencoder  # as the latents were made with it
        pipeline = self.pipeline(**parts, trained_on=origin_of_latents(parts["autoencoder"]))
        save_pipeline(pipeline, folder, with_text_encoder=with_text_encoder)

    def export_adapter(self, folder: Path, lora: LoRAConfig) -> None:
        config = self.config
        training = {
            "lora": to_dict(lora),
            "diffusion": {"type": type(config.diffusion).__name__, **to_dict(config.diffusion)},
            "frame_masks": config.frame_masks,
            "drop_text": config.drop_text,
            "trained_on": origin_of_latents(self.autoencoder),
        }
        base = str(config.init_from)  # a name, or a folder, of which the last part is told
        base = base if base in BUNDLED else published_name(base) or Path(base).name
        export_adapter(self.transformer, lora, folder, base=base, training=training)

    def pipeline(self, **changes: Any) -> OpenSoraPipeline:
        """The current weights as a pipeline, which by default makes clips like those it was trained on.

        Args:
            changes: keywords of `OpenSoraPipeline` to take the place of this objective's.
        """
        parts = {
            "transformer": self.transformer,
            "scheduler": self.scheduler,
            "autoencoder": self.autoencoder,
            "text_encoder": self.captions.load(),
            "tokenizer": self.captions.tokenizer,
        }
        return OpenSoraPipeline(**{**parts, **self.defaults, **changes})
