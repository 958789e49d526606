"""A guidance scale for each latent channel: as it is written, as numbers, and as a rule of guidance.

Each scale that occurs is the rule at that scale, handed exactly the channels that have it. So "s on the first k
channels" is the scales s for these and 1 for the others, and a rule that takes norms or standard deviations takes them
over the channels of one scale. A channel of scale 1 keeps the conditional prediction; where all have it, no other
branch is computed. Rules that guide by known frames as well (:class:`opensora.models.guidance_rules.TextImageGuidance`)
have a text scale for each channel, and guide every channel by the frames, those of text scale 1 too.

Letters: C latent channels, s guidance scale.
"""

import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from opensora.contents import describe_value, parse_json, shown
from opensora.errors import OpenSoraError
from opensora.limits import NETWORK_SIZE, parse_count

if TYPE_CHECKING:
    from torch import Tensor

    from opensora.models.guidance import GuidanceRule, GuidanceStep

ChannelScales: TypeAlias = Sequence[float] | str
"""One scale for each latent channel: a list, the same as JSON text, or ranges (``"0-2:7,3:1"``)."""

_EXPECTED = "expected a scale for each latent channel: a list such as [7, 7, 7, 1], or ranges such as 0-2:7,3:1"
_MOST_CHARACTERS = 10_000
_MOST_CHANNELS = 65_536  # latents have 4 to 128


def resolve_channel_scales(channel_scales: ChannelScales, latent_channels: int) -> tuple[float, ...]:
    """Turn ``channel_scales`` into one scale for each channel.

    Args:
        channel_scales: C finite numbers >= 0, or ranges that hold every channel once. A channel without a scale is a
            mistake: whether it would be left unguided or at the model's own scale is not for us to guess.
        latent_channels: C.

    Raises:
        OpenSoraError: as :func:`parse_channel_scales`; too few, too many, or a channel outside the latent.
    """
    parsed = parse_channel_scales(channel_scales)
    if isinstance(parsed, tuple):
        if len(parsed) != latent_channels:
            raise OpenSoraError(
                f"`channel_scales` has {len(parsed)} scales, expected {latent_channels}: one for each latent channel"
            )
        return parsed
    following = 0
    for channels in [*parsed, range(latent_channels, latent_channels)]:
        if channels.stop > latent_channels:
            raise OpenSoraError(
                f"`channel_scales` names channel {channels.stop - 1}, expected channels from 0 to {latent_channels - 1}"
            )
        if channels.start > following:
            missing, first, last = _named(range(following, channels.start)), following, channels.start - 1
            written = f"{first}" if first == last else f"{first}-{last}"
            raise OpenSoraError(f"`channel_scales` leaves out {missing}; add {written}:1 for no guidance there")
        following = channels.stop
    return tuple(scale for channels, scale in parsed.items() for _ in channels)


def parse_channel_scales(channel_scales: ChannelScales) -> tuple[float, ...] | dict[range, float]:
    """What can be said of ``channel_scales`` without knowing the latent: its scales, or ascending ranges and theirs.

    Raises:
        OpenSoraError: neither a list of finite numbers >= 0 nor ranges of such, a range that runs backwards, or a
            channel twice.
    """
    if isinstance(channel_scales, str):
        if len(channel_scales) > _MOST_CHARACTERS:
            raise OpenSoraError(
                f"`channel_scales` is {shown(channel_scales)}, expected at most {_MOST_CHARACTERS:,} characters"
            )
        if not channel_scales.strip().startswith("["):
            return _parse_ranges(channel_scales)
        channel_scales = parse_json(channel_scales, "`channel_scales`")
    if not isinstance(channel_scales, list | tuple) or not channel_scales:
        raise OpenSoraError(f"`channel_scales` is {describe_value(channel_scales)}, {_EXPECTED}")
    if len(channel_scales) > _MOST_CHANNELS:
        raise OpenSoraError(f"`channel_scales` has {len(channel_scales):,} scales, expected at most {_MOST_CHANNELS:,}")
    return tuple(_checked(scale, range(channel, channel + 1)) for channel, scale in enumerate(channel_scales))


class ChannelScaleGuidance:
    """A rule of guidance with a scale for each latent channel, see the module.

    Args:
        scales: one for each of the C latent channels, >= 0.
        rule_at: the rule at a scale, on these channels; each rule remembers its own steps.
    """

    def __init__(self, scales: Sequence[float], rule_at: Callable[[float, tuple[int, ...]], "GuidanceRule"]) -> None:
        self.scales = tuple(scales)
        channels_of = {scale: tuple(c for c, own in enumerate(scales) if own == scale) for scale in scales}
        self.parts = tuple((channels, rule_at(scale, channels)) for scale, channels in channels_of.items())

    def branches(self, step: "GuidanceStep") -> tuple[str, ...]:
        """Those that any of the scales needs."""
        return tuple(dict.fromkeys(name for _, rule in self.parts for name in rule.branches(step)))

    def combine(self, predictions: "Mapping[str, Tensor]", step: "GuidanceStep") -> "Tensor":
        """Each channel as the rule at its scale has it; see :class:`opensora.models.guidance.GuidanceRule`.

        Variance channels are as the rule of the first channel has them: those of the conditional prediction.
        """
        by_scale = [
            (channels, rule.combine({name: predictions[name] for name in rule.branches(step)}, step))
            for channels, rule in self.parts
        ]
        result = by_scale[0][1]
        if all(guided is result for _, guided in by_scale):
            return result
        result = result.clone()
        for channels, guided in by_scale[1:]:
            for channel in channels:  # slices: nothing has to be copied to the accelerator
                result[:, channel] = guided[:, channel]
        return result

    def describe(self) -> dict[str, Any]:
        """The scales, and the rule without one, as plain JSON values."""
        said = self.parts[0][1].describe()
        if guider := said.get("guider"):
            said = {**said, "guider": {name: value for name, value in guider.items() if name != "guidance_scale"}}
        return {**said, "cfg_channels": None, "guidance_scale": None, "channel_scales": list(self.scales)}


def _parse_ranges(text: str) -> dict[range, float]:
    scales: list[tuple[range, float]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*:\s*([-+.\da-zA-Z]+)\s*", part, re.ASCII)
        if match is None:
            raise OpenSoraError(f"`channel_scales` is {shown(text)!r}, {_EXPECTED}")
        first = parse_count("a channel of `channel_scales`", match[1], NETWORK_SIZE, 0)
        last = parse_count("a channel of `channel_scales`", match[2] or match[1], NETWORK_SIZE, 0)
        if last < first:
            raise OpenSoraError(
                f"`channel_scales` has the range {first}-{last}, which runs backwards; write {last}-{first}"
            )
        channels = range(first, last + 1)
        try:
            scale = float(match[3])
        except ValueError:
            raise OpenSoraError(f"`channel_scales` is {shown(text)!r}, {_EXPECTED}") from None
        scales.append((channels, _checked(scale, channels)))
    scales.sort(key=lambda one: one[0].start)
    for (before, _), (after, _) in itertools.pairwise(scales):
        if after.start < before.stop:
            raise OpenSoraError(f"`channel_scales` names channel {after.start} twice; give each one scale")
    return dict(scales)


def _checked(scale: Any, channels: range) -> float:
    """A scale as a number."""
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not is_number or not 0 <= scale <= sys.float_info.max:
        said = f"the number {scale:g}" if isinstance(scale, float) else describe_value(scale)
        raise OpenSoraError(
            f"`channel_scales` holds {said} for {_named(channels)}, expected a finite number >= 0 (1 = no guidance)"
        )
    return float(scale)


def _named(channels: range) -> str:
    """`channel 3`, or `channels 3 to 5`."""
    first, last = channels.start, channels.stop - 1
    return f"channel {first}" if first == last else f"channels {first} to {last}"
