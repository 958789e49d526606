"""Adapters: a look, a subject or a motion learnt from a few clips, beside a model that stays as it is.

Clips are named by `objective.data.manifest=FILE`; `opensora data manifest` makes the table of a folder. What is
exported is the adapter, which `opensora generate --adapter` takes.
"""

from opensora.data.clips import ManifestClips
from opensora.models import mmdit_format
from opensora.models.stdit3 import FORMAT
from opensora.recipes import v2_0
from opensora.recipes.published import published_task
from opensora.recipes.v1_2 import DIFFUSION
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.config import DiffusionTaskConfig
from opensora.training.diffusion.lora import LoRAConfig
from opensora.training.diffusion.noise import Flow
from opensora.training.diffusion.text import FrozenText
from opensora.training.optimizer import OptimizerConfig

_MODEL = "opensora-1.2"
_LOOP = LoopConfig(
    steps=2000,
    seed=42,
    activation_checkpointing="full",
    ema_decay=0.99,
    log_every=10,
    checkpoint_every=250,
    optimizer=OptimizerConfig(matrices="adamw", lr=1e-4, betas=(0.9, 0.999), eps=1e-15, warmup_steps=100, decay=0.0),
)
"""Of adapters of published models."""


def toybox_lora() -> Recipe:
    """An adapter of the bundled model, on clips of 18 frames or more; minutes on one CPU core."""
    objective = DiffusionTaskConfig(
        data=ManifestClips({"64x64": {"17": (1.0, 10)}}, batches_in_a_row=1, num_workers=1),
        diffusion=Flow(loc=0.7),
        autoencoder="toybox",
        text=FrozenText("toybox"),
        init_from="toybox",
        train=LoRAConfig(rank=16, alpha=32, preserve=0.5, targets=FORMAT.lora_targets),
        sample_posterior=False,  # the toybox was trained on means
        frozen_dtype="bfloat16",
    )
    optimizer = OptimizerConfig(matrices="adamw", lr=3e-3, warmup_steps=10, decay=0.7)
    loop = LoopConfig(steps=320, ema_decay=0.98, log_every=10, checkpoint_every=50, optimizer=optimizer)
    return Recipe("toybox_lora", objective, loop)


def v1_2_lora() -> Recipe:
    """An adapter of Open-Sora 1.2, on clips of about 2 s at 240p and 360p."""
    objective = published_task(
        _MODEL,
        ManifestClips({"240p": {"51": (1.0, 2)}, "360p": {"51": (1.0, 1)}}),
        DIFFUSION,
        init_from=_MODEL,
        train=LoRAConfig(rank=16, targets=FORMAT.lora_targets),
    )
    return Recipe("v1_2_lora", objective, _LOOP)


def v2_0_lora() -> Recipe:
    """An adapter of Open-Sora 2.0, on clips of about 2 and 4 s at 256px, of most of which pictures are shown."""
    objective = published_task(
        "opensora-2.0",
        ManifestClips({"256px": {"49": (1.0, 1), "97": (1.0, 1)}}, max_fps=24, rate_told=True),
        v2_0.DIFFUSION,
        init_from="opensora-2.0",
        known_frames=v2_0.KNOWN_FRAMES,
        drop_text=v2_0.DROP,
        drop_pooled=v2_0.DROP,
        train=LoRAConfig(rank=16, targets=mmdit_format.FORMAT.lora_targets),
    )
    return Recipe("v2_0_lora", objective, _LOOP)
