"""The evaluation of conditioning frames: it sees whether they survive, and which colour an edited clip has."""

import math
from typing import Any

import pytest
from tiny_pipeline import make_pipeline

from opensora.cli.main import main
from opensora.evaluation.conditioning_frames import WAYS, conditioning_frames_survive, edits_follow
from opensora.evaluation.judge import load_judge
from opensora.toybox.specs import ATTRIBUTES


class Forgetful:
    """A pipeline that makes its clips without the frames it is given."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.config, self.autoencoder, self.device = pipeline.config, pipeline.autoencoder, pipeline.device

    def __call__(self, *args: Any, conditioning: Any, **options: Any) -> Any:
        return self.pipeline(*args, **options)


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline("flow", num_inference_steps=1)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_it_sees_whether_conditioning_frames_survive(pipe, way):
    survived = conditioning_frames_survive(pipe, load_judge(), way, num_clips=2)
    forgotten: Any = Forgetful(pipe)
    assert survived.way == way.name and survived.worst_psnr is not None and survived.worst_psnr > 60
    lost = conditioning_frames_survive(forgotten, load_judge(), way, num_clips=2)
    assert lost.worst_psnr is not None and lost.worst_psnr < 40
    assert survived.read.keys() == {*ATTRIBUTES, "all"}


def test_edits_ask_for_another_colour():
    """A strength of 0 returns the clip through the autoencoder: everything is read right but the colour."""
    import opensora

    pipe = opensora.load_pipeline("toybox")
    pipe.set_progress_bar_config(disable=True)
    pipe.register_to_config(num_inference_steps=2)  # no step changes a frame that is kept
    read = edits_follow(pipe, load_judge(), 0.0, num_clips=6)
    assert read["colour"] == 0 and read["shape"] == read["background"] == 1


def test_command(tmp_path, capsys):
    pipe = make_pipeline("flow", num_inference_steps=1)
    pipe.save_pretrained(tmp_path)
    assert main(["evaluate", "given-frames", "--model", str(tmp_path), "--num-clips", "1"]) == 0
    said = capsys.readouterr().out
    assert all(way.name in said for way in WAYS) and "strength 0.9" in said and str(math.nan) not in said
    assert main(["evaluate", "given-frames", "--num-clips", "0"]) == 2
