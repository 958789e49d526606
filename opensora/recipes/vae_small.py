"""A small video autoencoder for clips of one's own, from scratch: 8 times smaller in height and width, 4 in time.

It has the structure of the published ones (a 2D autoencoder frame by frame, a causal one over time, 4 latent channels)
and a thirtieth of their weights: half an hour on one CPU core in all. Run the four in this order, each with the same
`objective.data.manifest=CLIPS.csv`; each looks for the one before in `runs/`, where `opensora train NAME` puts it.
"""

from opensora.data.clips import ManifestClips
from opensora.recipes.toybox_vae import RUNS
from opensora.training.config import LoopConfig, Recipe
from opensora.training.optimizer import OptimizerConfig
from opensora.training.vae.clips import Cut
from opensora.training.vae.config import VAETaskConfig

AUTOENCODER = {
    "spatial": {"block_out_channels": [96, 160], "layers_per_block": 1, "norm_num_groups": 16, "latent_channels": 4},
    "spatial_patch_size": 4,
    "micro_frame_size": 17,
    "micro_batch_size": 4,
    "temporal": {"type": "folded", "dim": 256, "encoder_depth": 2, "decoder_depth": 4},
}
SIZE = "144x176"
CROP = 128  # pixels
RATES = {"betas": (0.9, 0.99), "decay": 0.5, "warmup_steps": 30}


def clips(num_frames: int, batch_size: int) -> ManifestClips:
    """Clips of one length; captions play no part."""
    return ManifestClips({SIZE: {str(num_frames): (1.0, batch_size)}}, text_required=False)


def vae_small_frames() -> Recipe:
    """The 2D autoencoder, on single frames."""
    objective = VAETaskConfig(
        stage="frames",
        data=clips(2, 16),
        cut=Cut(crop=CROP),
        autoencoder=AUTOENCODER,
        frames_per_clip=1,
        mse_weight=2.0,
        kl_weight=1e-5,
    )
    optimizer = OptimizerConfig(muon_lr=0.02, lr=2e-3, **RATES)
    return Recipe("vae_small_frames", objective, LoopConfig(steps=550, optimizer=optimizer))


def vae_small_stage1() -> Recipe:
    """Time, on frame latents; a fifth are images, whose latents are to stay as they are."""
    return _latents("vae_small_stage1", "vae_small_frames", steps=150, identity_weight=1.0)


def vae_small_stage2() -> Recipe:
    """Time, on frame latents alone."""
    return _latents("vae_small_stage2", "vae_small_stage1", steps=60, identity_weight=0.0)


def _latents(name: str, before: str, steps: int, identity_weight: float) -> Recipe:
    objective = VAETaskConfig(
        stage="latents",
        data=clips(17, 4),
        cut=Cut(image_share=0.2, crop=CROP),
        autoencoder=AUTOENCODER,
        init_from=str(RUNS / before / "model"),
        mse_weight=2.0,
        kl_weight=1e-5,
        identity_weight=identity_weight,
        num_clips=200,
        cache_latents=True,
    )
    optimizer = OptimizerConfig(muon_lr=0.02, lr=2e-3, **RATES)
    return Recipe(name, objective, LoopConfig(steps=steps, optimizer=optimizer))


def vae_small_stage3() -> Recipe:
    """Time and the 2D decoder together, on pixels, at random lengths of up to two chunks."""
    objective = VAETaskConfig(
        stage="pixels",
        data=clips(34, 2),
        cut=Cut(random_lengths=True, crop=CROP),
        autoencoder=AUTOENCODER,
        init_from=str(RUNS / "vae_small_stage2" / "model"),
        frames_per_clip=6,
        mse_weight=2.0,
        kl_weight=1e-5,
    )
    optimizer = OptimizerConfig(muon_lr=0.01, lr=5e-4, **RATES)
    return Recipe("vae_small_stage3", objective, LoopConfig(steps=250, optimizer=optimizer))
