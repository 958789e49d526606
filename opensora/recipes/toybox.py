"""The bundled text-to-video models: a rectified-flow transformer and its IDDPM twin, sized for one CPU core.

They learn on the latents of the autoencoder in `toybox_vae.py`, which is trained first.
"""

from typing import Any

from opensora.data.toybox import OtherLength, ToyboxLatents
from opensora.recipes.toybox_vae import RUNS
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.config import DiffusionTaskConfig
from opensora.training.diffusion.noise import IDDPM, Flow
from opensora.training.diffusion.previews import JudgedPrompts
from opensora.training.diffusion.text import TrainedText
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
AUTOENCODER = str(RUNS / "toybox_vae_pixels" / "model")
FLOW_DEFAULTS = {"num_inference_steps": 20, "guidance_scale": 4.0, "cfg_channels": None, "max_frames": 34}
IDDPM_DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 3.0, "cfg_channels": 3, "max_frames": 34}

# Images, a clip and one frame more (whose latent is its own chunk of the autoencoder, so it can be given), two chunks.
OTHER_LENGTHS = (OtherLength(1, 0.08), OtherLength(18, 0.12), OtherLength(34, 0.15))
FRAME_MASKS = {"image_head": 0.12, "head": 0.2, "tail": 0.12, "image_tail": 0.04, "image_head_tail": 0.12}

# The learned variance of so small a model is too large to draw with (docs/log.md), hence ddim.
CLEAN_LATENTS = IDDPM(prediction_type="sample", velocity_weights=True, sampler="ddim")


def _task(**options: Any) -> DiffusionTaskConfig:
    """What the runs have in common; `init_from` is the folder of the run before."""
    common: dict[str, Any] = {
        "data": ToyboxLatents(),
        "autoencoder": AUTOENCODER,
        "text": TrainedText(),
        "object_weight": 5.0,
        "preview": JudgedPrompts(),
    }
    return DiffusionTaskConfig(**common | options)


def _model(run: str) -> str:
    return str(RUNS / run / "model")


def toybox_base() -> Recipe:
    """Text to video with rectified flow, from scratch: colours, places, shapes, then sizes and motions."""
    objective = _task(diffusion=Flow(), text=TrainedText(TEXT_ENCODER), transformer=TRANSFORMER, defaults=FLOW_DEFAULTS)
    optimizer = OptimizerConfig(muon_lr=0.02, lr=1e-3, warmup_steps=100, decay=0.4)
    return Recipe("toybox_base", objective, LoopConfig(steps=4200, optimizer=optimizer, preview_every=500))


def toybox() -> Recipe:
    """`toybox_base` trained on at noisier times, where the direction of a motion is decided."""
    objective = _task(diffusion=Flow(loc=1.0), init_from=_model("toybox_base"), defaults=FLOW_DEFAULTS)
    optimizer = OptimizerConfig(muon_lr=0.01, lr=5e-4, warmup_steps=50, decay=0.7)
    return Recipe("toybox", objective, LoopConfig(steps=1200, optimizer=optimizer, preview_every=300))


def toybox_given() -> Recipe:
    """`toybox` trained on with conditioning frames, and with images and longer clips: the model that is shipped."""
    objective = _task(
        data=ToyboxLatents(other_lengths=OTHER_LENGTHS),
        diffusion=Flow(loc=0.7),
        init_from=_model("toybox"),
        frame_masks=FRAME_MASKS,
        defaults=FLOW_DEFAULTS,
    )
    optimizer = OptimizerConfig(muon_lr=0.01, lr=5e-4, warmup_steps=50, decay=0.7)
    return Recipe("toybox_given", objective, LoopConfig(steps=1800, optimizer=optimizer, preview_every=300))


def toybox_iddpm() -> Recipe:
    """Text to video with learned-variance IDDPM, fine-tuned from the rectified-flow model."""
    objective = _task(
        diffusion=CLEAN_LATENTS, init_from=_model("toybox"), new_parts=("last_layer",), defaults=IDDPM_DEFAULTS
    )
    optimizer = OptimizerConfig(muon_lr=0.01, lr=1e-3, warmup_steps=50, decay=0.6)
    return Recipe("toybox_iddpm", objective, LoopConfig(steps=1500, optimizer=optimizer, preview_every=500))


def toybox_iddpm_given() -> Recipe:
    """`toybox_iddpm` trained on likewise: the model that is shipped."""
    objective = _task(
        data=ToyboxLatents(other_lengths=OTHER_LENGTHS),
        diffusion=CLEAN_LATENTS,
        init_from=_model("toybox_iddpm"),
        frame_masks=FRAME_MASKS,
        defaults=IDDPM_DEFAULTS,
    )
    optimizer = OptimizerConfig(muon_lr=0.007, lr=5e-4, warmup_steps=50, decay=0.7)
    return Recipe("toybox_iddpm_given", objective, LoopConfig(steps=1200, optimizer=optimizer, preview_every=300))
