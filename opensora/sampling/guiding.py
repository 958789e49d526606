"""Which rule guides a call: the model's own, with the scales of the call, or one that the call brings."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from opensora.contents import describe_value
from opensora.errors import OpenSoraError
from opensora.keywords import check_keywords
from opensora.models.channel_scales import ChannelScaleGuidance, ChannelScales, resolve_channel_scales
from opensora.models.guidance import (
    NOT_GIVEN,
    CfgChannels,
    ChannelGuidance,
    GuidanceRule,
    GuiderRule,
    NotGiven,
    default_guider,
    is_rule,
)
from opensora.models.guidance_rules import DistilledGuidance, TextImageGuidance


def check_guidance_options(guidance_scale: float, options: Mapping[str, Any], transformer: Any) -> None:
    """Refuses a model's `guidance_options` that are no keywords of `TextImageGuidance`, or out of their range.

    Those of known frames are refused, too, where a transformer is not shown any: then it is another model's.

    Raises:
        OpenSoraError: naming the first such.
    """
    if not isinstance(options, Mapping):
        raise OpenSoraError(f"guidance_options is {describe_value(options)}, expected an object")
    if "guidance_scale" in options:
        raise OpenSoraError("guidance_options has a guidance_scale; the pipeline has one of its own, give that")
    check_keywords(TextImageGuidance.__init__, options, "guidance_options")
    TextImageGuidance(guidance_scale, **options)
    if "image_guidance_scale" in options and not transformer.reads_channels:
        raise OpenSoraError(
            "this model guides by known frames, which the transformer is not shown: it is another model's, such as one "
            "of pictures alone; put in the model's own, or leave image_guidance_scale out of guidance_options"
        )


class GuidingMixin:
    """Guidance of a pipeline's calls."""

    config: Any
    transformer: Any
    scheduler: Any
    autoencoder: Any

    @property
    def default_cfg_channels(self) -> CfgChannels:
        """Which channels are guided unless a call says otherwise: the model's, but all with DPM-Solver++."""
        return None if self.scheduler.guides_all_channels else self.config.cfg_channels

    def guidance_rule(
        self,
        guider: Any = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        cfg_channels: CfgChannels | NotGiven = NOT_GIVEN,
        channel_scales: ChannelScales | None = None,
    ) -> GuidanceRule:
        """A rule of guidance for one run, from the arguments of a call.

        A rule that the call brings combines all channels, those of the variance among them, unless channels are given.
        """
        if channel_scales is not None:
            self._check_one_scale_each(guidance_scale, cfg_channels)
        if guider is not None:
            for name, scale in (("guidance_scale", guidance_scale), ("image_guidance_scale", image_guidance_scale)):
                if scale is not None:
                    raise OpenSoraError(
                        f"got {name}={scale} and a {type(guider).__name__}, which has a scale of its own; "
                        "give one of them"
                    )
        latent_channels = self.autoencoder.latent_channels
        if channel_scales is not None:

            def rule_at(scale: float, channels: Sequence[int]) -> GuidanceRule:
                if guider is None:
                    return self.guidance_rule(None, scale, image_guidance_scale, channels)
                return self.guidance_rule(at_scale(guider, scale), None, None, channels)

            return ChannelScaleGuidance(resolve_channel_scales(channel_scales, latent_channels), rule_at)
        if is_rule(guider):
            rule = copy.deepcopy(guider)
            return rule if isinstance(cfg_channels, NotGiven) else ChannelGuidance(rule, cfg_channels, latent_channels)
        if guider is None:
            guider = self._default_rule(guidance_scale, image_guidance_scale)
        channels = self.default_cfg_channels if isinstance(cfg_channels, NotGiven) else cfg_channels
        return self.transformer.guidance_rule(copy.deepcopy(guider), channels, latent_channels)

    def _check_one_scale_each(self, guidance_scale: float | None, cfg_channels: CfgChannels | NotGiven) -> None:
        """Raises `OpenSoraError` where scales of channels stand beside what they replace, or cannot be."""
        if guidance_scale is not None or not isinstance(cfg_channels, NotGiven):
            given = "cfg_channels" if guidance_scale is None else "guidance_scale"
            raise OpenSoraError(f"`channel_scales` says the scale of every channel; leave out `{given}`")
        if self.transformer.reads_guidance:
            raise OpenSoraError(
                "guidance is distilled into this model's transformer, which is told one scale for all channels; give "
                "`guidance_scale` in place of `channel_scales`"
            )

    def _default_rule(self, guidance_scale: float | None, image_guidance_scale: float | None) -> Any:
        """The model's own, as a guider of diffusers or a rule."""
        options = dict(self.config.guidance_options or {})
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if image_guidance_scale is not None:
            if not self.transformer.reads_channels:
                raise OpenSoraError(
                    f"got `image_guidance_scale` {image_guidance_scale:g}; this model is not shown known frames beside "
                    "the noise and cannot be guided by them: leave it out"
                )
            options["image_guidance_scale"] = image_guidance_scale
        return own_rule(self.transformer, scale, options)


def own_rule(transformer: Any, scale: float, options: Mapping[str, Any]) -> Any:
    """How a model guides by itself, as a guider of diffusers or a rule, for the transformer's `guidance_rule`.

    Args:
        transformer: of the model.
        scale: of guidance.
        options: keywords of `TextImageGuidance`; none for plain guidance.
    """
    if options:
        return TextImageGuidance(scale, **options)
    return DistilledGuidance(scale) if transformer.reads_guidance else default_guider(scale)


def at_scale(guider: Any, scale: float) -> Any:
    """A copy of a guider of diffusers, or of a rule that has a method `at_scale`, at another scale.

    A guider that counts from 0 (`use_original_formulation`) is set to `scale - 1`, which is as much.

    Raises:
        OpenSoraError: it has no scale, or several.
    """
    name = type(guider).__name__
    if is_rule(guider):
        rule_at = getattr(guider, "at_scale", None)
        if rule_at is None:
            raise OpenSoraError(
                f"got `channel_scales` and a {name}, which does not say what it is at another scale; give it a method "
                "at_scale(scale)"
            )
        return rule_at(scale)
    GuiderRule(guider)  # refuses what is no guider
    scales = [option for option in guider.config if "guidance_scale" in option]
    if scales != ["guidance_scale"]:
        found = ", ".join(scales) or "none"
        raise OpenSoraError(f"got `channel_scales` and a {name}, whose scales are {found}; expected one with a scale")
    other = copy.deepcopy(guider)
    other.guidance_scale = scale
    if getattr(guider, "use_original_formulation", False):
        if scale < 1:
            raise OpenSoraError(f"a {name} with use_original_formulation has no scale below 1, such as {scale:g}")
        other.guidance_scale = scale - 1
    return other
