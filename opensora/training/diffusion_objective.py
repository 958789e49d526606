"""Training a diffusion transformer, and with it a small text encoder, on captioned latents.

`prepare` draws everything random: which clips, how they are worded, noise, time, which captions are dropped. `loss`
corrupts the latents, asks the transformer, and compares. Two objectives share all of this and differ in the diffusion:
rectified flow (Liu et al., 2022) and discrete-time Gaussian diffusion with learned variances (Nichol & Dhariwal, 2021).

Letters: B clips, C latent channels, T latent frames, h, w latent cells, L text tokens.
"""

import copy
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from opensora import flow, gaussian
from opensora.checkpoints.loading import load_component
from opensora.checkpoints.weights import cast_weights, fingerprint
from opensora.conditioning import IMAGE_FPS
from opensora.data.frame_masks import check_ratios, draw_frame_masks
from opensora.data.toybox import CaptionedLatents, ToyboxClips
from opensora.distributed.seeding import Draw
from opensora.errors import OpenSoraError
from opensora.evaluation.judge import load_judge
from opensora.evaluation.toybox import contact_sheet, generate, held_out_samples, share_right
from opensora.gaussian_losses import mean_per_sample, training_losses, velocity_weights
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.schedulers.frames import choose_frames
from opensora.models.schedulers.iddpm import IDDPMScheduler
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler
from opensora.models.stdit3 import STDiT3
from opensora.pipeline import OpenSoraPipeline
from opensora.toybox.captions import build_tokenizer
from opensora.training.objective import Objective


@dataclass(frozen=True)
class OtherLength:
    """Clips of another length than most.

    Attributes:
        num_frames: T; 1 for images.
        share: of all steps, each of which has clips of one length.
    """

    num_frames: int
    share: float


@dataclass(frozen=True)
class DiffusionObjectiveConfig:
    """Which transformer learns to undo which corruption of which clips.

    Attributes:
        diffusion: "flow" (rectified flow) or "iddpm" (epsilon prediction, learned-range variance).
        autoencoder: folder of the autoencoder whose latents are learnt.
        clips: where clips come from.
        num_clips: clips encoded once, before the first step.
        other_lengths: clips of other lengths, which some steps have.
        num_clips_of_other_lengths: clips of each, encoded once.
        frame_masks: strategy -> share of the clips that have frames given so, see `data.frame_masks`.
        transformer: configuration of the STDiT3, for training from scratch.
        text_encoder: configuration of the T5 encoder, for training from scratch.
        init_from: exported pipeline folder to start from instead.
        new_last_layer: begin with a last layer of zeros, for a model that learns to predict something else than the one
            it starts from; what lies below would be torn apart otherwise.
        prediction_type: what "iddpm" predicts besides the variance: "epsilon" the noise, "sample" the clean latents.
        sampler: how an exported "iddpm" pipeline samples.
        batch_size: B, clips a step.
        t_loc: mean of the logit of rectified flow's training times; above 0 trains more on noisy clips, where a
            motion's direction is decided.
        drop_text: share of captions replaced by the null text, for classifier-free guidance.
        object_weight: extra weight of errors on latent cells that an object touches.
        num_previews: held-out prompts generated and read by the judge at every preview.
        export_dtype: precision of the exported weights; checkpoints are always float32.
        defaults: how the exported pipeline samples (steps, guidance, limits); size and rate come from the clips.
    """

    diffusion: Literal["flow", "iddpm"]
    autoencoder: Path
    clips: ToyboxClips = field(default_factory=ToyboxClips)
    num_clips: int = 20_000
    other_lengths: tuple[OtherLength, ...] = ()
    num_clips_of_other_lengths: int = 5_000
    frame_masks: dict[str, float] = field(default_factory=dict)
    transformer: dict[str, Any] | None = None
    text_encoder: dict[str, Any] | None = None
    init_from: Path | None = None
    new_last_layer: bool = False
    prediction_type: gaussian.PredictionType = "epsilon"
    sampler: Literal["ancestral", "ddim"] = "ancestral"
    batch_size: int = 48
    t_loc: float = 0.0
    drop_text: float = 0.1
    object_weight: float = 5.0
    num_previews: int = 40
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    defaults: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ratios(self.frame_masks)
        total = sum(length.share for length in self.other_lengths)
        if total > 1 or any(length.share < 0 for length in self.other_lengths):
            raise OpenSoraError(f"other_lengths have shares that sum to {total:g}; expected shares from 0 to 1 in all")

    def build(self, device: str) -> "DiffusionObjective":
        return {"flow": FlowObjective, "iddpm": GaussianObjective}[self.diffusion](self, device)


@dataclass
class Batch:
    """One step's data, on the device."""

    latents: Tensor  # (B, C, T, h, w) clean
    object_mask: Tensor  # (B, 1, T, h, w), 1 where an object is
    noise: Tensor  # like latents
    tokens: Tensor  # (B, L) token ids
    text_mask: Tensor  # (B, L), 1 = token
    drop_text: Tensor  # (B,) bool
    frame_mask: Tensor | None  # (B, T) bool, True = generated; None = all are
    fps: float


class DiffusionObjective(Objective):
    """What both kinds of diffusion share."""

    scheduler: RectifiedFlowScheduler | IDDPMScheduler

    def __init__(self, config: DiffusionObjectiveConfig, device: str) -> None:
        self.config, self.device = config, device
        if not config.autoencoder.exists():
            raise OpenSoraError(f"no autoencoder in {config.autoencoder}; train it first, or set objective.autoencoder")
        self.autoencoder = load_component(config.autoencoder, VideoAutoencoder).to(device).requires_grad_(False)
        self.tokenizer = build_tokenizer()
        self.transformer, self.text_encoder = self.load_networks()
        self.module = nn.ModuleDict({"transformer": self.transformer, "text_encoder": self.text_encoder})
        self.not_matrices = {n for n, _ in self.module.named_parameters() if not is_hidden_matrix(n)}
        self.latents: list[CaptionedLatents] = []

    def load_networks(self) -> tuple[STDiT3, T5EncoderModel]:
        config = self.config
        if config.init_from is not None:
            if not config.init_from.exists():
                raise OpenSoraError(
                    f"no model to start from in {config.init_from}; train it, or set objective.init_from"
                )
            transformer = load_component(config.init_from / "transformer", STDiT3)
            text_encoder = load_component(config.init_from / "text_encoder", T5EncoderModel)
            if config.new_last_layer:
                nn.init.zeros_(transformer.final_layer.linear.weight)
                nn.init.zeros_(transformer.final_layer.linear.bias)
            return transformer.train(), text_encoder.train()
        if config.transformer is None or config.text_encoder is None:
            raise OpenSoraError(
                "objective.transformer and objective.text_encoder are needed without objective.init_from"
            )
        text_config = T5Config(vocab_size=len(self.tokenizer), **config.text_encoder)
        return STDiT3(**config.transformer), T5EncoderModel(text_config)

    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.blocks)

    def set_up(self, cache: Path) -> None:
        config = self.config
        wanted = [(config.clips, config.num_clips)]
        for length in config.other_lengths:
            wanted.append((replace(config.clips, num_frames=length.num_frames), config.num_clips_of_other_lengths))
        self.latents = [
            CaptionedLatents.load_or_encode(cache, clips, self.autoencoder, num_clips, self.device)
            for clips, num_clips in wanted
        ]

    def prepare(self, draw: Draw) -> Batch:
        assert self.latents, "set_up first"
        config, size, device = self.config, self.config.batch_size, self.device
        shares = [length.share for length in config.other_lengths]
        rng = random.Random(draw.generator("frames").initial_seed())
        (which,) = rng.choices(range(len(self.latents)), [1 - sum(shares), *shares])
        clips = self.latents[which].sample(size, draw.generator("clips"))
        num_frames = config.clips.num_frames if which == 0 else config.other_lengths[which - 1].num_frames
        frame_mask = None
        if config.frame_masks and num_frames > 1:
            latent_frames = clips.latents.shape[2]
            frame_mask = draw_frame_masks(config.frame_masks, size, latent_frames, rng, draw.generator("given"))
        text = self.tokenizer(clips.captions, padding=True, truncation=True, return_tensors="pt")
        noise = torch.randn(clips.latents.shape, generator=draw.generator("noise"))
        drop_text = torch.rand(size, generator=draw.generator("drop")) < self.config.drop_text
        return Batch(
            latents=clips.latents.to(device),
            object_mask=clips.object_mask.to(device),
            noise=noise.to(device),
            tokens=text["input_ids"].to(device),
            text_mask=text["attention_mask"].to(device),
            drop_text=drop_text.to(device),
            frame_mask=None if frame_mask is None else frame_mask.to(device),
            fps=IMAGE_FPS if num_frames == 1 else float(config.clips.fps),
        )

    def predict(self, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """The transformer's float32 output for noisy latents; (B, C or 2C, T, h, w)."""
        text_states = self.text_encoder(batch.tokens, attention_mask=batch.text_mask).last_hidden_state
        clips = self.config.clips
        return self.transformer(
            noisy,
            timestep,
            text_states,
            batch.text_mask,
            drop_text=batch.drop_text,
            frame_mask=batch.frame_mask,
            fps=batch.fps,
            height=float(clips.height),
            width=float(clips.width),
        ).sample.float()

    def weights(self, batch: Batch) -> Tensor:
        """Loss weight of every latent cell, 1 on average; (B, 1, T, h, w)."""
        weights = 1 + self.config.object_weight * batch.object_mask
        return weights / weights.mean()

    def preview(self, folder: Path, step: int) -> dict[str, float]:
        """A contact sheet of held-out prompts, and the share of their words that the judge reads off the clips."""
        if not self.config.num_previews:
            return {}
        samples = held_out_samples(self.config.num_previews, world=self.config.clips.world)
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        clips = generate(pipeline, samples)
        shown = [(sample.prompt, clip) for sample, clip in zip(samples, clips, strict=True)]
        contact_sheet(shown[:8], folder / f"step-{step:08d}.png")
        read = load_judge(device=self.device).read(clips)
        shares = share_right([sample.wanted for sample in samples], read)
        return {f"judge_{name}": share for name, share in shares.items()}

    def export(self, folder: Path) -> None:
        pipeline = copy.deepcopy(self.pipeline())
        if self.config.export_dtype == "bfloat16":
            for part in (pipeline.transformer, pipeline.text_encoder, pipeline.autoencoder):
                cast_weights(part, torch.bfloat16)
        latent_space = pipeline.autoencoder.latent_space.to_dict()
        pipeline.register_to_config(
            trained_on={"latent_space": latent_space, "autoencoder": fingerprint(pipeline.autoencoder.state_dict())}
        )
        pipeline.save_pretrained(folder)

    def pipeline(self) -> OpenSoraPipeline:
        """The current weights as a pipeline, which by default makes clips like those it was trained on."""
        clips = self.config.clips
        return OpenSoraPipeline(
            transformer=self.transformer,
            scheduler=self.scheduler,
            autoencoder=self.autoencoder,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            num_frames=clips.num_frames,
            height=clips.height,
            width=clips.width,
            fps=clips.fps,
            **self.config.defaults,
        )


class FlowObjective(DiffusionObjective):
    """Rectified flow: the velocity from noise to data at logit-normal times."""

    def __init__(self, config: DiffusionObjectiveConfig, device: str) -> None:
        super().__init__(config, device)
        self.scheduler = RectifiedFlowScheduler(
            sample_method="logit-normal",
            sample_loc=config.t_loc,
            temporal_factor=self.autoencoder.temporal_factor,
            micro_frame_size=self.autoencoder.micro_frame_size,
        )

    def loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        clean, noise = batch.latents, batch.noise
        timestep = self.scheduler.draw_timesteps(len(clean), generator=draw.generator("t")).to(clean.device)
        noisy = flow.interpolate(clean, noise, timestep / self.scheduler.num_train_timesteps)
        if batch.frame_mask is not None:
            noisy = choose_frames(batch.frame_mask, noisy, clean)
        prediction = self.predict(noisy, timestep, batch)[:, : clean.shape[1]]
        error = (prediction - flow.velocity_target(clean, noise)).square()
        mask = batch.frame_mask
        return {"velocity": mean_per_sample(error * self.weights(batch), mask), "_mse": mean_per_sample(error, mask)}


class GaussianObjective(DiffusionObjective):
    """IDDPM: noise or clean latents at uniform steps, and the variance through the variational bound."""

    def __init__(self, config: DiffusionObjectiveConfig, device: str) -> None:
        super().__init__(config, device)
        self.scheduler = IDDPMScheduler(prediction_type=config.prediction_type, sampler=config.sampler)
        self.tables = self.scheduler.train_tables.to(device)
        self.timestep_weights = velocity_weights(self.tables, config.prediction_type).float()

    def loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        clean, noise = batch.latents, batch.noise
        t = torch.randint(len(self.tables), (len(clean),), generator=draw.generator("t")).to(clean.device)
        steps = t if batch.frame_mask is None else gaussian.frame_timesteps(t, batch.frame_mask)
        noisy = gaussian.q_sample(self.tables, clean, steps, noise)
        prediction = self.predict(noisy, t.float(), batch)
        losses = training_losses(
            self.tables,
            prediction,
            clean=clean,
            noisy=noisy,
            noise=noise,
            t=t,
            prediction_type=self.config.prediction_type,
            frame_mask=batch.frame_mask,
        )
        assert losses.mse is not None and losses.vb is not None
        target = noise if self.config.prediction_type == "epsilon" else clean
        error = (prediction[:, : clean.shape[1]] - target).square()
        weighted = mean_per_sample(error * self.weights(batch), batch.frame_mask) * self.timestep_weights[t]
        return {self.config.prediction_type: weighted, "vb": losses.vb, "_mse": losses.mse}


def is_hidden_matrix(name: str) -> bool:
    """Whether a parameter of transformer or text encoder is a matrix between two hidden layers."""
    in_block = "_blocks." in name or ".block." in name
    return in_block and name.endswith(".weight") and "norm" not in name and "relative_attention_bias" not in name
