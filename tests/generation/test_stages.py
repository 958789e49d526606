"""A clip made stage by stage: text, latents, frames."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import make_pipeline

from opensora.errors import OpenSoraError
from opensora.generation.engine import Engine
from opensora.generation.loading import LoadedModel
from opensora.generation.progress import Cancelled
from opensora.generation.request import ClipRequest
from opensora.settings import as_json

REQUEST = ClipRequest("a small red ball", negative_prompt="a large square", seed=3, num_inference_steps=4)


@pytest.fixture(scope="module", params=["flow", "iddpm"])
def engine(request) -> Engine:
    return Engine(make_pipeline(request.param), LoadedModel("tiny", "a" * 64))


def staged(engine: Engine, request: ClipRequest):
    prepared = engine.prepare([request])[0]
    return engine.decode(engine.sample(prepared, engine.encode_text(prepared)))


def test_stages_make_the_clip_that_is_made_at_once(engine, tmp_path):
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((48, 48, 3), (200, 30, 30), np.uint8)).save(picture)
    for request in (REQUEST, replace(REQUEST, negative_prompt=None, image=picture)):
        at_once, in_stages = engine.generate(request), staged(engine, request)
        assert np.array_equal(at_once.frames, in_stages.frames)
        assert json.loads(as_json(at_once.record)) == json.loads(as_json(in_stages.record))
        assert at_once.num_evaluations == in_stages.num_evaluations > 0


def test_a_text_serves_all_clips_that_are_spelled_alike(engine):
    first, second = engine.prepare([REQUEST, replace(REQUEST, seed=4)])
    text = engine.encode_text(first)
    assert np.array_equal(engine.decode(engine.sample(second, text)).frames, engine.generate(second.request).frames)


def test_the_text_of_another_clip_is_refused(engine):
    first, second = engine.prepare([REQUEST, replace(REQUEST, negative_prompt="a green ring")])
    with pytest.raises(OpenSoraError, match=r"a large square.*a green ring"):
        engine.sample(second, engine.encode_text(first))


def test_a_long_video_is_refused(engine):
    prepared = engine.prepare([replace(REQUEST, loop=2, condition_frame_length=1)])[0]
    with pytest.raises(OpenSoraError, match="`loop` is 2"):
        engine.sample(prepared, engine.encode_text(prepared))


def test_sampling_tells_its_steps_and_stops(engine):
    prepared = engine.prepare([REQUEST])[0]
    text, told = engine.encode_text(prepared), []
    engine.sample(prepared, text, on_progress=told.append)
    assert [progress.step for progress in told if progress.stage == "denoising"] == [1, 2, 3, 4]
    assert all(isinstance(progress.latents, torch.Tensor) for progress in told if progress.stage == "denoising")
    with pytest.raises(Cancelled):
        engine.sample(prepared, text, cancelled=lambda: True)
