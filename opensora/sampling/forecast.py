"""Predictions of a run of which some are computed by the network and the others forecast, as a plan says.

It stands between guidance and the denoiser and sees predictions alone, so it works with every network, sampler and rule
of guidance, and on several ranks: all of them compute the same predictions, and forecast the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opensora.denoiser import Denoiser
from opensora.errors import OpenSoraError
from opensora.sampling.forecast_plan import ForecastPlan, extrapolation

_TEXT = "text"


def forecasting_of(plan: ForecastPlan | None, num_steps: int, network: Any) -> "Forecast | None":
    """What a run forecasts; None for nothing.

    Args:
        plan: of the run.
        num_steps: of the run.
        network: that is called.

    Raises:
        OpenSoraError: no plan of that many steps, or a network that leaves out work by a cache of its own.
    """
    if plan is None:
        return None
    if not isinstance(plan, ForecastPlan):
        raise OpenSoraError(f"got {type(plan).__name__} as forecast, expected a ForecastPlan")
    plan.check_steps(num_steps)
    if network.is_cache_enabled:
        raise OpenSoraError("a forecast and a cache of the transformer both leave out work; use one of them")
    return Forecast(plan)


class Forecast:
    """What a run remembers of its predictions; made for one run.

    Only what has been seen can be forecast: where a branch is asked for the first time, or other frames are being
    generated than at the step before, the network computes all branches, whatever the plan says. A step that does
    not ask for the branch "text" is computed as well.

    Attributes:
        num_saved: evaluations that the network was spared so far, on this rank, see `Denoiser.num_evaluations`.

    Args:
        plan: for as many steps as the run has.
    """

    def __init__(self, plan: ForecastPlan) -> None:
        self.plan, self.num_saved = plan, 0
        self.forget()

    def forget(self) -> None:
        """What was seen is of another text or other latents: the next step is computed."""
        self._frame_mask: Tensor | None = None
        self._text = _Memory(self.plan.text_order)
        self._pulls: dict[str, _Memory] = {}

    def __call__(
        self,
        denoiser: Denoiser,
        names: Sequence[str],
        latents: Tensor,
        timestep: Tensor,
        frame_mask: Tensor | None = None,
        *,
        step: int,
        num_steps: int,
    ) -> dict[str, Tensor]:
        """As `Denoiser.__call__`, of the denoiser that computes what is not forecast."""
        if not _same(frame_mask, self._frame_mask):
            self.forget()
            self._frame_mask = frame_mask
        computed = self._computed(tuple(names), step)
        predictions: dict[str, Tensor] = {}
        if computed:
            predictions = denoiser(computed, latents, timestep, frame_mask, step=step, num_steps=num_steps)
        self.num_saved += (denoiser.num_computed(names) - denoiser.num_computed(computed)) * len(latents)
        return predictions if _TEXT not in names else self._completed(predictions, names, float(timestep))

    def _computed(self, names: tuple[str, ...], step: int) -> tuple[str, ...]:
        """Which branches the network computes."""
        work = self.plan.works[step]
        others = [name for name in names if name != _TEXT]
        if work == "all" or _TEXT not in names or not self._text.times or any(o not in self._pulls for o in others):
            return names
        return (_TEXT,) if work == "text" else ()

    def _completed(self, computed: dict[str, Tensor], names: Sequence[str], time: float) -> dict[str, Tensor]:
        """Remembers what was computed, forecasts what was not."""
        if _TEXT in computed:
            self._text.keep(time, computed[_TEXT])
        predictions = {_TEXT: computed[_TEXT] if _TEXT in computed else self._text.at(time)}
        for name in names:
            if name in computed and name != _TEXT:
                self._pulls.setdefault(name, _Memory(self.plan.pull_order)).keep(time, computed[name] - computed[_TEXT])
                predictions[name] = computed[name]
            elif name != _TEXT:
                predictions[name] = predictions[_TEXT] + self._pulls[name].at(time)
        return {name: predictions[name] for name in names}


class _Memory:
    """The last values of something that changes slowly, as many as a polynomial of a degree goes through."""

    def __init__(self, order: int) -> None:
        self._most = order + 1
        self.times: list[float] = []
        self._values: list[Tensor] = []

    def keep(self, time: float, value: Tensor) -> None:
        self.times = [*self.times, time][-self._most :]
        self._values = [*self._values, value][-self._most :]

    def at(self, time: float) -> Tensor:
        """The polynomial through all values that are there."""
        weights = extrapolation(self.times, time)
        terms = [value if weight == 1 else weight * value for weight, value in zip(weights, self._values, strict=True)]
        return sum(terms[1:], terms[0])


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)
