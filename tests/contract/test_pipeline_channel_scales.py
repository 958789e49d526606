"""A guidance scale for each latent channel in every pipeline: on every sampler, beside known frames, across ranks."""

from typing import Any

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from published_pipelines import PIPELINES, PROMPT, equal, near, pipeline_of, refusal, sample
from ranks import run_ranks
from tiny_pipeline import seeded
from torch import Tensor

from opensora.conditioning.frames import FrameConditioning
from opensora.geometry import VideoSize
from opensora.models.guidance_rules import DistilledGuidance, TextImageGuidance
from opensora.pipeline import OpenSoraPipeline

SCALES = [7.0, 3.0, 7.0, 1.0]


def ranges(pipe: OpenSoraPipeline, first_two: str) -> str:
    """Scales of the first two channels, and no guidance of the others."""
    return f"{first_two},2-{pipe.autoencoder.latent_channels - 1}:1"


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_scale_on_the_first_channels_is_the_same_clip(kind):
    pipe = pipeline_of(*PIPELINES[kind])
    how: dict[str, Any] = {"num_inference_steps": 3}
    first = sample(pipe, guidance_scale=3.0, cfg_channels=2, **how)
    others = [1.0] * (pipe.autoencoder.latent_channels - 2)
    equal(sample(pipe, channel_scales=[3.0, 3.0, *others], **how), first)
    equal(sample(pipe, channel_scales=ranges(pipe, "0-1:3"), **how), first)
    assert not torch.allclose(sample(pipe, channel_scales=ranges(pipe, "0:3,1:5"), **how), first, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("guider", [ClassifierFreeGuidance, AdaptiveProjectedGuidance, TextImageGuidance])
def test_a_guider_works_at_the_scales_of_the_call(guider):
    pipe = pipeline_of("opensora-1.2")
    mine = guider(9.0)
    scaled = sample(pipe, guider=mine, channel_scales=ranges(pipe, "0-1:3"))
    equal(scaled, sample(pipe, guider=guider(3.0), cfg_channels=2))
    assert mine.guidance_scale == 9.0


@pytest.mark.parametrize("kind", PIPELINES)
def test_scales_of_1_are_no_guidance(kind):
    pipe = pipeline_of(*PIPELINES[kind])
    how: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    scales = [1.0] * pipe.autoencoder.latent_channels
    made = pipe(PROMPT, channel_scales=scales, generator=seeded(1), **how)
    plain = pipe(PROMPT, guidance_scale=1.0, generator=seeded(1), **how)
    equal(made.frames, plain.frames)
    assert made.num_evaluations == plain.num_evaluations == 3


def test_settings_tell_the_scales():
    pipe = pipeline_of("opensora-1.0-hq-16x256x256")
    settings = pipe(PROMPT, channel_scales="0-2:7,3:1", output_type="latent", num_inference_steps=1).settings
    assert settings["channel_scales"] == [7.0, 7.0, 7.0, 1.0]
    assert settings["guidance_scale"] is None and settings["cfg_channels"] is None


def test_the_text_scale_of_each_channel_beside_guidance_by_known_frames():
    """One scale for all channels is that scale; and a channel of text scale 1 still follows the frames."""
    pipe = pipeline_of("opensora-1.3-i2v", scores=None)
    config = pipe.config
    nothing = FrameConditioning.none(pipe.autoencoder, VideoSize(config.num_frames, config.height, config.width))
    known = nothing.put(torch.randn(nothing.latents[:, :, :1].shape, generator=seeded(3)[0]), 0, 0.0)
    scales: list[float] = [3.0] * pipe.autoencoder.latent_channels
    equal(sample(pipe, conditioning=known, channel_scales=scales), sample(pipe, conditioning=known, guidance_scale=3.0))
    ones = {"conditioning": known, "channel_scales": [1.0] * len(scales)}
    weak, strong = (sample(pipe, image_guidance_scale=scale, **ones) for scale in (1.0, 9.0))
    assert not torch.allclose(weak, strong, rtol=1e-2, atol=1e-2)
    equal(weak, sample(pipe, conditioning=known, guidance_scale=1.0, image_guidance_scale=1.0))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"guidance_scale": 3.0}, "leave out `guidance_scale`"),
        ({"cfg_channels": 3}, "leave out `cfg_channels`"),
        ({"cfg_channels": None}, "leave out `cfg_channels`"),
        ({"cfg_channel": "all"}, "leave out `cfg_channels`"),
        ({"channel_scales": SCALES[:3]}, "has 3 scales, expected 4"),
        ({"guider": DistilledGuidance(3.0)}, "a DistilledGuidance, which does not say what it is at another scale"),
    ],
)
def test_scales_beside_what_they_replace_are_refused(options, says):
    assert says in refusal(pipeline_of("opensora-1.2"), **{"channel_scales": SCALES, **options})


def test_guidance_that_is_distilled_into_the_network_has_one_scale():
    pipe = pipeline_of("opensora-2.0")
    pipe.transformer.reads_guidance = True
    assert "is told one scale for all channels" in refusal(pipe, channel_scales=SCALES)


def on_ranks() -> tuple[Tensor, list[int]]:
    torch.set_num_threads(1)
    pipe = pipeline_of("opensora-1.2")
    pipe.parallelize(guidance=True)
    sizes: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    sample(pipe, channel_scales="0-3:1", num_inference_steps=1)
    return sample(pipe, channel_scales=SCALES, num_inference_steps=3), sizes


@pytest.mark.multi
def test_two_ranks():
    """A branch on each; where nothing is guided, the only one on both."""
    alone = sample(pipeline_of("opensora-1.2"), channel_scales=SCALES, num_inference_steps=3)
    for clip, sizes in run_ranks(2, on_ranks):
        near(clip, alone)
        assert sizes == [1] * 4
