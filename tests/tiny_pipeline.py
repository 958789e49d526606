"""A whole pipeline of a few thousand random parameters, built in memory: every part is the real class."""

from typing import Any

import torch
from transformers import T5Config, T5EncoderModel

from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.schedulers.iddpm import IDDPMScheduler
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler
from opensora.models.stdit3 import STDiT3
from opensora.pipeline import OpenSoraPipeline
from opensora.toybox.captions import MAX_TOKENS, build_tokenizer

TEXT_WIDTH = 16
DEFAULTS: dict[str, Any] = {
    "guidance_scale": 3.0,
    "num_inference_steps": 4,
    "height": 16,
    "width": 24,
    "num_frames": 5,
    "fps": 8,
    "max_frames": 34,
}


def make_text_encoder() -> T5EncoderModel:
    torch.manual_seed(1)
    config = T5Config(vocab_size=len(build_tokenizer()), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def make_transformer() -> STDiT3:
    torch.manual_seed(2)
    transformer = STDiT3(
        hidden_size=48, depth=2, num_heads=2, caption_channels=TEXT_WIDTH, model_max_length=MAX_TOKENS, qk_norm=True
    ).eval()
    # As it is initialised, the network returns zero whatever it is given.
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return transformer


def make_autoencoder() -> VideoAutoencoder:
    torch.manual_seed(3)
    return VideoAutoencoder(
        spatial={"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4},
        spatial_patch_size=4,
        temporal={"type": "folded", "dim": 16, "encoder_depth": 1, "decoder_depth": 1},
        latent_space={"shift": [0.1, -0.2, 0.3, 0.0], "scale": [2.0, 1.5, 1.25, 1.0], "trained_with": "nothing"},
    ).eval()


def make_pipeline(kind: str = "flow", **defaults: Any) -> OpenSoraPipeline:
    """`kind` is "flow" or "iddpm"; the latter guides 3 channels by default."""
    scheduler = RectifiedFlowScheduler(use_timestep_transform=True) if kind == "flow" else IDDPMScheduler()
    options: dict[str, Any] = {"cfg_channels": None if kind == "flow" else 3} | DEFAULTS | defaults
    pipeline = OpenSoraPipeline(
        transformer=make_transformer(),
        scheduler=scheduler,
        autoencoder=make_autoencoder(),
        text_encoder=make_text_encoder(),
        tokenizer=build_tokenizer(),
        **options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
