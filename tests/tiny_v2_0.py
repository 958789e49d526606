"""Open-Sora 2.0 as a whole pipeline of a few thousand random parameters, in memory: every part is the real class."""

from typing import Any, Literal

import torch
from tiny_pipeline import DEFAULTS, TEXT_WIDTH, make_text_encoder
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.dc_ae import VideoDCAutoencoder
from opensora.models.autoencoders.hunyuan import HunyuanVideoAutoencoder
from opensora.models.mmdit import MMDiT
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler
from opensora.pipeline import OpenSoraPipeline
from opensora.toybox.captions import MAX_TOKENS, build_tokenizer

GUIDANCE: dict[str, Any] = {
    "image_guidance_scale": 3.0,
    "oscillating": ["text", "image"],
    "image_ramp": "past_last_step",
    "image_ramp_for": "pictures",
}


def make_clip_encoder() -> CLIPTextModel:
    torch.manual_seed(4)
    config = CLIPTextConfig(
        vocab_size=len(build_tokenizer()), hidden_size=24, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=MAX_TOKENS, bos_token_id=3, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def make_autoencoder(kind: Literal["hunyuan", "dc-ae"]) -> VideoCodec:
    """Of 8 pixels and 4 frames a latent cell."""
    torch.manual_seed(3)
    if kind == "hunyuan":
        return HunyuanVideoAutoencoder(
            latent_channels=4, block_out_channels=[8, 8, 16, 16], layers_per_block=1, norm_num_groups=4
        ).eval()
    return VideoDCAutoencoder(
        latent_channels=4, widths=[4, 8, 8, 32], encoder_depths=[1, 1, 1, 1], decoder_depths=[1, 1, 1, 1],
        attention=[False, False, False, True], temporal_downsample=[False, True, True],
    ).eval()  # fmt: skip


def make_transformer() -> MMDiT:
    """All of it matters, also what is zero at first."""
    torch.manual_seed(2)
    transformer = MMDiT(
        in_channels=4, hidden_size=32, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6),
        caption_channels=TEXT_WIDTH, pooled_channels=24, model_max_length=MAX_TOKENS,
    ).eval()  # fmt: skip
    for parameter in transformer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return transformer


def make_pipeline(autoencoder: VideoCodec | None = None, **defaults: Any) -> OpenSoraPipeline:
    """Guided and conditioned as 2.0 is."""
    options = {"guidance_options": GUIDANCE, "known_frames": "pictures kept", "cfg_channels": None, "max_frames": None}
    pipeline = OpenSoraPipeline(
        transformer=make_transformer(),
        scheduler=RectifiedFlowScheduler(
            use_timestep_transform=True, transform="tokens", token_px=16, micro_frame_size=None,
            velocity="noise - data",
        ),
        autoencoder=autoencoder or make_autoencoder("hunyuan"),
        text_encoder=make_text_encoder(),
        tokenizer=build_tokenizer(),
        text_encoder_2=make_clip_encoder(),
        tokenizer_2=build_tokenizer(),
        **{**DEFAULTS, **options, **defaults},
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
