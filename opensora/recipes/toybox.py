"""The bundled text-to-video models: a rectified-flow transformer and its IDDPM twin, sized for one CPU core.

The last run of each, in large batches, is meant for a GPU, where it takes minutes.

They learn on the latents of the autoencoder in `toybox_vae.py`, which is trained first.
"""

from dataclasses import replace
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
CRISP_AUTOENCODER = str(RUNS / "toybox_vae_crisp" / "model")  # the same latents, drawn better
FLOW_DEFAULTS = {"num_inference_steps": 20, "guidance_scale": 4.0, "cfg_channels": None, "max_frames": 34}
LOW_GUIDANCE = {**FLOW_DEFAULTS, "guidance_scale": 2.5}  # opposites read loudly need no more, and shapes stay round
IDDPM_DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 3.0, "cfg_channels": 3, "max_frames": 34}

# Images, a clip and one frame more (whose latent is its own chunk of the autoencoder, so it can be given), two chunks.
OTHER_LENGTHS = (OtherLength(1, 0.08), OtherLength(18, 0.12), OtherLength(34, 0.15))
BILINGUAL = ToyboxLatents(
    chinese=0.4,
    plain=0.25,
    other_lengths=(OtherLength(1, 0.04), OtherLength(18, 0.05), OtherLength(34, 0.06)),
    num_clips_of_other_lengths=1_000,
)
LARGE_BATCHES = replace(
    BILINGUAL,
    chinese=0.5,
    batch_size=256,
    num_clips=40_000,
    num_clips_of_other_lengths=3_000,
    motion_weights={"grow": 1.3, "shrink": 1.3},
    other_lengths=(OtherLength(1, 0.03), OtherLength(18, 0.05), OtherLength(34, 0.06)),
)
FRAME_MASKS = {"image_head": 0.12, "head": 0.2, "tail": 0.12, "image_tail": 0.04, "image_head_tail": 0.12}
FEWER_FRAME_MASKS = {"image_head": 0.05, "head": 0.06, "tail": 0.04, "image_tail": 0.02, "image_head_tail": 0.04}

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
    """`toybox` trained on with conditioning frames, and with images and longer clips: Toybox 1."""
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
    """`toybox_iddpm` trained on likewise: Toybox 1."""
    objective = _task(
        data=ToyboxLatents(other_lengths=OTHER_LENGTHS),
        diffusion=CLEAN_LATENTS,
        init_from=_model("toybox_iddpm"),
        frame_masks=FRAME_MASKS,
        defaults=IDDPM_DEFAULTS,
    )
    optimizer = OptimizerConfig(muon_lr=0.007, lr=5e-4, warmup_steps=50, decay=0.7)
    return Recipe("toybox_iddpm_given", objective, LoopConfig(steps=1200, optimizer=optimizer, preview_every=300))


def _bilingual_task(**options: Any) -> DiffusionTaskConfig:
    """What the runs of Toybox 2 have in common besides."""
    common: dict[str, Any] = {
        "data": BILINGUAL,
        "autoencoder": CRISP_AUTOENCODER,
        "frame_masks": FEWER_FRAME_MASKS,
        "defaults": LOW_GUIDANCE,
    }
    return _task(**common | options)


def toybox_bilingual() -> Recipe:
    """`toybox_given`, reading another text encoder, trained on in two languages."""
    objective = _bilingual_task(
        diffusion=Flow(loc=1.0),
        init_from=_model("toybox_text_read"),
    )
    optimizer = OptimizerConfig(muon_lr=0.015, lr=1e-3, warmup_steps=30, decay=0.8)
    return Recipe("toybox_bilingual", objective, LoopConfig(steps=1200, optimizer=optimizer, preview_every=400))


def toybox_directions() -> Recipe:
    """`toybox_bilingual`, reading opposites loudly, trained on where they are decided."""
    objective = _bilingual_task(
        data=replace(BILINGUAL, motion_weights={"up": 2.5, "down": 2.5, "grow": 2.5, "shrink": 2.5}),
        diffusion=Flow(loc=1.4),
        init_from=_model("toybox_text_loud"),
        object_weight=8.0,
    )
    optimizer = OptimizerConfig(muon_lr=0.015, lr=1e-3, warmup_steps=30, decay=0.9)
    return Recipe("toybox_directions", objective, LoopConfig(steps=700, optimizer=optimizer, preview_every=300))


def toybox_growth() -> Recipe:
    """`toybox_directions`, reading motions more loudly, trained on until it tells growing from shrinking."""
    objective = _bilingual_task(
        data=replace(BILINGUAL, chinese=0.5, motion_weights={"grow": 3.0, "shrink": 3.0, "up": 1.3, "down": 1.3}),
        diffusion=Flow(loc=1.1),
        init_from=_model("toybox_text_louder"),
        object_weight=8.0,
    )
    optimizer = OptimizerConfig(muon_lr=0.015, lr=1e-3, warmup_steps=20, decay=0.6)
    return Recipe("toybox_growth", objective, LoopConfig(steps=2400, ema_decay=0.99, optimizer=optimizer))


def toybox_settled() -> Recipe:
    """`toybox_growth`, all words read loudly again, trained on at times of every kind."""
    objective = _bilingual_task(
        data=replace(BILINGUAL, motion_weights={"grow": 1.5, "shrink": 1.5}),
        diffusion=Flow(loc=0.7, scale=1.2),
        init_from=_model("toybox_text_settled"),
        object_weight=6.0,
    )
    optimizer = OptimizerConfig(muon_lr=0.012, lr=6e-4, warmup_steps=20, decay=1.0)
    return Recipe("toybox_settled", objective, LoopConfig(steps=1250, ema_decay=0.99, optimizer=optimizer))


def toybox_iddpm_taught() -> Recipe:
    """IDDPM of clean latents, begun from the flow model and taught by it."""
    objective = _bilingual_task(
        diffusion=CLEAN_LATENTS,
        init_from=_model("toybox_settled"),
        new_parts=("last_layer",),
        teacher=_model("toybox_settled"),
        object_weight=6.0,
        defaults=IDDPM_DEFAULTS,
    )
    optimizer = OptimizerConfig(muon_lr=0.02, lr=1e-3, warmup_steps=20, decay=0.7)
    return Recipe("toybox_iddpm_taught", objective, LoopConfig(steps=1000, ema_decay=0.99, optimizer=optimizer))


def toybox_finished() -> Recipe:
    """`toybox_settled` trained on in large batches, half of them in Chinese: the model that is shipped."""
    objective = _bilingual_task(
        data=LARGE_BATCHES, diffusion=Flow(loc=0.7, scale=1.2), init_from=_model("toybox_settled"), object_weight=6.0
    )
    optimizer = OptimizerConfig(muon_lr=0.012, lr=6e-4, warmup_steps=20, decay=1.0)
    return Recipe("toybox_finished", objective, LoopConfig(steps=1150, optimizer=optimizer))


def toybox_iddpm_finished() -> Recipe:
    """`toybox_iddpm_taught` likewise, taught by `toybox_finished`: the model that is shipped."""
    objective = _bilingual_task(
        data=replace(LARGE_BATCHES, motion_weights={}),
        diffusion=CLEAN_LATENTS,
        init_from=_model("toybox_iddpm_taught"),
        teacher=_model("toybox_finished"),
        object_weight=6.0,
        defaults=IDDPM_DEFAULTS,
    )
    optimizer = OptimizerConfig(muon_lr=0.012, lr=6e-4, warmup_steps=20, decay=0.6)
    return Recipe("toybox_iddpm_finished", objective, LoopConfig(steps=2600, optimizer=optimizer))
