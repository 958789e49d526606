"""Conditioning frames: where they are encoded, that they survive, and that the rest is made."""

from typing import Any

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance
from tiny_pipeline import make_autoencoder, make_pipeline, seeded

from opensora import load_pipeline
from opensora.conditioning.frames import (
    FrameConditioning,
    condition,
    encode_in_place,
)
from opensora.conditioning.references import encode_span, taken_latents
from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.schedulers.iddpm import IDDPMScheduler
from opensora.models.text.prompts import parse_mask_strategy
from opensora.pipeline import OpenSoraPipeline

PROMPT = "a small red ball rolls left"
SIZE = VideoSize(18, 16, 24)  # a chunk of 17 frames in 5 latent frames, and one of 1 in 1


def clip(num_frames: int = 18, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, num_frames, 16, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def autoencoder() -> VideoAutoencoder:
    return make_autoencoder().requires_grad_(False)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# --- encoding frames where they stand ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("latent_frame", "frames"), [(0, 0), (1, 1), (2, 5), (4, 13), (5, 17), (6, 18)])
def test_frames_before_a_latent_frame(autoencoder, latent_frame, frames):
    assert autoencoder.frames_before(latent_frame, 18) == frames


def test_frames_before_without_a_temporal_part_and_with_a_short_chunk(autoencoder):
    frames_only = VideoAutoencoder(spatial={"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4})
    assert [frames_only.frames_before(k, 20) for k in (0, 7, 20)] == [0, 7, 20]
    assert [autoencoder.frames_before(k, 20) for k in (5, 6)] == [17, 20]  # the last chunk is 3 frames, 1 latent frame
    assert [autoencoder.frames_before(k, 6) for k in (0, 1, 2)] == [0, 2, 6]
    with pytest.raises(OpenSoraError, match="latent frame 7"):
        autoencoder.frames_before(7, 18)


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 3), (0, 5), (5, 1), (0, 6)])
def test_frames_at_the_beginning_or_of_whole_chunks_are_what_they_are_in_the_whole_clip(autoencoder, start, length):
    """Earlier frames never depend on later ones, and chunks not on each other."""
    whole = autoencoder.encode_video(clip()[None])
    first, end = autoencoder.frames_before(start, 18), autoencoder.frames_before(start + length, 18)
    close(encode_in_place(autoencoder, clip()[:, first:end], 18, start, length), whole[:, :, start : start + length])


def test_what_comes_before_within_the_chunk_is_taken_to_stand_still(autoencoder):
    image = clip(1)
    still = autoencoder.encode_video(image[None].expand(-1, -1, 17, -1, -1))
    close(encode_in_place(autoencoder, image, 17, 4, 1), still[:, :, 4:])


# --- in words ---------------------------------------------------------------------------------------------------------


def test_each_way_gives_the_frames_it_names(autoencoder):
    image = clip(1)
    cases: list[tuple[dict[str, Any], list[float]]] = [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"image": image}, [0, 1, 1, 1, 1, 1]),
        ({"last_image": image}, [1, 1, 1, 1, 1, 0]),
        ({"image": image, "last_image": image}, [0, 1, 1, 1, 1, 0]),
        ({"extend": clip()}, [0, 0, 1, 1, 1, 1]),
        ({"extend": clip(), "condition_frames": 3, "last_image": image}, [0, 0, 0, 1, 1, 0]),
        ({"extend": clip(), "backwards": True}, [1, 1, 1, 1, 1, 0]),  # the last chunk alone
        ({"extend": clip(), "backwards": True, "condition_frames": 2, "image": image}, [0, 1, 1, 1, 0, 0]),
        ({"edit": clip(), "strength": 0.25}, [0.25] * 6),
    ]
    for options, strengths in cases:
        assert condition(autoencoder, SIZE, **options).strength.tolist() == [strengths], options


def test_going_on_takes_the_end_and_going_back_the_beginning(autoencoder):
    video, size = clip(30), VideoSize(17, 16, 24)
    onwards = condition(autoencoder, size, extend=video, condition_frames=3).latents
    close(onwards[:, :, :3], autoencoder.encode_video(video[None, :, 21:]))
    backwards = condition(autoencoder, VideoSize(34, 16, 24), extend=video, backwards=True).latents
    close(backwards[:, :, 5:], autoencoder.encode_video(video[None, :, :17]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": clip(), "strength": 0.5, "image": clip(1)}, "leave out image"),
        ({"edit": clip()}, "give strength"),
        ({"image": clip(1), "strength": 0.5}, "give the clip as edit"),
        ({"edit": clip(), "strength": 1.5}, "outside of 0"),
        ({"edit": clip(17), "strength": 0.5}, "has 17 frames; this clip of 18 needs 18"),
        ({"extend": clip(), "image": clip(1)}, "leave out the first image"),
        ({"extend": clip(), "backwards": True, "last_image": clip(1)}, "leave out the last image"),
        ({"extend": clip(4)}, "has 4 frames; this clip of 18 needs 5"),
        ({"extend": clip(), "condition_frames": 6}, "6 of 6 latent frames"),
        ({"image": clip(1)[:, :, :8]}, "expected"),
    ],
)
def test_contradictions(autoencoder, options, message):
    with pytest.raises(OpenSoraError, match=message):
        condition(autoencoder, SIZE, **options)


def test_shapes_that_do_not_belong_together():
    with pytest.raises(OpenSoraError, match="expected"):
        FrameConditioning(torch.zeros(1, 4, 5, 2, 2), torch.ones(1, 4))


# --- in the pipeline --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["flow", "ancestral", "ddim", "dpm-solver++"])
def pipe(request) -> OpenSoraPipeline:
    if request.param == "flow":
        return make_pipeline("flow", num_frames=18)
    pipeline = make_pipeline("iddpm", num_frames=18)
    pipeline.use_sampler(request.param)
    return pipeline


def latents_of(pipe: OpenSoraPipeline, **options: Any) -> torch.Tensor:
    return pipe(PROMPT, generator=seeded(1), output_type="latent", **options).frames


def test_conditioning_frames_come_out_as_they_went_in(pipe):
    conditioning = condition(pipe.autoencoder, SIZE, image=clip(1), last_image=clip(1, seed=1))
    result = latents_of(pipe, conditioning=conditioning)
    # Ancestral sampling and DDIM let conditioning frames take part in the very last step, as Open-Sora does.
    tolerance = 0.05 if pipe.scheduler.config.get("sampler") else 0.0
    for frame in (0, -1):
        torch.testing.assert_close(result[:, :, frame], conditioning.latents[:, :, frame], rtol=0, atol=tolerance)
    assert (result[:, :, 1:-1] - latents_of(pipe)[:, :, 1:-1]).abs().mean() > 1e-3


def test_networks_that_predict_clean_latents_keep_conditioning_frames_too():
    """What such a network says of conditioning frames would take their place in the last step."""
    pipe = make_pipeline("iddpm", num_frames=18)
    pipe.scheduler = IDDPMScheduler(prediction_type="sample", sampler="ddim")
    conditioning = condition(pipe.autoencoder, SIZE, image=clip(1))
    torch.testing.assert_close(latents_of(pipe, conditioning=conditioning)[:, :, 0], conditioning.latents[:, :, 0])
    masks: list[torch.Tensor] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["frame_mask"][0]), with_kwargs=True
    )
    latents_of(pipe, conditioning=condition(pipe.autoencoder, SIZE, edit=clip(), strength=0.5), num_inference_steps=4)
    assert [bool(mask.all()) for mask in masks] == [False, True, True, True]  # told in the very step they begin


def test_strength_goes_from_the_clip_to_pure_noise(pipe):
    edited = [condition(pipe.autoencoder, SIZE, edit=clip(), strength=strength) for strength in (0.0, 0.5, 1.0)]
    results = [latents_of(pipe, conditioning=conditioning, num_inference_steps=8) for conditioning in edited]
    away = [float((result - edited[0].latents).abs().mean()) for result in results]
    assert away[0] < 0.05 < away[1] < away[2]
    if pipe.scheduler.config.get("sampler") != "ancestral":  # whose noise would be drawn in another order
        close(results[2], latents_of(pipe, num_inference_steps=8))


def test_nothing_given_is_the_same_as_a_mask_of_ones():
    """Noise is drawn for masks at every step, so the samples differ where sampling draws noise of its own."""
    pipe = make_pipeline("flow", num_frames=18)
    close(latents_of(pipe, conditioning=FrameConditioning.none(pipe.autoencoder, SIZE)), latents_of(pipe))


def test_guided_channels_and_guiders_work_with_conditioning_frames(pipe):
    conditioning = condition(pipe.autoencoder, SIZE, image=clip(1))
    plain = latents_of(pipe, conditioning=conditioning, guidance_scale=1.0, num_inference_steps=1)
    some = latents_of(pipe, conditioning=conditioning, guidance_scale=5.0, cfg_channels=[0], num_inference_steps=1)
    close(some[:, 1:], plain[:, 1:])
    assert (some[:, 0, 1:] - plain[:, 0, 1:]).abs().mean() > 1e-4
    assert torch.isfinite(latents_of(pipe, conditioning=conditioning, guider=AdaptiveProjectedGuidance(4.0))).all()


def test_a_clip_is_the_one_it_is_alone(pipe):
    conditioning = condition(pipe.autoencoder, SIZE, image=clip(1))
    two = pipe([PROMPT, "a big square"], generator=seeded(1, 2), output_type="latent", conditioning=conditioning).frames
    close(two[:1], latents_of(pipe, conditioning=conditioning))


def test_conditioning_frames_of_another_size_are_refused(pipe):
    with pytest.raises(OpenSoraError, match="encode frames for this size"):
        latents_of(pipe, conditioning=FrameConditioning.none(pipe.autoencoder, VideoSize(17, 16, 24)))


# --- what the network is told -----------------------------------------------------------------------------------------


def told(pipe: OpenSoraPipeline, **options: Any) -> dict[str, Any]:
    return pipe(PROMPT, num_inference_steps=1, output_type="latent", **options).settings["clip_conditions"]


def test_a_nominal_size_stands_for_the_default_size_only():
    pipe = make_pipeline("flow", nominal_size=(18, 27))
    assert (told(pipe)["height"], told(pipe)["width"]) == (18, 27)
    assert told(pipe, height=24)["height"] == 24
    assert told(pipe, height=24, nominal_size=(25, 30))["width"] == 30


def test_a_single_frame_is_an_image():
    pipe = make_pipeline("flow")
    assert (told(pipe)["fps"], told(pipe, num_frames=1)["fps"]) == (8, 120)
    assert told(make_pipeline("flow", image_fps=None), num_frames=1)["fps"] == 8


def test_prompts_are_spelled_as_the_captions_were():
    pipe = make_pipeline("flow", clean_prompts=True, scores={"aesthetic": 6.5, "flow": None, "camera_motion": None})
    pipe.tokenizer.unk_token = None  # the tiny tokenizer knows no scores
    seen: list[list[str]] = []

    def encode(prompts: list[str] | None, *rest: Any) -> Any:
        seen.extend([prompts] if prompts else [])
        return make_pipeline()._encode([PROMPT] if prompts else None, *rest)

    pipe._encode = encode
    settings = pipe("A <b>red</b> ball", scores={"flow": 2.0}, num_inference_steps=1, output_type="latent").settings
    assert seen == [["a red ball aesthetic score: 6.5. motion score: 2.0."]] == [settings["spelled_prompt"]]
    with pytest.raises(OpenSoraError, match="not trained with the score 'beauty'"):
        pipe(PROMPT, scores={"beauty": 1.0})
    with pytest.raises(OpenSoraError, match="knows none"):
        make_pipeline()(PROMPT, scores={"flow": 1.0})


def test_the_training_latent_space_must_be_the_autoencoders():
    space = make_autoencoder().latent_space.to_dict()
    make_pipeline(trained_on={"latent_space": space})
    with pytest.raises(OpenSoraError, match="two different latent spaces"):
        make_pipeline(trained_on={"latent_space": {**space, "scaling_factor": 0.13025}})


def test_samplers_and_their_guided_channels():
    pipe = make_pipeline("iddpm")
    assert pipe.config.cfg_channels == 3
    pipe.use_sampler("dpm-solver++")
    assert pipe(PROMPT, output_type="latent").settings["cfg_channels"] == [0, 1, 2, 3]
    pipe.use_sampler("ddim")
    assert pipe.scheduler.config.sampler == "ddim" and pipe.default_cfg_channels == 3
    with pytest.raises(OpenSoraError, match="expected one of"):
        pipe.use_sampler("euler")
    with pytest.raises(OpenSoraError, match="for models that predict noise"):
        make_pipeline("flow").use_sampler("ddim")


def test_something_must_be_left_to_make(autoencoder):
    with pytest.raises(OpenSoraError, match="nothing is left to make"):
        condition(autoencoder, VideoSize(1, 16, 24), image=clip(1))
    with pytest.raises(OpenSoraError, match="0 of 6 latent frames"):
        condition(autoencoder, SIZE, extend=clip(), condition_frames=0)


def test_a_swapped_sampler_is_saved_and_swapped_back(tmp_path):
    pipe = make_pipeline("iddpm")
    pipe.scheduler = IDDPMScheduler(float32_tables=True)
    pipe.use_sampler("dpm-solver++")
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert loaded.default_cfg_channels is None
    loaded.use_sampler("ancestral")
    assert loaded.default_cfg_channels == 3
    assert loaded.scheduler.config.float32_tables  # of the model's own schedule, not of the solver's


@pytest.mark.parametrize("span", [(0, 1), (0, 15), (5, 6), (4, 7), (10, 12), (13, 15), (0, 0)])
def test_only_the_chunks_that_are_used_are_encoded(autoencoder, span):
    video, read = clip(51), []

    def frames(chosen: slice) -> torch.Tensor:
        read.append(video[:, chosen].shape[1])
        return video[:, chosen]

    (whole,) = autoencoder.encode_video(video[None])
    part = encode_span(autoencoder, frames, 51, span)
    assert part.shape == whole.shape and sum(read) == 17 * max(-(-span[1] // 5) - span[0] // 5, 1)
    close(part[:, slice(*span)], whole[:, slice(*span)])


def test_what_is_taken_of_a_reference():
    placements = parse_mask_strategy("0,0,2,0,3;1,1,-2,0,5;0,0,7,1")
    assert taken_latents(placements, 0, 2, 10, None) == (2, 8)
    assert taken_latents(placements, 0, 2, 10, 5) == (0, 6)
    assert taken_latents(placements, 1, 2, 10, None) == (8, 10)
    assert taken_latents(placements[:1], 1, 2, 10, None) == (0, 0)
