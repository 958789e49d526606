"""How much of a clip is forecast: `fast`, by the file that `opensora calibrate` made of a model, or evenly without one.

A calibration lies in the folder `calibrations` of a model's own folder, or wherever a request says. It is of one model,
one way to sample and one number of steps, and holds the best plans from the cheapest to the exact one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora.contents import read_object
from opensora.errors import OpenSoraError
from opensora.generation.loading import LoadedModel
from opensora.generation.record import Sampling
from opensora.generation.request import ClipRequest
from opensora.sampling.forecast_plan import FAST, ForecastPlan, RatedPlan
from opensora.settings import from_dict

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline

FOLDER = "calibrations"
"""Of a model's folder, where its calibrations lie."""


@dataclass(frozen=True)
class Calibration:
    """What a model allows to be forecast.

    Attributes:
        model: its name.
        model_hash: see `LoadedModel.sha256`.
        scheduler: class and configuration, as the pipeline describes it.
        num_steps: of a run.
        num_prompts: clips that it was found on.
        evaluations: of the exact clip.
        plans: cheapest first.
    """

    model: str
    model_hash: str
    scheduler: dict[str, Any]
    num_steps: int
    num_prompts: int
    evaluations: int
    plans: tuple[RatedPlan, ...]

    @classmethod
    def read(cls, path: Path) -> "Calibration":
        """A calibration from its file.

        Raises:
            OpenSoraError: no such file, or none of `opensora calibrate`.
        """
        found = from_dict(cls, read_object(path, "calibration"), where=str(path))
        if not found.plans:
            raise OpenSoraError(f"{path} holds no plans; make it again with opensora calibrate")
        for rated in found.plans:
            rated.plan.check_steps(found.num_steps)
        return found

    def rated(self, fast: str) -> RatedPlan:
        """The best plan that computes at most the share of evaluations that `FAST` allows; else the cheapest."""
        most = FAST[fast] * self.evaluations
        return max((one for one in self.plans if one.evaluations <= most), key=_cost, default=self.plans[0])

    def unfit(self, model_hash: str, scheduler: Mapping[str, Any], num_steps: int) -> str | None:
        """What of a run it is not made for, in words; None for one that it fits."""
        if model_hash != self.model_hash:
            return f"another model ({self.model}, hash {self.model_hash[:12]}; this one has {model_hash[:12]})"
        if dict(scheduler) != self.scheduler:
            return f"another way to sample ({_differing(self.scheduler, scheduler)})"
        if num_steps != self.num_steps:
            return f"{self.num_steps} steps (this clip takes {num_steps})"
        return None


def with_forecast(
    pipe: "OpenSoraPipeline", request: ClipRequest, sampling: Sampling, model: LoadedModel | None
) -> tuple[Sampling, list[str]]:
    """The sampling of a clip with the plan of what is forecast, and what the user should know of it.

    Args:
        pipe: with the sampler of the request.
        request: checked already.
        sampling: what it comes to besides.
        model: that the pipeline is of; None for one that nobody knows.

    Raises:
        OpenSoraError: a calibration that does not fit, or a plan of another number of steps.
    """
    if request.fast is None and request.forecast is None:
        return sampling, []
    num_steps = len(pipe.schedule(sampling.num_inference_steps, sampling.size).timesteps)
    if request.forecast is not None:
        request.forecast.check_steps(num_steps)
    if request.fast is None or request.forecast is not None:
        return sampling, []
    run = ("" if model is None else model.sha256, pipe.describe()["scheduler"], num_steps)
    if request.calibration is not None:
        calibration = Calibration.read(request.calibration)
        if (other := calibration.unfit(*run)) is not None:
            raise OpenSoraError(
                f"`calibration` {request.calibration} is for {other}; give one that fits, or leave it out"
            )
        return replace(sampling, forecast=calibration.rated(request.fast).plan), []
    for calibration in _own(model):
        if calibration.unfit(*run) is None:
            return replace(sampling, forecast=calibration.rated(request.fast).plan), []
    note = (
        f"no calibration of this model fits {num_steps} steps so sampled, so `fast` computes steps that are evenly "
        "spread; opensora calibrate finds better ones"
    )
    return replace(sampling, forecast=ForecastPlan.even(num_steps, FAST[request.fast])), [note]


def _own(model: LoadedModel | None) -> list[Calibration]:
    """Those that lie in a model's folder."""
    if model is None or model.folder is None:
        return []
    return [Calibration.read(path) for path in sorted((model.folder / FOLDER).glob("*.json"))]


def _cost(rated: RatedPlan) -> int:
    return rated.evaluations


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The first setting of two schedulers that differs."""
    name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
    return f"{name} {ours.get(name)!r} there, {theirs.get(name)!r} here"
