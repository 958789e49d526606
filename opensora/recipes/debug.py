"""The family in miniature: networks of the published classes, with published settings where those are not sizes.

Nothing is downloaded: text encoder and autoencoder have random weights, always the same ones, and the text is read byte
by byte, so captions of any clips will do. What is trained is worthless; that it trains, resumes and exports is the
point. On clips of one's own:

    opensora train v1_2_debug objective.data.manifest=clips.csv

They are cut to 17 frames of 64x64 unless objective.data.buckets says otherwise.
"""

from dataclasses import replace
from typing import Any

from opensora.checkpoints.published import PUBLISHED, PublishedPart
from opensora.data.toybox import OtherLength, ToyboxClips, ToyboxLatents
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.config import DiffusionTaskConfig
from opensora.training.diffusion.noise import IDDPM, Flow
from opensora.training.diffusion.text import FrozenText
from opensora.training.optimizer import OptimizerConfig
from opensora.training.parts import Untrained

CLIPS = ToyboxClips(num_frames=17, height=64, width=64)
_TRANSFORMER = {"hidden_size": 48, "depth": 2, "num_heads": 2, "caption_channels": 32, "model_max_length": 120}
_MMDIT = {"depth_single_blocks": 2, "axes_dim": [8, 8, 8], "pooled_channels": 24}
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
_CLIP_ENCODER = {
    "vocab_size": 384,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
_SPATIAL = {"block_out_channels": [8, 8, 8, 16], "layers_per_block": 1, "norm_num_groups": 4}
_TEMPORAL = {"filters": 8, "num_groups": 4, "num_res_blocks": 1, "channel_multipliers": [1, 1, 1, 2]}
_WHOLE: dict[str, dict[str, Any]] = {
    "CausalVideoAutoencoder": {**_TEMPORAL, "temporal_downsample": [False, True, True]},
    "HunyuanVideoAutoencoder": {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4},
    "VideoDCAutoencoder": {
        "latent_channels": 16,
        "widths": [8, 8, 8, 16, 16, 16],
        "encoder_depths": [1] * 6,
        "decoder_depths": [1] * 6,
        "head_dim": 8,
    },
}
"""Small sizes of autoencoders that are one network."""


def debug_task(
    model: str,
    diffusion: Flow | IDDPM,
    transformer: dict[str, Any] | None = None,
    clips: ToyboxClips = CLIPS,
    **options: Any,
) -> DiffusionTaskConfig:
    """A published model's training with tiny networks of its classes.

    Args:
        model: its name.
        diffusion: the corruption.
        transformer: keywords besides its sizes.
        clips: their size.
        options: more of `DiffusionTaskConfig`.
    """
    released = PUBLISHED[model]
    images = OtherLength(1, 0.25)
    autoencoder = _tiny_autoencoder(released.autoencoder)
    sizes: dict[str, Any] = {**released.transformer.config, **_TRANSFORMER}
    text = FrozenText(Untrained(_TEXT_ENCODER))
    if released.text_encoder_2 is not None:
        text = replace(text, origin_2=Untrained(_CLIP_ENCODER, architecture="CLIPTextModel"))
        sizes |= {**_MMDIT, "in_channels": autoencoder.options["latent_channels"]}
    defaults = {name: value for name, value in released.defaults.items() if name != "nominal_size"}
    defaults |= {"num_frames": clips.num_frames, "height": clips.height, "width": clips.width}
    common: dict[str, Any] = {
        "data": ToyboxLatents(clips, 16, other_lengths=(images,), num_clips_of_other_lengths=8, batch_size=4),
        "diffusion": diffusion,
        "autoencoder": autoencoder,
        "text": text,
        "architecture": released.transformer.class_name.rpartition(".")[2],
        "transformer": {**sizes, **(transformer or {})},
        "defaults": {**defaults, "num_inference_steps": 4},
    }
    return DiffusionTaskConfig(**common | options)


def debug_recipe(name: str, objective: DiffusionTaskConfig) -> Recipe:
    """Twenty steps, checkpoints on the way."""
    optimizer = OptimizerConfig(matrices="adamw", lr=1e-3, warmup_steps=5, decay=0.0)
    loop = LoopConfig(steps=20, precision="fp32", log_every=5, checkpoint_every=10, optimizer=optimizer)
    return Recipe(name, objective, loop)


def _tiny_autoencoder(released: PublishedPart) -> Untrained:
    """A published autoencoder with small sizes."""
    config, name = released.config, released.class_name.rpartition(".")[2]
    if name in _WHOLE:
        return Untrained({**config, **_WHOLE[name]}, architecture=name)
    small = {**config, "spatial": {**config["spatial"], **_SPATIAL}}
    if "temporal" in config:
        small["temporal"] = {**config["temporal"], **_TEMPORAL}
    return Untrained(small)
