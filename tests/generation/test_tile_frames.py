"""Tiles of fewer frames than the model's own: asked for, told in the record, refused where they do not fit."""

import pytest
import torch
from tiny_two_encoders import pipeline_of

from opensora import ClipRequest, Engine
from opensora.errors import OpenSoraError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    pipeline_of("opensora-2.0", num_frames=33).save_pretrained(path)
    return str(path)


def test_a_clip_in_tiles_of_its_own(folder):
    request = ClipRequest("a red ball", model=folder, num_inference_steps=1, device="cpu")
    whole, tiled = (Engine.load(request, tile_frames=frames) for frames in (None, 16))
    assert "tile_frames" not in whole.pipeline.describe() and tiled.pipeline.describe()["tile_frames"] == 16
    one, other = (torch.from_numpy(engine.generate(request).frames).float() for engine in (whole, tiled))
    assert one.shape == other.shape
    assert 0 < (one - other).abs().mean() < 0.5 * one.std()


def test_tiles_are_no_odd_number_of_frames(folder):
    with pytest.raises(OpenSoraError, match="is 10, expected a multiple of 16"):
        Engine.load(ClipRequest("a red ball", model=folder, device="cpu"), tile_frames=10)
