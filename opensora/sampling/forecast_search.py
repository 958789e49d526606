"""Which predictions to compute so that forecasting the others costs least: dynamic programming on recorded errors.

A forecast is a weighted sum of earlier predictions, so the square of its error follows from the products of the
predictions of a recorded run with each other: |sum_i w_i p_i|^2 = w' G w. From one table of products the errors of all
forecasts are known, whatever they are made from. What counts is how far off the latents are when the network is called
again, so the errors of steps that are forecast one after the other are added up, each as far as its step moves the
latents, and then squared. That latents which are off lead the later steps astray is left out.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from opensora.sampling.forecast_plan import ForecastPlan, RatedPlan, extrapolation

MOST_APART = 12
"""Computed steps are at most so far from each other; no run is so smooth that more would pay."""
_ORDERS = (0, 1, 2)

Error = Callable[[tuple[int, ...], tuple[int, ...]], float]
"""Of the forecast of some steps, one after the other, from the last computed ones."""


@dataclass(frozen=True)
class Choice:
    """Steps that are computed.

    Attributes:
        steps: their numbers, ascending.
        error: of all steps that are not, together.
        order: of the polynomial that forecasts them.
    """

    steps: tuple[int, ...]
    error: float
    order: int


@dataclass(frozen=True)
class RecordedRun:
    """What exact runs were like, as far as forecasts depend on it.

    Attributes:
        times: that the network was told, (n,).
        text: products (n, n) of the predictions with the text, a mean over clips and values.
        pull: likewise, of what guidance adds to them.
        guided: (n,) bool, at which steps there is a pull.
        weights: (n,) how far a step moves the latents for a prediction of 1.
        num_branches: that the network computes at a guided step.
    """

    times: np.ndarray
    text: np.ndarray
    pull: np.ndarray
    guided: np.ndarray
    weights: np.ndarray
    num_branches: int


def best_plans(run: RecordedRun) -> list[RatedPlan]:
    """The plans that no other beats in evaluations and error, cheapest first.

    The steps at which the text is computed are the best for their number; those at which the other branches are, the
    best for theirs among these.
    """
    num_steps = len(run.times)
    guided = np.flatnonzero(run.guided).tolist()
    ends = {0, num_steps - 1, *guided[:1]}
    text_error, pull_error = _errors(run.text, run), _errors(run.pull, run)
    moved = float((run.weights**2 * (np.diag(run.text) + np.diag(run.pull))).sum())
    everything = range(num_steps)
    found: dict[int, RatedPlan] = {}
    for text in _best_of_orders(text_error, everything, everything, ends).values():
        allowed = [step for step in guided if step in text.steps]
        for pull in _best_of_orders(pull_error, guided, allowed, ends.intersection(guided)).values():
            evaluations = len(text.steps) + (run.num_branches - 1) * len(pull.steps)
            error = float(np.sqrt((text.error + pull.error) / moved))
            if evaluations not in found or error < found[evaluations].error:
                steps = (num_steps, text.steps, {0, num_steps - 1, *pull.steps})
                plan = ForecastPlan.computing(*steps, text.order, pull.order)
                found[evaluations] = RatedPlan(evaluations, error, plan)
    kept: list[RatedPlan] = []
    for evaluations in sorted(found, reverse=True):
        while kept and kept[-1].error >= found[evaluations].error:
            kept.pop()
        kept.append(found[evaluations])
    return kept[::-1]


def best_choices(
    error: Error, steps: Sequence[int], allowed: Sequence[int], required: Collection[int], order: int
) -> dict[int, Choice]:
    """For every number of computed steps the choice of least error.

    Args:
        error: of the forecast of steps from the last `order + 1` computed ones, or as many as there are.
        steps: that are needed, ascending.
        allowed: those of them that can be computed, ascending, the first of `steps` among them; none for no steps.
        required: those that are computed in any case.
        order: of the polynomial.

    Returns:
        Number of computed steps -> choice; numbers that cannot be are left out.
    """
    if not allowed:
        return {0: Choice((), 0.0, order)}
    most, can_be = len(allowed), set(allowed)
    # State: the last computed steps. For each number of computed steps the least error, and the state before.
    states: dict[tuple[int, ...], tuple[np.ndarray, list[tuple[int, ...]]]] = {}
    ends: dict[int, tuple[float, tuple[int, ...]]] = {}

    def reach(state: tuple[int, ...], errors: np.ndarray, before: tuple[int, ...]) -> None:
        least, origins = states.setdefault(state, (np.full(most + 1, np.inf), [()] * (most + 1)))
        for number in np.flatnonzero(errors < least).tolist():
            least[number], origins[number] = errors[number], before

    def end(state: tuple[int, ...], errors: np.ndarray) -> None:
        for number in np.flatnonzero(np.isfinite(errors)).tolist():
            if number not in ends or errors[number] < ends[number][0]:
                ends[number] = (float(errors[number]), state)

    reach((allowed[0],), np.array([np.inf, 0.0, *[np.inf] * (most - 1)]), ())
    for last in allowed:
        later = [step for step in steps if step > last]
        for state in [state for state in states if state[-1] == last]:
            least, _ = states[state]
            for skipped in range(len(later) + 1):
                errors = least + error(state, tuple(later[:skipped]))
                if skipped == len(later):
                    end(state, errors)
                    break
                step = later[skipped]
                if step in can_be:
                    reach((*state, step)[-order - 1 :], np.concatenate([[np.inf], errors[:-1]]), state)
                if step in required or step - last >= MOST_APART:
                    break
    return {number: Choice(_walked(states, state, number), total, order) for number, (total, state) in ends.items()}


def _walked(states: dict, state: tuple[int, ...], number: int) -> tuple[int, ...]:
    """All computed steps, from the last state back."""
    steps: list[int] = []
    while state:
        steps.append(state[-1])
        state, number = states[state][1][number], number - 1
    return tuple(reversed(steps))


def _best_of_orders(
    error: Error, steps: Sequence[int], allowed: Sequence[int], required: Collection[int]
) -> dict[int, Choice]:
    """As `best_choices`, of the best order for each number."""
    best: dict[int, Choice] = {}
    for order in _ORDERS:
        for number, choice in best_choices(error, steps, allowed, required, order).items():
            if number not in best or choice.error < best[number].error:
                best[number] = choice
    return best


def _errors(products: np.ndarray, run: RecordedRun) -> Error:
    """The error of every forecast of what has these products."""
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}

    def error(last: tuple[int, ...], skipped: tuple[int, ...]) -> float:
        if (last, skipped) not in known:
            rows, times = [*last, *skipped], run.times[list(last)].tolist()
            missing = np.zeros(len(rows))
            for place, step in enumerate(skipped, start=len(last)):
                missing[place] = run.weights[step]
                missing[: len(last)] -= run.weights[step] * np.array(extrapolation(times, float(run.times[step])))
            known[last, skipped] = max(float(missing @ products[np.ix_(rows, rows)] @ missing), 0.0)
        return known[last, skipped]

    return error
