"""Frames to latents and back: an image autoencoder of diffusers, applied to a video.

Every frame is encoded by itself. It is decoded by itself too, or with the *temporal decoder* of Stable Video Diffusion,
which was trained for Stable Diffusion's latents and looks at neighbouring frames, so that what it draws flickers less.
Micro batches bound the memory and change nothing but the rounding.

Letters: B batch, T frames, H, W height and width in pixels, C channels of a frame latent, h, w latent height and width,
p spatial patch size.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.keywords import check_keywords
from opensora.models.autoencoders.layout import for_convolution
from opensora.models.autoencoders.posterior import Posterior


class FrameAutoencoder(nn.Module):
    """diffusers' AutoencoderKL applied to every frame of a video by itself.

    Args:
        config: keywords of AutoencoderKL; block types and channels at both ends are derived where left out.
        patch_size: p; frames go through a pixel unshuffle by p first and the inverse last.

    Raises:
        OpenSoraError: for a keyword that AutoencoderKL lacks or channels that do not fit p.
    """

    kind: type[AutoencoderKL | AutoencoderKLTemporalDecoder] = AutoencoderKL

    def __init__(self, config: Mapping[str, Any], patch_size: int = 1) -> None:
        super().__init__()
        known = inspect.signature(self.kind.__init__).parameters
        check_keywords(self.kind.__init__, config, "spatial")
        pixel_channels = 3 * patch_size * patch_size
        values = {"in_channels": pixel_channels, "out_channels": pixel_channels, "latent_channels": 4, **config}
        for end in ("in_channels", "out_channels"):
            if values[end] != pixel_channels:
                raise OpenSoraError(
                    f"spatial: {end} is {values[end]}, but RGB in patches of {patch_size} px has {pixel_channels}; "
                    "leave it out or change spatial_patch_size"
                )
        levels = len(values.setdefault("block_out_channels", (64,)))
        values.setdefault("down_block_types", ("DownEncoderBlock2D",) * levels)
        if "up_block_types" in known:
            values.setdefault("up_block_types", ("UpDecoderBlock2D",) * levels)
        self.module = self.kind(**values)
        self.patch_size = patch_size
        self.latent_channels: int = values["latent_channels"]
        self.spatial_factor = patch_size * 2 ** (levels - 1)

    def encode(self, video: Tensor, micro_batch_size: int | None) -> Posterior:
        """Video (B, 3, T, H, W) -> posterior with mean and log-variance (B, C, T, h, w)."""
        batch = video.shape[0]
        means, logvars = [], []
        for frames in _micro_batches(video, micro_batch_size):
            patches = for_convolution(F.pixel_unshuffle(frames, self.patch_size))
            predicted = self.module.encode(patches).latent_dist  # type: ignore
            means.append(predicted.mean)
            logvars.append(predicted.logvar)
        return Posterior(_to_clips(means, batch), _to_clips(logvars, batch))

    def decode(self, frame_latents: Tensor, micro_batch_size: int | None) -> Tensor:
        """Frame latents (B, C, T, h, w) -> video (B, 3, T, H, W)."""
        frames = [
            F.pixel_shuffle(self.module.decode(latents).sample, self.patch_size)  # type: ignore
            for latents in _micro_batches(frame_latents, micro_batch_size)
        ]
        return _to_clips(frames, frame_latents.shape[0])

    def enable_tiling(self, tile_sample_min_size: int | None) -> None:
        """See `VideoAutoencoder.enable_tiling`; the edge of a tile in pixels."""
        if not isinstance(self.module, AutoencoderKL):
            kind = type(self.module).__name__
            raise OpenSoraError(f"{kind} cannot be tiled; decode fewer frames at once (chunk_size)")
        # Three quarters of a tile must be whole cells, or what diffusers puts together has another size.
        multiple = round(self.spatial_factor / self.module.tile_overlap_factor)
        edge = (
            self.module.tile_sample_min_size * self.patch_size if tile_sample_min_size is None else tile_sample_min_size
        )
        if edge < 1 or edge % multiple:
            raise OpenSoraError(f"tile_sample_min_size is {edge}, expected a multiple of {multiple} px")
        self.module.tile_sample_min_size = edge // self.patch_size
        self.module.tile_latent_min_size = edge // self.spatial_factor
        self.module.enable_tiling()


class TemporalDecoderAutoencoder(FrameAutoencoder):
    """diffusers' AutoencoderKLTemporalDecoder: encodes every frame by itself, decodes it with its neighbours.

    Args:
        config: keywords of AutoencoderKLTemporalDecoder; what is left out is derived as in `FrameAutoencoder`.
        patch_size: p, likewise.
        chunk_size: frames that are decoded together and know nothing of the others; None for the whole clip. Fewer take
            less memory and let the picture jump between chunks.
    """

    kind = AutoencoderKLTemporalDecoder

    def __init__(self, config: Mapping[str, Any], patch_size: int = 1, *, chunk_size: int | None = None) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise OpenSoraError(
                f"temporal_decoder: chunk_size is {chunk_size}, but it must be 1 or more, or None for the whole clip"
            )
        super().__init__(config, patch_size)
        self.chunk_size = chunk_size

    def decode(self, frame_latents: Tensor, micro_batch_size: int | None) -> Tensor:
        """Frame latents (B, C, T, h, w) -> video (B, 3, T, H, W), by chunks; micro batches do not apply."""
        frames = [
            F.pixel_shuffle(self.module.decode(chunk, num_frames=len(chunk)).sample, self.patch_size)  # type: ignore
            for clip in frame_latents.transpose(1, 2)
            for chunk in clip.split(self.chunk_size or len(clip))
        ]
        return _to_clips(frames, frame_latents.shape[0])


def _micro_batches(clips: Tensor, size: int | None) -> tuple[Tensor, ...]:
    """(B, C, T, h, w) -> batches (at most `size`, C, h, w) of the frames, clip after clip."""
    frames = clips.transpose(1, 2).flatten(0, 1)
    return frames.split(frames.shape[0] if size is None else size)


def _to_clips(frames: list[Tensor], batch: int) -> Tensor:
    """Inverse of `_micro_batches`."""
    return torch.cat(frames).unflatten(0, (batch, -1)).transpose(1, 2)
