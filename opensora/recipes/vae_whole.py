"""The published training of the autoencoders of Open-Sora 1.3 and 2.0 (DC-AE), and one of each that runs in seconds.

Rates, sizes and weights of losses are those of the released configurations: clips of 256 x 256 px, 17 frames in 1.3
and 32 in 2.0, and a fifth of images, one clip on each of 8 GPUs. How many steps the DC-AE took is not published (three
weeks for its first stage); those here are ours. Clips are named by `objective.data.manifest=FILE`.
"""

from typing import Any

from opensora.checkpoints.published_parts import DC_AE_2_0, OPENSORA_VAE_1_3, PublishedPart
from opensora.data.clips import ManifestClips
from opensora.data.toybox import ToyboxClips, ToyboxVideos
from opensora.recipes.toybox_vae import RUNS
from opensora.training.config import LoopConfig, Recipe
from opensora.training.optimizer import OptimizerConfig
from opensora.training.vae.clips import Cut
from opensora.training.vae.config import VAETaskConfig
from opensora.training.vae.discriminator import DiscriminatorConfig

_PIXELS = "256x256"


def _of(part: PublishedPart) -> dict[str, Any]:
    """Class and configuration of an autoencoder, whose latents are what they are until they are measured at the end."""
    config = {name: value for name, value in part.config.items() if name != "latent_space"}
    return {"architecture": part.class_name.rpartition(".")[2], "autoencoder": config}


def _published(
    name: str, steps: int, frames: int, optimizer: dict[str, Any], loop: dict[str, Any], **options: Any
) -> Recipe:
    objective = VAETaskConfig(
        stage="whole",
        data=ManifestClips({_PIXELS: {str(frames): (1.0, 1)}}, text_required=False),
        cut=Cut(image_share=0.2),
        reduction="sum",
        perceptual="lpips",
        **options,
    )
    adam = OptimizerConfig(matrices="adamw", decay=0.0, **optimizer)
    return Recipe(name, objective, LoopConfig(steps=steps, seed=42, checkpoint_every=1000, optimizer=adam, **loop))


def vae_v1_3() -> Recipe:
    """The autoencoder of 1.3, against its critic from the first step on."""
    adam = {"lr": 5e-6, "betas": (0.9, 0.999)}
    return _published(
        "vae_v1_3",
        1_000_000,
        17,
        {**adam, "warmup_steps": 1000},
        {"ema_decay": 0.0, "critic": OptimizerConfig(matrices="adamw", decay=0.0, warmup_steps=0, **adam)},
        **_of(OPENSORA_VAE_1_3),
        micro_batch_size=4,
        kl_weight=1e-6,
        perceptual_weight=1.0,
        discriminator=DiscriminatorConfig(dim=64, depth=3, weight=0.5, architecture="patchgan"),
    )


def vae_v2_0_dc_stage1() -> Recipe:
    """The deep compression autoencoder, without a critic."""
    return _published(
        "vae_v2_0_dc_stage1",
        250_000,
        32,
        {"lr": 5e-5, "betas": (0.9, 0.98), "warmup_steps": 0},
        {"ema_decay": 0.99, "activation_checkpointing": "full"},
        **_of(DC_AE_2_0),
        kl_weight=0.0,
        perceptual_weight=0.5,
    )


def vae_v2_0_dc_stage2() -> Recipe:
    """The same against a critic."""
    critic = OptimizerConfig(matrices="adamw", lr=1e-4, betas=(0.9, 0.98), decay=0.0, warmup_steps=0)
    return _published(
        "vae_v2_0_dc_stage2",
        250_000,
        32,
        {"lr": 5e-5, "betas": (0.9, 0.98), "warmup_steps": 0},
        {"ema_decay": 0.99, "activation_checkpointing": "full", "critic": critic},
        **_of(DC_AE_2_0),
        init_from=str(RUNS / "vae_v2_0_dc_stage1" / "model"),
        kl_weight=0.0,
        perceptual_weight=0.5,
        discriminator=DiscriminatorConfig(dim=64, depth=5, weight=0.05, architecture="patchgan", dropout=0.3),
    )


def _debug(name: str, frames: int, **options: Any) -> Recipe:
    objective = VAETaskConfig(
        stage="whole",
        data=ToyboxVideos(ToyboxClips(num_frames=frames, height=32, width=32), batch_size=2),
        cut=Cut(image_share=0.2),
        discriminator=DiscriminatorConfig(dim=4, depth=2, start=2, architecture="patchgan"),
        num_clips=4,
        **options,
    )
    optimizer = OptimizerConfig(muon_lr=0.01, lr=1e-3, warmup_steps=0)
    return Recipe(name, objective, LoopConfig(steps=6, log_every=1, preview_every=3, optimizer=optimizer))


def vae_v1_3_debug() -> Recipe:
    """The autoencoder of 1.3 at a size at which it runs in seconds, in two chunks."""
    return _debug(
        "vae_v1_3_debug",
        9,
        architecture="CausalVideoAutoencoder",
        autoencoder={
            "latent_channels": 4,
            "filters": 8,
            "channel_multipliers": [1, 1, 2],
            "num_res_blocks": 1,
            "temporal_downsample": [True, True],
            "num_groups": 4,
            "micro_frame_size": 5,
        },
    )


def vae_v2_0_dc_debug() -> Recipe:
    """The deep compression autoencoder likewise."""
    return _debug(
        "vae_v2_0_dc_debug",
        8,
        architecture="VideoDCAutoencoder",
        kl_weight=0.0,
        autoencoder={
            "latent_channels": 8,
            "widths": [8, 8, 16],
            "encoder_depths": [1, 1, 1],
            "decoder_depths": [1, 1, 1],
            "attention": [False, False, True],
            "temporal_downsample": [True, True],
            "head_dim": 8,
            "tile_sample_size": None,
            "tile_sample_frames": None,
        },
    )
