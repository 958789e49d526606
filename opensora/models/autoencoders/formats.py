"""The formats that autoencoders are published in, see `format`: the video autoencoder's own, and 2D ones.

A video autoencoder applies a 2D one to frames, so it runs the weights of those as well, diffusers' and those in the
names of latent diffusion's authors (LDM, FLUX). Names of attention layers from before 2023 are brought up to date.
Codecs of another kind have a format of their own beside them.
"""

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.models.autoencoders import causal, dc_ae, hunyuan
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.format import (
    REFERENCE_OPTIONS,
    Format,
    Identity,
    RenamedWeights,
    TensorShapes,
    known_keywords,
    known_values,
)

_FRAME_AUTOENCODERS = {cls.__name__: cls for cls in (AutoencoderKL, AutoencoderKLTemporalDecoder)}

_TOLD_BY_CONFIG = "shapes do not tell; the file's config.json or the model it belongs to does"
_SPATIAL = "spatial_vae.module."
_OLD_ATTENTION = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")
_OF_LATENT_DIFFUSION = (
    (r"encoder\.down\.", "encoder.down_blocks."),
    (r"(?<=\d\.)block\.", "resnets."),
    (r"nin_shortcut", "conv_shortcut"),
    (r"(?<=\d\.)(down|up)sample\.", r"\1samplers.0."),
    (r"mid\.block_1\.", "mid_block.resnets.0."),
    (r"mid\.block_2\.", "mid_block.resnets.1."),
    (r"mid\.attn_1\.norm\.", "mid_block.attentions.0.group_norm."),
    (r"mid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
    (r"mid\.attn_1\.proj_out\.", "mid_block.attentions.0.to_out.0."),
    (r"norm_out", "conv_norm_out"),
)
"""Names of latent diffusion's authors, by pattern, and those of diffusers."""
_NEW_NAME = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# --- diffusers' 2D autoencoders ---------------------------------------------------------------------------------------


class _FrameFormat(Format):
    cls = AutoencoderKL
    kind = "autoencoder"
    summary = "2D autoencoder of Stable Diffusion's kind (1.x and SDXL have the same shapes)"
    prefixes = ("encoder.down_blocks.0.resnets.0.",)

    def identify(self, shapes: TensorShapes) -> Identity | None:
        if not shapes.has(*self.prefixes) or not shapes.shape("encoder.conv_in.weight"):
            return None
        config, unsure = _spatial(shapes)
        unsure["scaling_factor"] = "shapes do not tell; 0.18215 for Stable Diffusion 1.x, 0.13025 for SDXL"
        return _run_in_video(self.identity(config | _block_types(config), unsure))


class _TemporalDecoderFormat(Format):
    cls = AutoencoderKLTemporalDecoder
    kind = "autoencoder"
    summary = "2D encoder with the temporal decoder of Stable Video Diffusion"
    prefixes = ("encoder.down_blocks.0.resnets.0.", "decoder.time_conv_out.")

    def identify(self, shapes: TensorShapes) -> Identity | None:
        if not shapes.has(*self.prefixes):
            return None
        config = _with_temporal_decoder(_spatial(shapes)[0])
        unsure = {"scaling_factor": "shapes do not tell; 0.18215 for Stable Video Diffusion"}
        return _run_in_video(self.identity(config | _block_types(config, up=False), unsure))


class _LatentDiffusionFormat(Format):
    cls = AutoencoderKL
    kind = "autoencoder"
    summary = "2D autoencoder in the names of its first authors (LDM, FLUX)"
    prefixes = ("encoder.down.0.block.0.", "encoder.conv_in.weight")

    def identify(self, shapes: TensorShapes) -> Identity | None:
        if not shapes.has(*self.prefixes):
            return None
        levels = shapes.count("encoder.down") or 0
        widths = [shapes.size(f"encoder.down.{i}.block.0.conv1.weight", 0) for i in range(levels)]
        config = known_values(
            in_channels=shapes.size("encoder.conv_in.weight", 1),
            out_channels=shapes.size("decoder.conv_out.weight", 0),
            latent_channels=shapes.size("decoder.conv_in.weight", 1),
            block_out_channels=widths if widths and None not in widths else None,
            layers_per_block=shapes.count("encoder.down.0.block"),
            use_quant_conv=shapes.has("quant_conv."),
            use_post_quant_conv=shapes.has("post_quant_conv."),
            mid_block_add_attention=shapes.has("encoder.mid.attn_1."),
        )
        unsure = {
            "norm_num_groups": "shapes do not tell; 32 in every published autoencoder",
            "scaling_factor": "shapes do not tell; 0.18215 for Stable Diffusion 1.x, 0.3611 after a shift for FLUX",
        }
        return _run_in_video(self.identity(config | _block_types(config), unsure))


def _run_in_video(identity: Identity) -> Identity:
    return replace(identity, runs_as=(VideoAutoencoder.__module__, VideoAutoencoder.__name__))


def _spatial(shapes: TensorShapes, prefix: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """Keywords of diffusers' AutoencoderKL, and those that shapes cannot tell."""
    levels = shapes.count(f"{prefix}encoder.down_blocks") or 0
    widths = [shapes.size(f"{prefix}encoder.down_blocks.{i}.resnets.0.conv1.weight", 0) for i in range(levels)]
    config = known_values(
        in_channels=shapes.size(f"{prefix}encoder.conv_in.weight", 1),
        out_channels=shapes.size(f"{prefix}decoder.conv_out.weight", 0),
        latent_channels=shapes.size(f"{prefix}decoder.conv_in.weight", 1),
        block_out_channels=widths if widths and None not in widths else None,
        layers_per_block=shapes.count(f"{prefix}encoder.down_blocks.0.resnets"),
        use_quant_conv=shapes.has(f"{prefix}quant_conv."),
        use_post_quant_conv=shapes.has(f"{prefix}post_quant_conv."),
        mid_block_add_attention=shapes.has(f"{prefix}encoder.mid_block.attentions.0."),
    )
    return config, {"norm_num_groups": "shapes do not tell; 32 in every published autoencoder"}


def _with_temporal_decoder(config: dict[str, Any]) -> dict[str, Any]:
    """Of the keywords of AutoencoderKL those that AutoencoderKLTemporalDecoder takes."""
    taken = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels")
    return {name: config[name] for name in taken if name in config}


def _block_types(config: dict[str, Any], *, up: bool = True) -> dict[str, Any]:
    levels = len(config.get("block_out_channels", ()))
    down = {"down_block_types": ["DownEncoderBlock2D"] * levels}
    return down | {"up_block_types": ["UpDecoderBlock2D"] * levels} if up else down


# --- the video autoencoder --------------------------------------------------------------------------------------------


class _VideoFormat(Format):
    cls = VideoAutoencoder
    kind = "autoencoder"
    summary = "2D autoencoder, frame by frame"
    prefixes = (_SPATIAL,)

    def identify(self, shapes: TensorShapes) -> Identity | None:
        if not shapes.has(*self.prefixes):
            return None
        spatial, groups = _spatial(shapes, _SPATIAL)
        unsure = {f"spatial.{name}": note for name, note in groups.items()}
        pixels = spatial.get("in_channels")
        config: dict[str, Any] = {"spatial": spatial, "temporal": None, "temporal_decoder": None}
        if pixels:
            config["spatial_patch_size"] = math.isqrt(pixels // 3)
        summary = self.summary
        if shapes.has(f"{_SPATIAL}decoder.time_conv_out."):
            config |= {"spatial": _with_temporal_decoder(spatial), "temporal_decoder": {}}
            unsure.pop("spatial.norm_num_groups")
            summary = _TemporalDecoderFormat.summary
        if shapes.has("temporal_vae.encoder.conv_in."):
            config["temporal"] = _causal_3d(shapes)
            unsure["temporal.num_groups"] = "shapes do not tell; 32 in the published autoencoder"
            unsure["micro_frame_size"] = "shapes do not tell; 17 for Open-Sora 1.2"
            summary = "autoencoder of Open-Sora 1.2, 2D and temporal part"
        elif shapes.has("temporal_vae.encoder_in."):
            config["temporal"] = _folded(shapes, spatial)
            unsure["micro_frame_size"] = _TOLD_BY_CONFIG
            summary = "2D autoencoder with a folded temporal part, as in the toybox"
        unsure["latent_space.scaling_factor"] = (
            "shapes do not tell; 0.18215 for Open-Sora 1.2" if config["temporal"] else _TOLD_BY_CONFIG
        )
        return replace(self.identity(config, unsure), summary=summary)

    def is_foreign_config(self, stored: Mapping[str, Any]) -> bool:
        return super().is_foreign_config(stored) or stored.get("_class_name") in _FRAME_AUTOENCODERS

    def translate_config(
        self, stored: Mapping[str, Any], where: Path, base: Mapping[str, Any], assumed: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        if stored.get("_class_name") in _FRAME_AUTOENCODERS:
            return _of_diffusers(stored, where, assumed)
        return self._of_reference(stored, where, base)

    def _of_reference(self, stored: Mapping[str, Any], where: Path, base: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords from the reference's configuration, which names the parts and says little of them."""
        values = dict(stored)
        for name, kind in (("vae_2d", "VideoAutoencoderKL"), ("vae_temporal", "VAE_Temporal_SD")):
            part = values.pop(name, None) or {}
            if part.get("type", kind) != kind:
                raise OpenSoraError(f"{where}: {name} is a {part['type']}; expected a {kind}")
            if "micro_batch_size" in part:
                values.setdefault("micro_batch_size", part["micro_batch_size"])
        latent_space = dict(base.get("latent_space") or {})
        channels = base["temporal"]["latent_channels"] if base.get("temporal") else base["spatial"]["latent_channels"]
        for name in ("shift", "scale"):
            value = values.pop(name, None)
            if value is not None:
                latent_space[name] = [float(value)] * channels if isinstance(value, int | float) else list(value)
        dropped = REFERENCE_OPTIONS | {"freeze_vae_2d", "cal_loss"}
        return {**known_keywords(values, where, self.cls, dropped), "latent_space": latent_space}

    def config_of(self, identity: Identity) -> dict[str, Any] | None:
        if identity.class_name in _FRAME_AUTOENCODERS:
            over_time = identity.class_name == AutoencoderKLTemporalDecoder.__name__
            return {"spatial": dict(identity.config), "temporal_decoder": {} if over_time else None}
        return super().config_of(identity)

    def assumes_published(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("temporal"))

    def complete(self, config: Mapping[str, Any], assumed: Mapping[str, Any], where: Path) -> dict[str, Any]:
        merged = {**assumed, **config}
        # The 2D autoencoder with the temporal decoder takes other keywords than the one without.
        same_kind = (assumed.get("temporal_decoder") is None) == (config.get("temporal_decoder") is None)
        for name in ("spatial", "temporal", "temporal_decoder") if same_kind else ("temporal",):
            if isinstance(assumed.get(name), Mapping) and isinstance(merged[name], Mapping):
                merged[name] = {**assumed[name], **merged[name]}
        if isinstance(assumed.get("temporal"), Mapping) and config.get("temporal", 0) is None:
            raise OpenSoraError(f"{where} holds the 2D part of the autoencoder alone; the part over time is missing")
        return merged

    def difference(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
        if bool(config.get("temporal")) == bool(other.get("temporal")):
            return None
        return f"it has {'a' if config.get('temporal') else 'no'} part over time"

    def adapt_weights(self, model: nn.Module, weights: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
        if "encoder.down.0.block.0.conv1.weight" in weights:
            return _of_latent_diffusion(weights)
        prefix = "" if any(name.startswith("spatial_vae.") for name in weights) else _SPATIAL
        kept = {"scale", "shift"}
        renamed = {name if name in kept else prefix + _new_attention(name): name for name in weights}
        return RenamedWeights(weights, renamed)


def _of_diffusers(stored: Mapping[str, Any], where: Path, assumed: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keywords of the video autoencoder from diffusers' 2D one, which may declare factor and shift of its own."""
    cls = _FRAME_AUTOENCODERS[stored["_class_name"]]
    spatial = known_keywords(stored, where, cls, ())
    default = inspect.signature(cls.__init__).parameters["scaling_factor"].default
    space = (assumed or {}).get("latent_space", {"scaling_factor": default})
    factor = spatial.pop("scaling_factor", space["scaling_factor"])
    if factor != space["scaling_factor"] or assumed is None:
        space = {"scaling_factor": factor, "trained_with": "a 2D autoencoder that declares this factor"}
    if shift := spatial.pop("shift_factor", None):  # it is subtracted before the factor, ours after it
        channels = spatial.get("latent_channels", 4)
        space = {**space, "shift": [shift * factor] * channels, "trained_with": "a 2D autoencoder that declares both"}
    return {"spatial": spatial, "latent_space": space, "micro_frame_size": None}


def _of_latent_diffusion(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights in the names of latent diffusion's authors; their attention layers are convolutions of one pixel."""
    levels = TensorShapes(weights).count("decoder.up") or 0
    names = {_SPATIAL + _name_in_diffusers(name, levels): name for name in weights}
    matrices = {
        new: weights[name][..., 0, 0] for new, name in names.items() if ".to_" in new and new.endswith("weight")
    }
    return RenamedWeights(weights, names, matrices)


def _name_in_diffusers(name: str, levels: int) -> str:
    name = re.sub(r"decoder\.up\.(\d+)", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}", name)
    for pattern, replacement in _OF_LATENT_DIFFUSION:
        name = re.sub(pattern, replacement, name)
    return name


def _causal_3d(shapes: TensorShapes) -> dict[str, Any]:
    encoder = "temporal_vae.encoder"
    filters = shapes.size(f"{encoder}.conv_in.conv.weight", 0)
    levels = shapes.count(f"{encoder}.block_res_blocks") or 0
    widths = [shapes.size(f"{encoder}.block_res_blocks.{i}.0.conv1.conv.weight", 0) for i in range(levels)]
    moments = shapes.size("temporal_vae.quant_conv.conv.weight", 0)
    return known_values(
        type="causal3d",
        in_channels=shapes.size(f"{encoder}.conv_in.conv.weight", 1),
        latent_channels=moments // 2 if moments else None,
        filters=filters,
        num_res_blocks=shapes.count(f"{encoder}.block_res_blocks.0"),
        channel_multipliers=[width // filters if width and filters else 1 for width in widths] or None,
        temporal_downsample=[shapes.has(f"{encoder}.conv_blocks.{i}.") for i in range(levels - 1)] if levels else None,
    )


def _folded(shapes: TensorShapes, spatial: dict[str, Any]) -> dict[str, Any]:
    channels, folded = spatial.get("latent_channels"), shapes.size("temporal_vae.encoder_in.weight", 1)
    return known_values(
        type="folded",
        in_channels=channels,
        latent_channels=shapes.size("temporal_vae.decoder_in.weight", 1),
        dim=shapes.size("temporal_vae.encoder_in.weight", 0),
        encoder_depth=shapes.count("temporal_vae.encoder_blocks") or 0,
        decoder_depth=shapes.count("temporal_vae.decoder_blocks") or 0,
        temporal_factor=folded // channels if folded and channels else None,
    )


def _new_attention(name: str) -> str:
    if ".attentions." not in name:
        return name
    return _OLD_ATTENTION.sub(lambda match: _NEW_NAME[match[1]], name)


FORMATS: tuple[Format, ...] = (
    _VideoFormat(),
    hunyuan.FORMAT,
    dc_ae.FORMAT,
    causal.FORMAT,
    _TemporalDecoderFormat(),
    _LatentDiffusionFormat(),
    _FrameFormat(),
)
"""In the order in which weights are compared with them; the first one is meant where no class is named."""
