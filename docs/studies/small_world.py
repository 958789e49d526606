"""What the studies share: an easy corner of the toy world, models that learn it in a minute of one core, rows of runs.

One 2D autoencoder serves all runs. What a study is about, temporal autoencoders (0.6 M weights) and transformers
(0.5 M), is trained by the package's own trainer, from seeds that all arms of a study share. Whatever a run found
becomes a row, and a study that was stopped goes on with the rows that are missing.

Letters: B clips, C channels, T frames, N latent frames, H, W pixels, h, w latent cells.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora import OpenSoraPipeline, load_pipeline
from opensora.checkpoints.source import find_part
from opensora.data.batch import LatentBatch
from opensora.data.toybox import ToyboxClips, ToyboxLatents, ToyboxVideos
from opensora.denoiser import predict
from opensora.diffusion.flow import towards_data, velocity_target
from opensora.distributed.seeding import derive_seed, generator
from opensora.evaluation.judge import Judge
from opensora.evaluation.loss import with_text
from opensora.evaluation.psnr import frame_psnr
from opensora.evaluation.toybox import Sample, generate, label_words
from opensora.files import replacing_folder
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.schedulers.base import process_of
from opensora.toybox.captions import plain_caption
from opensora.toybox.world import ATTRIBUTES, ClipSpec, World, render, sample_specs
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.config import DiffusionTaskConfig
from opensora.training.diffusion.noise import Flow
from opensora.training.diffusion.text import TrainedText
from opensora.training.optimizer import OptimizerConfig
from opensora.training.trainer import Trainer
from opensora.training.vae.config import VAETaskConfig

STUDIES = Path(__file__).parent
WORLD = World(
    shapes=("ball", "cross"),
    colours=("red", "green", "yellow"),
    sizes=("large",),
    motions=("still", "left", "right"),
    speeds=("fast",),
    backgrounds=("white", "night"),
)
WIDER_WORLD = World(
    shapes=("ball", "square", "cross"),
    colours=("red", "green", "blue", "yellow"),
    sizes=("large",),
    motions=("left", "right", "up", "down"),
    speeds=("fast",),
    backgrounds=("white", "grey", "night"),
)
"""What the 2D autoencoder is trained on."""
CLIPS = ToyboxClips(WORLD, num_frames=9, height=32, width=32)
FRAMES = {"block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 4}
PATCH_SIZE = 2
TEXT_ENCODER = {
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 128,
    "num_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
NUM_INFERENCE_STEPS = 12


@dataclass(frozen=True)
class Budget:
    """How much every run may take; tests take less.

    Attributes:
        frames_steps, autoencoder_steps, transformer_steps: of training the 2D autoencoder, a temporal one, a
            transformer.
        batch_size: clips a step.
        num_clips: training clips.
        num_new: clips and prompts that are measured.
        width, temporal_width: of the transformer and the temporal autoencoder.
    """

    frames_steps: int = 400
    autoencoder_steps: int = 200
    transformer_steps: int = 320
    batch_size: int = 48
    num_clips: int = 800
    num_new: int = 64
    width: int = 96
    temporal_width: int = 96


TINY = Budget(2, 2, 2, 2, 8, 4, 16, 8)


# ---- training


def train(recipe: Recipe, folder: Path) -> Path:
    """The model of a recipe: that of its folder if it is there; a run that was stopped goes on."""
    model = folder / "model"
    if not model.exists():
        print(time.strftime("%H:%M:%S"), recipe.name, flush=True)
        Trainer(recipe, folder).run()
        for name in ("checkpoints", "cache"):  # which are large
            shutil.rmtree(folder / name, ignore_errors=True)
    return model


def spatial_autoencoder(folder: Path, budget: Budget) -> tuple[Path, float]:
    """The 2D autoencoder of all runs, as one of diffusers', and the right scaling factor: 1 / std of its latents."""
    objective = VAETaskConfig(
        stage="frames",
        data=ToyboxVideos(replace(CLIPS, world=WIDER_WORLD), batch_size=8),
        autoencoder={"spatial": FRAMES, "spatial_patch_size": PATCH_SIZE},
        frames_per_clip=4,
        mse_weight=2.0,
        kl_weight=1e-4,
        object_weight=10.0,
        num_clips=200,
    )
    optimizer = OptimizerConfig(muon_lr=0.02, lr=2e-3, betas=(0.9, 0.99), decay=0.5, warmup_steps=20)
    model = find_part(
        train(Recipe("frames", objective, _loop(budget.frames_steps, 0, optimizer)), folder), "autoencoder"
    )
    alone, autoencoder = folder / "spatial", model.load()
    if not alone.exists():
        with replacing_folder(alone) as temporary:
            autoencoder.spatial_vae.module.save_pretrained(temporary)
    return alone, autoencoder.latent_space.factor


def autoencoder_recipe(name: str, seed: int, channels: int, factor: float, spatial: Path, budget: Budget) -> Recipe:
    """A temporal autoencoder from scratch, on frame latents multiplied by a factor.

    Args:
        name: of the recipe.
        seed: of its weights and draws.
        channels: of its latents; those of a frame have 4.
        factor: scaling factor.
        spatial: folder of the 2D autoencoder.
        budget: of the run.
    """
    temporal = {"type": "folded", "in_channels": 4, "latent_channels": channels, "dim": budget.temporal_width}
    objective = VAETaskConfig(
        stage="latents",
        data=ToyboxVideos(CLIPS, batch_size=min(16, budget.batch_size)),
        autoencoder={
            "spatial": FRAMES,
            "spatial_patch_size": PATCH_SIZE,
            "temporal": {**temporal, "encoder_depth": 1, "decoder_depth": 2},
        },
        spatial_from=str(spatial),
        scaling_factor=factor,
        mse_weight=2.0,
        kl_weight=1e-4,
        object_weight=10.0,
        num_clips=budget.num_clips // 2,
        cache_latents=True,
    )
    optimizer = OptimizerConfig(muon_lr=0.02, lr=2e-3, betas=(0.9, 0.99), decay=0.5, warmup_steps=20)
    return Recipe(name, objective, _loop(budget.autoencoder_steps, seed, optimizer))


def transformer_recipe(
    name: str, seed: int, channels: int, autoencoder: Path, budget: Budget, shift_ratio: float | None = None
) -> Recipe:
    """A rectified-flow transformer of 1.2's class from scratch, with its text encoder.

    Args:
        name: of the recipe.
        seed: of its weights and draws.
        channels: of the latents.
        autoencoder: folder of what makes them.
        budget: of the run.
        shift_ratio: of the time shift, in training and in sampling; None for none.
    """
    objective = DiffusionTaskConfig(
        data=ToyboxLatents(CLIPS, budget.num_clips, batch_size=budget.batch_size, plain=1.0),
        diffusion=Flow(loc=1.0, time_shift=shift_ratio is not None, shift_ratio=shift_ratio),
        autoencoder=str(autoencoder),
        text=TrainedText(TEXT_ENCODER),
        transformer={
            "in_channels": channels,
            "hidden_size": budget.width,
            "depth": 2,
            "num_heads": max(2, budget.width // 32),
            "caption_channels": TEXT_ENCODER["d_model"],
            "model_max_length": 16,
            "qk_norm": True,
            "pred_sigma": False,
            "learn_null_text": True,
        },
        object_weight=5.0,
        export_dtype="float32",
        defaults={"num_inference_steps": NUM_INFERENCE_STEPS, "guidance_scale": 2.0, "cfg_channels": None},
    )
    optimizer = OptimizerConfig(muon_lr=0.03, lr=2e-3, decay=0.6, warmup_steps=20)
    return Recipe(name, objective, _loop(budget.transformer_steps, seed, optimizer))


def _loop(steps: int, seed: int, optimizer: OptimizerConfig) -> LoopConfig:
    return LoopConfig(
        steps=steps,
        seed=seed,
        ema_decay=0.98,
        checkpoint_every=200,
        keep_checkpoints=1,
        log_every=50,
        trackers=(),
        optimizer=optimizer,
    )


def without_normalisation(autoencoder: Path, folder: Path) -> Path:
    """A copy of an autoencoder whose latents are left as its network makes them."""
    if not folder.exists():
        model = VideoAutoencoder.from_pretrained(autoencoder)
        model.set_latent_space(replace(model.latent_space, shift=None, scale=None))
        with replacing_folder(folder) as temporary:
            model.save_pretrained(temporary)
    return folder


def deviations(space: LatentSpace) -> Tensor:
    """Standard deviation of each channel before normalisation, (C,)."""
    return torch.tensor(space.scale or (), dtype=torch.float64).flatten()


# ---- measuring


@torch.no_grad()
def reconstruction_psnr(autoencoder: VideoAutoencoder, num_clips: int) -> dict[str, list[float]]:
    """Decibels of new clips: through both parts ("clip"), and through the 2D part alone ("frames")."""
    found: dict[str, list[float]] = {"clip": [], "frames": []}
    for start in range(0, num_clips, 16):
        specs = new_clips(num_clips, "reconstruction")[start : start + 16]
        video, _ = render(specs, CLIPS.num_frames, CLIPS.height, CLIPS.width)
        latents = autoencoder.encode_video(video)
        frames = autoencoder.decode_frames(autoencoder.encode_frames(video).mode())
        for name, decoded in (("clip", autoencoder.decode_latents(latents, CLIPS.num_frames)), ("frames", frames)):
            found[name] += frame_psnr(decoded, video).mean(1).double().tolist()
    return {name: rounded(values, 2) for name, values in found.items()}


@torch.no_grad()
def unexplained_variance(
    pipeline: OpenSoraPipeline, log_snrs: Sequence[float], num_clips: int, batch_size: int = 32
) -> list[list[float]]:
    """Errors of the estimate of clean latents at fixed signal-to-noise ratios, in units of the latents' variance.

    Unlike a loss at fixed times, which depends on the scale of the latents, this compares models of latents of any
    scale: 0 for a perfect estimate, 1 for one that knows nothing but the mean. Of every channel by itself, then
    averaged.

    With latents of deviation d, x_t = (1 - t) x + t e has the log-SNR 2 log((1 - t) d / t), and errors of the velocity
    are 1 / t of those of x.

    Args:
        pipeline: rectified flow.
        log_snrs: natural logarithms of signal variance over noise variance.
        num_clips: new clips.
        batch_size: clips at a time.

    Returns:
        For each log-SNR, that of every clip.
    """
    specs = new_clips(num_clips, "loss")
    latents = []
    for start in range(0, num_clips, batch_size):
        video, _ = render(specs[start : start + batch_size], CLIPS.num_frames, CLIPS.height, CLIPS.width)
        latents.append(pipeline.autoencoder.encode_video(video))
    clean = torch.cat(latents)
    variance = clean.transpose(0, 1).flatten(1).var(dim=1)  # of every channel
    deviation, process = float(variance.mean().sqrt()), process_of(pipeline.scheduler)
    found = []
    for log_snr in log_snrs:
        t = deviation / (deviation + torch.tensor(log_snr / 2).exp())
        errors = []
        for start in range(0, num_clips, batch_size):
            part, chosen = clean[start : start + batch_size], specs[start : start + batch_size]
            noise = torch.stack(
                [
                    torch.randn(part.shape[1:], generator=generator("study", str(log_snr), str(start + row)))
                    for row in range(len(part))
                ]
            )
            captions = [plain_caption(spec) for spec in chosen]
            batch, _ = with_text(pipeline, LatentBatch(part, captions, CLIPS.conditions(len(part)), "study"))
            times = (1000 * t).expand(len(part))
            noisy = process.corrupt(part, noise, times)
            assert batch.text is not None
            answer = predict(pipeline.transformer, noisy, process.timesteps(times), batch.text, batch.conditions)
            wrong = t * (towards_data(answer, "data - noise") - velocity_target(part, noise))
            errors += (wrong.square().mean(dim=(2, 3, 4)) / variance).mean(dim=1).double().tolist()
        found.append(rounded(errors, 4))
    return found


def read_right(
    pipeline: OpenSoraPipeline,
    judge: Judge,
    samples: list[Sample],
    measure: Callable[[Tensor], Any] | None = None,
    **how: Any,
) -> tuple[dict[str, str], list[Any]]:
    """Which attributes the judge reads as they were prompted: attribute -> a character for each sample, 1 or 0.

    Args:
        pipeline: generates.
        judge: reads.
        samples: prompts.
        measure: something else that is to be known of every batch of clips.
        how: keywords of the pipeline.

    Returns:
        What is right, and what `measure` returned.
    """
    marks: dict[str, str] = dict.fromkeys((*ATTRIBUTES, "all"), "")
    measured = []
    for start in range(0, len(samples), 32):
        batch = samples[start : start + 32]
        video = generate(pipeline, batch, **how)
        if measure is not None:
            measured.append(measure(video))
        for sample, read in zip(batch, judge.read(video), strict=True):
            hits = {name: sample.wanted[name] == read[name] for name in ATTRIBUTES}
            for name, hit in (hits | {"all": all(hits.values())}).items():
                marks[name] += "1" if hit else "0"
    return marks, measured


def new_clips(num: int, purpose: str) -> list[ClipSpec]:
    """Clips that nothing was trained on. A sixth are of triples (shape, colour, motion) that nothing was, either."""
    return sample_specs(num, derive_seed("study", purpose), WORLD, "all")


def prompts(num: int) -> list[Sample]:
    """What models are asked for, plainly worded."""
    specs = new_clips(num, "prompts")
    return [Sample(f"study-{i:03d}", plain_caption(spec), label_words(spec)) for i, spec in enumerate(specs)]


def quiet(model: Path) -> OpenSoraPipeline:
    """The pipeline of a trained transformer, without progress bars."""
    pipeline = load_pipeline(str(model))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def rounded(values: Sequence[float], digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]
