"""The published stages of the autoencoder of Open-Sora 1.2, and one that tries the machinery in seconds.

Rates, lengths and steps are those of the released configurations and of the report: SDXL's 2D autoencoder with a causal
one over time on top, 17 frames of 256 x 256 px and a fifth of images, then random lengths of up to two chunks. Stages 1
and 2 ran on 8 GPUs, stage 3 on 24, with one clip on each. Clips are named by `objective.data.manifest=FILE`.

One figure is not the published one: trained from scratch, frame latents are scaled by the 2D autoencoder's own factor
(0.13025). The released weights were trained with 0.18215 and keep it wherever they are trained on
(`objective.init_from=opensora-1.2`); `objective.scaling_factor=0.18215` repeats the choice.
"""

from typing import Any

from opensora.checkpoints.published import PUBLISHED
from opensora.data.clips import ManifestClips
from opensora.data.toybox import ToyboxClips, ToyboxVideos
from opensora.recipes.toybox_vae import RUNS
from opensora.training.config import LoopConfig, Recipe
from opensora.training.optimizer import OptimizerConfig
from opensora.training.vae.clips import Cut
from opensora.training.vae.config import VAETaskConfig
from opensora.training.vae.discriminator import DiscriminatorConfig

SDXL_AUTOENCODER = "pretrained_models/pixart_sigma_sdxlvae_T5_diffusers/vae"
AUTOENCODER: dict[str, Any] = {
    name: value for name, value in PUBLISHED["opensora-1.2"].autoencoder.config.items() if name != "latent_space"
}
PIXELS = "256x256"


def _stage(name: str, steps: int, frames: int, **options: Any) -> Recipe:
    objective = VAETaskConfig(
        data=ManifestClips({PIXELS: {str(frames): (1.0, 1)}}, text_required=False),
        autoencoder=AUTOENCODER,
        sample_frames=True,
        micro_batch_size=4,
        reduction="sum",
        **options,
    )
    optimizer = OptimizerConfig(matrices="adamw", lr=1e-5, betas=(0.9, 0.999), warmup_steps=0, decay=0.0)
    loop = LoopConfig(
        steps=steps,
        seed=42,
        activation_checkpointing="full",
        ema_decay=0.0,  # the weights themselves were released
        checkpoint_every=1000,
        optimizer=optimizer,
    )
    return Recipe(name, objective, loop)


def vae_v1_2_stage1() -> Recipe:
    """Time, on the latents of frozen frames; latents of images are to stay as they are. No divergence was added."""
    return _stage(
        "vae_v1_2_stage1",
        380_000,
        17,
        stage="latents",
        spatial_from=SDXL_AUTOENCODER,
        cut=Cut(image_share=0.2),
        identity_weight=1.0,
        kl_weight=0.0,
    )


def vae_v1_2_stage2() -> Recipe:
    """The same without the wish for images."""
    return _stage(
        "vae_v1_2_stage2",
        260_000,
        17,
        stage="latents",
        init_from=str(RUNS / "vae_v1_2_stage1" / "model"),
        cut=Cut(image_share=0.2),
        kl_weight=0.0,
    )


def vae_v1_2_stage3() -> Recipe:
    """All of it, on pixels, at random lengths."""
    return _stage(
        "vae_v1_2_stage3",
        540_000,
        34,
        stage="pixels",
        init_from=str(RUNS / "vae_v1_2_stage2" / "model"),
        cut=Cut(random_lengths=True),
        train_encoder=True,
        kl_weight=1e-6,
        perceptual="lpips",
        perceptual_weight=0.1,
    )


def vae_debug() -> Recipe:
    """Stage 3 at a size at which it runs in seconds, from random weights, against a critic."""
    objective = VAETaskConfig(
        stage="pixels",
        data=ToyboxVideos(ToyboxClips(num_frames=20, height=32, width=32), batch_size=2),
        cut=Cut(image_share=0.2, random_lengths=True),
        autoencoder={
            "spatial": {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4},
            "spatial_patch_size": 4,
            "temporal": {
                "type": "causal3d",
                "filters": 8,
                "num_res_blocks": 1,
                "channel_multipliers": [1, 1, 2],
                "temporal_downsample": [True, True],
                "num_groups": 4,
            },
        },
        train_encoder=True,
        discriminator=DiscriminatorConfig(dim=8, depth=2, start=2),
        num_clips=4,
    )
    optimizer = OptimizerConfig(muon_lr=0.01, lr=1e-3, warmup_steps=0)
    return Recipe("vae_debug", objective, LoopConfig(steps=6, log_every=1, preview_every=3, optimizer=optimizer))
