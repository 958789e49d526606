"""What to do about latents that are as they are.

Released weights keep the latent space that transformers were trained on, right or wrong; whoever trains from scratch
takes what is measured. A temporal part is bound to the factor before it in the same way.
"""

from dataclasses import dataclass, replace

import torch

from opensora.lab.latents.encoding import FactorTrial, Measured
from opensora.lab.latents.known import KnownSpace
from opensora.lab.latents.verdict import Verdict, configuration, convention_of, normalising, with_factor
from opensora.models.autoencoders.latent_space import Convention, LatentSpace

_LEAST_DB, _CLEARLY_DB = 20.0, 0.2  # of a temporal part that was trained; by which one factor is better than others


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        keep: with these weights, in a sentence.
        from_scratch: what a training from scratch declares.
        lines: what to paste for it, by what it is; none where nothing is wrong.
    """

    keep: str
    from_scratch: LatentSpace
    lines: dict[str, str]


def factor_trained_with(trials: list[FactorTrial]) -> FactorTrial | None:
    """The factor with which a temporal part gives back most; None if none is clearly better than all others.

    Clearly is by more than a little, and by more than twice the standard error of what clips differ.
    """
    if len(trials) < 2:
        return None
    best = max(trials, key=lambda trial: trial.decibels)
    for other in trials:
        gains = torch.tensor(best.clips_db) - torch.tensor(other.clips_db)
        error = float(gains.std()) / len(gains) ** 0.5 if len(gains) > 1 else float("inf")
        if other is not best and not float(gains.mean()) > max(_CLEARLY_DB, 2 * error):
            return None
    return best if best.decibels >= _LEAST_DB else None


def advise(
    measured: Measured,
    space: LatentSpace,
    verdicts: list[Verdict],
    trials: list[FactorTrial],
    known: list[KnownSpace],
    trained_on: str,
) -> Advice:
    """What to do with these weights, and in a training from scratch.

    Args:
        measured: the figures.
        space: the declaration that was measured under.
        verdicts: of the places where something is declared, the transformer's last.
        trials: of two parts, of other factors.
        known: declarations that may have been meant.
        trained_on: who was trained on these latents; "" for nobody.
    """
    own, good = space.declared_by_weights, all(verdict.kind == "good" for verdict in verdicts)
    if space.overridden:
        keep = "the declaration was overridden; leave them their own, " + configuration(own)
    elif trained_on:
        learnt = "" if good else "; whatever is wrong with it was learnt as well"
        keep = f"keep what is declared, for {trained_on} was trained on it{learnt}"
    elif good:
        keep = "nothing is to be changed"
    else:
        keep = "nothing is known to be trained on these latents; declare what is measured before something is"
    if measured.frames is None:
        return Advice(keep, *_of_one_part(measured, own, verdicts[-1], convention_of(own, known)))
    trained = factor_trained_with(trials)
    if not good and not space.overridden and (trained is None or trained.factor == space.factor):
        keep += f"; the factor {space.scaling_factor:g} stays with this temporal part in any case"
    return Advice(keep, *_of_two_parts(measured, space, verdicts))


def _of_one_part(
    measured: Measured, own: LatentSpace, verdict: Verdict, convention: Convention
) -> tuple[LatentSpace, dict[str, str]]:
    """What to declare before a transformer is trained, and how."""
    if verdict.kind in ("good", "cannot tell"):
        return own, {}
    factor = 1 / measured.own.deviation
    bare = with_factor(LatentSpace(trained_with="1 / deviation of the latents"), factor, convention)
    channels = replace(normalising(measured.own, own), trained_with="mean and deviation of each channel")
    if verdict.kind == "wrong factor":
        return bare, {"one factor": _line(bare), "channel by channel": _line(channels)}
    return channels, {"channel by channel": _line(channels)}


def _of_two_parts(
    measured: Measured, space: LatentSpace, verdicts: list[Verdict]
) -> tuple[LatentSpace, dict[str, str]]:
    """What to declare before a temporal part is trained, or a transformer, and how."""
    before, after = verdicts
    if before.kind in ("good", "cannot tell"):
        scratch, lines = LatentSpace(space.scaling_factor, space.convention), {}
    else:
        assert measured.frames is not None
        scratch = LatentSpace(1 / measured.frames.deviation, trained_with="1 / deviation of the frame latents")
        lines = {"temporal part": f"objective.scaling_factor={scratch.scaling_factor:.4g}"}
    if after.kind == "normalise" and not space.overridden:
        channels = normalising(measured.own, space, has_factor=False)
        lines["transformer"] = _line(replace(channels, trained_with="mean and deviation of each channel"))
    return scratch, lines


def _line(space: LatentSpace) -> str:
    if len(space.shift or ()) > 16:
        return "opensora latents measure writes the shift and scale of each"
    return configuration(space)
