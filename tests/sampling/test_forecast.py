"""Forecasts of predictions: which are computed, what the others are, and what makes a forecast impossible."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from ranks import run_ranks
from tiny_pipeline import make_pipeline, seeded
from tiny_published import pipeline_of
from torch import Tensor

from opensora.conditioning.frames import FrameConditioning
from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
from opensora.models.guidance_rules import TextImageGuidance
from opensora.models.guiders import GUIDERS, make_guider
from opensora.pipeline import OpenSoraPipeline
from opensora.sampling.forecast import Forecast
from opensora.sampling.forecast_plan import ForecastPlan, extrapolation

PROMPT = "a small red ball rolls left"
EXACT = ForecastPlan("all all all all")
MIXED = ForecastPlan("all text none all")


def sample(pipe: OpenSoraPipeline, **options: Any) -> Any:
    how: dict[str, Any] = {"generator": seeded(1), "output_type": "latent", "num_inference_steps": 4}
    return pipe(PROMPT, **how | options)


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


# --- plans


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": "all some all"}, "is 'some', expected one of all, text, none"),
        ({"steps": ""}, "is '', expected one of"),
        ({"steps": "text all"}, "begins with 'text'"),
        ({"steps": "all none"}, "ends with 'none'"),
        ({"steps": "all all", "text_order": 3}, "text_order of a forecast plan is 3"),
        ({"steps": "all all", "pull_order": -1}, "pull_order of a forecast plan is -1"),
        ({"steps": " ".join(["all"] * 10_001)}, "number of steps"),
    ],
)
def test_what_is_no_plan(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OpenSoraError, match=words) as error:
        ForecastPlan(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("share", "computed"), [(0.25, 5), (0.5, 10), (1.0, 20), (0.01, 2)])
def test_an_even_plan_computes_its_share(share: float, computed: int) -> None:
    works = ForecastPlan.even(20, share).works
    assert works.count("all") == computed and works.count("none") == 20 - computed
    gaps = [len(run) for run in " ".join(works).replace("none", "-").replace(" ", "").split("all") if run]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_polynomial_is_continued_exactly() -> None:
    weights = extrapolation([1.0, 3.0, 4.0], 7.0)
    assert sum(w * (2 - t + 3 * t**2) for w, t in zip(weights, (1.0, 3.0, 4.0), strict=True)) == pytest.approx(142)
    assert extrapolation([5.0], 2.0) == [1.0]


# --- against predictions that are known


class Known:
    """A denoiser whose predictions are functions of the time alone; keeps what it was asked for."""

    def __init__(self, **branches: Callable[[float], float]) -> None:
        self.branches, self.asked = branches, []

    def __call__(
        self, names: Sequence[str], latents: Tensor, timestep: Tensor, *_: Any, **__: Any
    ) -> dict[str, Tensor]:
        self.asked.append(tuple(names))
        return {name: torch.full_like(latents, self.branches[name](float(timestep))) for name in names}

    def num_computed(self, names: Sequence[str]) -> int:
        return len(names)


def walked(denoiser: Any, plan: ForecastPlan, names: Sequence[Sequence[str]], times: Sequence[float]) -> list[dict]:
    forecast, latents = Forecast(plan), torch.zeros(1, 4, 2, 3, 3, dtype=torch.float64)
    return [
        {
            name: float(value.mean())
            for name, value in forecast(
                denoiser, asked, latents, torch.tensor(time), step=i, num_steps=len(times)
            ).items()
        }
        for i, (asked, time) in enumerate(zip(names, times, strict=True))
    ]


@pytest.mark.parametrize("order", [1, 2])
def test_what_is_a_polynomial_in_time_is_forecast_exactly(order: int) -> None:
    def text(t: float) -> float:
        return 3 - 0.01 * t + (order - 1) * 1e-5 * t * t

    def null(t: float) -> float:
        return text(t) + 1 + 0.002 * t + (order - 1) * 2e-6 * t * t

    times = [1000, 930, 800, 640, 500, 210, 20]
    plan = ForecastPlan("all all all text none none all", order, order)
    for found, time in zip(
        walked(Known(text=text, null=null), plan, [("text", "null")] * 7, times), times, strict=True
    ):
        assert found == pytest.approx({"text": text(time), "null": null(time)}, rel=1e-5)
    constant = ForecastPlan(plan.steps, order - 1, order - 1)
    lower = walked(Known(text=text, null=null), constant, [("text", "null")] * 7, times)
    assert abs(lower[5]["text"] - text(210)) > 0.1


def test_the_plan_says_what_is_computed() -> None:
    denoiser = Known(text=lambda t: t, null=lambda t: 2 * t)
    names = [("text", "null")] * 6
    found = walked(denoiser, ForecastPlan("all text none text all all", 0, 0), names, [9, 8, 7, 6, 5, 4])
    assert denoiser.asked == [("text", "null"), ("text",), ("text",), ("text", "null"), ("text", "null")]
    assert [step["text"] for step in found] == [9, 8, 8, 6, 5, 4]
    assert [step["null"] for step in found] == [18, 17, 17, 15, 10, 8], "the last difference is repeated"


def test_a_branch_that_was_never_computed_is_not_forecast() -> None:
    """Guidance that begins later, and a step that the text has no part in."""
    denoiser = Known(text=lambda t: t, null=lambda t: 2 * t)
    names = [("text",), ("text", "null"), ("text", "null"), ("null",), ("text", "null")]
    walked(denoiser, ForecastPlan("all none none none all"), names, [9, 8, 7, 6, 5])
    assert denoiser.asked == [("text",), ("text", "null"), ("null",), ("text", "null")]


# --- in pipelines


@pytest.mark.parametrize("kind", ["flow", "iddpm"])
def test_a_plan_that_computes_everything_changes_no_bit(kind: str) -> None:
    pipe = make_pipeline(kind)
    exact, planned = sample(pipe), sample(pipe, forecast=EXACT)
    assert planned.frames.equal(exact.frames)
    assert (planned.num_evaluations, planned.num_forecast) == (exact.num_evaluations, 0) == (8, 0)
    assert planned.settings["forecast"]["steps"] == EXACT.steps and "forecast" not in exact.settings


@pytest.mark.parametrize("kind", ["flow", "iddpm"])
def test_evaluations_are_counted_as_they_are_made(kind: str) -> None:
    """Also of networks that have learned their variance, whose outputs have twice the channels."""
    pipe = make_pipeline(kind)
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    made = pipe([PROMPT] * 2, generator=seeded(1, 2), output_type="latent", forecast=MIXED)
    assert calls == [4, 2, 4] and (made.num_evaluations, made.num_forecast) == (10, 6)
    assert made.frames.isfinite().all() and not made.frames[:1].equal(sample(pipe).frames)


GUIDANCE: dict[str, tuple[Callable[[], Any], int]] = {
    **{name: (lambda name=name: make_guider(name, 3.0), 8) for name in GUIDERS},
    "scale of 1": (lambda: make_guider("cfg", 1.0), 4),
    "within an interval": (lambda: make_guider("cfg:start=0.25,stop=0.75", 3.0), 6),
    "oscillating": (lambda: TextImageGuidance(3.0, oscillating=["text"], steady_steps=1), 6),
}


@pytest.mark.parametrize("name", GUIDANCE)
def test_steps_that_need_fewer_branches_cost_fewer(name: str) -> None:
    make, evaluations = GUIDANCE[name]
    pipe = make_pipeline()
    exact = sample(pipe, guider=make())
    assert exact.num_evaluations == evaluations
    planned = sample(pipe, guider=make(), forecast=MIXED)
    assert planned.num_evaluations < evaluations == planned.num_evaluations + planned.num_forecast
    assert sample(pipe, guider=make(), forecast=EXACT).frames.equal(exact.frames)


def test_branches_that_read_the_same_are_forecast_as_one() -> None:
    pipe = make_pipeline()
    (text, _), (same, _) = pipe.encode_prompt(PROMPT), pipe.encode_prompt(PROMPT)
    how = {"prompt_embeds": text, "negative_prompt_embeds": same, "generator": seeded(1), "output_type": "latent"}
    made = pipe(**how, forecast=MIXED)
    assert (made.num_evaluations, made.num_forecast) == (3, 1)


def test_frames_that_begin_later_are_computed_first() -> None:
    """A frame of strength 0.5 is known for half of the steps; what was said of it then tells nothing of its noise."""
    pipe = make_pipeline()
    config = pipe.config
    frames = FrameConditioning.none(pipe.autoencoder, VideoSize(config.num_frames, config.height, config.width))
    frames = frames.put(torch.randn(frames.latents[:, :, :1].shape, generator=seeded(3)[0]), 0, 0.5)
    nothing = ForecastPlan("all none none none none all")
    made = sample(pipe, conditioning=frames, forecast=nothing, num_inference_steps=6)
    assert (made.num_evaluations, made.num_forecast) == (6, 6)
    assert sample(pipe, forecast=nothing, num_inference_steps=6).num_evaluations == 4


@pytest.mark.parametrize("name", ["latents", "prompt_embeds"])
def test_what_a_callback_changes_is_computed_next(name: str) -> None:
    pipe = make_pipeline()
    other, _ = pipe.encode_prompt("a large blue ring")

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        changed = tensors["latents"] + 1 if name == "latents" else other
        return {name: changed} if step == 1 else tensors

    nothing = ForecastPlan("all none none none all")
    made = sample(pipe, forecast=nothing, num_inference_steps=5, callback_on_step_end=change)
    assert (made.num_evaluations, made.num_forecast) == (6, 4)


def test_plans_that_do_not_fit() -> None:
    pipe = make_pipeline()
    with pytest.raises(OpenSoraError, match="is for 4 steps, this run has 3"):
        sample(pipe, forecast=MIXED, num_inference_steps=3)
    with pytest.raises(OpenSoraError, match="got str as forecast"):
        sample(pipe, forecast="draft")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(OpenSoraError, match="both leave out work; use one of them"):
        sample(pipe, forecast=MIXED)


def on_ranks(guidance: bool) -> tuple[Tensor, int, int]:
    torch.set_num_threads(1)
    pipe = pipeline_of("opensora-1.2")
    pipe.parallelize(guidance=guidance)
    made = sample(pipe, forecast=MIXED)
    return made.frames, made.num_evaluations, made.num_forecast


@pytest.mark.multi
@pytest.mark.parametrize(("guidance", "counted"), [(True, (3, 1)), (False, (5, 3))])
def test_two_ranks_forecast_as_one(guidance: bool, counted: tuple[int, int]) -> None:
    alone = sample(pipeline_of("opensora-1.2"), forecast=MIXED)
    for clip, *evaluations in run_ranks(2, on_ranks, guidance):
        near(clip, alone.frames)
        assert tuple(evaluations) == counted
