"""Rules of guidance of Open-Sora 1.3 and 2.0: text and image guided apart, with scales that change on the way.

One formula for all of it (Brooks et al. 2023, https://arxiv.org/abs/2211.09800, equation 3), with c the prediction that
reads text and known frames, u the one that reads the known frames alone and n the one that reads neither:
``v = n + g (u - n) + s (c - u)``, that is ``s c + (g - s) u + (1 - g) n``. A branch of weight 0 is not computed: where
both scales are 1 only c is, and without known frames u and n are one.

Letters: s text scale, g image scale, i step of n steps, T latent frames.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from opensora.errors import OpenSoraError
from opensora.models.guidance import GuidanceStep, check_guidance_scale

Oscillating = Literal["text", "image"]
ImageRamp = Literal["to_last_step", "past_last_step"]


def oscillating_scale(scale: float, index: int, steady_steps: int = 10) -> float:
    """A scale that is 1, no guidance, in every odd step from ``steady_steps`` on."""
    return scale if index < steady_steps or index % 2 == 0 else 1.0


def falling_scale(scale: float, end: float, index: int, last: int) -> float:
    """Linear from ``scale`` at step 0 to ``end`` at step ``last``."""
    return scale + (end - scale) * index / max(1, last)


class TextImageGuidance:
    """Text and image guidance with a scale each.

    In a run without known frames (:attr:`GuidanceStep.conditioned`) this is classifier-free guidance.

    Args:
        guidance_scale: s >= 0; 1 = no guidance by the text.
        image_guidance_scale: g >= 0; 1 = no guidance by the known frames.
        oscillating: which of the scales are 1 in every odd step from ``steady_steps`` on.
        steady_steps: the first steps, which have the whole scales.
        image_ramp: the image scale rises from ``image_ramp_start`` in the first latent frame to g in the last one, and
            the latter falls from step to step, to reach ``image_ramp_start`` in the last step (Open-Sora 1.3) or where
            one step more would be (2.0); ``None`` for g everywhere. Steps in which g is not above
            ``image_ramp_start`` have no ramp.
        image_ramp_start: see ``image_ramp``.
        image_ramp_for: known frames of which runs have the ramp, ``"all"`` (1.3) or ``"pictures"`` alone (2.0).
        guidance_rescale: 0 to 1, how far the standard deviation of the guided prediction is brought back to that of the
            conditional one (Lin et al. 2023, https://arxiv.org/abs/2305.08891, section 3.4), in runs without known
            frames alone; 0.7 is what Open-Sora 1.3 calls its flaw fix.

    Raises:
        OpenSoraError: a number out of range or an unknown name.
    """

    def __init__(
        self,
        guidance_scale: float,
        image_guidance_scale: float = 1.0,
        *,
        oscillating: Sequence[Oscillating] = (),
        steady_steps: int = 10,
        image_ramp: ImageRamp | None = None,
        image_ramp_start: float = 1.0,
        image_ramp_for: Literal["all", "pictures"] = "all",
        guidance_rescale: float = 0.0,
    ) -> None:
        check_guidance_scale(guidance_scale)
        for name, scale in (("image_guidance_scale", image_guidance_scale), ("image_ramp_start", image_ramp_start)):
            check_guidance_scale(scale, name)
        if isinstance(oscillating, str) or not set(oscillating) <= set(get_args(Oscillating)):
            raise OpenSoraError(f"got oscillating={oscillating!r}; expected a list of none, one or both of text, image")
        if image_ramp is not None and image_ramp not in get_args(ImageRamp):
            expected = " or ".join(get_args(ImageRamp))
            raise OpenSoraError(f"got image_ramp={image_ramp!r}; expected {expected}, or None for no ramp")
        if image_ramp_for not in ("all", "pictures"):
            raise OpenSoraError(f"got image_ramp_for={image_ramp_for!r}; expected all or pictures")
        if not 0.0 <= guidance_rescale <= 1.0:
            raise OpenSoraError(f"got guidance_rescale={guidance_rescale}; expected a number from 0 to 1")
        self.guidance_scale, self.image_guidance_scale = guidance_scale, image_guidance_scale
        self.oscillating, self.steady_steps = tuple(oscillating), steady_steps
        self.image_ramp, self.image_ramp_start = image_ramp, image_ramp_start
        self.image_ramp_for, self.guidance_rescale = image_ramp_for, guidance_rescale

    def branches(self, step: GuidanceStep) -> tuple[str, ...]:
        """``"text"``, ``"null"`` and ``"unconditional"`` (c, u and n), without those whose weight is 0."""
        text = self._text_scale(step)
        image = {scale for clips in set(step.clips_known) for scale in self._image_scales(step, clips)}
        needed = {"text": True, "null": image != {text}, "unconditional": image != {1.0}}
        return tuple(name for name, is_needed in needed.items() if is_needed)

    def combine(self, predictions: Mapping[str, torch.Tensor], step: GuidanceStep) -> torch.Tensor:
        """The formula of the module; see :class:`opensora.models.guidance.GuidanceRule`."""
        cond = predictions["text"]
        if len(predictions) == 1:
            return cond
        null = predictions.get("null", cond)
        unconditional = predictions.get("unconditional", null)
        image_scale = self.image_scale(step, cond)
        guided = unconditional + image_scale * (null - unconditional) + self._text_scale(step) * (cond - null)
        if step.conditioned or not self.guidance_rescale:
            return guided
        return _rescaled(guided, cond, self.guidance_rescale)

    def at_scale(self, scale: float) -> "TextImageGuidance":
        """The same rule with another text scale."""
        check_guidance_scale(scale)
        other = copy.copy(self)
        other.guidance_scale = scale
        return other

    def image_scale(self, step: GuidanceStep, like: torch.Tensor) -> torch.Tensor | float:
        """For a prediction (B, C, T, H, W): one number, or (B or 1, 1, T, 1, 1), one for each latent frame."""
        ends = [self._image_scales(step, clips) for clips in step.clips_known]
        if {scale for pair in ends for scale in pair} == {ends[0][0]}:
            return ends[0][0]
        num_frames, kind = like.shape[2], {"device": like.device, "dtype": like.dtype}
        ramps = [torch.linspace(first, last, num_frames, **kind) for first, last in ends]
        return torch.stack(ramps)[:, None, :, None, None]

    def describe(self) -> dict[str, Any]:
        """The scales and the options, as plain JSON values."""
        options = {
            "oscillating": list(self.oscillating),
            "steady_steps": self.steady_steps,
            "image_ramp": self.image_ramp,
            "image_ramp_start": self.image_ramp_start,
            "image_ramp_for": self.image_ramp_for,
            "guidance_rescale": self.guidance_rescale,
        }
        return {
            "guidance_scale": self.guidance_scale,
            "image_guidance_scale": self.image_guidance_scale,
            "guider": {"class": type(self).__name__, **options},
        }

    def _text_scale(self, step: GuidanceStep) -> float:
        return self._oscillated("text", self.guidance_scale, step)

    def _image_scales(self, step: GuidanceStep, clips_known: bool) -> tuple[float, float]:
        """Of the first and of the last latent frame of a clip of which a clip is known, or pictures are."""
        if not step.conditioned:
            return 1.0, 1.0
        scale, start = self._oscillated("image", self.image_guidance_scale, step), self.image_ramp_start
        left_out = clips_known and self.image_ramp_for == "pictures"
        if self.image_ramp is None or scale <= start or left_out:
            return scale, scale
        last = step.num_steps - (1 if self.image_ramp == "to_last_step" else 0)
        return start, falling_scale(scale, start, step.index, last)

    def _oscillated(self, name: Oscillating, scale: float, step: GuidanceStep) -> float:
        return oscillating_scale(scale, step.index, self.steady_steps) if name in self.oscillating else scale


class DistilledGuidance:
    """Guidance that the network was distilled to do itself: one branch, and the scale is told to it, as to FLUX.

    A network that has ``reads_guidance`` is told the scale of any rule.

    Args:
        guidance_scale: that it is told.

    Raises:
        OpenSoraError: a negative scale.
    """

    def __init__(self, guidance_scale: float) -> None:
        check_guidance_scale(guidance_scale)
        self.guidance_scale = guidance_scale

    def branches(self, step: GuidanceStep) -> tuple[str, ...]:
        """``("text",)``."""
        return ("text",)

    def combine(self, predictions: Mapping[str, torch.Tensor], step: GuidanceStep) -> torch.Tensor:
        """The prediction as it is."""
        return predictions["text"]

    def describe(self) -> dict[str, Any]:
        """The scale, as plain JSON values."""
        return {"guidance_scale": self.guidance_scale, "guider": {"class": type(self).__name__}}


def _rescaled(guided: torch.Tensor, cond: torch.Tensor, strength: float) -> torch.Tensor:
    """The guided prediction with the standard deviations of each sample brought back to the conditional one's."""
    axes = tuple(range(1, cond.ndim))
    ratio = cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return guided * (strength * ratio + (1 - strength))
