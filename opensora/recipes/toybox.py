"""The bundled text-to-video models: a rectified-flow transformer and its IDDPM twin, sized for one CPU core.

They learn on the latents of the autoencoder in `toybox_vae.py`, which is trained first.
"""

from opensora.recipes.toybox_vae import RUNS
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion_objective import DiffusionObjectiveConfig, OtherLength
from opensora.training.optimizer import OptimizerConfig

TRANSFORMER = {
    "in_channels": 4,
    "patch_size": [1, 2, 2],
    "hidden_size": 192,
    "depth": 4,
    "num_heads": 4,
    "caption_channels": 128,
    "model_max_length": 24,
    "qk_norm": True,
    "pred_sigma": True,
    "learn_null_text": True,
}
TEXT_ENCODER = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
AUTOENCODER = RUNS / "toybox_vae_pixels" / "model"
FLOW_DEFAULTS = {"num_inference_steps": 20, "guidance_scale": 4.0, "cfg_channels": None, "max_frames": 34}
IDDPM_DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 3.0, "cfg_channels": 3, "max_frames": 34}

# Images, a clip and one frame more (whose latent is its own chunk of the autoencoder, so it can be given), two chunks.
OTHER_LENGTHS = (OtherLength(1, 0.08), OtherLength(18, 0.12), OtherLength(34, 0.15))
FRAME_MASKS = {"image_head": 0.12, "head": 0.2, "tail": 0.12, "image_tail": 0.04, "image_head_tail": 0.12}


def toybox_base() -> Recipe:
    """Text to video with rectified flow, from scratch: colours, places, shapes, then sizes and motions."""
    objective = DiffusionObjectiveConfig(
        diffusion="flow",
        autoencoder=AUTOENCODER,
        transformer=TRANSFORMER,
        text_encoder=TEXT_ENCODER,
        defaults=FLOW_DEFAULTS,
    )
    optimizer = OptimizerConfig(muon_lr=0.02, lr=1e-3, warmup_steps=100, decay=0.4)
    return Recipe("toybox_base", objective, LoopConfig(steps=4200, optimizer=optimizer, preview_every=500))


def toybox() -> Recipe:
    """`toybox_base` trained on at noisier times, where the direction of a motion is decided."""
    objective = DiffusionObjectiveConfig(
        diffusion="flow",
        autoencoder=AUTOENCODER,
        init_from=RUNS / "toybox_base" / "model",
        t_loc=1.0,
        defaults=FLOW_DEFAULTS,
    )
    optimizer = OptimizerConfig(muon_lr=0.01, lr=5e-4, warmup_steps=50, decay=0.7)
    return Recipe("toybox", objective, LoopConfig(steps=1200, optimizer=optimizer, preview_every=300))


def toybox_given() -> Recipe:
    """`toybox` trained on with frames that are given, and with images and longer clips: the model that is shipped."""
    objective = DiffusionObjectiveConfig(
        diffusion="flow",
        autoencoder=AUTOENCODER,
        init_from=RUNS / "toybox" / "model",
        other_lengths=OTHER_LENGTHS,
        frame_masks=FRAME_MASKS,
        t_loc=0.7,
        defaults=FLOW_DEFAULTS,
    )
    optimizer = OptimizerConfig(muon_lr=0.01, lr=5e-4, warmup_steps=50, decay=0.7)
    return Recipe("toybox_given", objective, LoopConfig(steps=1800, optimizer=optimizer, preview_every=300))


def toybox_iddpm() -> Recipe:
    """Text to video with learned-variance IDDPM, fine-tuned from the rectified-flow model."""
    objective = DiffusionObjectiveConfig(
        diffusion="iddpm",
        autoencoder=AUTOENCODER,
        init_from=RUNS / "toybox" / "model",
        new_last_layer=True,
        prediction_type="sample",
        sampler="ddim",  # the learned variance of so small a model is too large to draw with (docs/log.md)
        defaults=IDDPM_DEFAULTS,
    )
    optimizer = OptimizerConfig(muon_lr=0.01, lr=1e-3, warmup_steps=50, decay=0.6)
    return Recipe("toybox_iddpm", objective, LoopConfig(steps=1500, optimizer=optimizer, preview_every=500))


def toybox_iddpm_given() -> Recipe:
    """`toybox_iddpm` trained on likewise: the model that is shipped."""
    objective = DiffusionObjectiveConfig(
        diffusion="iddpm",
        autoencoder=AUTOENCODER,
        init_from=RUNS / "toybox_iddpm" / "model",
        other_lengths=OTHER_LENGTHS,
        frame_masks=FRAME_MASKS,
        prediction_type="sample",
        sampler="ddim",
        defaults=IDDPM_DEFAULTS,
    )
    optimizer = OptimizerConfig(muon_lr=0.007, lr=5e-4, warmup_steps=50, decay=0.7)
    return Recipe("toybox_iddpm_given", objective, LoopConfig(steps=1200, optimizer=optimizer, preview_every=300))
