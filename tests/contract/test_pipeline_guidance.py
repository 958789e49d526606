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

from opensora import load_pipeline
from opensora.conditioning.frames import FrameConditioning
from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
from opensora.models.guidance import GuidanceStep
from opensora.models.guidance_rules import TextImageGuidance
from opensora.models.text.conditioner import T5Conditioner, TextStates
from opensora.pipeline import OpenSoraPipeline

PROMPT, NEGATIVE = "a red ball", "a blue cube"
PLAIN = TextImageGuidance(3.0)
SHORT = TextImageGuidance(
    5.0, 3.0, oscillating=("text", "image"), steady_steps=0, image_ramp="to_last_step", guidance_rescale=0.7
)
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


# --- guidance that changes on the way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PIPELINES)
def test_oscillating_guidance_computes_what_has_a_weight(kind):
    pipe, rule = pipeline_of(*PIPELINES[kind]), TextImageGuidance(3.0, oscillating=["text"], steady_steps=1)
    sizes = batches(pipe)
    made = pipe(PROMPT, guider=rule, num_inference_steps=4, output_type="latent", num_videos_per_prompt=2)
    assert sizes == [4, 2, 4, 2]
    assert made.num_evaluations == 12


@pytest.mark.parametrize("kind", PIPELINES)
def test_channels_restrict_rules_of_one_s_own(kind):
    """A rule that says what classifier-free guidance does, on the channels that are guided there."""
    pipe = pipeline_of(*PIPELINES[kind])
    plain, ours = (sample(pipe, cfg_channels=2, **how) for how in ({"guidance_scale": 3.0}, {"guider": PLAIN}))
    near(ours, plain)
    everywhere = sample(pipe, guider=PLAIN)
    assert not torch.allclose(everywhere, plain, rtol=1e-2, atol=1e-2)


def test_a_model_brings_the_guidance_that_it_was_published_with(tmp_path):
    pipe = pipeline_of("opensora-1.2")
    pipe.register_to_config(guidance_options={"oscillating": ["text"], "steady_steps": 2, "guidance_rescale": 0.7})
    made = pipe(PROMPT, num_inference_steps=4, output_type="latent", generator=seeded(1))
    assert made.num_evaluations == 7
    assert made.settings["guider"]["guidance_rescale"] == 0.7
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    again = loaded(PROMPT, num_inference_steps=4, output_type="latent", generator=seeded(1))
    near(again.frames, made.frames)
    assert again.num_evaluations == 7


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"oscilating": ["text"]}, "did you mean 'oscillating'"),
        ({"oscillating": ["picture"]}, "one of text, image"),
        ({"image_guidance_scale": "5"}, "image_guidance_scale"),
        ({"image_guidance_scale": -5}, "image_guidance_scale=-5"),
        ({"guidance_scale": 5.0}, "has a guidance_scale"),
        ({"steady_steps": 10**12}, "steady_steps"),
    ],
)
def test_a_model_s_guidance_is_checked_as_it_is_read(options, named, tmp_path):
    pipe = pipeline_of("opensora-1.2")
    pipe.register_to_config(guidance_options=options)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(OpenSoraError, match=named) as error:
        load_pipeline(tmp_path)
    assert "\n" not in str(error.value)


def test_a_negative_prompt_that_says_the_same_costs_nothing():
    pipe = pipeline_of("opensora-1.2")
    (text, _), (same, _) = pipe.encode_prompt(PROMPT), pipe.encode_prompt(PROMPT)
    how: dict[str, Any] = {"prompt_embeds": text, "output_type": "latent", "num_inference_steps": 2}
    guided = pipe(**how, negative_prompt_embeds=same, guidance_scale=5.0, generator=seeded(1))
    plain = pipe(**how, guidance_scale=1.0, generator=seeded(1))
    near(guided.frames, plain.frames)
    assert guided.num_evaluations == plain.num_evaluations == 2


def test_guidance_by_known_frames_needs_a_network_that_is_shown_them():
    with pytest.raises(OpenSoraError, match="`image_guidance_scale` 3; this model is not shown") as error:
        sample(pipeline_of("opensora-1.2"), image_guidance_scale=3.0)
    assert "\n" not in str(error.value)


# --- known frames beside the noise ------------------------------------------------------------------------------------


class Everything(TextImageGuidance):
    """Computes all branches, as the reference does."""

    def branches(self, step: GuidanceStep) -> tuple[str, ...]:
        return ("text", "null", "unconditional")


def first_frame(pipe: OpenSoraPipeline, strength: float = 0.0) -> FrameConditioning:
    config = pipe.config
    nothing = FrameConditioning.none(pipe.autoencoder, VideoSize(config.num_frames, config.height, config.width))
    return nothing.put(torch.randn(nothing.latents[:, :, :1].shape, generator=seeded(3)[0]), 0, strength)


@pytest.mark.parametrize(("known", "fewer", "all_branches"), [(False, 50, 60), (True, 70, 90)])
def test_branches_that_open_sora_1_3_does_not_need(known, fewer, all_branches):
    """Published settings in 30 steps; what is left out changes nothing but roundings."""
    pipe = pipeline_of("opensora-1.3-i2v", scores=None)
    how: dict[str, Any] = {"conditioning": first_frame(pipe) if known else None, "num_inference_steps": 30}
    how |= {"output_type": "latent"}
    made = pipe(PROMPT, generator=seeded(1), **how)
    rule = Everything(pipe.config.guidance_scale, **pipe.config.guidance_options)
    whole = pipe(PROMPT, generator=seeded(1), guider=rule, cfg_channels="all", **how)
    near(made.frames, whole.frames)
    assert (made.num_evaluations, whole.num_evaluations) == (fewer, all_branches)


def test_what_becomes_of_known_frames():
    pipe = pipeline_of("opensora-1.3-i2v", scores=None)
    known, made = first_frame(pipe), {}
    for name in ("free", "noised", "pictures kept"):
        pipe.register_to_config(known_frames=name)
        made[name] = sample(pipe, conditioning=known)
    frame, rest = made["free"][:, :, :1], made["free"][:, :, 1:]
    assert not torch.allclose(frame, known.latents[:, :, :1], atol=0.5)
    # From the last step's time on it is the network that moves it.
    assert (made["noised"] - known.latents)[:, :, 0].abs().mean() < (frame - known.latents[:, :, :1]).abs().mean() / 2
    kept = made["pictures kept"]
    assert kept[:, :, :1].equal(known.latents[:, :, :1]) and kept[:, :, 1:].equal(rest)
    others = [sample(pipe, conditioning=first_frame(pipe, strength)) for strength in (1.0, 0.5)]
    near(others[0], sample(pipe))
    assert not torch.allclose(others[1], others[0], rtol=1e-2, atol=1e-2)
    with pytest.raises(OpenSoraError, match="known_frames is 'lost'"):
        OpenSoraPipeline(**{**pipe.components, "known_frames": "lost"})


def test_guidance_by_known_frames_has_a_scale():
    pipe = pipeline_of("opensora-1.3-i2v", scores=None)
    known = first_frame(pipe)
    weak, strong = (sample(pipe, conditioning=known, image_guidance_scale=scale) for scale in (1.0, 9.0))
    assert not torch.allclose(weak, strong, rtol=1e-2, atol=1e-2)
    near(sample(pipe, image_guidance_scale=1.0), sample(pipe, image_guidance_scale=9.0))  # nothing is known


def known_on_ranks() -> tuple[Tensor, list[int]]:
    torch.set_num_threads(1)
    pipe = pipeline_of("opensora-1.3-i2v", scores=None)
    pipe.parallelize(guidance=True)
    sizes = batches(pipe)
    return sample(pipe, conditioning=first_frame(pipe), guider=SHORT), sizes


@pytest.mark.multi
def test_known_frames_on_two_ranks():
    """Two of three branches each, one of one; the last frame's scale has come down to 1 in the last step."""
    pipe = pipeline_of("opensora-1.3-i2v", scores=None)
    alone = sample(pipe, conditioning=first_frame(pipe), guider=SHORT)
    for clip, sizes in run_ranks(2, known_on_ranks):
        near(clip, alone)
        assert sizes == [2, 1, 2, 1]
