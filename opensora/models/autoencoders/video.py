"""Videos to latents and back: a 2D autoencoder frame by frame, optionally one over time, and a latent space.

    video --pixel unshuffle, AutoencoderKL--> frame latents --factor--> [temporal autoencoder, in chunks of M frames]
          --(z - shift) / scale--> normalised latents

With a temporal autoencoder a clip is cut into chunks of M = `micro_frame_size` frames that know nothing of each other
(the last may be shorter); that is part of what the latents mean and of the published models. Micro batches, in
contrast, only bound the memory of the 2D part; results are the same up to float rounding. Parameter names are the
published ones (`spatial_vae.module.*`, `temporal_vae.*`, `scale`, `shift`).

Letters: B batch, T frames, H, W height and width in pixels, C channels of a frame latent, Z channels of a video
latent, N latent frames, h, w latent height and width, p spatial patch size.
"""

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.models.autoencoders.folded import FoldedTemporalAutoencoder
from opensora.models.autoencoders.frames import FrameAutoencoder, TemporalDecoderAutoencoder
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.posterior import Posterior
from opensora.models.autoencoders.temporal import TemporalAutoencoder
from opensora.models.portable_config import PortableConfigMixin

TemporalPart = TemporalAutoencoder | FoldedTemporalAutoencoder
TEMPORAL_TYPES: dict[str, type[TemporalPart]] = {
    "causal3d": TemporalAutoencoder,
    "folded": FoldedTemporalAutoencoder,
}


class VideoAutoencoder(ModelMixin, PortableConfigMixin):
    """The autoencoder of a video diffusion model: `encode` to normalised latents, `decode` back to pixels.

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
    temporal_vae: TemporalPart | None
    scale: Tensor
    shift: Tensor
    if TYPE_CHECKING:  # diffusers wraps it in a way that hides its signature

        def to(self, *args: Any, **kwargs: Any) -> Self: ...

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
        self.micro_frame_size = micro_frame_size
        self.micro_batch_size = micro_batch_size
        declared = LatentSpace.from_dict(latent_space or {})
        if "scaling_factor" in spatial:
            own = replace(declared.declared_by_weights, scaling_factor=spatial["scaling_factor"], convention="multiply")
            declared.declared_by_weights.check_same(own, here="latent_space", there="the spatial options")
        self._latent_space = declared
        shift, scale = declared.declared_by_weights.statistics(self.latent_channels)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.checks_loaded_statistics = True  # whoever overrides the latent space next switches it off
        self.register_load_state_dict_pre_hook(_complete_statistics)
        self.register_load_state_dict_post_hook(_check_statistics)

    # ---- shapes

    @property
    def latent_channels(self) -> int:
        """Z, channels of the latents."""
        return self.spatial_vae.latent_channels if self.temporal_vae is None else self.temporal_vae.latent_channels

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell along height and width."""
        return self.spatial_vae.spatial_factor

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame; 1 without a temporal part."""
        return 1 if self.temporal_vae is None else self.temporal_vae.temporal_factor

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
        total = self.latent_frames(num_frames)
        if not 0 <= latent_frame <= total:
            raise OpenSoraError(f"latent frame {latent_frame} asked for, but {num_frames} frames have {total}")
        frames = 0
        for chunk in self._chunks(num_frames) if self.temporal_vae is not None else [num_frames]:
            latents = chunk if self.temporal_vae is None else self.temporal_vae.latent_frames(chunk)
            if latent_frame < latents:
                return frames + max(0, chunk - (latents - latent_frame) * self.temporal_factor)
            frames, latent_frame = frames + chunk, latent_frame - latents
        return frames

    def chunk_start(self, frame: int, num_frames: int) -> int:
        """The first frame of the chunk in which a frame of a clip of `num_frames` lies.

        Where every frame has a latent frame of its own, that is the frame itself.
        """
        size = 1 if self.temporal_factor == 1 else self.micro_frame_size or num_frames
        return frame // size * size

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """(T, H, W) in frames and pixels -> (N, h, w).

        Raises:
            OpenSoraError: for a size that does not divide into latent cells; the nearest that do are named.
        """
        num_frames, height, width = size
        factor = self.spatial_factor
        for name, value in (("height", height), ("width", width)):
            if value < factor or value % factor:
                below, above = value // factor * factor, -(-max(value, 1) // factor) * factor
                nearest = f"{below} or {above}" if below else f"{above}"
                raise OpenSoraError(f"{name} {value} px given, but it must be a multiple of {factor}; use {nearest}")
        return self.latent_frames(num_frames), height // factor, width // factor

    def _chunks(self, num_frames: int) -> list[int]:
        """Frames of each chunk of a clip."""
        size = self.micro_frame_size or num_frames
        return [min(size, num_frames - start) for start in range(0, num_frames, size)]

    # ---- the whole way

    def encode(
        self,
        video: Tensor,
        *,
        sample: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
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

    def posterior(self, video: Tensor) -> Posterior:
        """What is predicted of a video (B, 3, T, H, W): its normalised latents (B, Z, N, h, w) with their uncertainty.

        The mean is what `encode` returns. With a temporal part the log-variance is that part's own, given the modes of
        the frames.
        """
        frame_posterior = self.encode_frames(video)
        space, log_factor = self.latent_space, 0.0
        if self.temporal_vae is None:
            mean, logvar = space.scale_frames(frame_posterior.mode()), frame_posterior.logvar
            log_factor = math.log(space.factor)
        else:
            time_posterior = self.encode_time(frame_posterior.mode())
            mean, logvar = time_posterior.mean, time_posterior.logvar
        _, scale = space.statistics(mean.shape[1], mean.device)
        return Posterior(space.normalise(mean), logvar + 2 * (log_factor - scale.log()))

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """Normalised latents (B, Z, N, h, w) -> video (B, 3, num_frames, H, W), nominally in [-1, 1], float32.

        Raises:
            OpenSoraError: if the latents are not those of a clip of `num_frames` frames.
        """
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels:
            raise OpenSoraError(
                f"latents of shape {tuple(latents.shape)} given, expected (B, {self.latent_channels}, N, h, w)"
            )
        latents = self.latent_space.denormalise(latents.float())
        if self.temporal_vae is not None:
            frame_latents = self.decode_time(latents, num_frames)
        else:
            self._check_latent_frames(latents, num_frames)
            frame_latents = self.latent_space.unscale_frames(latents)
        return self.decode_frames(frame_latents)

    def forward(self, video: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Reconstruction (B, 3, T, H, W) of a video of that shape."""
        return self.decode(self.encode(video, sample=sample, generator=generator), video.shape[2])

    # ---- its parts, for training

    def encode_frames(self, video: Tensor) -> Posterior:
        """Posterior of the 2D autoencoder, float32 (B, C, T, h, w), before the scaling factor."""
        if video.ndim != 5 or video.shape[1] != 3:
            raise OpenSoraError(f"video of shape {tuple(video.shape)} given, expected (B, 3, T, H, W)")
        if not video.is_floating_point():
            raise OpenSoraError(f"video of {video.dtype} given, expected floating point in [-1, 1]; use x / 127.5 - 1")
        self.latent_size((video.shape[2], video.shape[3], video.shape[4]))
        posterior = self.spatial_vae.encode(video.to(self.dtype), self.micro_batch_size)
        return Posterior(posterior.mean.float(), posterior.logvar.float())

    def decode_frames(self, frame_latents: Tensor) -> Tensor:
        """Frame latents (B, C, T, h, w), before the scaling factor -> video (B, 3, T, H, W), float32."""
        return self.spatial_vae.decode(frame_latents.to(self.dtype), self.micro_batch_size).float()

    def encode_time(self, frame_latents: Tensor) -> Posterior:
        """Posterior of the temporal autoencoder, float32 (B, Z, N, h, w), before shift and scale.

        Args:
            frame_latents: (B, C, T, h, w), before the scaling factor, which is applied here.
        """
        temporal = self._require_temporal()
        scaled = self.latent_space.scale_frames(frame_latents.float()).to(self.dtype)
        posteriors = [temporal.encode(chunk) for chunk in scaled.split(self._chunks(scaled.shape[2]), dim=2)]
        mean = torch.cat([posterior.mean for posterior in posteriors], dim=2)
        return Posterior(mean.float(), torch.cat([posterior.logvar for posterior in posteriors], dim=2).float())

    def decode_time(self, latents: Tensor, num_frames: int) -> Tensor:
        """Video latents (B, Z, N, h, w) without shift and scale -> frame latents (B, C, T, h, w) before the factor."""
        temporal = self._require_temporal()
        self._check_latent_frames(latents, num_frames)
        lengths = self._chunks(num_frames)
        chunks = latents.to(self.dtype).split([temporal.latent_frames(length) for length in lengths], dim=2)
        frames = [temporal.decode(chunk, length) for chunk, length in zip(chunks, lengths, strict=True)]
        return self.latent_space.unscale_frames(torch.cat(frames, dim=2).float())

    def _require_temporal(self) -> TemporalPart:
        if self.temporal_vae is None:
            raise OpenSoraError("this autoencoder has no temporal part; use encode_frames and decode_frames")
        return self.temporal_vae

    def _check_latent_frames(self, latents: Tensor, num_frames: int) -> None:
        expected = self.latent_frames(num_frames)
        if latents.shape[2] != expected:
            raise OpenSoraError(
                f"{latents.shape[2]} latent frames given for a video of {num_frames} frames, which has {expected}"
            )

    # ---- latent space

    @property
    def latent_space(self) -> LatentSpace:
        """The declaration in force; `latent_space.overridden` tells whether a user put it there."""
        return self._latent_space

    def set_latent_space(self, latent_space: LatentSpace) -> None:
        """Declares what these weights' latents stand for, after training them: in the config and in the buffers."""
        shift, scale = latent_space.declared_by_weights.statistics(self.latent_channels, self.shift.device)
        self.shift.copy_(shift)
        self.scale.copy_(scale)
        self._latent_space = latent_space
        self.register_to_config(latent_space=latent_space.to_dict())

    def override_latent_space(self, latent_space: LatentSpace) -> None:
        """Uses another declaration than the checkpoint's; the config and every output remember both."""
        latent_space.statistics(self.latent_channels)
        self._latent_space = latent_space.overriding(self._declared_by_weights())
        self.register_to_config(latent_space=self._latent_space.to_dict())

    def check_latent_space(self) -> None:
        """Refuses weights whose `shift` and `scale` are not those of the declared latent space.

        Raises:
            OpenSoraError: naming both values and the two ways out.
        """
        configured = self._latent_space.declared_by_weights
        configured.check_same(self._declared_by_weights(), here="the configuration", there="the weights")

    def _declared_by_weights(self) -> LatentSpace:
        """The configured declaration with the weights' own shift and scale where those say otherwise."""
        configured = self._latent_space.declared_by_weights
        if self.shift.is_meta or self.scale.is_meta:
            return configured
        shift, scale = configured.statistics(self.latent_channels, self.shift.device)
        if _same_but_for_rounding(self.shift, shift) and _same_but_for_rounding(self.scale, scale):
            return configured
        return replace(configured, shift=_float32_values(self.shift), scale=_float32_values(self.scale))

    @torch.no_grad()
    def measure_latent_space(self, videos: Iterable[Tensor], trained_with: str) -> LatentSpace:
        """Sets shift and scale to mean and standard deviation per channel over `videos`; factor stays.

        Args:
            videos: batches (B, 3, T, H, W) in [-1, 1].
            trained_with: what they are and for which weights, for whoever reads the config.
        """
        count = 0
        total = torch.zeros(self.latent_channels, dtype=torch.float64)
        squares = torch.zeros_like(total)
        for video in videos:
            latents = self.latent_space.denormalise(self.encode(video)).transpose(0, 1).flatten(1).cpu().double()
            count += latents.shape[1]
            total += latents.sum(dim=1)
            squares += latents.square().sum(dim=1)
        if count < 2:
            raise OpenSoraError(f"{count} latent positions given, but a mean and a deviation need at least 2")
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        measured = replace(
            self.latent_space.declared_by_weights,
            shift=tuple(mean.tolist()),
            scale=tuple(std.tolist()),
            trained_with=trained_with,
        )
        self.set_latent_space(measured)
        return measured

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        override_latent_space: LatentSpace | Mapping[str, Any] | None = None,
        **loading: Any,
    ) -> Self:
        """Loads a folder as diffusers does, and holds its latent space against the one in the weights.

        Args:
            pretrained_model_name_or_path: the folder.
            override_latent_space: used instead of the folder's, and recorded as such.
            **loading: diffusers' own options (`subfolder`, `torch_dtype`, ...).

        Raises:
            OpenSoraError: if configuration and weights declare different latent spaces and no override is given, or
                for a configuration field among the options.
        """
        fields = {"latent_space", "spatial", "temporal", "spatial_patch_size", "temporal_decoder"}
        fields = sorted(fields & set(loading))
        if fields:
            raise OpenSoraError(
                f"{', '.join(fields)} given, but the folder's own configuration belongs to its weights; "
                "keep it, or pass override_latent_space=... to replace the latent space"
            )
        model = super().from_pretrained(pretrained_model_name_or_path, **loading)
        if override_latent_space is not None:
            wanted = override_latent_space
            model.override_latent_space(wanted if isinstance(wanted, LatentSpace) else LatentSpace.from_dict(wanted))
        else:
            model.check_latent_space()
        return model


def _build_spatial(
    config: Mapping[str, Any], patch_size: int, temporal_decoder: Mapping[str, Any] | None
) -> FrameAutoencoder:
    if temporal_decoder is None:
        return FrameAutoencoder(config, patch_size)
    unknown = sorted(set(temporal_decoder) - {"chunk_size"})
    if unknown:
        raise OpenSoraError(f"temporal_decoder: unknown option {', '.join(unknown)}; it takes chunk_size")
    return TemporalDecoderAutoencoder(config, patch_size, **temporal_decoder)


def _build_temporal(config: Mapping[str, Any]) -> TemporalPart:
    options = dict(config)
    kind = options.pop("type", None)
    if kind not in TEMPORAL_TYPES:
        raise OpenSoraError(f"temporal: type {kind!r} given; known are {', '.join(TEMPORAL_TYPES)}")
    known = [name for name in inspect.signature(TEMPORAL_TYPES[kind].__init__).parameters if name != "self"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise OpenSoraError(f"temporal: unknown option {', '.join(unknown)}; {kind} takes {', '.join(known)}")
    return TEMPORAL_TYPES[kind](**options)


def _draw(
    posterior: Posterior,
    sample: bool,
    generator: torch.Generator | list[torch.Generator] | None,
    noise: Tensor | None,
) -> Tensor:
    if not sample:
        return posterior.mode()
    if noise is None:  # all of it at once, so that micro batches and chunks do not change what is drawn
        noise = randn_tensor(tuple(posterior.mean.shape), generator, posterior.mean.device, posterior.mean.dtype)
    if noise.shape != posterior.mean.shape:
        raise OpenSoraError(f"noise of shape {tuple(noise.shape)} given for latents of {tuple(posterior.mean.shape)}")
    return posterior.sample(noise=noise)


def _complete_statistics(module: VideoAutoencoder, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Published files may hold one shift and scale for all channels, or none: the declared ones then stand."""
    for name in ("shift", "scale"):
        own: Tensor = getattr(module, name)
        value = state_dict.get(prefix + name, own)
        state_dict[prefix + name] = value.expand(own.shape) if value.ndim == 0 else value


def _check_statistics(module: VideoAutoencoder, _: Any) -> None:
    if module.checks_loaded_statistics:
        module.check_latent_space()


def _float32_values(buffer: Tensor) -> tuple[float, ...]:
    """Shortest decimals that stand for the same float32 numbers: 0.34, not 0.3400000035762787."""
    return tuple(float(str(value)) for value in buffer.float().flatten().cpu().numpy())


def _same_but_for_rounding(found: Tensor, declared: Tensor) -> bool:
    """Whether `found` is `declared`, maybe stored in half precision at some time."""
    found, declared = found.float(), declared.float()
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    return any(torch.equal(found, declared.to(kind).float()) for kind in kinds)
