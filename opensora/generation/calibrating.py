"""A model calibrated: clips made exactly, their predictions recorded, and the best plans of what to forecast found.

Predictions are recorded as guidance sees them, by a rule that stands before the model's own; how far a step moves the
latents is asked of the scheduler itself. So any network, sampler and rule of guidance can be calibrated.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.generation.engine import Engine
from opensora.generation.fast import Calibration
from opensora.generation.guidance import pipeline_guidance
from opensora.generation.request import ClipRequest
from opensora.models.guidance import GuidanceRule, GuidanceStep
from opensora.sampling.forecast_search import RecordedRun, best_plans
from opensora.toybox.captions import plain_caption
from opensora.toybox.specs import sample_specs

if TYPE_CHECKING:
    from opensora.generation.prepared import PreparedClip

_PROBE = 1e-3  # of a prediction, small enough for samplers that clip


def toy_prompts(number: int) -> list[str]:
    """Captions of the toy world, none of which is held out."""
    return [plain_caption(spec) for spec in sample_specs(number, seed=0)]


class RecordingRule:
    """A rule of guidance that keeps what its steps combine.

    Attributes:
        text: for each step the prediction with the text, (B, C, T, h, w).
        pull: what guidance made of it, less it; None where there is no other branch.
        num_branches: the most that a step had.
        shape: of a prediction, variance channels and all.

    Args:
        rule: that guides.
        latent_channels: C; of variance channels behind them nothing is kept.
    """

    def __init__(self, rule: GuidanceRule, latent_channels: int) -> None:
        self.rule, self._channels = rule, latent_channels
        self.text: list[Tensor] = []
        self.pull: list[Tensor | None] = []
        self.num_branches = 1
        self.shape: tuple[int, ...] = ()

    def __deepcopy__(self, memo: Any) -> "RecordingRule":
        return self  # a run copies its rule, and what it keeps is wanted

    def branches(self, step: GuidanceStep) -> tuple[str, ...]:
        return self.rule.branches(step)

    def combine(self, predictions: Mapping[str, Tensor], step: GuidanceStep) -> Tensor:
        guided, text = self.rule.combine(predictions, step), predictions["text"]
        self.text.append(text[:, : self._channels].cpu())
        is_guided = len(predictions) > 1
        self.pull.append((guided - text)[:, : self._channels].cpu() if is_guided else None)
        self.num_branches, self.shape = max(self.num_branches, len(predictions)), tuple(text.shape)
        return guided

    def describe(self) -> dict[str, Any]:
        return self.rule.describe()


def calibrate(
    engine: Engine,
    requests: Sequence[ClipRequest],
    on_progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Makes clips exactly and finds the plans that forecast best.

    Args:
        engine: of the model.
        requests: clips of the same settings but for prompt and seed, one or more.
        on_progress: called with (clips done, clips in all).

    Raises:
        OpenSoraError: a model that the engine knows nothing of, or wishes that cannot be granted.
    """
    if engine.model is None:
        raise OpenSoraError("a pipeline that was put together by hand has no hash to know it by; load a model")
    prepared = engine.prepare(requests)
    pipe, sampling = prepared[0].pipeline, prepared[0].sampling
    scheduler = pipe.schedule(sampling.num_inference_steps, sampling.size)
    products: list[np.ndarray] = []
    recorded: RecordingRule | None = None
    for done, clip in enumerate(prepared):
        if on_progress is not None:
            on_progress(done, len(prepared))
        recorded = _record(clip)
        products.append(np.stack([_products(recorded.text), _products(recorded.pull)]))
    assert recorded is not None
    if on_progress is not None:
        on_progress(len(prepared), len(prepared))
    text, pull = np.mean(products, axis=0)
    run = RecordedRun(
        times=scheduler.timesteps.double().numpy(),
        text=text,
        pull=pull,
        guided=np.array([one is not None for one in recorded.pull]),
        weights=_weights(scheduler, recorded.shape, recorded.text[0]),
        num_branches=recorded.num_branches,
    )
    return Calibration(
        model=engine.model.name,
        model_hash=engine.model.sha256,
        scheduler=pipe.describe()["scheduler"],
        num_steps=len(run.times),
        num_prompts=len(prepared),
        evaluations=len(run.times) + int(run.guided.sum()) * (run.num_branches - 1),
        plans=tuple(best_plans(run)),
    )


def _record(clip: "PreparedClip") -> RecordingRule:
    """One clip sampled; nothing is decoded."""
    pipe, sampling, request = clip.pipeline, clip.sampling, clip.request
    rule = RecordingRule(pipe.guidance_rule(**pipeline_guidance(sampling)), pipe.autoencoder.latent_channels)
    pipe(
        request.shown,
        request.negative_prompt,
        height=sampling.height,
        width=sampling.width,
        num_frames=sampling.num_frames,
        nominal_size=sampling.nominal_size,
        fps=sampling.fps,
        scores=sampling.scores,
        num_inference_steps=sampling.num_inference_steps,
        guider=rule,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
    )
    return rule


def _products(predictions: Sequence[Tensor | None]) -> np.ndarray:
    """Mean products of the predictions of all steps with each other, (n, n); 0 where there is none."""
    like = next((one for one in predictions if one is not None), torch.zeros(1))
    rows = torch.stack([(torch.zeros_like(like) if one is None else one).double().flatten() for one in predictions])
    return (rows @ rows.T / rows.shape[1]).numpy()


def _weights(scheduler: Any, shape: tuple[int, ...], like: Tensor) -> np.ndarray:
    """How far each step moves the latents for a prediction of 1, as the scheduler does it, (n,).

    Args:
        scheduler: its steps laid out.
        shape: of a prediction.
        like: latents.
    """
    latents, generator = torch.zeros_like(like), torch.Generator()

    def step(scheduler: Any, t: Tensor, prediction: float) -> Tensor:
        generator.manual_seed(0)
        return scheduler.step(torch.full(shape, prediction), t, latents, generator=generator).prev_sample

    found = []
    for t in scheduler.timesteps:
        moved = step(copy.deepcopy(scheduler), t, _PROBE) - step(scheduler, t, 0.0)
        found.append(float(moved.double().mean().abs()) / _PROBE)
    return np.array(found)
