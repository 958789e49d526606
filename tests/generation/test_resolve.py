"""Sizes, lengths, rates and scores as each model means them, from the published models' own defaults."""

import functools
import inspect
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opensora.checkpoints.published import PUBLISHED
from opensora.errors import OpenSoraError
from opensora.generation.request import ClipRequest
from opensora.generation.resolve import check_effects, resolve, resolve_size
from opensora.geometry import SizeRule
from opensora.pipeline import OpenSoraPipeline
from opensora.sampling.prompting import PromptingMixin

PROMPT = "a small red ball rolls left"
V1_0, V1_1, V1_2 = "opensora-1.0-hq-16x256x256", "opensora-1.1-stage3", "opensora-1.2"
RULE = SizeRule(spatial_multiple=8)


def size_of(model: str, rule: SizeRule = RULE, edited_frames: int | None = None, **wishes: Any) -> Any:
    edited = None if edited_frames is None else lambda file_fps: edited_frames
    return resolve_size(ClipRequest(PROMPT, **wishes), config_of(model), rule, edited)


def sampling_of(model: str, **wishes: Any) -> Any:
    config = config_of(model)
    pipe: Any = SimpleNamespace(config=config, default_cfg_channels=config.cfg_channels, size_rule=lambda: RULE)
    pipe.rated_scores = functools.partial(PromptingMixin.rated_scores, pipe)
    return resolve(pipe, ClipRequest(PROMPT, **wishes))


def config_of(model: str):
    parameters = inspect.signature(OpenSoraPipeline.__init__).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
    if model == "toybox":
        return SimpleNamespace(**defaults | {"height": 64, "width": 64, "num_frames": 17, "fps": 8})
    return SimpleNamespace(**defaults | dict(PUBLISHED[model].defaults))


@pytest.mark.parametrize(
    ("model", "wishes", "made", "told"),
    [
        (V1_2, {}, (240, 424), (240, 426)),
        (V1_2, {"resolution": "240p", "aspect_ratio": "9:16"}, (240, 424), (240, 426)),
        (V1_2, {"resolution": "240p", "aspect_ratio": "16:9"}, (424, 240), (426, 240)),
        (V1_2, {"resolution": "720p"}, (720, 1280), (720, 1280)),
        (V1_2, {"resolution": "480p", "aspect_ratio": "9:16"}, (480, 848), (480, 854)),
        (V1_2, {"resolution": "360p", "aspect_ratio": "1:1"}, (480, 480), (480, 480)),
        (V1_2, {"height": 240, "width": 424}, (240, 424), (240, 426)),
        (V1_2, {"height": 256, "width": 256}, (256, 256), (256, 256)),
        (V1_2, {"aspect_ratio": "9:16"}, (240, 424), (240, 426)),
        (V1_1, {"image_size": (240, 426)}, (240, 424), (240, 426)),
        (V1_1, {"image_size": (240, 424)}, (240, 424), (240, 424)),
        (V1_1, {"resolution": "144p", "aspect_ratio": "16:9"}, (256, 144), (256, 144)),
        (V1_0, {}, (256, 256), None),
        (V1_0, {"resolution": "512"}, (512, 512), None),
        ("toybox", {"resolution": "240p", "aspect_ratio": "9:16"}, (424, 240), None),
        ("toybox", {"aspect_ratio": "2:1"}, (48, 88), None),
        ("toybox", {"image_size": (60, 90)}, (56, 88), None),
    ],
)
def test_each_model_means_its_own_sizes(model, wishes, made, told):
    size = size_of(model, **wishes)
    assert (size.height, size.width) == made and size.nominal_size == told


@pytest.mark.parametrize(
    ("model", "text", "expected"),
    [
        (V1_2, "4s", 102),
        (V1_2, "2x", 102),
        (V1_2, "8s", 204),
        (V1_2, "51", 51),
        (V1_2, None, 51),
        (V1_1, "2s", 16),  # of a file at 24 / 3 frames per second
        (V1_1, None, 16),
        ("toybox", "2s", 16),
        ("toybox", None, 17),
    ],
)
def test_each_model_means_its_own_seconds(model, text, expected):
    assert size_of(model, num_frames=text).num_frames == expected


@pytest.mark.parametrize(
    ("model", "text", "message"),
    [
        (V1_2, "3s", "nearest valid is 4s"),
        (V1_1, "2x", "neither a count such as 17 nor a duration"),
        (V1_2, "0", "neither a count such as 51"),
    ],
)
def test_lengths_that_mean_nothing_to_a_model(model, text, message):
    with pytest.raises(OpenSoraError, match=message):
        size_of(model, num_frames=text)


@pytest.mark.parametrize(
    ("length", "rule", "expected"),
    [(20, RULE, 20), (40, SizeRule(max_frames=34), 34), (20, SizeRule(frame_multiple=4, frame_offset=1), 17)],
)
def test_an_edited_clip_keeps_its_length_as_far_as_can_be(length, rule, expected):
    assert size_of("toybox", rule, length).num_frames == expected
    assert size_of("toybox", rule, length, num_frames="5").num_frames == 5


@pytest.mark.parametrize(
    ("model", "wishes", "file_fps", "told"),
    [
        (V1_1, {}, 8, 24),
        (V1_1, {"fps": 12}, 4, 12),
        (V1_1, {"frame_interval": 2}, 12, 24),
        (V1_1, {"fps": 10}, 10 / 3, 10),
        (V1_2, {}, 24, 24),
        (V1_2, {"save_fps": 10}, 10, 24),
    ],
)
def test_rate_of_the_file_and_rate_told(model, wishes, file_fps, told):
    sampling = sampling_of(model, **wishes)
    assert (sampling.file_fps, sampling.fps) == (file_fps, told)


@pytest.mark.parametrize(
    ("model", "wishes", "expected"),
    [
        (V1_2, {}, {"aesthetic": 6.5, "flow": None, "camera_motion": None}),
        (V1_2, {"aesthetic": None}, {"aesthetic": None, "flow": None, "camera_motion": None}),
        (V1_2, {"flow": 2, "camera_motion": "pan left"}, {"aesthetic": 6.5, "flow": 2, "camera_motion": "pan left"}),
        (V1_1, {}, None),
        (V1_1, {"aesthetic": 7}, {"aesthetic": 7}),  # which the pipeline refuses
    ],
)
def test_scores_take_the_place_of_the_models_own(model, wishes, expected):
    assert sampling_of(model, scores=wishes).scores == expected


def test_loops_carry_what_the_model_likes():
    assert sampling_of(V1_2).condition_frames is None
    assert sampling_of(V1_2, loop=2).condition_frames is None  # extending has another default
    assert sampling_of(V1_2, loop=2, condition_frame_length=3).condition_frames == 3


def test_the_scale_of_known_frames():
    assert sampling_of(V1_2).image_guidance_scale is None
    assert sampling_of("opensora-1.3-i2v").image_guidance_scale == 5.0
    asked = ClipRequest(PROMPT, image_guidance_scale=2.0, image=Path("a.png"))
    sampling = sampling_of("opensora-1.3-i2v", image_guidance_scale=2.0)
    assert sampling.image_guidance_scale == 2.0
    check_effects(asked, sampling)
    with pytest.raises(OpenSoraError, match=r"`image_guidance_scale` .* the clip is conditioned on no frames"):
        check_effects(replace(asked, image=None), sampling)
    with pytest.raises(OpenSoraError, match="`image_guidance_scale` is -1, expected 0 or more"):
        replace(asked, image_guidance_scale=-1.0).check()
