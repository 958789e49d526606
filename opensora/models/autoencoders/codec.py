"""What everything else asks of a video autoencoder: sizes, videos to normalised latents and back.

A codec is a network that turns a video into latents on which a diffusion model works, and latents into a video. The
pipeline, conditioning, data, training, evaluation and plans know this class alone; how a codec computes is its own
affair. `VideoAutoencoder` is one.

Tensors in and out of `encode_video`, `posterior` and `decode_latents` are plain; `encode`, `decode` and `forward` are
the same in diffusers' manner, for code that is written for its autoencoders.

Letters: B batch, T frames, H, W height and width in pixels, Z channels of a latent, N latent frames, h, w latent height
and width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.geometry import SizeRule
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.posterior import Generators, Posterior
from opensora.models.offload_hooks import apply_offload_hooks
from opensora.models.portable_config import PortableModelMixin


class VideoCodec(AutoencoderMixin, PortableModelMixin, ABC):
    """Base of a video autoencoder.

    A new one sets the three numbers without a default, implements the abstract methods, and overrides what is not true
    of it. What is here holds where a clip is one piece, and its first latent frame stands for what is left when the
    others take `temporal_factor` frames each. Methods that compute are decorated with `apply_offload_hooks`, so that
    offloading brings the weights in.

    Attributes:
        latent_channels: Z.
        spatial_factor: pixels per latent cell along height and width.
        temporal_factor: frames per latent frame; 1 where every frame has one of its own.
        declared_tensors: tensors in files of weights that only repeat the configuration.
        frame_multiple: frame counts that can be encoded are `frame_offset` + k * `frame_multiple`; 1 for all.
        frame_offset: see `frame_multiple`; (16, 1) for 1, 17, 33, ...
        single_frame: whether an image can be encoded as well, where the two say otherwise.
        micro_frame_size: frames of a chunk that knows nothing of the others; None where a clip is one piece.
        micro_batch_size: frames that are worked on at once, which bounds the memory and changes nothing but the
            rounding; None for all. Without effect where a codec cannot divide its work.
    """

    latent_channels: int
    spatial_factor: int
    temporal_factor: int
    declared_tensors: tuple[str, ...] = ()
    frame_multiple: int = 1
    frame_offset: int = 0
    single_frame: bool = False
    micro_frame_size: int | None = None
    micro_batch_size: int | None = None
    use_slicing: bool = False
    if TYPE_CHECKING:  # diffusers wraps it in a way that hides its signature

        def to(self, *args: Any, **kwargs: Any) -> Self: ...

    # ---- sizes

    @abstractmethod
    def latent_frames(self, num_frames: int) -> int:
        """N for a clip of `num_frames` frames.

        Raises:
            OpenSoraError: for a count that is none of the valid ones.
        """

    def size_rule(self, max_frames: int | None = None) -> SizeRule:
        """Which sizes can be encoded; `max_frames` is the limit of the model that uses the latents."""
        return SizeRule(
            self.spatial_factor, self.frame_multiple, self.frame_offset, max_frames, single_frame=self.single_frame
        )

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

    def frames_before(self, latent_frame: int, num_frames: int) -> int:
        """Video frames that latent frames 0 .. `latent_frame` - 1 of a clip of `num_frames` frames stand for."""
        total = self.latent_frames(num_frames)
        self._check_latent_frame(latent_frame, total, num_frames)
        return max(0, num_frames - (total - latent_frame) * self.temporal_factor)

    def frame_span(self, latent_frame: int, num_frames: int) -> tuple[int, int]:
        """The video frames that a latent frame of a clip of `num_frames` frames stands for: first, one past the last.

        Where chunks share a frame, two latent frames stand for it.
        """
        return self.frames_before(latent_frame, num_frames), self.frames_before(latent_frame + 1, num_frames)

    def chunk_start(self, frame: int, num_frames: int) -> int:
        """The first frame of the chunk in which a frame of a clip of `num_frames` lies.

        Where every frame has a latent frame of its own, that is the frame itself.
        """
        size = 1 if self.temporal_factor == 1 else self.micro_frame_size or num_frames
        return frame // size * size

    def shortest_clip(self, latent_frames: int) -> int:
        """Frames of the shortest clip that has so many latent frames: 5 -> 17 where four frames share one.

        Raises:
            OpenSoraError: no clip has.
        """
        rule = self.size_rule()
        num_frames = rule.frames_from(1)
        while (found := self.latent_frames(num_frames)) < latent_frames:
            num_frames = rule.frames_from(num_frames + 1)
        if found > latent_frames:
            raise OpenSoraError(f"no clip has {latent_frames} latent frames; one of {num_frames} frames has {found}")
        return num_frames

    @staticmethod
    def _check_latent_frame(latent_frame: int, total: int, num_frames: int) -> None:
        if not 0 <= latent_frame <= total:
            raise OpenSoraError(f"latent frame {latent_frame} asked for, but {num_frames} frames have {total}")

    # ---- latents

    @abstractmethod
    def posterior(self, video: Tensor) -> Posterior:
        """What is predicted of a video (B, 3, T, H, W) in [-1, 1]: a Gaussian over normalised latents (B, Z, N, h, w).

        Float32, whatever the weights run in. Its mode is what `encode_video` returns.

        Raises:
            OpenSoraError: for an impossible size, or pixels that are no floating point numbers.
        """

    def encode_video(self, video: Tensor, *, sample: bool = False, generator: Generators | None = None) -> Tensor:
        """Video (B, 3, T, H, W) in [-1, 1] -> normalised latents (B, Z, N, h, w), float32.

        Args:
            video: pixels.
            sample: draw from the posterior; otherwise its mode is taken and the result is deterministic.
            generator: source of the noise; one per clip if a list.

        Raises:
            OpenSoraError: for an impossible size, or a generator for an encoding that is not sampled.
        """
        if generator is not None and not sample:
            raise OpenSoraError("a generator given for a deterministic encoding; pass sample=True as well")
        posterior = self.posterior(video)
        return posterior.sample(generator) if sample else posterior.mode()

    @abstractmethod
    def decode_latents(self, latents: Tensor, num_frames: int) -> Tensor:
        """Normalised latents (B, Z, N, h, w) -> video (B, 3, num_frames, H, W), nominally in [-1, 1], float32.

        Raises:
            OpenSoraError: if the latents are not those of a clip of `num_frames` frames.
        """

    # ---- latent space

    @property
    def latent_space(self) -> LatentSpace:
        """The declaration in force; `latent_space.overridden` tells whether a user put it there."""
        return LatentSpace()

    def override_latent_space(self, latent_space: LatentSpace) -> None:
        """Uses another declaration than the checkpoint's; the config and every output remember both."""
        raise OpenSoraError(f"the latent space of a {type(self).__name__} is fixed; leave the override out")

    def latent_space_of(self, weights: Mapping[str, Tensor]) -> LatentSpace:
        """The checkpoint's own declaration with the figures that stand in stored weights, where those say otherwise."""
        return self.latent_space.declared_by_weights

    # ---- plans

    def decoders(self) -> list[tuple[nn.Module, str]]:
        """Modules and names of methods that decode a clip piece by piece.

        Pieces of one shape need the same memory, so plans trace one of them.
        """
        return []

    def encoders(self) -> list[nn.Module]:
        """Modules that encode a clip piece by piece; see `decoders`."""
        return []

    # ---- diffusers' manner

    @apply_offload_hooks
    def encode(self, video: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[Posterior]:
        """Video (B, 3, T, H, W) in [-1, 1] -> `latent_dist`, the posterior of its normalised latents.

        Unlike those of diffusers' autoencoders they need no scaling factor: they are as a diffusion model takes them.
        """
        posterior = self.posterior(video)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)  # type: ignore[arg-type]

    @apply_offload_hooks
    def decode(
        self, latents: Tensor, num_frames: int | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Normalised latents (B, Z, N, h, w) -> `sample`, a video (B, 3, T, H, W).

        Args:
            latents: of one clip each.
            num_frames: T; None for the shortest clip that has N latent frames.
            return_dict: False for a tuple.
        """
        video = self.decode_latents(latents, self.shortest_clip(latents.shape[2]) if num_frames is None else num_frames)
        return DecoderOutput(sample=video) if return_dict else (video,)

    def forward(
        self,
        video: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generators | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Reconstruction `sample` (B, 3, T, H, W) of a video of that shape."""
        latents = self.encode_video(video, sample=sample_posterior, generator=generator)
        return self.decode(latents, video.shape[2], return_dict)
