"""Whether an autoencoder's latents are what a diffusion model expects, what they would be otherwise, and what to do."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from opensora import __version__
from opensora.lab.latents.advice import Advice, advise, factor_trained_with
from opensora.lab.latents.clips import Clips
from opensora.lab.latents.encoding import FactorTrial, Measured, measure_latents, try_factors, two_parts
from opensora.lab.latents.known import KnownSpace, known_spaces, nearest_known
from opensora.lab.latents.signal_to_noise import ClipSize, ScheduleShift, schedule_shifts, training_schedules
from opensora.lab.latents.statistics import ChannelFigures
from opensora.lab.latents.subject import Subject
from opensora.lab.latents.verdict import (
    Place,
    Verdict,
    configuration,
    figures_under,
    judge,
    log_snr_offset,
    normalising,
    with_factor,
)
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.latent_space import LatentSpace

_SAME = 0.02  # factors nearer than that are one factor


@dataclass(frozen=True)
class Alternative:
    """What latents would be under a declaration.

    Attributes:
        place: where it would be declared.
        name: of the declaration.
        space: the declaration.
        figures: what they would be.
    """

    place: Place
    name: str
    space: LatentSpace
    figures: ChannelFigures

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        deviation = self.figures.deviation
        return {
            "place": self.place,
            "name": self.name,
            "latent_space": self.space.to_dict(),
            "deviation": deviation,
            "log_snr": log_snr_offset(deviation) if deviation else None,
        }


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        name: of the model or autoencoder.
        clips: what was measured, in words.
        space: the declaration that was measured under.
        measured: the figures.
        verdicts: of each place where something is declared.
        alternatives: other declarations.
        trials: of two parts: what the temporal part makes of other factors.
        schedules: what these latents are to each way of training.
        advice: what to do.
        notes: what may surprise, one line each.
    """

    name: str
    clips: str
    space: LatentSpace
    measured: Measured
    verdicts: tuple[Verdict, ...]
    alternatives: tuple[Alternative, ...]
    trials: tuple[FactorTrial, ...]
    schedules: tuple[ScheduleShift, ...]
    advice: Advice
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        measured = self.measured
        return {
            "opensora": __version__,
            "model": self.name,
            "clips": self.clips,
            "latent_space": self.space.to_dict(),
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
            "latents": measured.normalised.to_dict(),
            "before_shift_and_scale": measured.own.to_dict(),
            "frame_latents": None if measured.frames is None else measured.frames.to_dict(),
            "histogram": measured.histogram.to_dict(),
            "spectrum": measured.spectrum.to_dict(),
            "alternatives": [alternative.to_dict() for alternative in self.alternatives],
            "trials": [asdict(trial) for trial in self.trials],
            "schedules": [shift.to_dict() for shift in self.schedules],
            "advice": {**asdict(self.advice), "from_scratch": self.advice.from_scratch.to_dict()},
            "notes": list(self.notes),
        }


def audit(
    subject: Subject, codec: VideoCodec, clips: Clips, on_clip: Callable[[int], None] = lambda number: None
) -> Audit:
    """Measures an autoencoder's latents and judges them.

    Args:
        subject: the autoencoder.
        codec: the same, loaded; with an override in force, that is what is judged.
        clips: what is encoded.
        on_clip: told how many clips are done.

    Raises:
        OpenSoraError: no clip can be used, or a size cannot be encoded.
    """
    measured, space = measure_latents(codec, clips, on_clip), codec.latent_space
    known, parts, trials = known_spaces(codec), two_parts(codec), list[FactorTrial]()
    verdicts = [judge(_place_of(measured), measured.normalised, measured.own, space, known)]
    if parts is not None and measured.frames is not None:
        trials = try_factors(parts, measured.kept, _factors(space, measured.frames, known))
        before = _judge_frames(measured.frames, space, known, trials)
        verdicts = [before, *(_follows(verdict, before, space, trials) for verdict in verdicts)]
    size, deviation = clips.size, measured.normalised.deviation
    schedules = training_schedules()
    if subject.process is not None:
        schedules = {"this model's": subject.process, **schedules}
    latent_frames = codec.latent_frames(size.num_frames)
    shifts = schedule_shifts(deviation, schedules, ClipSize(size.num_frames, size.height, size.width, latent_frames))
    return Audit(
        subject.name,
        clips.said,
        space,
        measured,
        tuple(verdicts),
        tuple(_alternatives(measured, space, known)),
        tuple(trials),
        tuple(shifts),
        advise(measured, space, verdicts, trials, known, subject.trained_on(codec)),
        tuple(_notes(measured, space, known, clips)),
    )


def _place_of(measured: Measured) -> Place:
    return "one part" if measured.frames is None else "after parts"


def _factors(space: LatentSpace, frames: ChannelFigures, known: list[KnownSpace]) -> dict[str, float]:
    """Factors that may have been meant between two parts, each once."""
    candidates = {
        "declared": space.factor,
        "declared by the weights": space.declared_by_weights.factor,
        **{one.name: one.space.factor for one in known},
        "1 / deviation": 1 / frames.deviation,
    }
    found: dict[str, float] = {}
    for name, factor in candidates.items():
        if all(abs(factor / other - 1) > _SAME for other in found.values()):
            found[name] = factor
    return found


def _judge_frames(
    frames: ChannelFigures, space: LatentSpace, known: list[KnownSpace], trials: list[FactorTrial]
) -> Verdict:
    """Whether the factor between two parts is right for the 2D part, and which one the temporal part is used to."""
    declared = LatentSpace(space.scaling_factor, space.convention)
    verdict = judge("between parts", figures_under(frames, declared), frames, declared, known)
    trained = factor_trained_with(trials)
    if verdict.kind != "wrong factor" or verdict.right is None:
        return verdict
    if trained is not None and trained.factor != space.factor:
        text = f"{verdict.text}. The temporal part was trained with {trained.factor:.4g}, with which it gives back most"
        return replace(verdict, text=text)
    off = 1 / (verdict.right.factor / space.factor)
    used = "gives back most with it" if trained is not None else "was presumably trained with it"
    text = (
        f"{verdict.text}. The temporal part {used}, so it stays with these weights: {off:.3g} times as large as meant, "
        f"{abs(log_snr_offset(off)):.2g} in log-SNR, which shift and scale after it are there to make up for. A "
        "temporal part trained from scratch takes the right one"
    )
    return replace(verdict, text=text)


def _follows(verdict: Verdict, before: Verdict, space: LatentSpace, trials: list[FactorTrial]) -> Verdict:
    """A verdict on shift and scale after a factor that the temporal part was not trained with."""
    trained = factor_trained_with(trials)
    if before.kind != "wrong factor" or verdict.kind == "good" or trained is None or trained.factor == space.factor:
        return verdict
    return replace(verdict, text=f"{verdict.text}; but put the factor before them right first")


def _alternatives(measured: Measured, space: LatentSpace, known: list[KnownSpace]) -> list[Alternative]:
    found: list[Alternative] = []
    place, one_part = _place_of(measured), measured.frames is None
    others: dict[str, LatentSpace] = {}
    if measured.frames is not None:
        for name, factor in _factors(space, measured.frames, known).items():
            other = LatentSpace(factor)
            found.append(Alternative("between parts", name, other, figures_under(measured.frames, other)))
        if space.shift is not None or space.scale is not None:
            others["no shift, no scale"] = replace(space, shift=None, scale=None)
    else:
        others |= {one.name: one.space for one in known if one.space.differences(space)}
        others["1 / deviation"] = with_factor(LatentSpace(), 1 / measured.own.deviation, space.convention)
    others["per channel"] = normalising(measured.own, space, has_factor=one_part)
    found.append(Alternative(place, "declared", space, measured.normalised))
    for name, other in others.items():
        figures = figures_under(measured.own, other, has_factor=one_part)
        found.append(Alternative(place, name, other, figures))
    return found


def _notes(measured: Measured, space: LatentSpace, known: list[KnownSpace], clips: Clips) -> list[str]:
    notes = []
    for one in known:
        other = one.space
        if other.convention == "divide":
            multiplying = replace(one, space=replace(other, convention="multiply"))
            mistaken = nearest_known(space.factor, [multiplying]) is not None
            notes.append(
                f"{one.name}: {other.scaling_factor:g} divides, which multiplies latents by {other.factor:.4g} and is "
                f"right for those of deviation {other.scaling_factor:g}, where these have {measured.own.deviation:.3g} "
                f"({other.trained_with}){'; here it is declared as if it multiplied' if mistaken else ''}"
            )
    if space.overridden:
        notes.append(f"looked at as if declared; the weights' own: {configuration(space.declared_by_weights)}")
    if clips.left_out:
        name, reason = next(iter(clips.left_out.items()))
        notes.append(f"clips left out: {len(clips.left_out)}, such as {name}: {reason}")
    if clips.num_read < clips.num_clips:
        notes.append(f"{clips.num_read} of {clips.num_clips} clips were there")
    return notes
