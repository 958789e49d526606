"""Which predictions of a run the network computes, and which are forecast from those before: step by step, plain data.

Predictions change slowly along a run, so that some can be told from the last ones: extrapolated by a polynomial in the
time that the network is told. What is forecast are two things apart: the prediction with the text, and what every other
branch adds to it, the difference that guidance pulls along (`models.guidance`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from opensora import limits
from opensora.contents import shown
from opensora.errors import OpenSoraError
from opensora.limits import check_count

Work = Literal["all", "text", "none"]
"""At a step the network computes all branches of guidance, the text's alone, or none."""
FAST: dict[str, float] = {"quality": 0.6, "balanced": 0.4, "draft": 0.25}
"""How fast -> the share of evaluations that is computed at most."""
_HIGHEST_ORDER = 2
_EXPECTED = f"expected one of {', '.join(get_args(Work))}"


@dataclass(frozen=True)
class ForecastPlan:
    """What is computed at each step of a run; the rest is forecast.

    Attributes:
        steps: a word (`Work`) for each step, with blanks between them; the first and the last are "all".
        text_order: degree, 0 to 2, of the polynomial through the last predictions with the text; 0 repeats the last.
        pull_order: likewise, of what the other branches add.

    Raises:
        OpenSoraError: no steps, another word, a first or last step that is forecast, or another degree.
    """

    steps: str
    text_order: int = 1
    pull_order: int = 0

    def __post_init__(self) -> None:
        works = self.works
        check_count("the number of steps of a forecast plan", len(works), limits.STEPS)
        for work in works:
            if work not in get_args(Work):
                raise OpenSoraError(f"a step of a forecast plan is {shown(work)!r}, {_EXPECTED}")
        if works[0] != "all" or works[-1] != "all":
            raise OpenSoraError(
                f"a forecast plan begins with {works[0]!r} and ends with {works[-1]!r}, expected 'all' for both: the "
                "first and the last step are always computed"
            )
        for name in ("text_order", "pull_order"):
            if not 0 <= getattr(self, name) <= _HIGHEST_ORDER:
                raise OpenSoraError(
                    f"{name} of a forecast plan is {getattr(self, name)}, expected 0, 1 or {_HIGHEST_ORDER}"
                )

    @classmethod
    def computing(
        cls, num_steps: int, text: Collection[int], pull: Collection[int], text_order: int = 1, pull_order: int = 0
    ) -> "ForecastPlan":
        """The plan that computes the text at some steps, and at some of these the other branches.

        Args:
            num_steps: of the run.
            text, pull: numbers of steps, the first and the last among them.
            text_order, pull_order: see the class.
        """
        works = ("all" if i in pull else "text" if i in text else "none" for i in range(num_steps))
        return cls(" ".join(works), text_order, pull_order)

    @cached_property
    def works(self) -> tuple[str, ...]:
        """What is computed at each step."""
        return tuple(self.steps.split(" "))

    @classmethod
    def even(cls, num_steps: int, share: float) -> "ForecastPlan":
        """The plan of a model of which nothing is known: all branches at that share of the steps, evenly spread."""
        number = max(2, min(num_steps, int(share * num_steps)))
        steps = [round(i * (num_steps - 1) / (number - 1)) for i in range(number)]
        return cls.computing(num_steps, steps, steps, 1, 1)

    def check_steps(self, num_steps: int) -> None:
        """Raises `OpenSoraError` for a run of another number of steps."""
        if num_steps != len(self.works):
            raise OpenSoraError(f"the forecast plan is for {len(self.works)} steps, this run has {num_steps}")


def extrapolation(times: Sequence[float], time: float) -> list[float]:
    """How much each of several values counts in the polynomial through them (Lagrange's), at another time.

    Args:
        times: of the values, one at least, no two equal.
        time: at which the polynomial is wanted.

    Returns:
        One weight for each value; they add up to 1.
    """
    weights = []
    for i, own in enumerate(times):
        weight = 1.0
        for j, other in enumerate(times):
            if j != i:
                weight *= (time - other) / (own - other)
        weights.append(weight)
    return weights


@dataclass(frozen=True)
class RatedPlan:
    """A plan, what it costs, and what it is expected to do.

    Attributes:
        evaluations: of one clip.
        error: how far forecasts move the latents from those of exact steps, as a share of how far these move.
        plan: itself.
    """

    evaluations: int
    error: float
    plan: ForecastPlan
