"""Which latent channels classifier-free guidance touches, and by which rule.

A *rule* of guidance names the branches of the network that it needs at a step, and makes one prediction of theirs
(:class:`GuidanceRule`). A branch is the network reading one thing: the text (``"text"``), no text or the negative
prompt (``"null"``), neither that nor any known frame (``"unconditional"``), or what else a text conditioner has. Rules
are the guiders of diffusers (:class:`GuiderRule`), those of :mod:`opensora.models.guidance_rules`, and any of a user's.

:class:`ChannelGuidance` restricts any rule to the chosen latent channels. The other latent channels keep the
conditional prediction, and so do the variance channels of a learned-variance network, which no rule then ever sees. The
first Open-Sora sampler guided 3 of 4 latent channels; its rectified-flow samplers guide all.

Letters: B batch, C latent channels, T frames, H rows, W columns, s guidance scale.
Default rule (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598, with s = 1 + w): ``uncond + s * (cond - uncond)``.
"""

import enum
import inspect
import logging
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias, TypeGuard, cast

import torch

from opensora.errors import OpenSoraError

if TYPE_CHECKING:
    from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance

CfgChannels: TypeAlias = int | Sequence[int] | Literal["all"] | None
"""The first k latent channels, these, or all of them (``None`` and ``"all"``)."""


class NotGiven(enum.Enum):
    """Type of :data:`NOT_GIVEN`; ``None`` cannot say "not given" because it already says "all channels"."""

    NOT_GIVEN = enum.auto()


NOT_GIVEN: Final = NotGiven.NOT_GIVEN


def merge_cfg_channel_alias(
    cfg_channels: CfgChannels | NotGiven = NOT_GIVEN,
    cfg_channel: CfgChannels | NotGiven = NOT_GIVEN,
    *,
    default: CfgChannels | NotGiven = None,
) -> CfgChannels | NotGiven:
    """Return the one of ``cfg_channels`` and its older spelling ``cfg_channel`` that was given, else ``default``.

    Raises:
        OpenSoraError: both were given, even with equal values.
    """
    if cfg_channels is not NOT_GIVEN and cfg_channel is not NOT_GIVEN:
        raise OpenSoraError(
            f"got cfg_channels={cfg_channels!r} and its alias cfg_channel={cfg_channel!r}; "
            "they are one option: give cfg_channels only"
        )
    if cfg_channels is not NOT_GIVEN:
        return cfg_channels
    return default if cfg_channel is NOT_GIVEN else cfg_channel


def resolve_cfg_channels(
    cfg_channels: CfgChannels, latent_channels: int, name: str = "cfg_channels"
) -> tuple[int, ...]:
    """Turn ``cfg_channels`` into ascending channel indices.

    Args:
        cfg_channels: an int k for the first k latent channels, a sequence of distinct indices in
            [0, ``latent_channels``), or ``None`` / ``"all"`` for every latent channel.
        latent_channels: C, the number of latent channels (without variance channels).
        name: of the argument, for messages.

    Returns:
        The guided channels, ascending, at least one.

    Raises:
        OpenSoraError: no channel, an index or count outside the latent, a duplicate, or another type.
    """
    if latent_channels < 1:
        raise OpenSoraError(f"got {latent_channels} latent channels; a latent has at least 1")
    if cfg_channels is None or (isinstance(cfg_channels, str) and cfg_channels == "all"):
        return tuple(range(latent_channels))
    expected = (
        f"expected a count from 1 to {latent_channels}, distinct indices from 0 to {latent_channels - 1}, or 'all'"
    )
    if isinstance(cfg_channels, str | bytes | bool) or not isinstance(cfg_channels, int | Sequence):
        raise OpenSoraError(f"got {name}={cfg_channels!r}; {expected}")
    if isinstance(cfg_channels, int):
        if not 1 <= cfg_channels <= latent_channels:
            raise OpenSoraError(f"got {name}={cfg_channels} for a latent of {latent_channels} channels; {expected}")
        return tuple(range(cfg_channels))
    indices = [_channel_index(value, name, expected) for value in cfg_channels]
    if not indices:
        raise OpenSoraError(f"got {name}=[], which guides nothing; {expected} (for no guidance: guidance_scale=1)")
    outside = [index for index in indices if not 0 <= index < latent_channels]
    if outside:
        raise OpenSoraError(f"got channel {outside[0]} in {name}={list(cfg_channels)}; {expected}")
    if len(set(indices)) != len(indices):
        raise OpenSoraError(f"got a channel twice in {name}={list(cfg_channels)}; {expected}")
    return tuple(sorted(indices))


def default_guider(
    guidance_scale: float, *, guidance_rescale: float = 0.0, start: float = 0.0, stop: float = 1.0
) -> "ClassifierFreeGuidance":
    """Build plain classifier-free guidance, ``uncond + guidance_scale * (cond - uncond)``.

    Args:
        guidance_scale: s >= 0; 1 is the conditional prediction (the unconditional branch is then not needed), 0 the
            unconditional one.
        guidance_rescale: 0 to 1, how far the guided prediction's standard deviation is brought back to that of the
            conditional one (Lin et al. 2023, https://arxiv.org/abs/2305.08891, section 3.4).
        start: fraction of the steps before which guidance is off.
        stop: fraction of the steps from which guidance is off again.

    Raises:
        OpenSoraError: a negative or non-finite scale, or a fraction outside its range.
    """
    check_guidance_scale(guidance_scale)
    if not 0.0 <= guidance_rescale <= 1.0:
        raise OpenSoraError(f"got guidance_rescale={guidance_rescale}; expected a number from 0 to 1")
    if not (0.0 <= start < 1.0 and start <= stop <= 1.0):
        raise OpenSoraError(
            f"got a guidance interval from {start} to {stop}; expected 0 <= start < 1, start <= stop <= 1"
        )
    with without_experimental_notice():
        from diffusers.guiders import ClassifierFreeGuidance

        return ClassifierFreeGuidance(
            guidance_scale=float(guidance_scale), guidance_rescale=guidance_rescale, start=start, stop=stop
        )


def check_guidance_scale(scale: float, name: str = "guidance_scale") -> None:
    """Raise :class:`OpenSoraError` unless a scale is a finite number >= 0."""
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not is_number or not math.isfinite(scale) or scale < 0:
        raise OpenSoraError(f"got {name}={scale!r}; expected a finite number >= 0 (1 = no guidance)")


@dataclass(frozen=True)
class GuidanceStep:
    """A step of a run, as far as guidance depends on it.

    Attributes:
        index: of the step, from 0.
        num_steps: of the run.
        timestep: that the network is told.
        conditioned: whether known frames are shown to the network in channels beside the noise.
        clips_known: for each clip of the batch, whether several of these follow each other, that is, they are no
            pictures; a single one is for all clips.
    """

    index: int
    num_steps: int
    timestep: torch.Tensor | float
    conditioned: bool = False
    clips_known: tuple[bool, ...] = (False,)


class GuidanceRule(Protocol):
    """How the predictions of several branches become one. A rule belongs to one run: it may remember its steps."""

    def branches(self, step: GuidanceStep) -> tuple[str, ...]:
        """Names of the branches that this step needs, one at least; no other is computed."""
        ...

    def combine(self, predictions: Mapping[str, torch.Tensor], step: GuidanceStep) -> torch.Tensor:
        """The guided prediction; called once per step, in order.

        Args:
            predictions: of the step's branches, each (B, C, T, H, W) or, with variance channels behind the latent ones,
                (B, 2C, T, H, W).
            step: which.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Its settings, as plain JSON values."""
        ...


class GuiderRule:
    """A guider of diffusers as a rule: the prediction with the text against the one without it.

    Any guider whose rule needs nothing but the conditional and the unconditional prediction works:
    ``ClassifierFreeGuidance``, ``AdaptiveProjectedGuidance``, ``ClassifierFreeZeroStarGuidance`` and their relatives.

    Whenever a guider is off (disabled, scale 1, or outside its start/stop interval) the result is the conditional
    prediction, bit for bit, and the unconditional branch is not computed.

    Args:
        guider: instance of a ``diffusers.guiders`` class; ``None`` means no guidance at all.

    Raises:
        OpenSoraError: a negative scale, or a guider that needs further network passes.
    """

    def __init__(self, guider: "BaseGuidance | None") -> None:
        if guider is not None:
            _check_guider(guider)
        self.guider = guider

    def branches(self, step: GuidanceStep) -> tuple[str, ...]:
        """``("text", "null")``, or ``("text",)`` where the guider is off."""
        if self.guider is None:
            return ("text",)
        self._enter(step)
        return ("text", "null") if self.guider.num_conditions > 1 else ("text",)

    def combine(self, predictions: Mapping[str, torch.Tensor], step: GuidanceStep) -> torch.Tensor:
        """The guided prediction, see :class:`GuidanceRule`; step 0 also clears what a guider remembers of a run.

        Raises:
            OpenSoraError: no unconditional prediction where the guider needs one.
        """
        cond, uncond = predictions["text"], predictions.get("null")
        if "null" not in self.branches(step):
            return cond
        assert self.guider is not None
        if uncond is None:
            raise OpenSoraError(
                f"step {step.index} is guided by {type(self.guider).__name__} but got no unconditional prediction; "
                "compute the branches that branches() names"
            )
        return self.guider.forward(cond, uncond).pred

    def describe(self) -> dict[str, Any]:
        """Scale and guider, as plain JSON values."""
        config = {} if self.guider is None else dict(self.guider.config)
        options = {name: value for name, value in config.items() if not name.startswith("_")}
        return {
            "guidance_scale": getattr(self.guider, "guidance_scale", None),
            "guider": None if self.guider is None else {"class": type(self.guider).__name__, **options},
        }

    def _enter(self, step: GuidanceStep) -> None:
        assert self.guider is not None
        # Typed as an integer tensor, but a guider only stores it.
        timestep = torch.as_tensor(step.timestep)
        self.guider.set_state(step.index, step.num_steps, timestep)  # pyright: ignore[reportArgumentType]
        if step.index == 0:
            # Guiders with momentum start a fresh average here; without it one run would leak into the next.
            self.guider.prepare_inputs({})  # pyright: ignore[reportArgumentType]


class ChannelGuidance:
    """A rule restricted to some latent channels; all others keep the prediction with the text.

    The rule is handed the guided channels alone, so norms, projections and standard deviations are taken over them. For
    a scale of its own for each channel see :mod:`opensora.models.channel_scales`.

    Args:
        guider: a rule, a ``diffusers.guiders`` guider (see :class:`GuiderRule`), or ``None`` for no guidance at all.
        cfg_channels: see :func:`resolve_cfg_channels`.
        latent_channels: C, the number of latent channels.

    Raises:
        OpenSoraError: channels outside the latent, or a guider that is no rule.
    """

    def __init__(
        self, guider: "GuidanceRule | BaseGuidance | None", cfg_channels: CfgChannels, latent_channels: int
    ) -> None:
        self.latent_channels = latent_channels
        self.channels = resolve_cfg_channels(cfg_channels, latent_channels)
        self.rule: GuidanceRule = guider if is_rule(guider) else GuiderRule(cast(Any, guider))

    def branches(self, step: GuidanceStep) -> tuple[str, ...]:
        """Those of the rule."""
        return self.rule.branches(step)

    def combine(self, predictions: Mapping[str, torch.Tensor], step: GuidanceStep) -> torch.Tensor:
        """Combine the predictions of one step.

        Args:
            predictions: of the branches, ``"text"`` among them: (B, C, T, H, W) or, with variance channels behind the
                latent ones, (B, 2C, T, H, W).
            step: which.

        Returns:
            Shape and dtype of the conditional prediction: guided on the chosen channels, equal to it everywhere else.

        Raises:
            OpenSoraError: wrong number of channels, differing shapes, or a missing branch.
        """
        if "text" not in predictions:
            raise OpenSoraError(
                f"got predictions of {', '.join(predictions)}; channels that are not guided (cfg_channels) keep that "
                "of the branch text, which the rule does not ask for: leave cfg_channels out, or let it ask"
            )
        cond = predictions["text"]
        allowed = (self.latent_channels, 2 * self.latent_channels)
        if cond.ndim < 2 or cond.shape[1] not in allowed:
            raise OpenSoraError(
                f"got a prediction of shape {tuple(cond.shape)}; for {self.latent_channels} latent channels its second "
                f"axis must be {allowed[0]}, or {allowed[1]} with learned variance"
            )
        for name, prediction in predictions.items():
            if prediction.shape != cond.shape:
                raise OpenSoraError(
                    f"got a prediction of shape {tuple(cond.shape)} for the branch text and one of "
                    f"{tuple(prediction.shape)} for {name}; they must be equal"
                )
        taken = {name: self._take(prediction) for name, prediction in predictions.items()}
        guided = self.rule.combine(taken, step)
        if guided is taken["text"]:
            return cond
        # Slices, not an index tensor: nothing has to be copied to the accelerator.
        result = cond.clone()
        for position, channel in enumerate(self.channels):
            result[:, channel] = guided[:, position]
        return result

    def describe(self) -> dict[str, Any]:
        """Guided channels and the rule, as plain JSON values."""
        return {"cfg_channels": list(self.channels), **self.rule.describe()}

    def _take(self, prediction: torch.Tensor) -> torch.Tensor:
        if self.channels == tuple(range(len(self.channels))):
            return prediction[:, : len(self.channels)]
        return torch.stack([prediction[:, channel] for channel in self.channels], dim=1)


def is_rule(guider: Any) -> TypeGuard[GuidanceRule]:
    """Whether this is a rule of guidance, and no guider of diffusers."""
    return hasattr(guider, "branches")


def _channel_index(value: Any, name: str, expected: str) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise OpenSoraError(f"got {value!r} as a channel in {name}; {expected}")


def _check_guider(guider: "BaseGuidance") -> None:
    from diffusers.guiders import BaseGuidance

    name = type(guider).__name__
    if not isinstance(guider, BaseGuidance):
        raise OpenSoraError(
            f"got {name} as guider; expected an instance of a diffusers.guiders class, e.g. ClassifierFreeGuidance(6.0)"
        )
    # A guider that changes the network itself (skipped layers, perturbed attention) would silently act as plain
    # guidance here, because this class only ever hands it two finished predictions.
    takes_two = list(inspect.signature(type(guider).forward).parameters) == ["self", "pred_cond", "pred_uncond"]
    if not takes_two or type(guider).prepare_models is not BaseGuidance.prepare_models:
        raise OpenSoraError(
            f"got {name}, which needs further passes through a changed network; expected a guider that combines the "
            "conditional and the unconditional prediction, e.g. ClassifierFreeGuidance or AdaptiveProjectedGuidance"
        )
    for attribute in ("guidance_scale", "adaptive_projected_guidance_scale"):
        if hasattr(guider, attribute):
            check_guidance_scale(getattr(guider, attribute))
    for scale in getattr(guider, "guidance_scales", ()):
        check_guidance_scale(scale)


@contextmanager
def without_experimental_notice() -> Iterator[None]:
    """Drop diffusers' notice that guiders are experimental, and only that one, while we build a guider ourselves."""

    def keep(record: logging.LogRecord) -> bool:
        return "experimental feature" not in record.getMessage()

    logger = logging.getLogger("diffusers.guiders.guider_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
