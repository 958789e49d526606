"""Which numbers a latent stands for: scaling factor, its convention, per-channel shift and scale, and their origin.

A diffusion model only works on the latents it was trained on, so these figures belong to the weights. There are two
steps, because the temporal autoencoder sits between them:

    frame latents of the 2D autoencoder  -- factor -->  input of the temporal autoencoder (or of the next step)
    video latents                        -- (z - shift) / scale -->  normalised latents

An autoencoder that is one network, space and time, has no first step of its own: its latents take both, one after the
other. The factor multiplies in most autoencoders and divides in some; both are in use under the same name, so the
convention is part of the declaration.

Shift and scale are one number per channel, or, where an autoencoder works in chunks, one for each latent frame of a
chunk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from opensora.contents import describe_value, parse_json, shown
from opensora.errors import OpenSoraError
from opensora.keywords import check_keywords

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Convention = Literal["multiply", "divide"]
Figures = tuple[float | tuple[float, ...], ...]
"""Per channel a number, or one for each latent frame of a chunk, as many in every channel."""


@dataclass(frozen=True)
class LatentSpace:
    """The declaration that goes with one set of autoencoder weights.

    Args:
        scaling_factor: applied to what the 2D encoder predicts; positive.
        convention: whether encoding multiplies or divides by `scaling_factor`.
        shift: `Figures`, subtracted after encoding; None for 0.
        scale: `Figures`, divided by after the shift; positive; None for 1.
        trained_with: where the figures come from: a sentence or a hash of the weights they were measured on.
        replaces: the checkpoint's own declaration where a user's override took its place, as a dict; None otherwise.

    Raises:
        OpenSoraError: for figures that cannot be inverted or that contradict each other in length.
    """

    scaling_factor: float = 1.0
    convention: Convention = "multiply"
    shift: Figures | None = None
    scale: Figures | None = None
    trained_with: str = ""
    replaces: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("shift", "scale"):
            values = getattr(self, name)
            if values is not None:  # JSON knows no tuples
                object.__setattr__(self, name, tuple(_entry(value) for value in values))
        if not (isfinite(self.scaling_factor) and self.scaling_factor > 0):
            raise OpenSoraError(f"scaling_factor {self.scaling_factor} given, but it must be a positive number")
        if self.convention not in ("multiply", "divide"):
            raise OpenSoraError(
                f'convention {shown(repr(self.convention))} given, but it must be "multiply" or "divide"'
            )
        if not all(isfinite(value) for row in _rows(self.shift) for value in row):
            raise OpenSoraError(f"shift {shown(self.shift)} given, but every channel needs a finite number")
        if not all(isfinite(value) and value > 0 for row in _rows(self.scale) for value in row):
            raise OpenSoraError(f"scale {shown(self.scale)} given, but every channel needs a positive number")
        for name in ("shift", "scale"):
            if len(lengths := {len(row) for row in _rows(getattr(self, name))}) > 1 or 0 in lengths:
                raise OpenSoraError(f"{name} has {sorted(lengths)} numbers in its channels; give as many in each")
        if self.shift is not None and self.scale is not None and len(self.shift) != len(self.scale):
            raise OpenSoraError(
                f"shift has {len(self.shift)} channels and scale {len(self.scale)}; give one of each per latent channel"
            )

    # ---- the two steps, each with its inverse

    @property
    def factor(self) -> float:
        """What encoding multiplies the 2D latents by, whichever convention is declared."""
        return self.scaling_factor if self.convention == "multiply" else 1.0 / self.scaling_factor

    def scale_frames(self, frame_latents: "Tensor") -> "Tensor":
        """2D latents as the encoder predicts them -> as the temporal autoencoder or the next step expects them."""
        return frame_latents * self.factor

    def unscale_frames(self, frame_latents: "Tensor") -> "Tensor":
        """Inverse of `scale_frames`."""
        return frame_latents / self.factor

    def normalise(self, latents: "Tensor") -> "Tensor":
        """(z - shift) / scale per channel; latents (B, C, T, h, w) -> normalised latents, same shape."""
        shift, scale = self.statistics_of(latents)
        return (latents - shift) / scale

    def denormalise(self, latents: "Tensor") -> "Tensor":
        """Inverse of `normalise`."""
        shift, scale = self.statistics_of(latents)
        return latents * scale + shift

    def statistics_of(self, latents: "Tensor") -> "tuple[Tensor, Tensor]":
        """Shift and scale as float32 tensors that broadcast over latents (B, C, N, h, w).

        Figures of P latent frames are repeated for every chunk of so many; of a lone latent frame they are the first.

        Raises:
            OpenSoraError: if the declaration is for another number of channels, or N is neither 1 nor a multiple of P.
        """
        shift, scale = self.statistics(latents.shape[1], latents.device)
        return _over_time(shift, latents.shape[2]), _over_time(scale, latents.shape[2])

    def statistics(self, channels: int, device: "torch.device | str | None" = None) -> "tuple[Tensor, Tensor]":
        """Shift and scale as float32 tensors (1, C, P, 1, 1), P latent frames of a chunk or 1 for all.

        Raises:
            OpenSoraError: if the declaration is for another number of channels.
        """
        for name, values in (("shift", self.shift), ("scale", self.scale)):
            if values is not None and len(values) != channels:
                raise OpenSoraError(
                    f"the latent space declares {name} for {len(values)} channels, but the latents have {channels}"
                )
        import torch

        shift = torch.tensor(_rows(self.shift or (0.0,) * channels), dtype=torch.float32, device=device)
        scale = torch.tensor(_rows(self.scale or (1.0,) * channels), dtype=torch.float32, device=device)
        return shift[None, :, :, None, None], scale[None, :, :, None, None]

    # ---- configuration

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON configuration."""
        values = asdict(self)
        for name in ("shift", "scale"):
            values[name] = None if values[name] is None else _as_lists(values[name])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatentSpace":
        """Inverse of `to_dict`; fields left out take their defaults.

        Raises:
            OpenSoraError: for a field that does not exist, or a value of another kind.
        """
        known = [field.name for field in fields(cls)]
        unknown = shown(", ".join(sorted(set(values) - set(known))))
        if unknown:
            raise OpenSoraError(f"latent space: unknown field {unknown}; known are {', '.join(known)}")
        check_keywords(cls.__init__, values, "latent space")
        return cls(**values)

    def changed(self, fields: Mapping[str, Any]) -> "LatentSpace":
        """Another declaration: these fields, and what they leave out as in this one. Where from is theirs to say.

        Raises:
            OpenSoraError: as `from_dict`.
        """
        return LatentSpace.from_dict({**self.to_dict(), "trained_with": "", "replaces": None, **fields})

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
            if not _same_figures(_rows(ours), _rows(others)):
                found[name] = (_as_lists(ours), _as_lists(others))
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
                "other declaration, or say which one holds (`latent_space`, override_latent_space=...), which is then "
                "recorded in every output"
            )

    def overriding(self, checkpoint: "LatentSpace") -> "LatentSpace":
        """This declaration in place of a checkpoint's own, which it remembers. Same figures: the checkpoint's stay."""
        original = LatentSpace.from_dict(checkpoint.replaces) if checkpoint.replaces is not None else checkpoint
        if not self.differences(original):
            return original
        return replace(self, replaces=original.to_dict())

    @property
    def overridden(self) -> bool:
        """Whether a user's override took the place of the checkpoint's declaration."""
        return self.replaces is not None

    @property
    def declared_by_weights(self) -> "LatentSpace":
        """The checkpoint's own declaration, also under an override."""
        return self if self.replaces is None else LatentSpace.from_dict(self.replaces)


Override = LatentSpace | Mapping[str, Any]
"""What takes the place of a checkpoint's declaration: another one, or fields of it, all others staying as declared."""


def override_configured(configured: Mapping[str, Any] | None, override: Override) -> dict[str, Any]:
    """A declaration in place of a configured one whose weights are yet to be read, for the configuration.

    Unlike `LatentSpace.overriding` it also stands where both have the same figures, for the weights may have others.

    Raises:
        OpenSoraError: fields that are none, or that do not fit those that stay.
    """
    declared = LatentSpace.from_dict(configured or {})
    wanted = override if isinstance(override, LatentSpace) else declared.changed(override)
    return replace(wanted, replaces=declared.declared_by_weights.to_dict()).to_dict()


def parse_override(said: float | str | Mapping[str, Any]) -> dict[str, Any]:
    """Fields that take the place of declared ones, as a user says them.

    Args:
        said: a scaling factor, `"0.13025"`, or fields as an autoencoder's `config.json` has them, as a JSON object:
            `{"shift": [0.1, 0, 0, 0], "scale": null}`.

    Raises:
        OpenSoraError: neither, or what can be in no declaration.
    """
    fields: Any = said
    if isinstance(said, str):
        try:
            fields = float(said)
        except ValueError:
            fields = parse_json(said, "`latent_space`") if said.lstrip().startswith("{") else said
    if isinstance(fields, float | int):
        fields = {"scaling_factor": fields}
    if not isinstance(fields, Mapping) or not set(fields) - {"trained_with"}:
        raise OpenSoraError(
            f"`latent_space` is {describe_value(fields)}, expected a scaling factor such as 0.18215, or a JSON object "
            "with some of scaling_factor, convention, shift and scale"
        )
    if "replaces" in fields:
        raise OpenSoraError("`latent_space` says what holds; leave out `replaces`, which is recorded by itself")
    LatentSpace.from_dict(fields)
    return dict(fields)


def _entry(value: float | Sequence[float]) -> float | tuple[float, ...]:
    return tuple(float(item) for item in value) if isinstance(value, Sequence) else float(value)


def _rows(figures: Figures | None) -> tuple[tuple[float, ...], ...]:
    """Channels x latent frames."""
    return tuple(value if isinstance(value, tuple) else (value,) for value in figures or ())


def _as_lists(figures: Figures) -> list[Any]:
    return [list(value) if isinstance(value, tuple) else value for value in figures]


def _same_figures(ours: tuple[tuple[float, ...], ...], others: tuple[tuple[float, ...], ...]) -> bool:
    """Whether two declarations say the same of every channel and latent frame."""
    if len(ours) != len(others):
        return False
    for mine, theirs in zip(ours, others, strict=True):
        frames = max(len(mine), len(theirs))  # one number stands for all latent frames
        mine, theirs = (row * frames if len(row) == 1 else row for row in (mine, theirs))
        if len(mine) != len(theirs):
            return False
        if any(abs(a - b) > 1e-6 * max(1.0, abs(a)) for a, b in zip(mine, theirs, strict=True)):
            return False
    return True


def _over_time(figures: "Tensor", latent_frames: int) -> "Tensor":
    """Figures (1, C, P, 1, 1) for so many latent frames; P = 1 broadcasts."""
    period = figures.shape[2]
    if period == 1 or latent_frames == 1:
        return figures[:, :, :1]
    if latent_frames % period:
        raise OpenSoraError(
            f"{latent_frames} latent frames given, but the latent space declares its figures for chunks of {period}; "
            f"give 1 or a multiple of {period}"
        )
    return figures.repeat(1, 1, latent_frames // period, 1, 1)
