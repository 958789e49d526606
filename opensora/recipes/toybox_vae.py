"""The bundled video autoencoder, in five stages, the first four sized for one CPU core: about 40 minutes in all.

Run them in this order; each looks for the stage before in `runs/`, where `opensora train NAME` puts it.
"""

from pathlib import Path

from opensora.data.toybox import ToyboxVideos
from opensora.training.config import LoopConfig, Recipe
from opensora.training.optimizer import OptimizerConfig
from opensora.training.vae.config import VAETaskConfig

RUNS = Path("runs")

AUTOENCODER = {
    "spatial": {
        "in_channels": 12,
        "out_channels": 12,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [32, 64, 96],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
    },
    "spatial_patch_size": 2,
    "micro_batch_size": 68,
    "temporal": {
        "type": "folded",
        "in_channels": 4,
        "latent_channels": 4,
        "dim": 256,
        "encoder_depth": 2,
        "decoder_depth": 3,
        "temporal_factor": 4,
    },
}


def toybox_vae_frames() -> Recipe:
    """Stage 1 of the autoencoder: single frames."""
    objective = VAETaskConfig(
        stage="frames",
        data=ToyboxVideos(batch_size=8),
        autoencoder=AUTOENCODER,
        frames_per_clip=4,
        mse_weight=2.0,
        kl_weight=2e-4,
        object_weight=20.0,
        num_clips=1200,
    )
    optimizer = OptimizerConfig(muon_lr=0.02, lr=2e-3, betas=(0.9, 0.99), decay=0.5)
    return Recipe("toybox_vae_frames", objective, LoopConfig(steps=1800, preview_every=200, optimizer=optimizer))


def toybox_vae_latents() -> Recipe:
    """Stage 2 of the autoencoder: time, on the latents of stage 1."""
    objective = VAETaskConfig(
        stage="latents",
        data=ToyboxVideos(batch_size=16),
        init_from=str(RUNS / "toybox_vae_frames" / "model"),
        autoencoder=AUTOENCODER,
        mse_weight=2.0,
        kl_weight=1e-3,
        object_weight=10.0,
        num_clips=2000,
        cache_latents=True,
    )
    optimizer = OptimizerConfig(muon_lr=0.02, lr=2e-3, betas=(0.9, 0.99), decay=0.5)
    return Recipe("toybox_vae_latents", objective, LoopConfig(steps=800, preview_every=200, optimizer=optimizer))


def toybox_vae_pixels() -> Recipe:
    """Stage 3 of the autoencoder: time and the spatial decoder together, on pixels."""
    objective = VAETaskConfig(
        stage="pixels",
        data=ToyboxVideos(batch_size=8),
        init_from=str(RUNS / "toybox_vae_latents" / "model"),
        autoencoder=AUTOENCODER,
        frames_per_clip=4,
        mse_weight=2.0,
        kl_weight=1e-3,
        object_weight=20.0,
        num_clips=1000,
    )
    optimizer = OptimizerConfig(muon_lr=0.01, lr=1e-4, betas=(0.9, 0.99), decay=0.5)
    return Recipe("toybox_vae_pixels", objective, LoopConfig(steps=800, preview_every=200, optimizer=optimizer))


def _decoders(before: str, batch_size: int) -> VAETaskConfig:
    """Both decoders, for crisp pictures of the latents that there are."""
    return VAETaskConfig(
        stage="decoders",
        data=ToyboxVideos(batch_size=batch_size),
        init_from=str(RUNS / before / "model"),
        autoencoder=AUTOENCODER,
        frames_per_clip=4,
        mse_weight=10.0,
        object_weight=2.0,
    )


def toybox_vae_decoders() -> Recipe:
    """Stage 4 of the autoencoder: both decoders, for crisp pictures of the latents of stage 3."""
    objective = _decoders("toybox_vae_pixels", batch_size=8)
    optimizer = OptimizerConfig(muon_lr=0.015, lr=1e-3, betas=(0.9, 0.99), decay=0.9)
    return Recipe("toybox_vae_decoders", objective, LoopConfig(steps=1300, preview_every=250, optimizer=optimizer))


def toybox_vae_crisp() -> Recipe:
    """Stage 5 of the autoencoder: the same for longer than a CPU would, six minutes of a GPU."""
    objective = _decoders("toybox_vae_decoders", batch_size=16)
    optimizer = OptimizerConfig(muon_lr=0.008, lr=5e-4, betas=(0.9, 0.99), decay=1.0)
    return Recipe("toybox_vae_crisp", objective, LoopConfig(steps=4800, preview_every=1200, optimizer=optimizer))
