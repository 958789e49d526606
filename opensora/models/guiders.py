"""Guiders of diffusers by name: ways to combine the prediction with the text and the one without it.

A guider is said in one line, `NAME` or `NAME:OPTION=VALUE,...`, with the options that diffusers gives it:
`apg:eta=0,adaptive_projected_guidance_rescale=2.5`, `cfg:guidance_rescale=0.7`. Its scale is that of the clip. Those
that need further passes through the network, or pictures without time, are not among them.

- cfg: classifier-free guidance (Ho and Salimans 2022), with `guidance_rescale` (Lin et al. 2023), `start` and `stop`.
- apg: adaptive projected guidance (Sadat et al. 2024, https://arxiv.org/abs/2410.02416).
- cfg-zero-star: an optimised scale of the prediction without text, first steps zero (Fan et al. 2025,
  https://arxiv.org/abs/2503.18886).
- tangential: the part along the tangent (Kwon et al. 2025, https://arxiv.org/abs/2503.18137).
"""

import json
from typing import TYPE_CHECKING, Any

from opensora.contents import shown
from opensora.errors import OpenSoraError
from opensora.keywords import check_keywords
from opensora.settings import nearest_name

if TYPE_CHECKING:
    from diffusers.guiders import BaseGuidance

GUIDERS = {
    "cfg": "ClassifierFreeGuidance",
    "apg": "AdaptiveProjectedGuidance",
    "cfg-zero-star": "ClassifierFreeZeroStarGuidance",
    "tangential": "TangentialClassifierFreeGuidance",
}
"""Name -> class of `diffusers.guiders`."""
_MOST_CHARACTERS = 1_000


def parse_guider(text: str) -> tuple[str, dict[str, Any]]:
    """`"apg:eta=0"` -> ("apg", {"eta": 0}).

    Raises:
        OpenSoraError: an unknown name, or options that are not written so.
    """
    if len(text) > _MOST_CHARACTERS:
        raise OpenSoraError(f"`guider` is {shown(text)}, expected at most {_MOST_CHARACTERS} characters")
    name, _, said = text.partition(":")
    if name not in GUIDERS:
        raise OpenSoraError(f"unknown guider {shown(name)!r}{nearest_name(name, GUIDERS)}")
    options: dict[str, Any] = {}
    for part in filter(None, said.split(",")):
        option, equals, value = part.partition("=")
        if not equals or not value:
            raise OpenSoraError(f"`guider` is {shown(text)!r}, expected options such as {name}:guidance_rescale=0.7")
        if option in options:
            raise OpenSoraError(f"`guider` is {shown(text)!r}, which says {option} twice")
        if option == "guidance_scale":
            raise OpenSoraError("the scale of a guider is `guidance_scale`; leave it out of `guider`")
        try:
            options[option] = json.loads(value)
        except (ValueError, RecursionError):
            options[option] = value
    return name, options


def make_guider(text: str, scale: float) -> "BaseGuidance":
    """The guider that a line says, at a scale.

    Raises:
        OpenSoraError: as `parse_guider`; options that this guider does not have, or a scale below 0.
    """
    from opensora.models.guidance import check_guidance_scale, without_experimental_notice  # which need torch

    name, options = parse_guider(text)
    check_guidance_scale(scale)
    with without_experimental_notice():
        from diffusers import guiders

        kind = getattr(guiders, GUIDERS[name])
        check_keywords(kind.__init__, options, f"guider {name}")
        try:
            return kind(guidance_scale=float(scale), **options)
        except (TypeError, ValueError) as error:
            raise OpenSoraError(f"guider {name}: {shown(' '.join(str(error).split()), 200)}") from None
