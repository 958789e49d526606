"""Known frames as some networks read them: latents and a mask in channels beside the noise.

Open-Sora 1.0 to 1.2 are given known frames in place of the noise (`frame_mask` says which). From 1.3 on every frame is
generated, and what is known of it lies in channels of its own. One object for every such network, in training as in
sampling; how many channels the mask has, and how they are packed, is the network's affair.

Letters: B clips, C latent channels, T, H, W latent frames and cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.errors import OpenSoraError


@dataclass(frozen=True)
class ChannelConditioning:
    """What is known of the frames of some clips.

    No object at all and one in which no frame is known are not the same: published weights of Open-Sora 1.3 saw the
    second in training and the first in sampling.

    Attributes:
        latents: (B, C, T, H, W), normalised; what frames hold that are not known does not matter.
        mask: (B, T) bool, True where a frame is known.

    Raises:
        OpenSoraError: shapes that do not belong together, or another dtype of the mask.
    """

    latents: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        expected = (self.latents.shape[0], self.latents.shape[2]) if self.latents.ndim == 5 else None
        if self.mask.shape != expected or self.mask.dtype != torch.bool:
            raise OpenSoraError(
                f"channel conditioning has latents of shape {tuple(self.latents.shape)} and a mask "
                f"of {self.mask.dtype} {tuple(self.mask.shape)}; expected (B, C, T, H, W) and torch.bool (B, T)"
            )

    @classmethod
    def none(cls, latents: Tensor) -> "ChannelConditioning":
        """No frame known, of clips with latents of this shape."""
        mask = torch.zeros(len(latents), latents.shape[2], dtype=torch.bool, device=latents.device)
        return cls(torch.zeros_like(latents), mask)

    @property
    def masked_latents(self) -> Tensor:
        """(B, C, T, H, W), zeros where a frame is not known."""
        return torch.where(self.mask[:, None, :, None, None], self.latents, 0)

    @property
    def single_frames(self) -> Tensor:
        """(B, T) bool, True for known frames whose neighbours are not known: pictures, and not clips."""
        unknown = torch.nn.functional.pad(~self.mask, (1, 1), value=True)
        return self.mask & unknown[:, :-2] & unknown[:, 2:]

    def without_latents(self) -> "ChannelConditioning":
        """The same mask over zeros: which frames are known, but not what they show."""
        return ChannelConditioning(torch.zeros_like(self.latents), self.mask)

    def where(self, chosen: Tensor, other: "ChannelConditioning") -> "ChannelConditioning":
        """Clips of this where `chosen` (B,) is true, of another one elsewhere."""
        latents = torch.where(chosen[:, None, None, None, None], self.latents, other.latents)
        return ChannelConditioning(latents, torch.where(chosen[:, None], self.mask, other.mask))

    def to(self, device: torch.device | str) -> "ChannelConditioning":
        """The same on another device."""
        return ChannelConditioning(self.latents.to(device), self.mask.to(device))

    @staticmethod
    def cat(conditionings: "Sequence[ChannelConditioning]") -> "ChannelConditioning":
        """Clips of several batches, one batch after the other."""
        if len(conditionings) == 1:
            return conditionings[0]
        return ChannelConditioning(
            torch.cat([one.latents for one in conditionings]), torch.cat([one.mask for one in conditionings])
        )
