"""The pipeline on tiny random components: what a call returns, what it depends on, and what it refuses."""

import copy
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.hooks import FirstBlockCacheConfig
from PIL import Image
from tiny_pipeline import DEFAULTS, make_pipeline, seeded

from opensora.errors import OpenSoraError
from opensora.models.clip_conditions import ClipConditions
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler
from opensora.pipeline import OpenSoraPipeline

PROMPT = "a small red ball rolls left"
OTHER = "a big blue square spins at night"
LATENT_SIZE = (2, 2, 3)


@pytest.fixture(scope="module")
def pipelines():
    return {kind: make_pipeline(kind) for kind in ("flow", "iddpm")}


@pytest.fixture(params=["flow", "iddpm"])
def pipe(request, pipelines) -> OpenSoraPipeline:
    return pipelines[request.param]


@pytest.fixture
def flow(pipelines) -> OpenSoraPipeline:
    return pipelines["flow"]


def latents_of(pipe, prompt: str | list[str] = PROMPT, **options: Any):
    options: dict[str, Any] = {"generator": seeded(5), "output_type": "latent"} | options
    return pipe(prompt, **options).frames


# --- results ----------------------------------------------------------------------------------------------------------


def test_frames_have_the_default_size_and_range(pipe):
    frames = pipe(PROMPT, generator=seeded(0), output_type="pt").frames
    assert frames.shape == (1, DEFAULTS["num_frames"], 3, DEFAULTS["height"], DEFAULTS["width"])
    assert frames.dtype == torch.float32
    assert 0 <= frames.min() < frames.max() <= 1


def test_any_size_that_divides(pipe):
    assert pipe(PROMPT, height=24, width=8, num_frames=18, output_type="pt").frames.shape == (1, 18, 3, 24, 8)
    assert pipe(PROMPT, num_frames=1, output_type="pt").frames.shape[1] == 1


def test_output_types_show_the_same_video(flow):
    tensor, array, images, latents = (
        flow(PROMPT, generator=seeded(0), output_type=kind).frames for kind in ("pt", "np", "pil", "latent")
    )
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    assert isinstance(images[0][0], Image.Image)
    np.testing.assert_array_equal(np.stack([np.asarray(i) for i in images[0]]), (array[0] * 255).round())
    decoded = flow.autoencoder.decode_latents(latents, DEFAULTS["num_frames"])
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1).transpose(1, 2), tensor)


def test_tuple_on_request(flow):
    (frames,) = flow(PROMPT, generator=seeded(0), output_type="pt", return_dict=False)
    assert torch.equal(frames, flow(PROMPT, generator=seeded(0), output_type="pt").frames)


def test_latents_are_float32_whatever_the_network_runs_in():
    pipe = make_pipeline("flow").to(torch.bfloat16)
    seen = []
    pipe(PROMPT, callback_on_step_end=lambda pipe, i, t, values: seen.append(values["latents"].dtype))
    assert set(seen) == {torch.float32}
    assert pipe(PROMPT, output_type="pt").frames.dtype == torch.float32


# --- seeds and batches ------------------------------------------------------------------------------------------------


def test_a_seed_makes_the_same_video_bit_for_bit(pipe):
    assert torch.equal(
        pipe(PROMPT, generator=seeded(7), output_type="pt").frames,
        pipe(PROMPT, generator=seeded(7), output_type="pt").frames,
    )
    assert not torch.equal(
        pipe(PROMPT, generator=seeded(7), output_type="pt").frames,
        pipe(PROMPT, generator=seeded(8), output_type="pt").frames,
    )


def test_without_a_generator_the_recorded_seed_makes_it_again(pipe):
    first = pipe(PROMPT, output_type="pt")
    assert torch.equal(pipe(PROMPT, generator=seeded(*first.settings["seed"]), output_type="pt").frames, first.frames)


def assert_same_video(actual, expected):
    """Equal but for rounding; a random network takes IDDPM's latents into the hundreds."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_batch_of_two_is_two_of_one(pipe):
    both = latents_of(pipe, [PROMPT, OTHER], generator=seeded(3, 4))
    for row, prompt, seed in ((0, PROMPT, 3), (1, OTHER, 4)):
        assert_same_video(both[row : row + 1], latents_of(pipe, prompt, generator=seeded(seed)))


def test_several_videos_per_prompt_come_one_after_the_other(pipe):
    four = latents_of(pipe, [PROMPT, OTHER], num_videos_per_prompt=2, generator=seeded(1, 2, 3, 4))
    assert len(four) == 4
    assert_same_video(four[2:3], latents_of(pipe, OTHER, generator=seeded(3)))


def test_a_single_generator_seeds_every_video(pipe):
    one = latents_of(pipe, [PROMPT, PROMPT], generator=seeded(3)[0])
    assert not torch.equal(one[0], one[1])
    assert torch.equal(one, latents_of(pipe, [PROMPT, PROMPT], generator=seeded(3)[0]))


def test_given_latents_are_the_noise(flow):
    noise = torch.randn(1, 4, *LATENT_SIZE, generator=seeded(5)[0])
    assert torch.equal(latents_of(flow, latents=noise), latents_of(flow))


# --- guidance ---------------------------------------------------------------------------------------------------------


def reference_flow(pipe, noise, steps, scale, negative=None):
    """Rectified flow with classifier-free guidance, written out: one branch at a time, in float64, no reuse of text.

    x <- x + v (t_i - t_{i+1}), v = v_null + s (v_text - v_null), t shifted to t r / (1 + (r - 1) t).
    """
    network = copy.deepcopy(pipe.transformer).double()
    tokens = pipe.tokenizer([PROMPT], padding="max_length", max_length=24, return_tensors="pt")
    states = pipe.text_encoder(**{k: tokens[k] for k in ("input_ids", "attention_mask")})[0].double()
    mask = null_mask = tokens["attention_mask"]
    null = network.null_text[None].double()
    if negative is not None:
        tokens = pipe.tokenizer([negative], padding="max_length", max_length=24, return_tensors="pt")
        null = pipe.text_encoder(**{k: tokens[k] for k in ("input_ids", "attention_mask")})[0].double()
        null_mask = tokens["attention_mask"]
    height, width = DEFAULTS["height"], DEFAULTS["width"]
    ratio = math.sqrt(height * width / 512**2) * math.sqrt(LATENT_SIZE[0])
    times = [1 - i / steps for i in range(steps)]
    times = [ratio * t / (1 + (ratio - 1) * t) for t in times] + [0.0]
    x = noise.double()
    for now, following in itertools.pairwise(times):
        clip = ClipConditions(DEFAULTS["fps"], height, width, DEFAULTS["num_frames"])
        t = torch.tensor([1000 * now], dtype=torch.float64)
        with_text = network(x, t, states, mask, clip_conditions=clip).sample[:, :4]
        without = network(x, t, null, null_mask, clip_conditions=clip).sample[:, :4]
        x = x + (without + scale * (with_text - without)) * (now - following)
    return x.float()


@pytest.mark.parametrize("negative", [None, "a white ring at night"])
@torch.no_grad()
def test_the_whole_loop_is_the_formula(flow, negative):
    noise = torch.randn(1, 4, *LATENT_SIZE, generator=seeded(11)[0])
    made = latents_of(flow, negative_prompt=negative, latents=noise, num_inference_steps=6, guidance_scale=2.5)
    expected = reference_flow(flow, noise, 6, 2.5, negative)
    assert (expected - noise).abs().max() > 0.1  # the network does something
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_scale_one_is_the_conditional_prediction_and_takes_one_branch(pipe):
    sizes = []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    unguided = latents_of(pipe, guidance_scale=1.0)
    hook.remove()
    assert set(sizes) == {1}
    off = ClassifierFreeGuidance(guidance_scale=9.0)
    off.disable()
    assert torch.equal(unguided, latents_of(pipe, guider=off))
    assert torch.equal(unguided, latents_of(pipe, guidance_scale=1.0, cfg_channels=1, negative_prompt=OTHER))
    assert not torch.allclose(unguided, latents_of(pipe, guidance_scale=3.0))


def test_foreign_autoencoder_is_refused_before_anything_runs(pipe):
    foreign = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    with pytest.raises(OpenSoraError, match=r"got AutoencoderKL as the autoencoder; expected a VideoCodec"):
        OpenSoraPipeline(**{**pipe.components, "autoencoder": foreign})


def test_foreign_scheduler_is_refused_before_anything_runs(pipe):
    with pytest.raises(OpenSoraError, match=r"FlowMatchEulerDiscreteScheduler.*x - e towards the data.*e - x"):
        OpenSoraPipeline(**{**pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler()})


def test_cfg_channels_touch_the_chosen_channels_only(pipe):
    """After one step the channels that are not guided are those of an unguided run."""
    one: dict[str, Any] = {"num_inference_steps": 1}
    unguided, every = latents_of(pipe, guidance_scale=1.0, **one), latents_of(pipe, cfg_channels="all", **one)
    for chosen, indices in ((2, [0, 1]), ([3, 1], [1, 3])):
        some = latents_of(pipe, cfg_channels=chosen, **one)
        others = [channel for channel in range(4) if channel not in indices]
        torch.testing.assert_close(some[:, indices], every[:, indices])
        torch.testing.assert_close(some[:, others], unguided[:, others])
        assert not torch.allclose(some[:, indices], unguided[:, indices])
    assert torch.equal(latents_of(pipe, cfg_channels=None), latents_of(pipe, cfg_channels=[0, 1, 2, 3]))


def test_cfg_channel_is_the_same_option(pipe):
    assert torch.equal(latents_of(pipe, cfg_channel=2), latents_of(pipe, cfg_channels=2))
    with pytest.raises(OpenSoraError, match="alias"):
        pipe(PROMPT, cfg_channel=2, cfg_channels=2)


def test_the_models_own_channels_are_the_default(pipelines):
    assert torch.equal(latents_of(pipelines["iddpm"]), latents_of(pipelines["iddpm"], cfg_channels=3))
    assert torch.equal(latents_of(pipelines["flow"]), latents_of(pipelines["flow"], cfg_channels=4))


@pytest.mark.parametrize(("kind", "channels"), [("flow", None), ("iddpm", 3)])
def test_the_family_decides_the_channels_that_nobody_chose(kind, channels):
    made = make_pipeline(kind)
    assert OpenSoraPipeline(**made.components).config.cfg_channels == channels


@pytest.mark.parametrize("threshold", [0.0, 1e9])
def test_a_cache_of_diffusers_works_in_the_loop_and_leaves_nothing_behind(threshold):
    plain = make_pipeline()
    expected = plain("a ball", generator=seeded(3), num_inference_steps=6, output_type="pt").frames
    cached = make_pipeline()
    cached.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    first = cached("a ball", generator=seeded(3), num_inference_steps=6, output_type="pt").frames
    again = cached("a ball", generator=seeded(3), num_inference_steps=6, output_type="pt").frames
    assert torch.equal(first, again)
    assert torch.equal(first, expected) == (threshold == 0.0)
    assert cached.current_timestep is None


def test_guiders_replace_plain_guidance(pipe):
    plain = latents_of(pipe, guider=ClassifierFreeGuidance(guidance_scale=3.0))
    assert torch.equal(plain, latents_of(pipe, guidance_scale=3.0))
    projected = latents_of(pipe, guider=AdaptiveProjectedGuidance(guidance_scale=3.0, eta=0.0))
    assert not torch.allclose(plain, projected)


def test_an_interval_of_guidance_runs_one_branch_outside_it(flow):
    sizes = []
    hook = flow.transformer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    guider = ClassifierFreeGuidance(guidance_scale=3.0, start=0.5)
    latents_of(flow, guider=guider, num_inference_steps=4)
    hook.remove()
    assert sizes == [1, 1, 2, 2]


def test_negative_prompts_change_the_result_only_where_guidance_looks(pipe):
    assert not torch.allclose(latents_of(pipe), latents_of(pipe, negative_prompt=OTHER))


# --- steps and callbacks ----------------------------------------------------------------------------------------------


def test_text_is_encoded_once_and_the_network_called_once_a_step(flow):
    calls = {"text": 0, "network": 0}
    hooks = [
        flow.text_encoder.register_forward_hook(lambda *_: calls.update(text=calls["text"] + 1)),
        flow.transformer.register_forward_hook(lambda *_: calls.update(network=calls["network"] + 1)),
    ]
    flow(PROMPT, num_inference_steps=3)
    for hook in hooks:
        hook.remove()
    assert calls == {"text": 1, "network": 3}


def test_the_callback_sees_every_step_and_may_change_latents(pipe):
    steps = []

    def zero_at_the_end(pipe, step, timestep, values):
        steps.append((step, float(timestep)))
        return {"latents": torch.zeros_like(values["latents"])} if step == 2 else None

    result = latents_of(pipe, num_inference_steps=3, callback_on_step_end=zero_at_the_end)
    assert [step for step, _ in steps] == [0, 1, 2]
    assert steps == sorted(steps, key=lambda step: -step[1])
    assert not result.any()


def test_iddpm_takes_a_respacing(pipelines):
    steps = []
    pipe = pipelines["iddpm"]
    pipe(PROMPT, num_inference_steps="ddim5", callback_on_step_end=lambda p, i, t, v: steps.append(i))
    assert len(steps) == 5
    with pytest.raises(OpenSoraError, match="num_inference_steps"):
        pipelines["flow"](PROMPT, num_inference_steps="ddim5")


# --- the record -------------------------------------------------------------------------------------------------------


def test_settings_say_what_was_done_in_plain_values(pipe):
    output = pipe(PROMPT, generator=seeded(9), cfg_channels=[0, 2], guidance_scale=2.0, fps=12, num_inference_steps=2)
    settings = json.loads(json.dumps(output.settings))
    expected = {"cfg_channels": [0, 2], "guidance_scale": 2.0, "fps": 12, "num_inference_steps": 2, "seed": [9]}
    expected |= {"prompt": [PROMPT], "negative_prompt": None, "height": 16, "width": 24, "num_frames": 5}
    assert {name: settings[name] for name in expected} == expected
    assert settings["guider"]["class"] == "ClassifierFreeGuidance"
    assert settings["scheduler"]["class"] == type(pipe.scheduler).__name__
    assert settings["latent_space"]["trained_with"] == "nothing"
    assert settings["latent_space"]["replaces"] is None


def test_an_overridden_latent_space_is_recorded():
    pipe = make_pipeline("flow")
    from opensora.models.autoencoders.latent_space import LatentSpace

    pipe.autoencoder.override_latent_space(LatentSpace(scaling_factor=0.5))
    recorded = pipe(PROMPT).settings["latent_space"]
    assert recorded["scaling_factor"] == 0.5
    assert recorded["replaces"]["trained_with"] == "nothing"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": " ".join(["ball"] * 30)}, "31 tokens"),
        ({"height": 20}, "nearest valid is 16 or 24"),
        ({"width": 0}, "nearest valid is 8"),
        ({"num_frames": 0}, "nearest valid is 1"),
        ({"num_frames": 99}, "nearest valid is 34"),
        ({"num_frames": 5.0}, "whole number"),
        ({"fps": 0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"num_inference_steps": 0}, "0"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": 2.0, "guider": ClassifierFreeGuidance()}, "a scale of its own"),
        ({"guider": 3.0}, "guider"),
        ({"cfg_channels": 5}, "1 to 4"),
        ({"cfg_channels": 0}, "1 to 4"),
        ({"cfg_channels": [4]}, "channel 4"),
        ({"output_type": "mp4"}, "output_type"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt"),
        ({"generator": seeded(1, 2)}, "2 generators for 1 videos"),
        ({"latents": torch.zeros(1, 4, 2, 2, 2)}, "(1, 4, 2, 2, 3)"),
        ({"latents": torch.full((1, 4, 2, 2, 3), float("nan"))}, "NaN"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1"),
    ],
)
def test_impossible_values_are_refused_in_one_line(pipe, options, message):
    with pytest.raises(OpenSoraError) as refusal:
        pipe(**({"prompt": PROMPT} | options))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_misspelt_option_is_refused(flow):
    with pytest.raises(TypeError, match="guidence_scale"):
        flow(PROMPT, guidence_scale=2.0)


def test_latents_that_are_not_finite_are_refused():
    pipe = make_pipeline("flow")
    torch.nn.init.constant_(pipe.transformer.final_layer.linear.bias, float("nan"))
    with pytest.raises(OpenSoraError, match=r"the latents after 4 steps in torch\.float32 hold NaN"):
        pipe(PROMPT)


def test_parts_of_two_models_are_refused(flow):
    parts = dict(flow.components)
    transformer = type(flow.transformer)(in_channels=8, hidden_size=8, depth=1, num_heads=1, caption_channels=16)
    with pytest.raises(OpenSoraError, match="8 latent channels, the autoencoder makes 4"):
        OpenSoraPipeline(**{**parts, "transformer": transformer})
    scheduler = RectifiedFlowScheduler(use_timestep_transform=True, temporal_factor=8)
    with pytest.raises(OpenSoraError, match="temporal_factor=8, but the autoencoder has 4"):
        OpenSoraPipeline(**{**parts, "scheduler": scheduler})
