"""Every pipeline in the shape of diffusers' pipeline tests: threads, embeddings, callbacks, schedules, copies, files.

Each test runs on all three generations of the family, with every scheduler there is. Offloading is tested in
`test_pipeline_offload.py`, adapters in `test_pipeline_lora.py`, guidance in `test_pipeline_guidance.py`, frames that
are given in `test_pipeline_frames.py`.
"""

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.utils import dynamic_modules_utils, export_to_video, export_utils
from tiny_pipeline import seeded
from tiny_published import pipeline_of
from torch import Tensor

from opensora.checkpoints.loading import load_pipeline
from opensora.errors import OpenSoraError
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler
from opensora.models.text.conditioner import TextStates
from opensora.pipeline import OpenSoraPipeline

PROMPT = "a red ball"
OTHER = "rain in the hills"
NEGATIVE = "a blue cube"
PIPELINES: dict[str, tuple[str, str | None]] = {
    "1.0, ancestral": ("opensora-1.0-hq-16x256x256", None),
    "1.0, DPM-Solver++": ("opensora-1.0-hq-16x256x256", "dpm-solver++"),
    "1.1, DDIM": ("opensora-1.1-stage3", "ddim"),
    "1.1, DPM-Solver++": ("opensora-1.1-stage3", "dpm-solver++"),
    "1.2, flow": ("opensora-1.2", None),
}


@pytest.fixture(scope="module", params=PIPELINES)
def kept(request: pytest.FixtureRequest) -> OpenSoraPipeline:
    """A tiny pipeline of each kind, not to be changed."""
    return pipeline_of(*PIPELINES[request.param])


@pytest.fixture(params=PIPELINES)
def pipe(request: pytest.FixtureRequest) -> OpenSoraPipeline:
    """A tiny pipeline of each kind, to be changed."""
    return pipeline_of(*PIPELINES[request.param])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of several threads of one operator depend on how busy a machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sample(pipe: OpenSoraPipeline, prompt: Any = PROMPT, seed: int = 1, **options: Any) -> Any:
    return pipe(prompt, **{"generator": seeded(seed), "output_type": "latent"} | options).frames


def equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def near(actual: Tensor, expected: Tensor) -> None:
    """Up to rounding, which a sampler may enlarge where latents are large."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def refusal(pipe: OpenSoraPipeline, prompt: Any = PROMPT, **options: Any) -> str:
    """Why a call is refused, which is said in one line."""
    with pytest.raises(OpenSoraError) as error:
        sample(pipe, prompt, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


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


@pytest.mark.parametrize("steps", [(6, 6, 6), (4, 9, 6)], ids=["same steps", "other steps"])
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
    assert isinstance(text, TextStates) and len(text) == 2 and (against is None) == (negative is None)
    embeds = {"prompt_embeds": text, "negative_prompt_embeds": against}
    equal(sample(kept, None, **embeds, generator=seeded(1, 2)), expected)
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
    assert calls == [1]


def test_contradictions_about_text_are_refused(kept):
    text, _ = kept.encode_prompt(PROMPT)
    assert refusal(kept, PROMPT, prompt_embeds=text).startswith("got both prompt and prompt_embeds")
    assert refusal(kept, None).startswith("got neither prompt nor prompt_embeds")
    both = refusal(kept, negative_prompt=NEGATIVE, negative_prompt_embeds=text)
    assert both.startswith("got both negative_prompt and negative_prompt_embeds")
    three = kept.encode_prompt([PROMPT, OTHER, PROMPT])[0]
    two = kept.encode_prompt([PROMPT, OTHER])[0]
    assert refusal(kept, None, prompt_embeds=three, negative_prompt_embeds=two).startswith("got 2 negative texts for 3")
    assert "prompt_attention_mask" in refusal(kept, PROMPT, prompt_attention_mask=text.mask)
    assert "prompt_attention_mask" in refusal(kept, None, prompt_embeds=text, prompt_attention_mask=text.mask)
    mask = text.mask[:, 1:]
    assert "prompt_attention_mask" in refusal(kept, None, prompt_embeds=text.states, prompt_attention_mask=mask)
    assert "prompt_embeds" in refusal(kept, None, prompt_embeds=text.states[0])
    assert "encoder_hidden_states" in refusal(kept, None, prompt_embeds=text.states[..., 1:])
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
        tensor_inputs = ("latents", "noise_pred")

        def callback_fn(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            assert set(tensors) == {"latents", "noise_pred"}
            return {"latents": tensors["latents"] / 2} if step == 1 else tensors

    plain = sample(kept, num_inference_steps=2)
    for callback in (Halve(cutoff_step_ratio=None, cutoff_step_index=0), MultiPipelineCallbacks([Halve(1.0, None)])):
        equal(sample(kept, num_inference_steps=2, callback_on_step_end=callback), plain / 2)


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
    for context, text in zip(read, (first, other), strict=True):
        expected = kept.transformer.encode_text(**text.inputs())
        for ours, theirs in zip(context.keys_values, expected.keys_values, strict=True):
            equal(ours, theirs)


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
    equal(video, kept._decode(reached[-1], kept._size(None, None, None), "pt"))
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


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_output_types_hold_the_same_video(kept):
    video, array, images, latents = (sample(kept, output_type=kind) for kind in ("pt", "np", "pil", "latent"))
    assert video.shape == (1, 4, 3, 32, 48) and video.dtype == torch.float32
    assert isinstance(array, np.ndarray)
    equal(torch.tensor(array).movedim(-1, 2), video)
    pixels = np.stack([np.asarray(image) for image in images[0]])
    assert np.array_equal(pixels, (array[0] * 255).round().astype(np.uint8))
    equal(kept._decode(latents, kept._size(None, None, None), "pt"), video)
    as_tuple = sample_tuple(kept)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    assert "output_type is 'mp4'" in refusal(kept, output_type="mp4")


def sample_tuple(pipe: OpenSoraPipeline) -> Any:
    return pipe(PROMPT, generator=seeded(1), return_dict=False)


@pytest.mark.parametrize("output_type", [None, "np"])
def test_export_to_video_is_given_the_pixels_of_the_video(kept, output_type, monkeypatch):
    """Up to the codec, which is another program."""
    written: list[np.ndarray] = []

    class Writer:
        def append_data(self, frame: np.ndarray) -> None:
            written.append(np.asarray(frame))

        def __enter__(self) -> "Writer":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    plugins = SimpleNamespace(ffmpeg=SimpleNamespace(get_exe=lambda: "ffmpeg"))
    fake = SimpleNamespace(plugins=plugins, get_writer=lambda *_, **__: Writer())
    monkeypatch.setitem(sys.modules, "imageio", fake)
    monkeypatch.setattr(export_utils, "is_imageio_available", lambda: True)
    kinds = {} if output_type is None else {"output_type": output_type}
    frames = kept(PROMPT, generator=seeded(1), **kinds).frames[0]
    export_to_video(frames, "clip.mp4", fps=8)
    exact = sample(kept, output_type="np")[0] * 255
    assert len(written) == len(exact) and all(frame.dtype == np.uint8 for frame in written)
    # diffusers rounds arrays down.
    assert np.abs(np.stack(written) - exact).max() <= (0.5 if output_type is None else 1) + 1e-4


# ---- copies and files -----------------------------------------------------------------------------------------------


def defaults_of(pipe: OpenSoraPipeline) -> dict[str, Any]:
    return {name: value for name, value in dict(pipe.config).items() if not name.startswith("_")}


CHANGED: dict[str, Any] = {"guidance_scale": 2.5, "cfg_channels": [0, 2], "height": 16, "num_frames": 3, "fps": 9}


def with_own_defaults(kind: str) -> OpenSoraPipeline:
    """A pipeline none of whose defaults are those of the class."""
    name, sampler = PIPELINES[kind]
    pipe = pipeline_of(name, sampler, **CHANGED)
    space = pipe.autoencoder.latent_space.to_dict()
    pipe.register_to_config(trained_on={"latent_space": space, "autoencoder": "a" * 64})
    return pipe


COPIES: dict[str, Callable[[OpenSoraPipeline], OpenSoraPipeline]] = {
    "components": lambda pipe: OpenSoraPipeline(**pipe.components),
    "from_pipe": OpenSoraPipeline.from_pipe,
    "from_pipe and back": lambda pipe: OpenSoraPipeline.from_pipe(OpenSoraPipeline.from_pipe(pipe)),
}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("kind", PIPELINES)
def test_copies_keep_the_models_defaults_and_share_its_networks(kind, copy):
    pipe = with_own_defaults(kind)
    made = COPIES[copy](pipe)
    made.set_progress_bar_config(disable=True)
    assert defaults_of(made) == defaults_of(pipe)
    assert {name: dict(made.config)[name] for name in CHANGED} == CHANGED
    assert all(made.networks[name] is part for name, part in pipe.networks.items())
    equal(sample(made), sample(pipe))


def test_a_copy_may_differ_and_leaves_the_first_as_it_was(kept):
    before, expected = defaults_of(kept), sample(kept)
    made = OpenSoraPipeline.from_pipe(kept, guidance_scale=1.0)
    assert defaults_of(made) == before | {"guidance_scale": 1.0} and defaults_of(kept) == before
    made.set_progress_bar_config(disable=True)
    equal(sample(made), sample(kept, guidance_scale=1.0))
    equal(sample(kept), expected)


def test_a_copy_of_an_offloaded_pipeline_is_offloaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    away = load_pipeline(tmp_path, offload=True)
    away.sequential_guidance = True
    made = OpenSoraPipeline.from_pipe(away)
    made.set_progress_bar_config(disable=True)
    assert made.sequential_guidance
    near(sample(made), sample(pipe))


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("way", ["from_pretrained", "DiffusionPipeline", "load_pipeline"])
def test_saved_and_loaded(kind, way, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    pipe = with_own_defaults(kind)
    folder = tmp_path / "saved"
    pipe.save_pretrained(folder)
    ways: dict[str, Callable[..., Any]] = {
        "from_pretrained": OpenSoraPipeline.from_pretrained,
        "DiffusionPipeline": lambda path, **how: DiffusionPipeline.from_pretrained(path, trust_remote_code=True, **how),
        "load_pipeline": lambda path, torch_dtype=None: load_pipeline(path, dtype=torch_dtype),
    }
    loaded = ways[way](folder)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is OpenSoraPipeline and type(loaded.scheduler) is type(pipe.scheduler)
    assert defaults_of(loaded) == defaults_of(pipe)
    near(sample(loaded), sample(pipe))
    half = ways[way](folder, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    dtypes = {name: getattr(half, name).dtype for name in ("transformer", "autoencoder", "text_encoder")}
    assert dtypes == dict.fromkeys(dtypes, torch.bfloat16) and half.dtype == torch.bfloat16
    latents = sample(half)
    assert latents.dtype == torch.float32 and torch.isfinite(latents).all()


def test_cast_as_a_whole(pipe):
    expected = sample(pipe)
    latents = sample(pipe.to(torch.bfloat16))
    assert pipe.dtype == torch.bfloat16 and latents.dtype == torch.float32
    assert 0 < (latents - expected).abs().max() < expected.abs().max()


# ---- the autoencoder ------------------------------------------------------------------------------------------------


def test_the_autoencoder_is_also_the_vae(pipe):
    assert pipe.vae is pipe.autoencoder
    prompts, seeds = [PROMPT, OTHER], (1, 2)
    whole = sample(pipe, prompts, output_type="pt", generator=seeded(*seeds))
    pipe.enable_vae_slicing()
    assert pipe.vae.use_slicing
    near(sample(pipe, prompts, output_type="pt", generator=seeded(*seeds)), whole)
    pipe.disable_vae_slicing()
    pipe.enable_vae_tiling()
    assert pipe.vae.use_tiling
    tiles = sample(pipe, prompts, output_type="pt", generator=seeded(*seeds))
    assert tiles.shape == whole.shape and torch.isfinite(tiles).all()
    pipe.disable_vae_tiling()
    assert not pipe.vae.use_tiling and not pipe.vae.use_slicing
    equal(sample(pipe, prompts, output_type="pt", generator=seeded(*seeds)), whole)
