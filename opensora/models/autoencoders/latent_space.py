"""Which numbers a latent stands for: scaling factor, its convention, per-channel shift and scale, and their origin.

A diffusion model only works on the latents it was trained on, so these figures belong to the weights. There are two
steps, because the temporal autoencoder sits between them:

    frame latents of the 2D autoencoder  -- factor -->  input of the temporal autoencoder (or of the next step)
    video latents                        -- (z - shift) / scale -->  normalised latents

The factor multiplies in most autoencoders and divides in some; both are in use under the same name, so the convention
is part of the declaration.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from opensora.errors import OpenSoraError

Convention = Literal["multiply", "divide"]


@dataclass(frozen=True)
class LatentSpace:
    """The declaration that goes with one set of autoencoder weights.

    Args:
        scaling_factor: applied to what the 2D encoder predicts; positive.
        convention: whether encoding multiplies or divides by `scaling_factor`.
        shift: per latent channel, subtracted after encoding; None for 0.
        scale: per latent channel, divided by after the shift; positive; None for 1.
        trained_with: where the figures come from: a sentence or a hash of the weights they were measured on.
        replaces: the checkpoint's own declaration where a user's override took its place, as a dict; None otherwise.

    Raises:
        OpenSoraError: for figures that cannot be inverted or that contradict each other in length.
    """

    scaling_factor: float = 1.0
    convention: Convention = "multiply"
    shift: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None
    trained_with: str = ""
    replaces: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("shift", "scale"):
            values = getattr(self, name)
            if values is not None:  # JSON knows no tuples
                object.__setattr__(self, name, tuple(float(value) for value in values))
        if not (isfinite(self.scaling_factor) and self.scaling_factor > 0):
            raise OpenSoraError(f"scaling_factor {self.scaling_factor} given, but it must be a positive number")
        if self.convention not in ("multiply", "divide"):
            raise OpenSoraError(f'convention {self.convention!r} given, but it must be "multiply" or "divide"')
        if not all(isfinite(value) for value in self.shift or ()):
            raise OpenSoraError(f"shift {self.shift} given, but every channel needs a finite number")
        if not all(isfinite(value) and value > 0 for value in self.scale or ()):
            raise OpenSoraError(f"scale {self.scale} given, but every channel needs a positive number")
        if self.shift is not None and self.scale is not None and len(self.shift) != len(self.scale):
            raise OpenSoraError(
                f"shift has {len(self.shift)} channels and scale {len(self.scale)}; give one of each per latent channel"
            )

    # ---- the two steps, each with its inverse

    @property
    def factor(self) -> float:
        """What encoding multiplies the 2D latents by, whichever convention is declared."""
        return self.scaling_factor if self.convention == "multiply" else 1.0 / self.scaling_factor

    def scale_frames(self, frame_latents: Tensor) -> Tensor:
        """2D latents as the encoder predicts them -> as the temporal autoencoder or the next step expects them."""
        return frame_latents * self.factor

    def unscale_frames(self, frame_latents: Tensor) -> Tensor:
        """Inverse of `scale_frames`."""
        return frame_latents / self.factor

    def normalise(self, latents: Tensor) -> Tensor:
        """(z - shift) / scale per channel; latents (B, C, T, h, w) -> normalised latents, same shape."""
        shift, scale = self.statistics(latents.shape[1], latents.device)
        return (latents - shift) / scale

    def denormalise(self, latents: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        shift, scale = self.statistics(latents.shape[1], latents.device)
        return latents * scale + shift

    def statistics(self, channels: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Shift and scale as float32 tensors (1, C, 1, 1, 1).

        Raises:
            OpenSoraError: if the declaration is for another number of channels.
        """
        for name, values in (("shift", self.shift), ("scale", self.scale)):
            if values is not None and len(values) != channels:
                raise OpenSoraError(
                    f"the latent space declares {name} for {len(values)} channels, but the latents have {channels}"
                )
        shift = torch.tensor(self.shift or (0.0,) * channels, dtype=torch.float32, device=device)
        scale = torch.tensor(self.scale or (1.0,) * channels, dtype=torch.float32, device=device)
        return shift.view(1, -1, 1, 1, 1), scale.view(1, -1, 1, 1, 1)

    # ---- configuration

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON configuration."""
        values = asdict(self)
        for name in ("shift", "scale"):
            values[name] = None if values[name] is None else list(values[name])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatentSpace":
        """Inverse of `to_dict`; fields left out take their defaults.

        Raises:
            OpenSoraError: for a field that does not exist.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise OpenSoraError(f"latent space: unknown field {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**values)

    # ---- agreement

    def differences(self, other: "LatentSpace") -> dict[str, tuple[Any, Any]]:
        """The figures in which two declarations differ: name -> (this one's, the other's).

        A factor under the other convention, or shift 0 against none, is no difference: the latents are the same.
        """
        found: dict[str, tuple[Any, Any]] = {}
        if abs(self.factor - other.factor) > 1e-6 * self.factor:
            found["scaling_factor"] = (
                f"{self.scaling_factor:g} ({self.convention})",
                f"{other.scaling_factor:g} ({other.convention})",
            )
        for name, neutral in (("shift", 0.0), ("scale", 1.0)):
            mine, theirs = getattr(self, name), getattr(other, name)
            channels = len(mine or theirs or ())
            ours, others = mine or (neutral,) * channels, theirs or (neutral,) * channels
            if len(ours) != len(others) or any(
                abs(a - b) > 1e-6 * max(1.0, abs(a)) for a, b in zip(ours, others, strict=True)
            ):
                found[name] = (list(ours), list(others))
        return found

    def check_same(self, other: "LatentSpace", *, here: str, there: str) -> None:
        """Refuses two different declarations for one set of weights.

        Args:
            other: the second declaration.
            here: who makes this declaration ("config.json of the autoencoder").
            there: who makes the other one ("the transformer's training run").

        Raises:
            OpenSoraError: naming both values and the two ways out.
        """
        found = self.differences(other)
        if found:
            values = "; ".join(f"{name} is {a} in {here} but {b} in {there}" for name, (a, b) in found.items())
            raise OpenSoraError(
                f"two different latent spaces for one set of weights: {values}. Keep the checkpoint's and drop the "
                "other declaration, or pass override_latent_space=..., which is then recorded in every output"
            )

    def overriding(self, checkpoint: "LatentSpace") -> "LatentSpace":
        """This declaration in place of a checkpoint's own, which it remembers. Same figures: the checkpoint's stay."""
        original = LatentSpace.from_dict(checkpoint.replaces) if checkpoint.replaces is not None else checkpoint
        if not self.differences(original):
            return original
        return replace(self, replaces=original.to_dict())

    def instead_of(self, configured: Mapping[str, Any] | None) -> dict[str, Any]:
        """This declaration in place of a configured one whose weights are yet to be read, for the configuration.

        Unlike `overriding` it also stands where both have the same figures, for the weights may have others.
        """
        original = LatentSpace.from_dict(configured or {}).declared_by_weights
        return replace(self, replaces=original.to_dict()).to_dict()

    @property
    def overridden(self) -> bool:
        """Whether a user's override took the place of the checkpoint's declaration."""
        return self.replaces is not None

    @property
    def declared_by_weights(self) -> "LatentSpace":
        """The checkpoint's own declaration, also under an override."""
        return self if self.replaces is None else LatentSpace.from_dict(self.replaces)
