"""The best choice of steps that are computed: against every choice there is, and on runs of which it is known."""

import itertools
import random

import numpy as np
import pytest

from opensora.sampling import forecast_search
from opensora.sampling.forecast_plan import ForecastPlan
from opensora.sampling.forecast_search import RecordedRun, best_choices, best_plans


def total(error, steps, chosen, order: int) -> float:
    """The error of a choice, told step by step."""
    found = 0.0
    for place, last in enumerate(chosen):
        following = chosen[place + 1] if place + 1 < len(chosen) else max(steps) + 1
        found += error(chosen[: place + 1][-order - 1 :], tuple(step for step in steps if last < step < following))
    return found


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    ("steps", "allowed", "required"),
    [
        (range(8), range(8), {0, 7}),
        (range(8), [0, 1, 3, 4, 7], {0, 3, 7}),
        ([2, 3, 4, 6, 7], [2, 4, 6], {2}),
    ],
    ids=["all", "some", "open end"],
)
def test_no_other_choice_is_better(order, steps, allowed, required) -> None:
    drawn: dict[object, float] = {}
    rng = random.Random(f"{order} {required}")

    def error(last: tuple[int, ...], skipped: tuple[int, ...]) -> float:
        return drawn.setdefault((last, skipped), rng.random()) if skipped else 0.0

    found = best_choices(error, list(steps), list(allowed), required, order)
    for number in range(1, len(allowed) + 1):
        choices = [(c, total(error, steps, c, order)) for c in itertools.combinations(allowed, number)]
        possible = {c: e for c, e in choices if c[0] == allowed[0] and required <= set(c)}
        assert (number in found) == bool(possible)
        if possible:
            best = min(possible, key=lambda choice: possible[choice])
            assert found[number].steps == best and found[number].error == pytest.approx(possible[best])


def test_computed_steps_are_never_too_far_apart(monkeypatch) -> None:
    monkeypatch.setattr(forecast_search, "MOST_APART", 3)
    found = best_choices(lambda last, skipped: float(len(skipped)), range(10), range(10), {0, 9}, 0)
    assert min(found) == 4 and found[4].steps == (0, 3, 6, 9)


def recorded(text: np.ndarray, pull: np.ndarray, guided: np.ndarray, weights: np.ndarray | None = None) -> RecordedRun:
    """A run whose predictions at each step are these (n, D)."""
    count = len(text)
    weights = np.ones(count) if weights is None else weights
    times = np.linspace(1000, 100, count)
    return RecordedRun(times, text @ text.T, (pull * guided[:, None]) @ (pull * guided[:, None]).T, guided, weights, 2)


def test_a_run_along_straight_lines_needs_few_steps() -> None:
    times, generator = np.linspace(0, 1, 8)[:, None], np.random.default_rng(0)
    text, pull = (generator.normal(size=(1, 5)) + times * generator.normal(size=(1, 5)) for _ in range(2))
    plans = best_plans(recorded(text, pull, np.ones(8, dtype=bool)))
    exact = next(rated for rated in plans if rated.error < 1e-6)
    assert exact.plan == ForecastPlan("all all none none none none none all", 1, 1) and exact.evaluations == 6


def test_plans_are_from_the_cheapest_to_the_exact_one() -> None:
    generator = np.random.default_rng(1)
    text, pull = generator.normal(size=(2, 6, 50))
    plans = best_plans(recorded(text, pull, np.ones(6, dtype=bool)))
    costs, errors = [rated.evaluations for rated in plans], [rated.error for rated in plans]
    assert costs == sorted(set(costs)) and errors == sorted(set(errors), reverse=True)
    assert (costs[0], costs[-1], errors[-1]) == (4, 12, 0.0)
    for rated in plans:
        assert rated.evaluations == sum({"all": 2, "text": 1, "none": 0}[work] for work in rated.plan.works)


def test_a_step_that_moves_nothing_is_left_out_first() -> None:
    generator = np.random.default_rng(2)
    text, pull = generator.normal(size=(2, 6, 50))
    weights = np.array([1, 1, 1, 0.01, 1, 1])
    plans = best_plans(recorded(text, pull, np.ones(6, dtype=bool), weights))
    assert next(rated for rated in plans if rated.evaluations == 10).plan.works[3] == "none"


def test_the_pull_begins_where_guidance_does() -> None:
    """Within an interval; at its first step all branches are computed, and outside of it there are none."""
    generator = np.random.default_rng(3)
    text, pull = generator.normal(size=(2, 7, 50))
    guided = np.array([False, False, True, True, True, False, False])
    plans = best_plans(recorded(text, pull, guided))
    assert plans[-1].evaluations == 10
    assert all(rated.plan.works[2] == "all" for rated in plans)
    assert plans[0].evaluations == 4  # the first, the last, and two branches where guidance begins


def test_a_run_without_guidance() -> None:
    text = np.random.default_rng(4).normal(size=(5, 50))
    plans = best_plans(recorded(text, text, np.zeros(5, dtype=bool)))
    assert [rated.evaluations for rated in plans] == [2, 3, 4, 5]
