"""Calls of every pipeline in the shape of diffusers' pipeline tests: threads, embeddings, callbacks, schedules.

Each test runs on all three generations of the family, with every scheduler there is. What comes out, copies and files
are in `test_pipeline_files.py`, conditioning frames in `test_pipeline_frames.py`, guidance in
`test_pipeline_guidance.py`, adapters in `test_pipeline_lora.py`, offloading in `test_pipeline_offload.py`.
"""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.hooks import FirstBlockCacheConfig
from published_pipelines import NEGATIVE, OTHER, PROMPT, equal, near, pipeline_of, refusal, sample
from tiny_pipeline import seeded
from torch import Tensor

from opensora.models.schedulers.dpm_solver import DPMSolverScheduler
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler
from opensora.models.text.conditioner import TextStates
from opensora.pipeline import OpenSoraPipeline


def count_calls(network: Any) -> list[int]:
    """Sizes of the batches that a network is called with from now on."""
    sizes: list[int] = []

    def count(_: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        sizes.append(len(next(iter([*args, *keywords.values()]))))

    network.register_forward_pre_hook(count, with_kwargs=True)
    return sizes


# ---- threads --------------------------------------------------------------------------------------------------------


def in_threads(calls: list[Callable[[], Tensor]]) -> list[Tensor]:
    """What calls return that begin at the same time."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Tensor]) -> Tensor:
        barrier.wait(timeout=60)
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(run, calls))


@pytest.mark.parametrize("steps", [(3, 3, 3), (2, 5, 3)], ids=["same steps", "other steps"])
def test_threads_make_the_clips_of_one_after_the_other(kept, one_thread, steps):
    wishes = [
        {"prompt": PROMPT, "seed": 1, "num_inference_steps": steps[0]},
        {"prompt": OTHER, "seed": 2, "num_inference_steps": steps[1], "guidance_scale": 2.0},
        {"prompt": PROMPT, "seed": 3, "num_inference_steps": steps[2], "negative_prompt": NEGATIVE},
    ]
    alone = [sample(kept, **wish) for wish in wishes]
    together = in_threads([lambda wish=wish: sample(kept, **wish) for wish in wishes])
    equal(together, alone)


def test_a_run_in_the_middle_of_another_changes_nothing(kept):
    """What threads would have to be lucky for: all of one run between two steps of another."""
    expected = sample(kept, num_inference_steps=4), sample(kept, OTHER, 2, num_inference_steps=3)
    inner = []

    def interleave(pipeline: OpenSoraPipeline, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            inner.append(sample(pipeline, OTHER, 2, num_inference_steps=3))
        assert pipeline.num_timesteps == 4
        return {}

    equal((sample(kept, num_inference_steps=4, callback_on_step_end=interleave), *inner), expected)


HOLDERS: dict[str, Callable[[OpenSoraPipeline], None]] = {
    "cache": lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05)),
    "models offloaded": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "groups offloaded": lambda pipe: pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    ),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_calls_wait_for_each_other_where_networks_keep_something(pipe, one_thread, holder):
    HOLDERS[holder](pipe)
    wishes: list[dict[str, Any]] = [{"seed": 1}, {"prompt": OTHER, "seed": 2}]
    alone = [sample(pipe, **wish, num_inference_steps=4) for wish in wishes]
    order: list[int] = []

    def note(*_: Any) -> dict[str, Any]:
        order.append(threading.get_ident())
        return {}

    calls = [
        lambda wish=wish: sample(pipe, **wish, num_inference_steps=4, callback_on_step_end=note) for wish in wishes
    ]
    equal(in_threads(calls), alone)
    changes = sum(before != after for before, after in itertools.pairwise(order))
    assert len(order) == 8 and changes == 1


def test_threads_encode_text_at_the_same_time(kept, one_thread):
    """Fast tokenizers refuse to be borrowed twice."""
    prompts = [f"{PROMPT} {number}" for number in range(8)]
    alone = [kept.encode_prompt(prompt)[0].states for prompt in prompts]
    equal(in_threads([lambda p=p: kept.encode_prompt(p)[0].states for p in prompts]), alone)


def test_an_error_in_one_thread_lets_the_next_in(pipe):
    HOLDERS["cache"](pipe)
    expected = sample(pipe)

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("of a callback")

    with pytest.raises(RuntimeError, match="of a callback"):
        sample(pipe, callback_on_step_end=fail)
    equal(in_threads([lambda: sample(pipe)])[0], expected)
    assert pipe.num_timesteps is None


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_encoded_prompts_are_taken_back(kept, negative):
    prompts = [PROMPT, OTHER]
    expected = sample(kept, prompts, negative_prompt=negative, generator=seeded(1, 2))
    text, against = kept.encode_prompt(prompts, negative)
    assert isinstance(text, TextStates) and len(text) == 2
    assert (against is None) == (negative is None and kept.text_conditioner.null_prompt is None)
    embeds = {"prompt_embeds": text, "negative_prompt_embeds": against}
    equal(sample(kept, None, **embeds, generator=seeded(1, 2)), expected)
    if kept.text_conditioner.pools:
        assert "has no pooled text" in refusal(kept, None, prompt_embeds=text.states, generator=seeded(1, 2))
        return
    tensors: dict[str, Any] = {"prompt_embeds": text.states, "prompt_attention_mask": text.mask}
    if against is not None:
        tensors |= {"negative_prompt_embeds": against.states, "negative_prompt_attention_mask": against.mask}
    equal(sample(kept, None, **tensors, generator=seeded(1, 2)), expected)


def test_one_negative_text_serves_all_prompts(kept):
    text, _ = kept.encode_prompt([PROMPT, OTHER])
    _, against = kept.encode_prompt(PROMPT, NEGATIVE)
    expected = sample(kept, [PROMPT, OTHER], negative_prompt=NEGATIVE, generator=seeded(1, 2))
    embeds = {"prompt_embeds": text, "negative_prompt_embeds": against}
    near(sample(kept, None, **embeds, generator=seeded(1, 2)), expected)
    mixed = {"prompt_embeds": text, "negative_prompt": NEGATIVE}
    near(sample(kept, None, **mixed, generator=seeded(1, 2)), expected)


def test_several_videos_of_each_prompt(kept):
    prompts, seeds = [PROMPT, OTHER], seeded(1, 2, 3, 4)
    expected = torch.cat([sample(kept, prompts[k // 2], k + 1, negative_prompt=NEGATIVE) for k in range(4)])
    several = {"num_videos_per_prompt": 2, "negative_prompt": NEGATIVE}
    near(sample(kept, prompts, **several, generator=seeds), expected)
    text, _ = kept.encode_prompt(prompts)
    near(sample(kept, None, prompt_embeds=text, **several, generator=seeded(1, 2, 3, 4)), expected)


def test_text_is_encoded_once(pipe):
    calls = count_calls(pipe.text_encoder)
    text, against = pipe.encode_prompt([PROMPT, OTHER], NEGATIVE)
    assert calls == [2, 2] or calls == [2, 1]
    calls.clear()
    for seed in (1, 3):
        sample(pipe, None, prompt_embeds=text, negative_prompt_embeds=against, generator=seeded(seed, 2))
    assert calls == []
    sample(pipe, PROMPT, num_videos_per_prompt=3, generator=seeded(1, 2, 3))
    assert calls == ([1] if pipe.text_conditioner.null_prompt is None else [1, 1])


def test_contradictions_about_text_are_refused(kept):
    text, _ = kept.encode_prompt(PROMPT)
    assert refusal(kept, PROMPT, prompt_embeds=text).startswith("got both prompt and prompt_embeds")
    assert refusal(kept, None).startswith("got neither prompt nor prompt_embeds")
    both = refusal(kept, negative_prompt=NEGATIVE, negative_prompt_embeds=text)
    assert both.startswith("got both negative_prompt and negative_prompt_embeds")
    three = kept.encode_prompt([PROMPT, OTHER, PROMPT])[0]
    two = kept.encode_prompt([PROMPT, OTHER])[0]
    assert refusal(kept, None, prompt_embeds=three, negative_prompt_embeds=two).startswith("got 2 negative texts for 3")
    mask = torch.ones(text.states.shape[:2])
    assert "prompt_attention_mask" in refusal(kept, PROMPT, prompt_attention_mask=mask)
    assert "prompt_attention_mask" in refusal(kept, None, prompt_embeds=text, prompt_attention_mask=mask)
    if not kept.text_conditioner.pools:
        short = {"prompt_embeds": text.states, "prompt_attention_mask": mask[:, 1:]}
        assert "prompt_attention_mask" in refusal(kept, None, **short)
    assert "prompt_embeds" in refusal(kept, None, prompt_embeds=text.states[0])
    narrow = replace(text, states=text.states[..., 1:])
    why = "text states" if kept.text_conditioner.pools else "encoder_hidden_states"  # there an empty text stands beside
    assert why in refusal(kept, None, prompt_embeds=narrow)
    against, _ = kept.encode_prompt(OTHER)
    assert "text states" in refusal(kept, None, prompt_embeds=narrow, negative_prompt_embeds=against)
    assert "prompt_embeds" in refusal(kept, None, prompt_embeds="a ball")


# ---- callbacks ------------------------------------------------------------------------------------------------------


def test_callbacks_get_the_tensors_that_they_ask_for(kept):
    seen: list[dict[str, Any]] = []

    def keep(pipeline: OpenSoraPipeline, step: int, timestep: Tensor, tensors: dict[str, Any]) -> None:
        seen.append({"step": step, "timestep": float(timestep), **tensors})

    names = kept._callback_tensor_inputs
    assert names == ["latents", "noise_pred", "prompt_embeds", "negative_prompt_embeds"]
    last = sample(
        kept, num_inference_steps=3, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=names,
        negative_prompt=NEGATIVE,
    )  # fmt: skip
    assert [set(one) for one in seen] == [{"step", "timestep", *names}] * 3
    text, against = kept.encode_prompt(PROMPT, NEGATIVE)
    equal(seen[-1]["latents"], last)
    for one in seen:
        equal(one["prompt_embeds"].states, text.states)
        equal(one["negative_prompt_embeds"].states, against.states)
        assert one["noise_pred"].shape[2:] == last.shape[2:]
    for name in names:
        seen.clear()
        sample(kept, num_inference_steps=1, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=[name])
        assert set(seen[0]) == {"step", "timestep", name}


def test_callback_objects_say_what_they_ask_for(kept):
    class Halve(PipelineCallback):
        tensor_inputs: Any = ("latents", "noise_pred")

        def callback_fn(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            assert set(tensors) == {"latents", "noise_pred"}
            return {"latents": tensors["latents"] / 2} if step == 1 else tensors

    plain = sample(kept, num_inference_steps=2)
    no_ratio: Any = None
    for callback in (Halve(no_ratio, cutoff_step_index=0), MultiPipelineCallbacks([Halve(1.0, None)])):
        equal(sample(kept, num_inference_steps=2, callback_on_step_end=callback), plain / 2)


def test_guidance_is_cut_off_by_a_guider_and_not_by_a_callback(kept):
    with pytest.raises(TypeError, match="TextStates"):
        sample(kept, num_inference_steps=4, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))
    asked: list[bool] = []

    def ask(pipeline: OpenSoraPipeline, *_: Any) -> dict[str, Any]:
        asked.append(pipeline.do_classifier_free_guidance)
        return {}

    guider = ClassifierFreeGuidance(3.0, stop=0.5)
    sample(kept, num_inference_steps=4, guider=guider, callback_on_step_end=ask)
    assert asked == [True, True, False, False]


def test_unknown_tensors_are_refused(kept):
    assert "'image_latents'" in refusal(kept, callback_on_step_end_tensor_inputs=["image_latents"])
    assert "'latent'" in refusal(kept, callback_on_step_end=lambda *_: {"latent": torch.zeros(1)})
    assert "latents" in refusal(kept, callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 1)})


def test_latents_that_a_callback_returns_are_gone_on_from(kept):
    def half(pipeline: OpenSoraPipeline, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] / 2} if step == 2 else tensors

    plain = sample(kept, num_inference_steps=3)
    equal(sample(kept, num_inference_steps=3, callback_on_step_end=half), plain / 2)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_text_that_a_callback_returns_is_gone_on_with(kept, as_tensor):
    """Replaced after the first step of two: the same as both steps with a rule that reads the other text then."""
    other, _ = kept.encode_prompt("a red cube")
    first, _ = kept.encode_prompt(PROMPT)
    read = []
    hook = kept.transformer.register_forward_pre_hook(
        lambda network, args, keywords: read.append(keywords["text_context"]), with_kwargs=True
    )
    new = {"prompt_embeds": other.states if as_tensor else other}
    sample(kept, num_inference_steps=2, guidance_scale=1.0, callback_on_step_end=lambda *_: new)
    hook.remove()
    second = replace(first, states=other.states) if as_tensor else other
    for context, text in zip(read, (first, second), strict=True):
        with torch.no_grad():
            expected = kept.transformer.encode_text(**text.inputs())
        equal(*(made if isinstance(made, dict) else made.keys_values for made in (context, expected)))


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in the callback", "from another thread"])
def test_interrupted_runs_decode_what_there_is(kept, elsewhere):
    reached = []

    def stop(pipeline: OpenSoraPipeline, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        reached.append(tensors["latents"])
        if step == 1:
            if elsewhere:
                in_threads([lambda: setattr(pipeline, "_interrupt", True) or torch.zeros(1)])
            else:
                pipeline._interrupt = True
            assert pipeline.interrupt
        return {}

    video = sample(kept, num_inference_steps=5, callback_on_step_end=stop, output_type="pt")
    assert len(reached) == 2 and not kept.interrupt
    with torch.no_grad():  # a codec may compute gradients' activations in other portions
        equal(video, kept.decode(reached[-1], kept.config.num_frames))
    assert len(sample(kept, num_inference_steps=2)) == 1  # the next one is not


def test_a_running_call_can_be_asked_about(kept):
    asked = []

    def ask(pipeline: OpenSoraPipeline, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert pipeline.current_timestep is not None and float(pipeline.current_timestep) == float(timestep)
        asked.append((pipeline.num_timesteps, pipeline.guidance_scale, pipeline.do_classifier_free_guidance))
        return {}

    sample(kept, num_inference_steps=2, guidance_scale=2.5, callback_on_step_end=ask)
    sample(kept, num_inference_steps=3, guidance_scale=1.0, callback_on_step_end=ask)
    assert asked == [(2, 2.5, True)] * 2 + [(3, 1.0, False)] * 3
    assert kept.num_timesteps is kept.guidance_scale is kept.current_timestep is None
    assert not kept.do_classifier_free_guidance


# ---- schedules, seeds, batches --------------------------------------------------------------------------------------


def scheduled(pipe: OpenSoraPipeline, num_steps: int) -> Any:
    """The scheduler of a call with the default sizes."""
    clip = pipe._clip_conditions(pipe._size(None, None, None), None, None)
    return pipe._prepared_scheduler(num_steps, None, None, clip, torch.device("cpu"))


def test_the_default_timesteps_make_the_default_clip(kept):
    timesteps = scheduled(kept, 4).timesteps
    expected = sample(kept, num_inference_steps=4)
    near(sample(kept, timesteps=timesteps.tolist()), expected)
    made = kept(PROMPT, timesteps=timesteps, generator=seeded(1), output_type="latent")
    assert made.settings["num_inference_steps"] == 4 and made.settings["timesteps"] == timesteps.tolist()
    assert not torch.allclose(sample(kept, timesteps=timesteps[::2].tolist()), expected, atol=1e-3)


def test_noise_levels_of_a_flow_are_a_schedule():
    pipe = pipeline_of("opensora-1.2")
    timesteps = scheduled(pipe, 4).timesteps
    near(sample(pipe, sigmas=(timesteps / 1000).tolist()), sample(pipe, num_inference_steps=4))
    assert refusal(pipe, sigmas=[0.5], timesteps=[500.0]) == "got timesteps and sigmas; give one of them"


def test_contradictions_about_steps_are_refused(kept):
    given = [500, 100]
    assert "num_inference_steps" in refusal(kept, timesteps=given, num_inference_steps=2)
    assert "timesteps" in refusal(kept, timesteps=given[::-1])
    if not isinstance(kept.scheduler, RectifiedFlowScheduler):
        assert "sigmas" in refusal(kept, sigmas=[0.5, 0.1])


def test_seeds_stand_for_generators(kept):
    prompts = [PROMPT, OTHER]
    expected = sample(kept, prompts, generator=seeded(1, 2))
    equal(sample(kept, prompts, generator=[1, 2]), expected)
    equal(sample(kept, prompts, generator=[1, torch.Generator().manual_seed(2)]), expected)
    equal(sample(kept, prompts, generator=(np.int64(1), np.int64(2))), expected)
    equal(sample(kept, generator=7), sample(kept, generator=seeded(7)))
    equal(sample(kept, generator=np.int64(7)), sample(kept, generator=seeded(7)))
    assert "2 generators for 1 video" in refusal(kept, generator=[1, 2])
    assert "'seven'" in refusal(kept, generator="seven")


def test_a_batch_is_its_single_clips(kept):
    prompts = [PROMPT, OTHER, "a ball"]
    together = sample(kept, prompts, generator=seeded(1, 2, 3), negative_prompt=[OTHER, PROMPT, NEGATIVE])
    for k, against in enumerate([OTHER, PROMPT, NEGATIVE]):
        near(together[k : k + 1], sample(kept, prompts[k], k + 1, negative_prompt=against))


def test_branches_by_turns_make_the_same_clip(pipe):
    expected = sample(pipe)
    pipe.sequential_guidance = True
    near(sample(pipe), expected)


def test_noise_may_be_given(kept):
    shape = sample(kept).shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    equal(sample(kept, latents=noise, seed=4), sample(kept, latents=noise.clone(), seed=4))
    assert not torch.equal(sample(kept, latents=noise, seed=4), sample(kept, latents=-noise, seed=4))
    drawn = seeded(1)
    noise = torch.randn(shape, generator=drawn[0])
    equal(sample(kept, latents=noise, generator=drawn), sample(kept))
    assert "latents have the shape (2," in refusal(kept, latents=noise.repeat(2, 1, 1, 1, 1))


# ---- schedulers -----------------------------------------------------------------------------------------------------


def test_the_scheduler_of_a_pipeline_is_a_template(kept):
    """Each call has a copy, which its callback does not find on the pipeline."""
    before = {name: str(value) for name, value in vars(kept.scheduler).items()}

    def look(pipeline: OpenSoraPipeline, *_: Any) -> dict[str, Any]:
        assert {name: str(value) for name, value in vars(pipeline.scheduler).items()} == before
        return {}

    sample(kept, num_inference_steps=3, callback_on_step_end=look)


def test_a_scheduler_is_swapped_as_in_diffusers():
    pipe, other = pipeline_of("opensora-1.1-stage3"), pipeline_of("opensora-1.1-stage3", "dpm-solver++")
    pipe.scheduler = DPMSolverScheduler.from_config(pipe.scheduler.config)
    equal(sample(pipe), sample(other))


def test_a_foreign_scheduler_in_its_place_is_refused(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    assert "FlowMatchEulerDiscreteScheduler" in refusal(pipe)


def test_context_parallelism_of_diffusers_has_no_plan(kept):
    """So that `enable_parallelism` refuses to guess one; `parallelize` takes its place."""
    assert kept.transformer._cp_plan is None
