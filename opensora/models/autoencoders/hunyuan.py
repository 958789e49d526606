"""HunyuanVideo's autoencoder, which Open-Sora 2.0 works with: diffusers' network behind this package's contract.

Convolutions and attention see this and earlier frames, so a clip may be encoded in one piece whatever its length; the
first latent frame stands for the first frame, every later one for four. Larger frames than a tile are worked on in
overlapping tiles, as published inference does it; longer clips as well where that is asked for. Parameter names are the
published ones, which are diffusers'.

Letters: B batch, T frames, H, W height and width in pixels, Z channels of a latent, N latent frames, h, w latent height
and width, r temporal factor.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLHunyuanVideo
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    HunyuanVideoDownsampleCausal3D,
    HunyuanVideoUpsampleCausal3D,
)
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # diffusers looks for it beside the class
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
from opensora.models.autoencoders.joint import JointFormat
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.posterior import Posterior
from opensora.models.autoencoders.strided import StridedConv3d
from opensora.models.autoencoders.tiles import TiledCodec, in_tiles
from opensora.models.format import TensorShapes, known_keywords, known_values
from opensora.models.offload_hooks import apply_offload_hooks


class HunyuanVideoAutoencoder(TiledCodec):
    """The autoencoder of HunyuanVideo and of Open-Sora 2.0.

    Clips have 1, r + 1, 2r + 1, ... frames.

    Args:
        latent_channels: Z.
        block_out_channels: channels of every level.
        layers_per_block: residual blocks of a level of the encoder; one more in the decoder.
        norm_num_groups: groups of every normalisation.
        spatial_compression_ratio: pixels per latent cell along height and width.
        temporal_compression_ratio: r; 4, or as in space: what halves height and width then halves time as well.
        mid_block_add_attention: whether there is attention between the residual blocks in the middle.
        latent_space: fields of `LatentSpace`.
        tile_sample_size: edge of a tile in pixels, a multiple of 4 * `spatial_factor`, a quarter of which overlaps with
            the next; None for whole frames.
        tile_sample_frames: frames of a tile, a multiple of 4 * r, likewise; None for whole clips.

    Raises:
        OpenSoraError: for another ratio, or sizes of tiles that are no such multiples.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["HunyuanVideoResnetBlockCausal3D", "Attention"]
    _group_offload_block_modules = ["encoder", "decoder"]
    name_of_last_layer = "conv_out.conv"
    frame_offset = 1

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        spatial_compression_ratio: int = 8,
        temporal_compression_ratio: int = 4,
        mid_block_add_attention: bool = True,
        latent_space: dict[str, Any] | None = None,
        tile_sample_size: int | None = 256,
        tile_sample_frames: int | None = None,
    ) -> None:
        super().__init__()
        levels = len(block_out_channels)
        network = AutoencoderKLHunyuanVideo(
            latent_channels=latent_channels,
            down_block_types=("HunyuanVideoDownBlock3D",) * levels,
            up_block_types=("HunyuanVideoUpBlock3D",) * levels,
            block_out_channels=tuple(block_out_channels),  # type: ignore[arg-type]  # diffusers' own type is too narrow
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            spatial_compression_ratio=spatial_compression_ratio,
            mid_block_add_attention=mid_block_add_attention,
        )
        _keep_narrow_clips_right(network)
        if temporal_compression_ratio == spatial_compression_ratio:
            _resample_time_everywhere(network)
        elif temporal_compression_ratio != network.temporal_compression_ratio:
            raise OpenSoraError(
                f"temporal_compression_ratio is {temporal_compression_ratio}, expected "
                f"{network.temporal_compression_ratio}, or spatial_compression_ratio, {spatial_compression_ratio}"
            )
        self.encoder, self.quant_conv = network.encoder, network.quant_conv
        self.post_quant_conv, self.decoder = network.post_quant_conv, network.decoder
        self.latent_channels = latent_channels
        self.spatial_factor, self.temporal_factor = spatial_compression_ratio, temporal_compression_ratio
        self.frame_multiple = temporal_compression_ratio
        self._set_tiles(tile_sample_size, tile_sample_frames)
        self._declare(LatentSpace.from_dict(latent_space or {}))

    def latent_frames(self, num_frames: int) -> int:
        """N for a clip of `num_frames` frames: 1 -> 1, 33 -> 9, 129 -> 33 in Open-Sora 2.0."""
        VideoSize(num_frames, self.spatial_factor, self.spatial_factor).check(self.size_rule())
        return (num_frames - 1) // self.temporal_factor + 1

    @apply_offload_hooks
    def encode_raw(self, video: Tensor) -> Posterior:
        """Posterior of a video (B, 3, T, H, W), float32 (B, Z, N, h, w) before the scaling factor."""
        tile, made = self._sample_tile, self._latent_tile
        return Posterior.from_moments(in_tiles(self._encode_tile, video.to(self.dtype), tile, made, lead=1).float())

    @apply_offload_hooks
    def decode_raw(self, latents: Tensor, num_frames: int) -> Tensor:
        """Video (B, 3, num_frames, H, W), float32, of latents (B, Z, N, h, w) before the scaling factor."""
        tile, made = self._latent_tile, self._sample_tile
        return in_tiles(self._decode_tile, latents.to(self.dtype), tile, made, lead=1).float()

    def _encode_tile(self, video: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(video))

    def _decode_tile(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


def _keep_narrow_clips_right(network: AutoencoderKLHunyuanVideo) -> None:
    """Convolutions of a stride, see `strided`, with the weights that are there."""
    for module in network.modules():
        if isinstance(module, HunyuanVideoDownsampleCausal3D):
            module.conv.conv = StridedConv3d.like(module.conv.conv)


def _resample_time_everywhere(network: AutoencoderKLHunyuanVideo) -> None:
    """What diffusers' class cannot be asked for: time is halved and doubled wherever height and width are."""
    for module in network.modules():
        if isinstance(module, HunyuanVideoDownsampleCausal3D):
            module.conv.conv.stride = (2, 2, 2)
        elif isinstance(module, HunyuanVideoUpsampleCausal3D):
            module.upsample_factor = (2, 2, 2)


# --- how it is published ----------------------------------------------------------------------------------------------

# Keywords of diffusers' class whose only value is the published one.
_FIXED: dict[str, Any] = {"in_channels": 3, "out_channels": 3, "act_fn": "silu"}


class _HunyuanFormat(JointFormat):
    cls = HunyuanVideoAutoencoder
    summary = "autoencoder of HunyuanVideo and Open-Sora 2.0"
    prefixes = ("encoder.down_blocks.0.resnets.0.conv1.conv.", "encoder.conv_in.conv.")

    def read_shapes(self, shapes: TensorShapes) -> tuple[dict[str, Any], dict[str, str]]:
        levels = range(shapes.count("encoder.down_blocks") or 0)
        widths = [shapes.size(f"encoder.down_blocks.{i}.resnets.0.conv1.conv.weight", 0) for i in levels]
        config = known_values(
            latent_channels=shapes.size("post_quant_conv.weight", 0),
            block_out_channels=widths if widths and None not in widths else None,
            layers_per_block=shapes.count("encoder.down_blocks.0.resnets"),
            mid_block_add_attention=shapes.has("encoder.mid_block.attentions.0."),
        )
        unsure = {
            "norm_num_groups": "shapes do not tell; 32 in the published autoencoder",
            "spatial_compression_ratio": "shapes do not tell; 8 in the published autoencoder",
            "temporal_compression_ratio": "shapes do not tell; 4 in the published autoencoder",
            "latent_space": "weights do not hold it; 0.476986 is the scaling factor of the published one",
        }
        return config, unsure

    def is_foreign_config(self, stored: Mapping[str, Any]) -> bool:
        return super().is_foreign_config(stored) or stored.get("_class_name") == AutoencoderKLHunyuanVideo.__name__

    def translate_config(
        self, stored: Mapping[str, Any], where: Path, base: Mapping[str, Any], assumed: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Keywords from those of diffusers' class, which declares a scaling factor."""
        values = {"scaling_factor": 0.476986, **stored}  # diffusers' default
        for name in ("down_block_types", "up_block_types"):
            values.pop(name, None)
        for name, known in _FIXED.items():
            if (value := values.pop(name, known)) != known:
                raise OpenSoraError(f"{where}: {name} is {value!r}, expected {known!r}")
        factor = values.pop("scaling_factor")
        space = {"scaling_factor": factor, "trained_with": "an autoencoder that declares this factor"}
        return {**known_keywords(values, where, self.cls, ()), "latent_space": space}


FORMAT = _HunyuanFormat()
