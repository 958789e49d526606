"""Which rule guides a call: the model's own, with the scales of the call, or one that the call brings."""

import copy
from collections.abc import Mapping
from typing import Any

from opensora.contents import describe_value
from opensora.errors import OpenSoraError
from opensora.keywords import check_keywords
from opensora.models.guidance import (
    CfgChannels,
    ChannelGuidance,
    GuidanceRule,
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

    def _guidance_rule(
        self,
        guider: Any,
        guidance_scale: float | None,
        image_guidance_scale: float | None,
        cfg_channels: CfgChannels | NotGiven,
    ) -> GuidanceRule:
        """A rule of guidance for one run, from the arguments of a call.

        A rule that the call brings combines all channels, those of the variance among them, unless channels are given.
        """
        if guider is not None:
            for name, scale in (("guidance_scale", guidance_scale), ("image_guidance_scale", image_guidance_scale)):
                if scale is not None:
                    raise OpenSoraError(
                        f"got {name}={scale} and a {type(guider).__name__}, which has a scale of its own; "
                        "give one of them"
                    )
        latent_channels = self.autoencoder.latent_channels
        if is_rule(guider):
            rule = copy.deepcopy(guider)
            return rule if isinstance(cfg_channels, NotGiven) else ChannelGuidance(rule, cfg_channels, latent_channels)
        if guider is None:
            guider = self._default_rule(guidance_scale, image_guidance_scale)
        channels = self.default_cfg_channels if isinstance(cfg_channels, NotGiven) else cfg_channels
        return self.transformer.guidance_rule(copy.deepcopy(guider), channels, latent_channels)

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
        if options:
            return TextImageGuidance(scale, **options)
        return DistilledGuidance(scale) if self.transformer.reads_guidance else default_guider(scale)
