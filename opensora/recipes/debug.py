"""The family in miniature: networks of the published classes, with published settings where those are not sizes.

Nothing is downloaded: text encoder and autoencoder have random weights, always the same ones, and the text is read byte
by byte, so captions of any clips will do. What is trained is worthless; that it trains, resumes and exports is the
point. On clips of one's own:

    opensora train v1_2_debug 'objective.data={"type": "ManifestClips", "manifest": "clips.csv",
                                               "buckets": {"144p": {"17": [1.0, 2]}}}'
"""

from typing import Any

from opensora.checkpoints.published import PUBLISHED
from opensora.data.toybox import OtherLength, ToyboxClips, ToyboxLatents
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.config import DiffusionTaskConfig
from opensora.training.diffusion.noise import IDDPM, Flow
from opensora.training.diffusion.text import FrozenText
from opensora.training.optimizer import OptimizerConfig
from opensora.training.parts import Untrained

_TRANSFORMER = {"hidden_size": 48, "depth": 2, "num_heads": 2, "caption_channels": 32, "model_max_length": 120}
_TEXT_ENCODER = {
    "vocab_size": 384,  # bytes and special tokens
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_SPATIAL = {"block_out_channels": [8, 8, 8, 16], "layers_per_block": 1, "norm_num_groups": 4}
_TEMPORAL = {"filters": 8, "num_groups": 4, "num_res_blocks": 1, "channel_multipliers": [1, 1, 1, 2]}


def debug_task(
    model: str, diffusion: Flow | IDDPM, transformer: dict[str, Any] | None = None, **options: Any
) -> DiffusionTaskConfig:
    """A published model's training with tiny networks of its classes.

    Args:
        model: its name.
        diffusion: the corruption.
        transformer: keywords besides its sizes.
        options: more of `DiffusionTaskConfig`.
    """
    released = PUBLISHED[model]
    clips = ToyboxClips(num_frames=17, height=64, width=64)
    images = OtherLength(1, 0.25)
    defaults = {name: value for name, value in released.defaults.items() if name != "nominal_size"}
    defaults |= {"num_frames": clips.num_frames, "height": clips.height, "width": clips.width}
    common: dict[str, Any] = {
        "data": ToyboxLatents(clips, 16, other_lengths=(images,), num_clips_of_other_lengths=8, batch_size=4),
        "diffusion": diffusion,
        "autoencoder": Untrained(_tiny_autoencoder(released.autoencoder.config)),
        "text": FrozenText(Untrained(_TEXT_ENCODER)),
        "architecture": released.transformer.class_name.rpartition(".")[2],
        "transformer": {**released.transformer.config, **_TRANSFORMER, **(transformer or {})},
        "defaults": {**defaults, "num_inference_steps": 4},
    }
    return DiffusionTaskConfig(**common | options)


def debug_recipe(name: str, objective: DiffusionTaskConfig) -> Recipe:
    """Twenty steps, checkpoints on the way."""
    optimizer = OptimizerConfig(matrices="adamw", lr=1e-3, warmup_steps=5, decay=0.0)
    loop = LoopConfig(steps=20, precision="fp32", log_every=5, checkpoint_every=10, optimizer=optimizer)
    return Recipe(name, objective, loop)


def _tiny_autoencoder(config: Any) -> dict[str, Any]:
    """A published autoencoder's keywords with small sizes."""
    small = {**config, "spatial": {**config["spatial"], **_SPATIAL}}
    if "temporal" in config:
        small["temporal"] = {**config["temporal"], **_TEMPORAL}
    return small
