"""Videos to latents and back: a 2D autoencoder frame by frame, optionally one over time, and a latent space.

    video --pixel unshuffle, AutoencoderKL--> frame latents --factor--> [temporal autoencoder, in chunks of M frames]
          --(z - shift) / scale--> normalised latents

With a temporal autoencoder a clip is cut into chunks of M = `micro_frame_size` frames that know nothing of each other
(the last may be shorter); that is part of what the latents mean and of the published models. Micro batches, in
contrast, only bound the memory of the 2D part; results are the same up to float rounding. Parameter names are the
published ones (`spatial_vae.module.*`, `temporal_vae.*`).

Published files also hold `shift` and `scale` of the latent space, which the configuration declares as well. What is
declared is what computes: the two are written into every state dict from the declaration, and held against it when one
is loaded (see `statistics.py`).

Letters: B batch, T frames, H, W height and width in pixels, C channels of a frame latent, Z channels of a video
latent, N latent frames, h, w latent height and width, p spatial patch size.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # diffusers looks for it beside the class
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.keywords import check_keywords
from opensora.models.autoencoders.folded import FoldedTemporalAutoencoder
from opensora.models.autoencoders.frames import FrameAutoencoder, TemporalDecoderAutoencoder
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.posterior import Generators, Posterior
from opensora.models.autoencoders.statistics import StoredStatistics
from opensora.models.autoencoders.temporal import TemporalAutoencoder
from opensora.models.offload_hooks import apply_offload_hooks

TemporalPart = TemporalAutoencoder | FoldedTemporalAutoencoder
TEMPORAL_TYPES: dict[str, type[TemporalPart]] = {
    "causal3d": TemporalAutoencoder,
    "folded": FoldedTemporalAutoencoder,
}


class VideoAutoencoder(StoredStatistics):
    """The autoencoder of a video diffusion model: to normalised latents, and back to pixels.

    Args:
        spatial: keywords of diffusers' AutoencoderKL.
        temporal: None, or `{"type": "causal3d" | "folded", ...}` with the keywords of that autoencoder over time.
        latent_space: fields of `LatentSpace`.
        spatial_patch_size: p, edge of the pixel patches folded into channels before the 2D autoencoder.
        micro_frame_size: M, frames of a chunk for the temporal part; None for the whole clip at once.
        micro_batch_size: frames that go through the 2D part at once; None for all.
        temporal_decoder: None, or the options of a `TemporalDecoderAutoencoder` in place of AutoencoderKL's decoder:
            `{"chunk_size": 14}`, or `{}` to decode the whole clip at once. `spatial` then holds the keywords of
            diffusers' AutoencoderKLTemporalDecoder.

    Raises:
        OpenSoraError: for options that do not exist or do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D", "Attention", "AutoencoderKLTemporalDecoder", "ResBlock", "CausalMixer"]
    # Modules that are called as such: offloaded groups come in when a part of them is, for `forward` is not always.
    _group_offload_block_modules = [
        *("spatial_vae", "module", "temporal_vae", "encoder", "decoder", "quant_conv", "post_quant_conv"),
        *("encoder_in", "encoder_out", "decoder_in", "decoder_out"),
    ]
    temporal_vae: TemporalPart | None

    @register_to_config
    def __init__(
        self,
        spatial: dict[str, Any],
        temporal: dict[str, Any] | None = None,
        latent_space: dict[str, Any] | None = None,
        spatial_patch_size: int = 1,
        micro_frame_size: int | None = 17,
        micro_batch_size: int | None = 4,
        temporal_decoder: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("micro_frame_size", micro_frame_size), ("micro_batch_size", micro_batch_size)):
            if value is not None and value < 1:
                raise OpenSoraError(f"{name} is {value}, but it must be 1 or more, or None for everything at once")
        self.spatial_vae = _build_spatial(spatial, spatial_patch_size, temporal_decoder)
        self.temporal_vae = None if temporal is None else _build_temporal(temporal)
        if self.temporal_vae is not None and self.temporal_vae.in_channels != self.spatial_vae.latent_channels:
            raise OpenSoraError(
                f"temporal: in_channels is {self.temporal_vae.in_channels}, but the 2D autoencoder's latents have "
                f"{self.spatial_vae.latent_channels} channels"
            )
        last = self.spatial_vae if self.temporal_vae is None else self.temporal_vae
        self.latent_channels = last.latent_channels
        self.spatial_factor = self.spatial_vae.spatial_factor
        self.temporal_factor = 1 if self.temporal_vae is None else self.temporal_vae.temporal_factor
        self.micro_frame_size = micro_frame_size
        self.micro_batch_size = micro_batch_size
        declared = LatentSpace.from_dict(latent_space or {})
        if "scaling_factor" in spatial:
            own = replace(declared.declared_by_weights, scaling_factor=spatial["scaling_factor"], convention="multiply")
            declared.declared_by_weights.check_same(own, here="latent_space", there="the spatial options")
        self._declare(declared)

    # ---- shapes

    def latent_frames(self, num_frames: int) -> int:
        """N for a clip of `num_frames` frames, chunk by chunk: 17 -> 5, 18 -> 6, 34 -> 10 in Open-Sora 1.2."""
        if num_frames < 1:
            raise OpenSoraError(f"{num_frames} frames given, but a video needs at least 1")
        if self.temporal_vae is None:
            return num_frames
        return sum(self.temporal_vae.latent_frames(chunk) for chunk in self._chunks(num_frames))

    def frames_before(self, latent_frame: int, num_frames: int) -> int:
        """Video frames that latent frames 0 .. `latent_frame` - 1 of a clip of `num_frames` frames stand for.

        The first latent frame of a chunk stands for what is left over when the others take `temporal_factor` each: of
        17 frames, latent frame 1 begins after 1 frame, 2 after 5, and 5, the next chunk's, after 17.
        """
        self._check_latent_frame(latent_frame, self.latent_frames(num_frames), num_frames)
        frames = 0
        for chunk in self._chunks(num_frames) if self.temporal_vae is not None else [num_frames]:
            latents = chunk if self.temporal_vae is None else self.temporal_vae.latent_frames(chunk)
            if latent_frame < latents:
                return frames + max(0, chunk - (latents - latent_frame) * self.temporal_factor)
            frames, latent_frame = frames + chunk, latent_frame - latents
        return frames

    def _chunks(self, num_frames: int) -> list[int]:
        """Frames of each chunk of a clip."""
        size = self.micro_frame_size or num_frames
        return [min(size, num_frames - start) for start in range(0, num_frames, size)]

    # ---- the whole way

    @apply_offload_hooks
    def encode_video(
        self,
        video: Tensor,
        *,
        sample: bool = False,
        generator: Generators | None = None,
        frame_noise: Tensor | None = None,
        latent_noise: Tensor | None = None,
    ) -> Tensor:
        """Video (B, 3, T, H, W) in [-1, 1] -> normalised latents (B, Z, N, h, w), float32.

        Args:
            video: pixels.
            sample: draw from both posteriors; otherwise their modes are taken and the result is deterministic.
            generator: source of the noise, first for the frames, then for the latents; one per clip if a list.
            frame_noise: standard normal (B, C, T, h, w) in place of drawn noise.
            latent_noise: standard normal (B, Z, N, h, w) in place of drawn noise; with a temporal part only.

        Raises:
            OpenSoraError: for an impossible size, or noise for an encoding that is not sampled.
        """
        if not sample and not (generator is None and frame_noise is None and latent_noise is None):
            raise OpenSoraError("noise or a generator given for a deterministic encoding; pass sample=True as well")
        if latent_noise is not None and self.temporal_vae is None:
            raise OpenSoraError("latent_noise given, but this autoencoder has no temporal part; use frame_noise alone")
        frame_latents = _draw(self.encode_frames(video), sample, generator, frame_noise)
        if self.temporal_vae is None:
            latents = self.latent_space.scale_frames(frame_latents)
        else:
            latents = _draw(self.encode_time(frame_latents), sample, generator, latent_noise)
        return self.latent_space.normalise(latents)

    @apply_offload_hooks
    def posterior(self, video: Tensor) -> Posterior:
        """What is predicted of a video (B, 3, T, H, W): its normalised latents (B, Z, N, h, w) with their uncertainty.

        The mean is what `encode_video` returns. With a temporal part the log-variance is that part's own, given the
        modes of the frames.
        """
        frame_posterior = self.encode_frames(video)
        space, log_factor = self.latent_space, 0.0
        if self.temporal_vae is None:
            mean, logvar = space.scale_frames(frame_posterior.mode()), frame_posterior.logvar
            log_factor = math.log(space.factor)
        else:
            time_posterior = self.encode_time(frame_posterior.mode())
            mean, logvar = time_posterior.mean, time_posterior.logvar
        _, scale = space.statistics_of(mean)
        return Posterior(space.normalise(mean), logvar + 2 * (log_factor - scale.log()))

    @apply_offload_hooks
    def decode_latents(self, latents: Tensor, num_frames: int) -> Tensor:
        """Normalised latents (B, Z, N, h, w) -> video (B, 3, num_frames, H, W), nominally in [-1, 1], float32.

        Raises:
            OpenSoraError: if the latents are not those of a clip of `num_frames` frames.
        """
        self._check_latents(latents, num_frames)
        latents = self.latent_space.denormalise(latents.float())
        if self.temporal_vae is not None:
            frame_latents = self.decode_time(latents, num_frames)
        else:
            frame_latents = self.latent_space.unscale_frames(latents)
        return self.decode_frames(frame_latents)

    def decoders(self) -> list[tuple[nn.Module, str]]:
        """Parts that decode: one takes micro batches of frames, the other chunks."""
        parts = (self.spatial_vae.module, self.temporal_vae)
        return [(part, "decode") for part in parts if part is not None]

    def encoders(self) -> list[nn.Module]:
        """Encoders of the parts, where they are modules of their own."""
        found = [getattr(part, "encoder", None) for part in (self.spatial_vae.module, self.temporal_vae)]
        return [encoder for encoder in found if isinstance(encoder, nn.Module)]

    # ---- less memory

    @property
    def use_tiling(self) -> bool:
        """Whether frames go through the 2D part in overlapping tiles."""
        return getattr(self.spatial_vae.module, "use_tiling", False)

    def enable_tiling(self, tile_sample_min_size: int | None = None) -> None:
        """Frames larger than a tile go through the 2D part in overlapping tiles, as diffusers' AutoencoderKL does it.

        A tile knows nothing of the others and their borders are blended, so the result is close to the whole one and
        not the same. What works over time is not tiled.

        Args:
            tile_sample_min_size: edge of a tile in pixels, a multiple of 4 * `spatial_factor`; a quarter of it overlaps
                with the next. None for what the 2D part's own configuration says (`sample_size`).

        Raises:
            OpenSoraError: an edge that is no such multiple, or a decoder over time, which diffusers cannot tile.
        """
        self.spatial_vae.enable_tiling(tile_sample_min_size)

    def disable_tiling(self) -> None:
        """Frames go through the 2D part whole again."""
        if self.use_tiling:
            self.spatial_vae.module.disable_tiling()

    def enable_slicing(self) -> None:
        """Clips of a batch go through one by one: the result of each is, to the bit, the one it has by itself."""
        super().enable_slicing()

    def _slices(self, clips: Tensor) -> tuple[Tensor, ...]:
        """A batch in the parts that are worked on at once."""
        return clips.split(1) if self.use_slicing else (clips,)

    # ---- its parts, for training

    @apply_offload_hooks
    def encode_frames(self, video: Tensor) -> Posterior:
        """Posterior of the 2D autoencoder, float32 (B, C, T, h, w), before the scaling factor."""
        self._check_video(video)
        video = video.to(self.dtype)
        parts = [self.spatial_vae.encode(clips, self.micro_batch_size) for clips in self._slices(video)]
        return Posterior.cat(parts, dim=0).float()

    @apply_offload_hooks
    def decode_frames(self, frame_latents: Tensor) -> Tensor:
        """Frame latents (B, C, T, h, w), before the scaling factor -> video (B, 3, T, H, W), float32."""
        clips = self._slices(frame_latents.to(self.dtype))
        return _joined([self.spatial_vae.decode(latents, self.micro_batch_size) for latents in clips]).float()

    @apply_offload_hooks
    def encode_time(self, frame_latents: Tensor) -> Posterior:
        """Posterior of the temporal autoencoder, float32 (B, Z, N, h, w), before shift and scale.

        Args:
            frame_latents: (B, C, T, h, w), before the scaling factor, which is applied here.
        """
        temporal = self._require_temporal()
        scaled = self.latent_space.scale_frames(frame_latents.float()).to(self.dtype)
        lengths = self._chunks(scaled.shape[2])
        clips = [
            Posterior.cat([temporal.encode(chunk) for chunk in clip.split(lengths, dim=2)], dim=2)
            for clip in self._slices(scaled)
        ]
        return Posterior.cat(clips, dim=0).float()

    @apply_offload_hooks
    def decode_time(self, latents: Tensor, num_frames: int) -> Tensor:
        """Video latents (B, Z, N, h, w) without shift and scale -> frame latents (B, C, T, h, w) before the factor."""
        temporal = self._require_temporal()
        self._check_latents(latents, num_frames)
        lengths = self._chunks(num_frames)
        sizes = [temporal.latent_frames(length) for length in lengths]
        clips = [
            torch.cat([temporal.decode(*chunk) for chunk in zip(clip.split(sizes, dim=2), lengths, strict=True)], dim=2)
            for clip in self._slices(latents.to(self.dtype))
        ]
        return self.latent_space.unscale_frames(_joined(clips).float())

    def _require_temporal(self) -> TemporalPart:
        if self.temporal_vae is None:
            raise OpenSoraError("this autoencoder has no temporal part; use encode_frames and decode_frames")
        return self.temporal_vae


def _build_spatial(
    config: Mapping[str, Any], patch_size: int, temporal_decoder: Mapping[str, Any] | None
) -> FrameAutoencoder:
    if temporal_decoder is None:
        return FrameAutoencoder(config, patch_size)
    unknown = sorted(set(temporal_decoder) - {"chunk_size"})
    if unknown:
        raise OpenSoraError(f"temporal_decoder: unknown option {', '.join(unknown)}; it takes chunk_size")
    check_keywords(TemporalDecoderAutoencoder.__init__, temporal_decoder, "temporal_decoder")
    return TemporalDecoderAutoencoder(config, patch_size, **temporal_decoder)


def _build_temporal(config: Mapping[str, Any]) -> TemporalPart:
    options = dict(config)
    kind = options.pop("type", None)
    if kind not in TEMPORAL_TYPES:
        raise OpenSoraError(f"temporal: type {kind!r} given; known are {', '.join(TEMPORAL_TYPES)}")
    check_keywords(TEMPORAL_TYPES[kind].__init__, options, "temporal")
    return TEMPORAL_TYPES[kind](**options)


def _joined(clips: list[Tensor]) -> Tensor:
    """Slices as one batch; a lone one is not copied."""
    return clips[0] if len(clips) == 1 else torch.cat(clips)


def _draw(
    posterior: Posterior,
    sample: bool,
    generator: Generators | None,
    noise: Tensor | None,
) -> Tensor:
    if not sample:
        return posterior.mode()
    if noise is None:  # all of it at once, so that micro batches and chunks do not change what is drawn
        noise = randn_tensor(tuple(posterior.mean.shape), generator, posterior.mean.device, posterior.mean.dtype)
    if noise.shape != posterior.mean.shape:
        raise OpenSoraError(f"noise of shape {tuple(noise.shape)} given for latents of {tuple(posterior.mean.shape)}")
    return posterior.sample(noise=noise)
