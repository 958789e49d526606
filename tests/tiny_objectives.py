"""Every training objective at a size at which a step takes milliseconds."""

from pathlib import Path
from typing import Any

from tiny_pipeline import make_autoencoder

from opensora.data.toybox import ToyboxClips, ToyboxLatents
from opensora.training.diffusion_objective import DiffusionObjectiveConfig
from opensora.training.diffusions import IDDPM, Flow
from opensora.training.previews import JudgedPrompts
from opensora.training.text import TrainedText
from opensora.training.vae_clips import ToyboxVideos
from opensora.training.vae_objective import VAEObjectiveConfig

CLIPS = ToyboxClips(num_frames=5, height=16, width=24)
AUTOENCODER: dict[str, Any] = {
    "spatial": {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4},
    "spatial_patch_size": 4,
    "temporal": {"type": "folded", "dim": 16, "encoder_depth": 1, "decoder_depth": 1},
}
TRANSFORMER = {"hidden_size": 48, "depth": 1, "num_heads": 2, "caption_channels": 16, "model_max_length": 24}
TEXT_ENCODER = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
DEFAULTS = {"num_inference_steps": 2}


def diffusion_config(kind: str, folder: Path, **changes: Any) -> DiffusionObjectiveConfig:
    """ "flow" or "iddpm", on the latents of an autoencoder saved in `folder`."""
    autoencoder = folder / "autoencoder"
    if not autoencoder.exists():
        make_autoencoder().save_pretrained(autoencoder)
    options: dict[str, Any] = {
        "data": ToyboxLatents(CLIPS, num_clips=6, batch_size=3),
        "diffusion": Flow() if kind == "flow" else IDDPM(),
        "autoencoder": str(autoencoder),
        "text": TrainedText(TEXT_ENCODER),
        "transformer": TRANSFORMER | {"learn_null_text": True},
        "drop_text": 0.5,
        "object_weight": 5.0,
        "preview": JudgedPrompts(2),
        "export_dtype": "float32",
        "defaults": DEFAULTS,
    }
    return DiffusionObjectiveConfig(**options | changes)


def vae_config(stage: str, **changes: Any) -> VAEObjectiveConfig:
    """One stage of autoencoder training, from scratch."""
    options: dict[str, Any] = {"stage": stage, "data": ToyboxVideos(CLIPS, batch_size=2), "autoencoder": AUTOENCODER}
    return VAEObjectiveConfig(**options | {"num_clips": 4, "frames_per_clip": 2} | changes)
