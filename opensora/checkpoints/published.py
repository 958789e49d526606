"""The models this package knows by name, in one table: those it brings along, and every released one of 1.0 to 1.2.

What belongs to a set of published weights stands here and nowhere else: where it lies on the Hub, the configuration of
every part, and how it is sampled. Nothing here imports a network, so asking for a name costs nothing.

Sizes of files are counted from the networks' parameters in the precision they were published in, so they are good to a
few percent.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora.errors import OpenSoraError

# Inside the installed package: offline from the first minute.
_WEIGHTS = Path(__file__).parent.parent / "toybox" / "weights"


@dataclass(frozen=True)
class BundledModel:
    """A pipeline folder that is shipped inside the package, complete but for what it shares with another one.

    Attributes:
        folder: where it lies.
        summary: one line that says what it is.
        shared: component -> bundled model whose copy it uses, so that the package holds one autoencoder.
    """

    folder: Path
    summary: str
    shared: dict[str, str] = field(default_factory=dict)


BUNDLED: dict[str, BundledModel] = {
    "toybox": BundledModel(_WEIGHTS / "toybox", "moving shapes, rectified flow, all latent channels guided"),
    "toybox-iddpm": BundledModel(
        _WEIGHTS / "toybox-iddpm",
        "the same world, IDDPM with learned variance, 3 latent channels guided",
        shared={"autoencoder": "toybox"},
    ),
}


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


@dataclass(frozen=True)
class PublishedModel:
    """A released model: its parts on the Hub, and all that sampling needs to know.

    Attributes:
        summary: one line that says what it is.
        transformer: the diffusion transformer.
        autoencoder: pixels <-> latents; its configuration holds the latent space.
        text_encoder: T5.
        tokenizer: of the text encoder.
        scheduler_class: the sampler, with its module.
        scheduler_config: its keywords.
        defaults: keywords of `OpenSoraPipeline` other than its components.
    """

    summary: str
    transformer: PublishedPart
    autoencoder: PublishedPart
    text_encoder: PublishedPart
    tokenizer: PublishedPart
    scheduler_class: str
    scheduler_config: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @property
    def parts(self) -> dict[str, PublishedPart]:
        """The components that come from the Hub, by name."""
        names = ("transformer", "autoencoder", "text_encoder", "tokenizer")
        return {name: getattr(self, name) for name in names}


# --- parts that several models share ----------------------------------------------------------------------------------

_T5 = "DeepFloyd/t5-v1_1-xxl"

_TEXT_ENCODER = PublishedPart(
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
_TOKENIZER = PublishedPart(
    _T5,
    ("spiece.model", "special_tokens_map.json", "tokenizer_config.json"),
    800_000,
    "transformers.T5Tokenizer",
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
_SD_VAE = PublishedPart(
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

# Open-Sora 1.2. Its 2D part is the SDXL autoencoder, whose own factor is 0.13025; the temporal part, shift and scale
# were trained on its latents times 0.18215, so 0.18215 is right for these weights.
_OPENSORA_VAE_1_2 = PublishedPart(
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

# All three generations: XL/2, learned variance (which rectified flow leaves unused), null text of T5's width.
_XL2: dict[str, Any] = {
    "in_channels": 4,
    "pred_sigma": True,
    "patch_size": [1, 2, 2],
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "caption_channels": 4096,
}

# 1.1 is told 24 frames per second, and its clips are to be played at 8; those of 1.0 likewise.
_IDDPM_DEFAULTS: dict[str, Any] = {
    "guidance_scale": 7.0,
    "num_inference_steps": 100,
    "cfg_channels": 3,
    "num_frames": 16,
    "fps": 24,
    "frame_interval": 3,
    "clean_prompts": True,
}


def _opensora_1_0(summary: str, file: str, latent_side: int) -> PublishedModel:
    """A model of 1.0, trained at 16 frames of one size: a square of so many latent cells."""
    transformer = PublishedPart(
        "hpcai-tech/Open-Sora",
        (file,),
        3_040_000_000,
        "opensora.models.stdit.STDiT",
        {
            **_XL2,
            "model_max_length": 120,
            "input_size": [16, latent_side, latent_side],
            "space_scale": latent_side / 64,
            "time_scale": 1.0,
        },
    )
    return PublishedModel(
        summary,
        transformer,
        _SD_VAE,
        _TEXT_ENCODER,
        _TOKENIZER,
        scheduler_class="opensora.models.schedulers.iddpm.IDDPMScheduler",
        scheduler_config={},
        defaults={**_IDDPM_DEFAULTS, "height": 8 * latent_side, "width": 8 * latent_side},
    )


def _opensora_1_1(summary: str, repository: str) -> PublishedModel:
    """A model of 1.1, for many sizes and lengths."""
    transformer = PublishedPart(
        repository,
        ("config.json", "model.safetensors"),
        3_073_000_000,
        "opensora.models.stdit2.STDiT2",
        {**_XL2, "model_max_length": 200, "qk_norm": True, "qk_norm_legacy": True, "input_sq_size": 512},
    )
    return PublishedModel(
        summary,
        transformer,
        _SD_VAE,
        _TEXT_ENCODER,
        _TOKENIZER,
        scheduler_class="opensora.models.schedulers.iddpm.IDDPMScheduler",
        scheduler_config={"float32_tables": True},
        defaults={
            **_IDDPM_DEFAULTS,
            "height": 240,
            "width": 424,
            "nominal_size": [240, 426],
            "image_fps": 120.0,
            "aspect_ratio_order": "height:width",
            "condition_frames": 4,
        },
    )


_OPENSORA_1_2 = PublishedModel(
    "any size from 144p to 720p, 2 to 16 s; autoencoder over time, rectified flow",
    PublishedPart(
        "hpcai-tech/OpenSora-STDiT-v3",
        ("config.json", "model*.safetensors*"),
        4_836_000_000,
        "opensora.models.stdit3.STDiT3",
        {**_XL2, "model_max_length": 300, "qk_norm": True, "input_sq_size": 512},
    ),
    _OPENSORA_VAE_1_2,
    _TEXT_ENCODER,
    _TOKENIZER,
    scheduler_class="opensora.models.schedulers.rectified_flow.RectifiedFlowScheduler",
    scheduler_config={
        "use_timestep_transform": True,
        "temporal_factor": 4,
        "micro_frame_size": 17,
        "sample_method": "logit-normal",
    },
    defaults={
        "guidance_scale": 7.0,
        "num_inference_steps": 30,
        "cfg_channels": None,
        "height": 240,
        "width": 424,
        "nominal_size": [240, 426],
        "num_frames": 51,
        "fps": 24,
        "frame_interval": 1,
        "image_fps": 120.0,
        "aspect_ratio_order": "height:width",
        "clip_frames": 51,
        "clip_s": 2,
        "clean_prompts": True,
        "scores": {"aesthetic": 6.5, "flow": None, "camera_motion": None},
        "frame_alignment": 5,
        "condition_frames": 5,
    },
)

# --- the table --------------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, PublishedModel] = {
    "opensora-1.0-16x256x256": _opensora_1_0(
        "16 frames of 256x256, first training stage", "OpenSora-v1-16x256x256.pth", 32
    ),
    "opensora-1.0-hq-16x256x256": _opensora_1_0(
        "16 frames of 256x256, tuned on better clips", "OpenSora-v1-HQ-16x256x256.pth", 32
    ),
    "opensora-1.0-hq-16x512x512": _opensora_1_0(
        "16 frames of 512x512, tuned on better clips", "OpenSora-v1-HQ-16x512x512.pth", 64
    ),
    "opensora-1.1-stage2": _opensora_1_1(
        "any size from 144p to 720p, images and clips as conditions; training stage 2",
        "hpcai-tech/OpenSora-STDiT-v2-stage2",
    ),
    "opensora-1.1-stage3": _opensora_1_1(
        "any size from 144p to 720p, images and clips as conditions; training stage 3",
        "hpcai-tech/OpenSora-STDiT-v2-stage3",
    ),
    "opensora-1.2": _OPENSORA_1_2,
}

ALIASES: dict[str, str] = {
    "opensora-1.0": "opensora-1.0-hq-16x256x256",
    "opensora-1.1": "opensora-1.1-stage3",
}
"""Short names -> the model they stand for."""


def known_names() -> list[str]:
    """Every name a model is known by: bundled, published, short."""
    return [*BUNDLED, *PUBLISHED, *ALIASES]


def published_name(name: str) -> str | None:
    """The full name of a published model; None if there is none of that name."""
    name = ALIASES.get(name, name)
    return name if name in PUBLISHED else None


def unknown_model(name: str) -> OpenSoraError:
    """The error that says so, with the nearest known name."""
    near = difflib.get_close_matches(name.lower(), known_names(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    known = ", ".join([*BUNDLED, *PUBLISHED])
    return OpenSoraError(f"unknown model {name!r}; {hint}known are {known}; or give a folder")


def component_folders(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Component name -> folder: a subfolder of the pipeline's own, or one that a bundled model shares."""
    here = folder.resolve()
    shared = next((model.shared for model in BUNDLED.values() if model.folder.resolve() == here), {})
    own = {name: folder / name for name in names}
    return {
        name: BUNDLED[shared[name]].folder / name if name in shared and not part.is_dir() else part
        for name, part in own.items()
    }
