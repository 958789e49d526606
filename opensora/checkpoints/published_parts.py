"""Parts of released models: those that several of them share, and large ones of 2.0."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opensora.models.autoencoders.statistics_v1_3 import STATISTICS


@dataclass(frozen=True)
class PublishedPart:
    """One component of a released model.

    Attributes:
        repository: its repository on the Hub.
        files: what of the repository is needed; names, or patterns with `*` where the number of files is not known.
        size_bytes: of these files, about.
        class_name: the class that runs it, with its module.
        config: keywords of that class (of its configuration, for classes of transformers).
    """

    repository: str
    files: tuple[str, ...]
    size_bytes: int
    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lone_file(self) -> str | None:
        """The only file needed, if it is one of several models' in its repository."""
        return self.files[0] if len(self.files) == 1 else None


_T5 = "DeepFloyd/t5-v1_1-xxl"

TEXT_ENCODER = PublishedPart(
    _T5,
    ("config.json", "pytorch_model*.bin*"),
    19_050_000_000,  # 4.76 B parameters in float32, the encoder alone
    "transformers.T5EncoderModel",
    {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
)
TOKENIZER = PublishedPart(
    _T5,
    ("spiece.model", "special_tokens_map.json", "tokenizer_config.json"),
    800_000,
    "transformers.T5Tokenizer",
)

_CLIP = "openai/clip-vit-large-patch14"

CLIP_ENCODER = PublishedPart(
    _CLIP,
    ("config.json", "model.safetensors"),
    1_710_000_000,  # with the encoder of images, which is not read
    "transformers.CLIPTextModel",
    {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,  # so it was published; the pooled token is then that of the largest number, its real end
    },
)
CLIP_TOKENIZER = PublishedPart(
    _CLIP,
    ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"),
    1_400_000,
    "transformers.CLIPTokenizer",
)

_FRAME_AUTOENCODER: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
_VIDEO_AUTOENCODER = "opensora.models.autoencoders.video.VideoAutoencoder"

# Open-Sora 1.0 and 1.1: the Stable Diffusion autoencoder alone.
SD_VAE = PublishedPart(
    "stabilityai/sd-vae-ft-ema",
    ("config.json", "diffusion_pytorch_model.safetensors"),
    335_000_000,
    _VIDEO_AUTOENCODER,
    {
        "spatial": _FRAME_AUTOENCODER,
        "latent_space": {"scaling_factor": 0.18215, "trained_with": "Stable Diffusion 1.x autoencoder"},
        "micro_frame_size": None,
        "micro_batch_size": 4,
    },
)

SVD_AUTOENCODER = PublishedPart(
    "stabilityai/stable-video-diffusion-img2vid",
    ("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
    391_000_000,
    _VIDEO_AUTOENCODER,
    {
        # Its norms always have 32 groups.
        "spatial": {name: value for name, value in _FRAME_AUTOENCODER.items() if name != "norm_num_groups"},
        "temporal_decoder": {},
        "latent_space": {"scaling_factor": 0.18215, "trained_with": "Stable Video Diffusion autoencoder"},
        "micro_frame_size": None,
        "micro_batch_size": 4,
    },
)
"""Takes the place of the autoencoder of 1.0 and 1.1: the same latents, and a decoder that looks at neighbouring frames,
so that what it draws flickers less."""

SDXL_LATENT_SPACE: dict[str, Any] = {"scaling_factor": 0.13025, "trained_with": "SDXL's autoencoder"}
"""What the 2D part of Open-Sora 1.2 asks for, and did not get."""

# Open-Sora 1.2. Its 2D part is the SDXL autoencoder, whose own factor is 0.13025; the temporal part, shift and scale
# were trained on its latents times 0.18215, so 0.18215 is right for these weights.
OPENSORA_VAE_1_2 = PublishedPart(
    "hpcai-tech/OpenSora-VAE-v1.2",
    ("config.json", "model.safetensors"),
    1_573_000_000,
    _VIDEO_AUTOENCODER,
    {
        "spatial": _FRAME_AUTOENCODER,
        "temporal": {
            "type": "causal3d",
            "in_channels": 4,
            "latent_channels": 4,
            "filters": 128,
            "num_res_blocks": 4,
            "channel_multipliers": [1, 2, 2, 4],
            "temporal_downsample": [False, True, True],
            "num_groups": 32,
        },
        "latent_space": {
            "scaling_factor": 0.18215,
            "shift": [-0.10, 0.34, 0.27, 0.98],
            "scale": [3.85, 2.32, 2.33, 3.06],
            "trained_with": "OpenSora-VAE-v1.2 (temporal autoencoder trained on SDXL frame latents times 0.18215)",
        },
        "micro_frame_size": 17,
        "micro_batch_size": 4,
    },
)

OPENSORA_VAE_1_3 = PublishedPart(
    "hpcai-tech/OpenSora-VAE-v1.3",
    ("config.json", "model.safetensors"),
    1_037_000_000,
    "opensora.models.autoencoders.causal.CausalVideoAutoencoder",
    {
        "latent_channels": 16,
        "filters": 128,
        "channel_multipliers": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temporal_downsample": [False, True, True],
        "num_groups": 32,
        "latent_space": STATISTICS["video"],
        "micro_frame_size": 17,
        "micro_batch_size": 4,
    },
)
"""Of Open-Sora 1.3. The statistics are not in its weights; the transformers were trained with those of videos."""

HUNYUAN_VAE = PublishedPart(
    "hpcai-tech/Open-Sora-v2",
    ("hunyuan_vae.safetensors",),
    986_000_000,
    "opensora.models.autoencoders.hunyuan.HunyuanVideoAutoencoder",
    {
        "latent_channels": 16,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 4,
        "mid_block_add_attention": True,
        "latent_space": {"scaling_factor": 0.476986, "trained_with": "HunyuanVideo's autoencoder"},
        "tile_sample_size": 256,
        "tile_sample_frames": None,
    },
)
"""Of HunyuanVideo and Open-Sora 2.0, whose inference cuts frames into tiles and leaves clips whole."""

FLUX_AE = PublishedPart(
    "hpcai-tech/Open-Sora-v2",
    ("flux1-dev-ae.safetensors",),
    335_000_000,
    _VIDEO_AUTOENCODER,
    {
        "spatial": {**_FRAME_AUTOENCODER, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        # 0.3611 (z - 0.1159)
        "latent_space": {"scaling_factor": 0.3611, "shift": [0.3611 * 0.1159] * 16, "trained_with": "FLUX.1"},
        "micro_frame_size": None,
        "micro_batch_size": 4,
    },
)
"""Of FLUX.1, the image model that Open-Sora 2.0 was started from."""

DC_AE_2_0 = PublishedPart(
    "hpcai-tech/Open-Sora-v2-Video-DC-AE",
    ("F32T4C128_AE.safetensors",),
    1_838_000_000,
    "opensora.models.autoencoders.dc_ae.VideoDCAutoencoder",
    {
        "latent_channels": 128,
        "widths": [128, 256, 512, 512, 1024, 1024],
        "encoder_depths": [2, 2, 2, 3, 3, 3],
        "decoder_depths": [3, 3, 3, 3, 3, 3],
        "attention": [False, False, False, True, True, True],
        "temporal_downsample": [False, False, False, True, True],
        "head_dim": 32,
        "scales": [5],
        "latent_space": {"trained_with": "F32T4C128_AE, no factor: as published inference computes"},
        "tile_sample_size": 256,
        "tile_sample_frames": 32,
    },
)
"""The deep compression autoencoder of Open-Sora 2.0."""

DC_AE_2_0_DECLARED_IN_TRAINING: dict[str, Any] = {
    "scaling_factor": 0.493,
    "convention": "divide",
    "trained_with": "F32T4C128_AE, the factor that training declares and does not apply, unlike published inference",
}
"""Another latent space for it, should a transformer have been trained on divided latents: clips of the published one
then have half the contrast that they should have, and this as `override_latent_space` puts it right."""


def _mmdit(repository: str, file: str, in_channels: int, patch_size: int) -> PublishedPart:
    """A transformer of 2.0, in bfloat16."""
    return PublishedPart(
        repository,
        (file,),
        23_783_000_000,
        "opensora.models.mmdit.MMDiT",
        {
            "in_channels": in_channels,
            "patch_size": patch_size,
            "hidden_size": 3072,
            "num_heads": 24,
            "depth": 19,
            "depth_single_blocks": 38,
            "mlp_ratio": 4.0,
            "axes_dim": [16, 56, 56],
            "theta": 10_000.0,
            "qkv_bias": True,
            "caption_channels": 4096,
            "pooled_channels": 768,
            "model_max_length": 512,
            "guidance_embed": False,
            "cond_embed": True,
            "fused_qkv": False,
            "interleaved_rope": False,
            "bf16_timesteps": True,
        },
    )


MMDIT_2_0 = _mmdit("hpcai-tech/Open-Sora-v2", "Open_Sora_v2.safetensors", 16, 2)
"""The transformer of Open-Sora 2.0."""
MMDIT_2_0_DC_AE = _mmdit("hpcai-tech/Open-Sora-v2-Video-DC-AE", "Open_Sora_v2_Video_DC_AE.safetensors", 128, 1)
"""That of the deep compression autoencoder."""

XL2: dict[str, Any] = {
    "in_channels": 4,
    "pred_sigma": True,
    "patch_size": [1, 2, 2],
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "caption_channels": 4096,
}
"""Transformers of 1.0 to 1.3: learned variance (which rectified flow leaves unused), null text of T5's width."""
