"""From figures to a verdict in words, and to what should be declared.

Latents are right where their deviation is 1 and no channel stands out; what has to be right is set here, and how sure
one must be to say so. A factor is called wrong where all of the interval that the deviation lies in is off.

Letters: f factor, m and s mean and deviation of a channel before the factor, b and c its declared shift and scale.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from opensora.lab.latents.known import KnownSpace, nearest_known
from opensora.lab.latents.statistics import ChannelFigures
from opensora.models.autoencoders.latent_space import Convention, LatentSpace

Place = Literal["one part", "between parts", "after parts"]
"""Where latents are declared: by factor, shift and scale; by the factor between a 2D part and a temporal part; by shift
and scale after the latter."""
Kind = Literal["good", "wrong factor", "normalise", "cannot tell"]

MOST_OFF = 1.15
"""How many times too large or too small latents may be: 0.28 in log-SNR. What clips show moves the deviation by a few
percent; the factors of Stable Diffusion and SDXL are 1.4 times each other."""
MOST_UNEVEN = 1.5
"""How many times the deviation of one channel may be that of another: 0.8 in log-SNR."""
MOST_SHIFTED = 0.3
"""How far a channel's mean may lie from 0."""


@dataclass(frozen=True)
class Verdict:
    """What is to be said of latents at one place.

    Attributes:
        place: which one.
        kind: in a word or two.
        text: in a sentence or two.
        right: the right declaration where the factor is wrong; None otherwise.
    """

    place: Place
    kind: Kind
    text: str
    right: LatentSpace | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "right": None if self.right is None else self.right.to_dict()}


def judge(
    place: Place, found: ChannelFigures, own: ChannelFigures, space: LatentSpace, known: list[KnownSpace]
) -> Verdict:
    """Whether latents are as a network expects them.

    Args:
        place: where they are declared.
        found: their figures, as declared.
        own: the same before the declaration.
        space: the declaration.
        known: declarations that may have been meant.
    """
    low, high = found.interval
    said = f"deviation {found.deviation:.3g} ({low:.3g} to {high:.3g}) where 1 is wanted"
    if not (_is_right(low) and _is_right(high)) and not (high < 1 / MOST_OFF or low > MOST_OFF):
        return Verdict(place, "cannot tell", f"{said}: cannot tell from so few clips; {_how_many(found)}")
    off = not _is_right(found.deviation)
    if off and place != "after parts" and (factor := right_factor(own, space)) > 0:
        right = with_factor(space, factor, convention_of(space, known))
        after = figures_under(own, right)
        if _is_right(after.deviation):
            text = f"{said}; the right factor is {_named(right, known)}, not {space.scaling_factor:g} "
            text += f"({space.convention})"
            if place == "one part" and (besides := _unevenness(after)):
                text += f". Besides, {besides}"
            return Verdict(place, "wrong factor", text, right)
    if place == "between parts":  # nothing there knows channels
        return Verdict(place, "good", said)
    unevenness = _unevenness(found)
    if off or unevenness:
        reason = unevenness or "shift and scale are those of other latents, or of none"
        return Verdict(place, "normalise", f"{said}; {reason}: normalise channel by channel")
    return Verdict(place, "good", f"{said}, channels even")


def right_factor(own: ChannelFigures, space: LatentSpace) -> float:
    """The factor that makes latents what they should be.

    Without shift and scale it is 1 / deviation. With them it is the f for which f m and f s are nearest to b and c, in
    units of c (least squares), and may come out negative where these are of quite other latents.
    """
    if space.shift is None and space.scale is None:
        return 1 / own.deviation
    shift, scale = _per_channel(space, len(own.mean))
    wanted = ((own.mean * shift + own.std * scale) / scale.square()).sum()
    return float(wanted / ((own.mean.square() + own.std.square()) / scale.square()).sum())


def convention_of(space: LatentSpace, known: list[KnownSpace]) -> Convention:
    """That of a declaration; where it has no factor, the one that is in use for such autoencoders."""
    if space.factor != 1.0:
        return space.convention
    return next((one.space for one in known if one.space.factor != 1.0), space).convention


def with_factor(space: LatentSpace, factor: float, convention: Convention) -> LatentSpace:
    """The declaration with another factor: what encoding multiplies by, declared in a convention."""
    return replace(space, scaling_factor=factor if convention == "multiply" else 1 / factor, convention=convention)


def normalising(own: ChannelFigures, space: LatentSpace, *, has_factor: bool = True) -> LatentSpace:
    """The declaration with shift and scale that make each channel's mean 0 and its deviation 1.

    Args:
        own: the latents' figures before factor, shift and scale.
        space: whose factor it keeps.
        has_factor: whether the factor comes before shift and scale; it lies elsewhere otherwise.
    """
    factor = space.factor if has_factor else 1.0
    shift, scale = own.mean * factor, (own.std * factor).clamp_min(1e-12)
    return replace(space, shift=tuple(shift.tolist()), scale=tuple(scale.tolist()), replaces=None)


def figures_under(own: ChannelFigures, space: LatentSpace, *, has_factor: bool = True) -> ChannelFigures:
    """Figures that latents would have under a declaration; of shift and scale that differ by frame, their means."""
    shift, scale = _per_channel(space, len(own.mean))
    factor = space.factor if has_factor else 1.0
    return own.transformed(factor / scale, -shift / scale)


def log_snr_offset(deviation: float) -> float:
    """By how much latents of some deviation are off in log-SNR: 2 ln a."""
    return 2 * math.log(deviation)


def configuration(space: LatentSpace) -> str:
    """The line of an autoencoder's `config.json` that declares it, in five digits."""
    values = {name: _rounded(value) for name, value in space.to_dict().items() if value not in (None, "")}
    return f'"latent_space": {json.dumps(values)}'


def _per_channel(space: LatentSpace, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    shift, scale = (figures.double().mean(dim=2).flatten() for figures in space.statistics(channels))
    return shift, scale


def _is_right(deviation: float) -> bool:
    return 1 / MOST_OFF <= deviation <= MOST_OFF


def _unevenness(found: ChannelFigures) -> str:
    """How uneven channels are beyond what clips differ; "" where they are not."""
    (least, low), (most, high) = ((float(value), int(where)) for value, where in (found.std.min(0), found.std.max(0)))
    shifted = float((found.mean.abs() - 1.96 * found.mean_errors).max())
    error = math.hypot(float(found.log_errors[low]), float(found.log_errors[high]))
    if not least or math.log(most / least) - 1.96 * error > math.log(MOST_UNEVEN):
        apart = f", {log_snr_offset(most / least):.2g} apart in log-SNR" if least else ""
        return f"channels are uneven, with deviations from {least:.3g} to {most:.3g}{apart}"
    if shifted > MOST_SHIFTED:
        return f"channels are uneven, with means up to {float(found.mean.abs().max()):.3g} from 0"
    return ""


def _how_many(found: ChannelFigures) -> str:
    if found.num_clips < 2:
        return "give 20 or more with `num_clips`"
    to_border = abs(abs(math.log(found.deviation)) - math.log(MOST_OFF))
    times = (1.96 * found.log_error / max(to_border, 0.005)) ** 2
    return f"some {max(math.ceil(found.num_clips * times), found.num_clips + 1):,} may tell (`num_clips`)"


def _named(space: LatentSpace, known: list[KnownSpace]) -> str:
    """A factor in its convention, and whose it may be."""
    near = nearest_known(space.factor, known)
    whose = "" if near is None else f", that of {near.name}: {near.space.scaling_factor:g} ({near.space.convention})"
    return f"{space.scaling_factor:.4g} ({space.convention}{whose})"


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
