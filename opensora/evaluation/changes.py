"""What changed from one evaluation to another, beyond chance: figure by figure, sample by sample where both have it.

Where two evaluations share samples (the same prompt, the same noise), their differences are taken pair by pair, which
tells changes that intervals of two means hide. Where they share none, the means of both are drawn again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from opensora.errors import OpenSoraError
from opensora.evaluation.intervals import Interval, difference_interval, unpaired_difference_interval
from opensora.evaluation.metrics.metric import Figure
from opensora.evaluation.results import Results

Verdict = Literal["better", "worse", "different", "unchanged"]


@dataclass(frozen=True)
class Bounds:
    """How much worse a figure may become.

    Attributes:
        share: of what it was before, for all figures.
        of_figures: name of a figure -> how much, in its own unit.
    """

    share: float = 0.0
    of_figures: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str, before: float) -> float:
        """In the figure's own unit."""
        return self.of_figures.get(name, self.share * abs(before))


@dataclass(frozen=True)
class Change:
    """Of one figure.

    Attributes:
        figure: which.
        before, after: its means.
        difference: after less before; None for figures of whole sets, of which intervals are all that is known.
        verdict: better, worse or different (a figure without a direction) only where chance alone is refused.
        is_regression: worse, and by more than is allowed.
    """

    figure: Figure
    before: Interval
    after: Interval
    difference: Interval | None
    verdict: Verdict
    is_regression: bool


def changes(before: Results, after: Results, bounds: Bounds | None = None) -> list[Change]:
    """Every figure that both have, in their order; those of sets last.

    Raises:
        OpenSoraError: other suites, no figure in common, or a bound of a figure that there is not.
    """
    bounds = bounds or Bounds()
    if before.suite != after.suite:
        raise OpenSoraError(f"results of {before.suite} and of {after.suite} cannot be compared; give two of one suite")
    shared = [name for name in before.figures if name in after.figures]
    shared_sets = [name for name in before.sets if name in after.sets]
    if not shared + shared_sets:
        raise OpenSoraError("these results have no figure in common; give two that were measured alike")
    unknown = [name for name in bounds.of_figures if name not in shared + shared_sets]
    if unknown:
        known = ", ".join(shared + shared_sets)
        raise OpenSoraError(f"a bound is given for {unknown[0]}, but these results have {known}")
    found = []
    for name in shared:
        difference = _difference(before, after, name)
        is_certain = difference.excludes_zero
        found.append(_change(before.figures[name], before.mean(name), after.mean(name), difference, is_certain, bounds))
    for name in shared_sets:
        (figure, one), (_, other) = before.sets[name], after.sets[name]
        is_apart = one.high < other.low or other.high < one.low
        found.append(_change(figure, one, other, None, is_apart, bounds))
    return found


def num_shared(before: Results, after: Results) -> int:
    """Samples that both have."""
    return len({sample["id"] for sample in before.samples} & {sample["id"] for sample in after.samples})


def _difference(before: Results, after: Results, name: str) -> Interval:
    old = dict(zip((sample["id"] for sample in before.samples), before.values(name), strict=True))
    new = dict(zip((sample["id"] for sample in after.samples), after.values(name), strict=True))
    groups = {sample["id"]: sample["group"] for sample in before.samples}
    shared = [sample for sample in old if sample in new]
    if not shared:
        return unpaired_difference_interval(list(new.values()), list(old.values()))
    pairs = ([new[sample] for sample in shared], [old[sample] for sample in shared])
    return difference_interval(*pairs, [groups[sample] for sample in shared])


def _change(
    figure: Figure, before: Interval, after: Interval, difference: Interval | None, is_certain: bool, bounds: Bounds
) -> Change:
    amount = after.value - before.value if difference is None else difference.value
    verdict: Verdict = "unchanged"
    if is_certain:
        is_better = (amount > 0) == (figure.better == "higher")
        verdict = "different" if figure.better is None else "better" if is_better else "worse"
    is_regression = verdict == "worse" and abs(amount) > bounds.of(figure.name, before.value)
    return Change(figure, before, after, difference, verdict, is_regression)
