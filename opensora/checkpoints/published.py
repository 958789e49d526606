"""The models this package knows by name, in one table: those it brings along, and every released one.

What belongs to a set of published weights stands here and nowhere else: where it lies on the Hub, the configuration of
every part, and how it is sampled. Nothing here imports a network, so asking for a name costs nothing.

Sizes of files are counted from the networks' parameters in their published precision, good to a few percent.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora.checkpoints.published_parts import (
    CLIP_ENCODER,
    CLIP_TOKENIZER,
    DC_AE_2_0,
    HUNYUAN_VAE,
    MMDIT_2_0,
    MMDIT_2_0_DC_AE,
    OPENSORA_VAE_1_2,
    OPENSORA_VAE_1_3,
    SD_VAE,
    TEXT_ENCODER,
    TOKENIZER,
    XL2,
    PublishedPart,
)
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


FORMER_BUNDLED = {
    "69924c9e4ea0458397f3664d3dff7de2261076b7a416a7d3050add665251b4e2": "Toybox 1",
    "974819b34117624772f7fcfff54320b0263acaecf85b143f20b09d31c28682af": "Toybox 1",
}
"""Hash of bundled weights of before -> what docs/log.md calls them, where it says how to get them back."""

BUNDLED: dict[str, BundledModel] = {
    "toybox": BundledModel(_WEIGHTS / "toybox", "moving shapes, rectified flow, all latent channels guided"),
    "toybox-iddpm": BundledModel(
        _WEIGHTS / "toybox-iddpm",
        "the same world, IDDPM with learned variance, 3 latent channels guided",
        shared={"autoencoder": "toybox"},
    ),
    "toybox-fast": BundledModel(
        _WEIGHTS / "toybox-fast",
        "toybox in four evaluations: four steps without guidance, distilled from it",
        shared={"autoencoder": "toybox", "text_encoder": "toybox", "tokenizer": "toybox"},
    ),
}


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
        text_encoder_2, tokenizer_2: of models that read text by two encoders.
    """

    summary: str
    transformer: PublishedPart
    autoencoder: PublishedPart
    text_encoder: PublishedPart
    tokenizer: PublishedPart
    scheduler_class: str
    scheduler_config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    text_encoder_2: PublishedPart | None = None
    tokenizer_2: PublishedPart | None = None

    @property
    def parts(self) -> dict[str, PublishedPart]:
        """The components that come from the Hub, by name."""
        names = ("transformer", "autoencoder", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        return {name: part for name in names if (part := getattr(self, name)) is not None}


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
            **XL2,
            "model_max_length": 120,
            "input_size": [16, latent_side, latent_side],
            "space_scale": latent_side / 64,
            "time_scale": 1.0,
        },
    )
    return PublishedModel(
        summary,
        transformer,
        SD_VAE,
        TEXT_ENCODER,
        TOKENIZER,
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
        {**XL2, "model_max_length": 200, "qk_norm": True, "qk_norm_legacy": True, "input_sq_size": 512},
    )
    return PublishedModel(
        summary,
        transformer,
        SD_VAE,
        TEXT_ENCODER,
        TOKENIZER,
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
        {**XL2, "model_max_length": 300, "qk_norm": True, "input_sq_size": 512},
    ),
    OPENSORA_VAE_1_2,
    TEXT_ENCODER,
    TOKENIZER,
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


def _opensora_1_3(
    summary: str, repository: str, height: int, width: int, aesthetic: float | None = None
) -> PublishedModel:
    """A model of 1.3, for any size and length; known frames lie beside the noise."""
    transformer = PublishedPart(
        repository,
        ("config.json", "model*.safetensors*"),
        4_837_000_000,
        "opensora.models.stdit4.STDiT4",
        {
            **XL2,
            "in_channels": 16,
            "model_max_length": 300,
            "qk_norm": True,
            "kernel_size": [8, 8, -1],
            "use_spatial_rope": True,
            "input_sq_size": 512,
        },
    )
    return PublishedModel(
        summary,
        transformer,
        OPENSORA_VAE_1_3,
        TEXT_ENCODER,
        TOKENIZER,
        scheduler_class="opensora.models.schedulers.rectified_flow.RectifiedFlowScheduler",
        scheduler_config={
            "use_timestep_transform": True,
            "transform_frames": "after_first",
            "temporal_factor": 4,
            "micro_frame_size": 17,
            "sample_method": "logit-normal",
        },
        defaults={
            "guidance_scale": 7.5,
            "guidance_options": {
                "image_guidance_scale": 5.0,
                "oscillating": ["text", "image"],
                "image_ramp": "to_last_step",
                "guidance_rescale": 0.7,
            },
            "num_inference_steps": 30,
            "cfg_channels": None,
            "height": height,
            "width": width,
            "num_frames": 113,
            "max_frames": 113,
            "fps": 24,
            "aspect_ratio_order": "height:width",
            "clean_prompts": True,
            "scores": {"aesthetic": aesthetic, "flow": None, "camera_motion": None},
            "scores_in_words": True,
            "frame_alignment": 5,
            "condition_frames": 5,
            "known_frames": "noised",
        },
    )


_GUIDANCE_2_0 = {
    "image_guidance_scale": 3.0,
    "oscillating": ["text", "image"],
    "image_ramp": "past_last_step",
    "image_ramp_for": "pictures",
}


def _opensora_2_0(
    summary: str,
    transformer: PublishedPart,
    autoencoder: PublishedPart,
    *,
    token_px: int,
    size: tuple[int, int, int],
    training_token_px: int | None = None,
) -> PublishedModel:
    """A model of 2.0: text by two encoders, three branches of guidance, prompts that tell frame rate and motion."""
    return PublishedModel(
        summary,
        transformer,
        autoencoder,
        TEXT_ENCODER,
        TOKENIZER,
        scheduler_class="opensora.models.schedulers.rectified_flow.RectifiedFlowScheduler",
        scheduler_config={
            "use_timestep_transform": True,
            "transform": "tokens",
            "token_px": token_px,
            "temporal_factor": 4,
            "micro_frame_size": None,
            "sample_method": "logit-normal",
            "velocity": "noise - data",
            **({} if training_token_px is None else {"training_token_px": training_token_px}),
        },
        defaults={
            "guidance_scale": 7.5,
            "guidance_options": _GUIDANCE_2_0,
            "num_inference_steps": 50,
            "cfg_channels": None,
            "fps": 24,
            "scores": {"fps": 24, "motion": 4},
            "known_frames": "pictures kept",
            **dict(zip(("num_frames", "height", "width"), size, strict=True)),
            "max_frames": size[0],
        },
        text_encoder_2=CLIP_ENCODER,
        tokenizer_2=CLIP_TOKENIZER,
    )


_OPENSORA_2_0 = _opensora_2_0(
    "any size to 768px, to 129 frames; also from first and last images",
    MMDIT_2_0,
    HUNYUAN_VAE,
    token_px=16,
    size=(129, 192, 336),
)

_OPENSORA_2_0_DC_AE = _opensora_2_0(
    "768px, 128 frames; deep compression autoencoder, a quarter of the tokens",
    MMDIT_2_0_DC_AE,
    DC_AE_2_0,
    token_px=32,
    training_token_px=64,  # counted as if patches were 2 x 2, as of the other autoencoder; sampling counts them all
    size=(128, 576, 1024),
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
    "opensora-1.3": _opensora_1_3(
        "any size to 720p, 49 to 113 frames; windows in space and time", "hpcai-tech/OpenSora-STDiT-v4", 720, 1280
    ),
    "opensora-1.3-360p": _opensora_1_3("the same, trained to 360p", "hpcai-tech/OpenSora-STDiT-v4-360p", 360, 640),
    "opensora-1.3-i2v": _opensora_1_3(
        "the same, for clips from first frames, last frames and the like",
        "hpcai-tech/OpenSora-STDiT-v4-i2v",
        360,
        640,
        aesthetic=7.0,
    ),
    "opensora-2.0": _OPENSORA_2_0,
    "opensora-2.0-dc-ae": _OPENSORA_2_0_DC_AE,
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
