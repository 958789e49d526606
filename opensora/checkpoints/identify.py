"""What a file of weights is, told by the names and shapes in it alone: no data is read, no configuration believed.

`read_header` lists the tensors of a file or folder, `identify` names the network they belong to and as much of its
configuration as shapes give away. What they do not give away (a position scale, the order of two operations) is named
too, with what the published models use, so that nobody takes a default for a fact.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora.checkpoints.weights import first_line, read_pickle, weight_files
from opensora.errors import OpenSoraError

Kind = Literal["transformer", "autoencoder", "text_encoder"]

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its shape, and its dtype by torch's name ("bfloat16")."""

    shape: tuple[int, ...]
    dtype: str


class Shaped(Protocol):
    """Whatever has a shape: a `TensorInfo`, or a tensor."""

    @property
    def shape(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Identity:
    """What some weights are.

    Attributes:
        kind: their place in a pipeline.
        summary: family and version in a few words.
        library: module of the class that holds them, as `model_index.json` names it; "" if there is none yet.
        class_name: that class, or the name the network is known by.
        config: keywords of the class as far as shapes tell them.
        unsure: keywords that shapes cannot tell, each with what is known about it; "spatial.norm_num_groups" is a
            keyword within a keyword.
    """

    kind: Kind
    summary: str
    library: str
    class_name: str
    config: dict[str, Any] = field(default_factory=dict)
    unsure: dict[str, str] = field(default_factory=dict)

    @property
    def supported(self) -> bool:
        """Whether this package can run it."""
        return bool(self.library)


# --- names, shapes and dtypes -----------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of the tensors in a file or in a component's folder; their data stays on disk.

    Raises:
        OpenSoraError: nothing there, a damaged file, or a pickle that holds more than tensors.
    """
    header: dict[str, TensorInfo] = {}
    for file in weight_files(path):
        header |= _safetensors_header(file) if file.suffix == ".safetensors" else _header_of(read_pickle(file))
    if not header:
        raise OpenSoraError(f"{path} holds no tensors at all; get it again")
    return header


def _safetensors_header(path: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: TensorInfo(tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), str(part.get_dtype())))
                for name, part in parts.items()
            }
    except (SafetensorError, OSError) as error:
        raise OpenSoraError(f"{path} is damaged ({first_line(error)}); get it again") from error


def _header_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }


# --- what they are ----------------------------------------------------------------------------------------------------

_TOLD_BY_CONFIG = "shapes do not tell; the file's config.json or --model does"

# Names that give away a network that this package cannot run, in the order in which they are looked for.
_FOREIGN: tuple[tuple[Kind, str, str, tuple[str, ...]], ...] = (
    ("transformer", "STDiT3", "transformer of Open-Sora 1.3", ("spatial_blocks.0.", "x_embedder_cond.")),
    ("transformer", "MMDiT", "transformer of Open-Sora 2.0", ("double_blocks.0.", "cond_in.")),
    ("transformer", "Flux", "FLUX.1 image transformer", ("double_blocks.0.", "single_blocks.0.")),
    ("transformer", "Latte", "Latte video transformer", ("blocks.0.adaLN_modulation.", "temp_embed")),
    ("transformer", "DiT", "DiT image transformer", ("blocks.0.adaLN_modulation.", "y_embedder.embedding_table.")),
    ("transformer", "PixArt", "PixArt image transformer", ("blocks.0.cross_attn.", "y_embedder.y_proj.", "t_block.")),
    ("transformer", "PixArt", "PixArt image transformer in diffusers' names", ("adaln_single.", "caption_projection.")),
    ("autoencoder", "OpenSoraVAE_V1_3", "autoencoder of Open-Sora 1.3", ("encoder.down.0.", "encoder.conv_in.conv.")),
    ("autoencoder", "Hunyuan VAE", "autoencoder of Open-Sora 2.0", ("encoder.down_blocks.0.", "encoder.conv_in.conv.")),
    (
        "autoencoder",
        "DC-AE",
        "deep compression autoencoder of Open-Sora 2.0",
        ("encoder.project_in.", "encoder.stages."),
    ),
    ("autoencoder", "AutoencoderKL", "2D autoencoder in its first authors' names (LDM, FLUX)", ("encoder.down.0.",)),
    ("text_encoder", "CLIPTextModel", "CLIP text encoder", ("text_model.embeddings.token_embedding.",)),
)


def identify(tensors: Mapping[str, Shaped]) -> Identity | None:
    """Names the network that these tensors belong to.

    Args:
        tensors: name -> anything with a shape; no name needs to be there, a missing one leaves its keywords unsure.

    Returns:
        None for tensors of a network that nothing is known of.
    """
    names = _Names(tensors)
    is_video = len(names.shape("x_embedder.proj.weight") or (0,) * 5) == 5
    if names.has("spatial_blocks.0.", "temporal_blocks.0.") and not names.has("x_embedder_cond."):
        return _stdit3(names)
    if names.has("blocks.0.attn_temp.", "t_block.") and is_video:
        return _stdit2(names) if names.has("t_block_temp.") else _stdit(names)
    if names.has("spatial_vae.module."):
        return _video_autoencoder(names)
    if names.has("encoder.down_blocks.0.resnets.0.", "decoder.time_conv_out."):
        config = _with_temporal_decoder(_spatial(names)[0])
        config |= _block_types(config, up=False)
        summary = "2D encoder with the temporal decoder of Stable Video Diffusion"
        unsure = {"scaling_factor": "shapes do not tell; 0.18215 for Stable Video Diffusion"}
        return Identity("autoencoder", summary, "diffusers", "AutoencoderKLTemporalDecoder", config, unsure)
    if names.has("encoder.down_blocks.0.resnets.0.") and names.shape("encoder.conv_in.weight"):
        config, unsure = _spatial(names)
        unsure["scaling_factor"] = "shapes do not tell; 0.18215 for Stable Diffusion 1.x, 0.13025 for SDXL"
        summary = "2D autoencoder of Stable Diffusion's kind (1.x and SDXL have the same shapes)"
        return Identity("autoencoder", summary, "diffusers", "AutoencoderKL", config | _block_types(config), unsure)
    if names.has("encoder.block.0.layer.0.SelfAttention.q."):
        return _t5(names)
    for kind, class_name, summary, prefixes in _FOREIGN:
        if names.has(*prefixes):
            return Identity(kind, f"{summary}, known but not supported yet", "", class_name)
    return None


class _Names:
    """Questions to names and shapes."""

    def __init__(self, tensors: Mapping[str, Shaped]) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def has(self, *prefixes: str) -> bool:
        """Whether every prefix begins some name."""
        return all(any(name.startswith(prefix) for name in self._shapes) for prefix in prefixes)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None if there is no such tensor."""
        return self._shapes.get(name)

    def size(self, name: str, dim: int) -> int | None:
        """One dimension of a tensor; None if it is not there."""
        shape = self.shape(name) or ()
        return shape[dim] if -len(shape) <= dim < len(shape) else None

    def count(self, prefix: str) -> int | None:
        """How many entries a list of modules has: one more than its highest index; None without any."""
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)(?:\.|$)")
        found = [int(match[1]) for name in self._shapes if (match := pattern.match(name))]
        return max(found) + 1 if found else None


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


# --- transformers -----------------------------------------------------------------------------------------------------


def _transformer(names: _Names, blocks: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What all space-time transformers have in common: keywords, and those that shapes cannot tell."""
    patch = names.shape("x_embedder.proj.weight")
    hidden_size, in_channels = (patch[0], patch[1]) if patch else (names.size("t_embedder.mlp.0.weight", 0), None)
    patch_size = list(patch[2:]) if patch else None
    out_features = names.size("final_layer.linear.weight", 0)
    pred_sigma = None
    if patch_size and out_features and in_channels:
        pred_sigma = out_features == 2 * in_channels * math.prod(patch_size)
    mlp = names.size(f"{blocks}.0.mlp.fc1.weight", 0)
    unsure = {"exact_gelu": "shapes do not tell; False in every published model"}
    if names.shape("y_embedder.y_embedding") is None:
        unsure["model_max_length"] = "the null text (y_embedder.y_embedding), which tells it, is missing"
    config = _known(
        in_channels=in_channels,
        pred_sigma=pred_sigma,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=names.count(blocks),
        mlp_ratio=mlp / hidden_size if mlp and hidden_size else None,
        caption_channels=names.size("y_embedder.y_proj.fc1.weight", 1) or names.size("y_embedder.y_embedding", 1),
        model_max_length=names.size("y_embedder.y_embedding", 0),
    )
    return config, unsure


def _stdit(names: _Names) -> Identity:
    config, unsure = _transformer(names, "blocks")
    unsure["num_heads"] = "shapes do not tell; 16 in every published model"
    unsure["space_scale"] = "shapes do not tell; 0.5 for 16x256x256, 1 for 512x512"
    unsure["time_scale"] = "shapes do not tell; 1 for 16 frames, 2/3 for 64"
    patches, frames = names.size("pos_embed", 1), names.size("pos_embed_temporal", 1)
    side = math.isqrt(patches or 0)
    patch_size = config.get("patch_size")
    if patches and frames and patch_size and side * side == patches:
        config["input_size"] = [frames * patch_size[0], side * patch_size[1], side * patch_size[2]]
    else:
        unsure["input_size"] = "no position tables of a square in the file; needed only to size these tables"
    return Identity("transformer", "transformer of Open-Sora 1.0", "opensora.models.stdit", "STDiT", config, unsure)


def _stdit2(names: _Names) -> Identity:
    config, unsure = _transformer(names, "blocks")
    config |= _heads(names, config, unsure, "blocks.0.attn")
    if config["qk_norm"]:
        unsure["qk_norm_legacy"] = "shapes do not tell; True for the published weights of 1.1"
    return Identity("transformer", "transformer of Open-Sora 1.1", "opensora.models.stdit2", "STDiT2", config, unsure)


def _stdit3(names: _Names) -> Identity:
    config, unsure = _transformer(names, "spatial_blocks")
    config |= _heads(names, config, unsure, "spatial_blocks.0.attn")
    return Identity("transformer", "transformer of Open-Sora 1.2", "opensora.models.stdit3", "STDiT3", config, unsure)


def _heads(names: _Names, config: dict[str, Any], unsure: dict[str, str], attention: str) -> dict[str, Any]:
    """Heads and their norm; the width of a head stands in its norm, and half of it in the rotary frequencies."""
    unsure["input_sq_size"] = "shapes do not tell; 512 in every published model"
    normed, rotated = names.size(f"{attention}.q_norm.weight", 0), names.size("rope.freqs", 0)
    head_dim = normed or (2 * rotated if rotated else None)
    hidden_size = config.get("hidden_size")
    if head_dim is None or hidden_size is None:
        unsure["num_heads"] = "the rotary frequencies (rope.freqs), which tell it, are missing"
        return {"qk_norm": normed is not None}
    return {"num_heads": hidden_size // head_dim, "qk_norm": normed is not None}


# --- autoencoders -----------------------------------------------------------------------------------------------------


def _video_autoencoder(names: _Names) -> Identity:
    spatial, groups = _spatial(names, "spatial_vae.module.")
    unsure = {f"spatial.{name}": note for name, note in groups.items()}
    pixels = spatial.get("in_channels")
    config: dict[str, Any] = {"spatial": spatial, "temporal": None, "temporal_decoder": None}
    if pixels:
        config["spatial_patch_size"] = math.isqrt(pixels // 3)
    summary = "2D autoencoder, frame by frame"
    if names.has("spatial_vae.module.decoder.time_conv_out."):
        config |= {"spatial": _with_temporal_decoder(spatial), "temporal_decoder": {}}
        unsure.pop("spatial.norm_num_groups")
        summary = "2D encoder with the temporal decoder of Stable Video Diffusion"
    if names.has("temporal_vae.encoder.conv_in."):
        config["temporal"] = _causal_3d(names)
        unsure["temporal.num_groups"] = "shapes do not tell; 32 in the published autoencoder"
        unsure["micro_frame_size"] = "shapes do not tell; 17 for Open-Sora 1.2"
        summary = "autoencoder of Open-Sora 1.2, 2D and temporal part"
    elif names.has("temporal_vae.encoder_in."):
        config["temporal"] = _folded(names, spatial)
        unsure["micro_frame_size"] = _TOLD_BY_CONFIG
        summary = "2D autoencoder with a folded temporal part, as in the toybox"
    unsure["latent_space.scaling_factor"] = (
        "shapes do not tell; 0.18215 for Open-Sora 1.2" if config["temporal"] else _TOLD_BY_CONFIG
    )
    library = "opensora.models.autoencoders.video"
    return Identity("autoencoder", summary, library, "VideoAutoencoder", config, unsure)


def _spatial(names: _Names, prefix: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """Keywords of diffusers' AutoencoderKL, and those that shapes cannot tell."""
    levels = names.count(f"{prefix}encoder.down_blocks") or 0
    widths = [names.size(f"{prefix}encoder.down_blocks.{i}.resnets.0.conv1.weight", 0) for i in range(levels)]
    config = _known(
        in_channels=names.size(f"{prefix}encoder.conv_in.weight", 1),
        out_channels=names.size(f"{prefix}decoder.conv_out.weight", 0),
        latent_channels=names.size(f"{prefix}decoder.conv_in.weight", 1),
        block_out_channels=widths if widths and None not in widths else None,
        layers_per_block=names.count(f"{prefix}encoder.down_blocks.0.resnets"),
        use_quant_conv=names.has(f"{prefix}quant_conv."),
        use_post_quant_conv=names.has(f"{prefix}post_quant_conv."),
        mid_block_add_attention=names.has(f"{prefix}encoder.mid_block.attentions.0."),
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


def _causal_3d(names: _Names) -> dict[str, Any]:
    encoder = "temporal_vae.encoder"
    filters = names.size(f"{encoder}.conv_in.conv.weight", 0)
    levels = names.count(f"{encoder}.block_res_blocks") or 0
    widths = [names.size(f"{encoder}.block_res_blocks.{i}.0.conv1.conv.weight", 0) for i in range(levels)]
    moments = names.size("temporal_vae.quant_conv.conv.weight", 0)
    return _known(
        type="causal3d",
        in_channels=names.size(f"{encoder}.conv_in.conv.weight", 1),
        latent_channels=moments // 2 if moments else None,
        filters=filters,
        num_res_blocks=names.count(f"{encoder}.block_res_blocks.0"),
        channel_multipliers=[width // filters if width and filters else 1 for width in widths] or None,
        temporal_downsample=[names.has(f"{encoder}.conv_blocks.{i}.") for i in range(levels - 1)] if levels else None,
    )


def _folded(names: _Names, spatial: dict[str, Any]) -> dict[str, Any]:
    channels, folded = spatial.get("latent_channels"), names.size("temporal_vae.encoder_in.weight", 1)
    return _known(
        type="folded",
        in_channels=channels,
        latent_channels=names.size("temporal_vae.decoder_in.weight", 1),
        dim=names.size("temporal_vae.encoder_in.weight", 0),
        encoder_depth=names.count("temporal_vae.encoder_blocks") or 0,
        decoder_depth=names.count("temporal_vae.decoder_blocks") or 0,
        temporal_factor=folded // channels if folded and channels else None,
    )


# --- text encoders ----------------------------------------------------------------------------------------------------

# Width of the text states -> what the size is called.
_T5_SIZES = {512: "small", 768: "base", 1024: "large", 2048: "XL", 4096: "XXL"}


def _t5(names: _Names) -> Identity:
    block = "encoder.block.0.layer"
    vocabulary = names.shape("shared.weight") or names.shape("encoder.embed_tokens.weight") or (None, None)
    attention = names.shape(f"{block}.0.SelfAttention.q.weight") or (None, None)
    bias = f"{block}.0.SelfAttention.relative_attention_bias.weight"
    heads = names.size(bias, 1)
    gated = names.has(f"{block}.1.DenseReluDense.wi_0.")
    config = _known(
        vocab_size=vocabulary[0],
        d_model=attention[1],
        d_kv=attention[0] // heads if attention[0] and heads else None,
        d_ff=names.size(f"{block}.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight", 0),
        num_layers=names.count("encoder.block"),
        num_heads=heads,
        relative_attention_num_buckets=names.size(bias, 0),
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
    size = _T5_SIZES.get(attention[1] or 0)
    summary = f"T5 {'v1.1 ' if gated else ''}text encoder" + (f", size {size}" if size and gated else "")
    if names.has("decoder.block.0."):
        summary += "; with the decoder, which is not used"
    unsure = {"relative_attention_max_distance": "shapes do not tell; 128 in every published model"}
    return Identity("text_encoder", summary, "transformers", "T5EncoderModel", config, unsure)
