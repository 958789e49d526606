"""What the studies share: an easy corner of the toy world, models that learn it in a minute of one core, rows of runs.

One 2D autoencoder serves all runs. What a study is about, temporal autoencoders (0.6 M weights) and transformers
(0.5 M), is trained by the package's own trainer, from seeds that all arms of a study share. Whatever a run found
becomes a row, and a study that was stopped goes on with the rows that are missing.

Letters: B clips, C channels, T frames, N latent frames, H, W pixels, h, w latent cells.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.checkpoints.source import find_part
from opensora.containers.runs import MODEL, RECIPE
from opensora.contents import read_object
from opensora.data.toybox import ToyboxClips, ToyboxLatents, ToyboxVideos
from opensora.errors import OpenSoraError
from opensora.files import replacing_folder
from opensora.lab.rows import Row, keep_row, read_rows
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.settings import to_dict
from opensora.toybox.specs import World
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


# ---- rows


def carry_out_missing(path: Path, runs: Sequence[Any], budget: Budget, carry_out: Callable[[Any], Row]) -> list[Row]:
    """Carries out runs that have no row yet, and adds theirs, one by one.

    Args:
        path: file of rows, JSON lines.
        runs: in order, with a `name` each.
        budget: of all of them.
        carry_out: makes the row of a run.

    Returns:
        All rows.

    Raises:
        OpenSoraError: the file has rows of another budget.
    """
    rows, spent = read_rows(path), list(astuple(budget))
    if any(row["budget"] != spent for row in rows.values()):
        raise OpenSoraError(f"{path} holds runs of another budget than {spent}; move it away to begin anew")
    for run in runs:
        if run.name not in rows:
            rows[run.name] = {"cell": run.name, **carry_out(run), "budget": spent}
            keep_row(path, rows[run.name])
    return list(rows.values())


# ---- training


def train(recipe: Recipe, folder: Path) -> Path:
    """The model of a recipe: that of its folder if it is there; a run that was stopped goes on.

    Raises:
        OpenSoraError: the model there is of another recipe.
    """
    model = folder / MODEL
    if model.exists() and read_object(folder / RECIPE) != to_dict(recipe):
        raise OpenSoraError(f"{folder} holds a model of other settings; name another folder by --models")
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
    loop = replace(_loop(budget.frames_steps, 0, optimizer), precision="fp32")
    model = find_part(train(Recipe("frames", objective, loop), folder), "autoencoder")
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
