"""A codec whose latent space is declared in its configuration: what is declared is what computes."""

import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.latent_space import LatentSpace, Override, override_configured

# Options of `from_pretrained` that say where a configuration is found.
_WHERE = ("subfolder", "revision", "cache_dir", "force_download", "local_files_only", "token", "proxies")
# Keywords that may be other than in the folder: the weights are the same.
_FREE = ("self", "micro_frame_size", "micro_batch_size")


class DeclaredCodec(VideoCodec):
    """Base of a codec with `latent_space`, fields of a `LatentSpace`, among its keywords.

    Its `__init__` calls `_declare` when `latent_channels` is set.
    """

    def _declare(self, latent_space: LatentSpace) -> None:
        """The declaration that goes with the weights, when the model is built."""
        latent_space.statistics(self.latent_channels)
        self._latent_space = latent_space

    @property
    def latent_space(self) -> LatentSpace:
        """The declaration in force; `latent_space.overridden` tells whether a user put it there."""
        return self._latent_space

    def set_latent_space(self, latent_space: LatentSpace) -> None:
        """Declares what these weights' latents stand for, after training them."""
        latent_space.statistics(self.latent_channels)
        self._latent_space = latent_space
        self.register_to_config(latent_space=latent_space.to_dict())

    def override_latent_space(self, latent_space: LatentSpace) -> None:
        """Uses another declaration than the checkpoint's; the config and every output remember both."""
        self.set_latent_space(latent_space.overriding(self.latent_space))

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
            latents = self.latent_space.denormalise(self.encode_video(video)).transpose(0, 1).flatten(1).cpu().double()
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

    def _check_latents(self, latents: Tensor, num_frames: int) -> None:
        """Refuses latents that are not those of a clip of `num_frames` frames."""
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels:
            raise OpenSoraError(
                f"latents of shape {tuple(latents.shape)} given, expected (B, {self.latent_channels}, N, h, w)"
            )
        expected = self.latent_frames(num_frames)
        if latents.shape[2] != expected:
            raise OpenSoraError(
                f"{latents.shape[2]} latent frames given for a video of {num_frames} frames, which has {expected}"
            )

    def _check_video(self, video: Tensor) -> None:
        """Refuses what is no video of a size that can be encoded."""
        if video.ndim != 5 or video.shape[1] != 3:
            raise OpenSoraError(f"video of shape {tuple(video.shape)} given, expected (B, 3, T, H, W)")
        if not video.is_floating_point():
            raise OpenSoraError(f"video of {video.dtype} given, expected floating point in [-1, 1]; use x / 127.5 - 1")
        self.latent_size((video.shape[2], video.shape[3], video.shape[4]))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        override_latent_space: Override | None = None,
        **loading: Any,
    ) -> Self:
        """Loads a folder as diffusers does, and holds its latent space against the one in the weights.

        Args:
            pretrained_model_name_or_path: the folder.
            override_latent_space: used instead of the folder's, or of those fields of it, and recorded as such.
            **loading: diffusers' own options (`subfolder`, `torch_dtype`, ...).

        Raises:
            OpenSoraError: if configuration and weights declare different latent spaces and no override is given, or
                for a configuration field among the options.
        """
        fields = sorted((set(inspect.signature(cls.__init__).parameters) - set(_FREE)) & set(loading))
        if fields:
            raise OpenSoraError(
                f"{', '.join(fields)} given, but the folder's own configuration belongs to its weights; "
                "keep it, or pass override_latent_space=... to replace the latent space"
            )
        if isinstance(loading.get("device_map"), dict):  # it is added to
            loading["device_map"] = dict(loading["device_map"])
        if override_latent_space is not None:
            found = {name: loading[name] for name in _WHERE if name in loading}
            config: Any = cls.load_config(pretrained_model_name_or_path, **found)
            loading["latent_space"] = override_configured(config.get("latent_space"), override_latent_space)
        return super().from_pretrained(pretrained_model_name_or_path, **loading)
