"""Guidance of one's own in every pipeline: three branches in one batch, by turns and across ranks.

A rule names the branches that it needs at a step, and no other is computed. Plain guidance and diffusers' guiders are
tested in `tests/test_pipeline.py` and `tests/models/test_guidance.py`.
"""

from collections.abc import Mapping
from types import MethodType
from typing import Any

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from ranks import run_ranks
from tiny_pipeline import seeded
from tiny_published import pipeline_of
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.models.guidance import GuidanceStep
from opensora.models.text.conditioner import T5Conditioner, TextStates
from opensora.pipeline import OpenSoraPipeline

PROMPT, NEGATIVE = "a red ball", "a blue cube"
PIPELINES: dict[str, tuple[str, str | None]] = {
    "1.0": ("opensora-1.0-hq-16x256x256", "dpm-solver++"),
    "1.1": ("opensora-1.1-stage3", "ddim"),
    "1.2": ("opensora-1.2", None),
}


class ThreeTexts(T5Conditioner):
    """A branch more: the null text of a prompt whose tokens are all taken for text."""

    def branches(self, text: TextStates, negative: TextStates | None) -> dict[str, TextStates]:
        everything = TextStates(text.states, dropped=text.states.new_ones(len(text), dtype=torch.bool))
        return {**super().branches(text, negative), "empty": everything}


class ThreeBranches:
    """s (text - null) + w (null - empty) + empty, without the third in the last step, and with one in the first."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def branches(self, step: GuidanceStep) -> tuple[str, ...]:
        if step.index == 0:
            return ("text",)
        return ("text", "null") if step.index == step.num_steps - 1 else ("text", "null", "empty")

    def combine(self, predictions: Mapping[str, Tensor], step: GuidanceStep) -> Tensor:
        assert tuple(predictions) == self.branches(step)
        self.steps.append(step.index)
        text = predictions["text"]
        null = predictions.get("null", text)
        empty = predictions.get("empty", null)
        return empty + 2.0 * (null - empty) + 3.0 * (text - null)

    def describe(self) -> dict[str, Any]:
        return {"guider": {"class": "ThreeBranches"}}


def three(kind: str) -> OpenSoraPipeline:
    pipe = pipeline_of(*PIPELINES[kind])
    pipe.transformer.text_conditioner = lambda components, network: ThreeTexts(components, network)
    return pipe


def sample(pipe: OpenSoraPipeline, **options: Any) -> Tensor:
    how: dict[str, Any] = {"generator": seeded(1), "output_type": "latent", "num_inference_steps": 4}
    return pipe(PROMPT, **how | options).frames


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def batches(pipe: OpenSoraPipeline) -> list[int]:
    """Clips of every call of the network from now on."""
    sizes: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


@pytest.mark.parametrize("kind", PIPELINES)
def test_three_branches_in_one_batch_and_by_turns(kind):
    pipe, rule = three(kind), ThreeBranches()
    sizes = batches(pipe)
    together = sample(pipe, guider=rule)
    assert sizes == [1, 3, 3, 2]
    assert rule.steps == []  # the run had a copy of its own
    sizes.clear()
    pipe.sequential_guidance = True
    near(sample(pipe, guider=rule), together)
    assert sizes == [1] * 9
    assert not torch.allclose(together, sample(pipe), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_formula(kind):
    """A rule that says what classifier-free guidance does makes the same clip, also against a negative prompt."""

    class Plain(ThreeBranches):
        def branches(self, step: GuidanceStep) -> tuple[str, ...]:
            return ("null", "text")

        def combine(self, predictions: Mapping[str, Tensor], step: GuidanceStep) -> Tensor:
            return predictions["null"] + 2.5 * (predictions["text"] - predictions["null"])

    pipe = three(kind)
    if kind == "1.0":  # of learned variance, of which plain guidance leaves the second half alone
        pipe.use_sampler("ddim")
    for negative in (None, NEGATIVE):
        options = {"negative_prompt": negative, "num_inference_steps": 3}
        expected = sample(pipe, guidance_scale=2.5, cfg_channels="all", **options)
        near(sample(pipe, guider=Plain(), **options), expected)
        near(sample(pipe, guider=ClassifierFreeGuidance(2.5), cfg_channels="all", **options), expected)


def test_rules_are_described_in_the_settings():
    made = three("1.2")(PROMPT, guider=ThreeBranches(), num_inference_steps=1, output_type="latent")
    assert made.settings["guider"] == {"class": "ThreeBranches"}


@pytest.mark.parametrize("names", [("text", "empty"), (), ("text", "text")])
def test_branches_that_there_are_not_are_refused(names):
    rule = ThreeBranches()
    rule.branches = MethodType(lambda _, step: names, rule)  # type: ignore[method-assign]
    with pytest.raises(OpenSoraError, match="expected one or more of text, null") as error:
        sample(pipeline_of("opensora-1.2"), guider=rule)
    assert "\n" not in str(error.value)


def test_two_scales_are_refused():
    with pytest.raises(OpenSoraError, match="has a scale of its own"):
        sample(pipeline_of("opensora-1.2"), guider=ThreeBranches(), guidance_scale=2.0)


def on_ranks(kind: str) -> tuple[Tensor, list[int]]:
    torch.set_num_threads(1)
    pipe = three(kind)
    pipe.parallelize(guidance=True)
    sizes = batches(pipe)
    return sample(pipe, guider=ThreeBranches()), sizes


@pytest.mark.multi
@pytest.mark.parametrize("kind", PIPELINES)
def test_three_branches_on_two_ranks(kind):
    """Each computes two of three, the middle one twice; one of two; and both the only one."""
    alone = sample(three(kind), guider=ThreeBranches())
    for clip, sizes in run_ranks(2, on_ranks, kind):
        near(clip, alone)
        assert sizes == [1, 2, 2, 1]
