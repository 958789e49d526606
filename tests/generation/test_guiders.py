"""Guiders and time shifts that are asked for by name: what diffusers computes, recorded, and made again."""

import dataclasses

import numpy as np
import pytest
import torch

from opensora.cli.main import main
from opensora.errors import OpenSoraError
from opensora.generation.engine import Engine
from opensora.generation.record import read_record, request_of
from opensora.generation.request import ClipRequest
from opensora.models.guiders import GUIDERS, make_guider, parse_guider

PROMPT = "a small red ball rolls left over the grass"
QUICK = ClipRequest(PROMPT, num_inference_steps=2, num_frames=5, guidance_scale=4.0, seed=3)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(ClipRequest("", device="cpu"))


def test_a_guider_is_what_the_pipeline_makes_of_it(engine: Engine) -> None:
    request = dataclasses.replace(QUICK, guider="apg:eta=0.5,adaptive_projected_guidance_rescale=2.5")
    clip = engine.generate(request)
    guider = make_guider("apg:eta=0.5,adaptive_projected_guidance_rescale=2.5", 4.0)
    noise = torch.Generator().manual_seed(3)
    output = engine.pipeline(
        PROMPT, guider=guider, num_inference_steps=2, num_frames=5, generator=noise, output_type="pt"
    )
    expected = (output.frames[0].permute(0, 2, 3, 1) * 255).round().byte().numpy()
    assert np.array_equal(clip.frames, expected)
    assert not np.array_equal(clip.frames, engine.generate(QUICK).frames)


def test_plain_guidance_by_name_is_that_of_the_model(engine: Engine) -> None:
    named = engine.generate(dataclasses.replace(QUICK, guider="cfg"))
    assert np.array_equal(named.frames, engine.generate(QUICK).frames)


def test_guiders_work_on_chosen_channels_and_at_scales_of_channels(engine: Engine) -> None:
    first = engine.generate(dataclasses.replace(QUICK, guider="cfg:guidance_rescale=0.7", cfg_channels=3))
    scales = dataclasses.replace(QUICK, guidance_scale=None, channel_scales="0-2:4,3:1")
    assert np.array_equal(
        first.frames, engine.generate(dataclasses.replace(scales, guider="cfg:guidance_rescale=0.7")).frames
    )


@pytest.mark.parametrize("wish", [{"guider": "cfg-zero-star:zero_init_steps=1"}, {"time_shift": 3.0}])
def test_a_clip_is_made_again_from_its_record(engine: Engine, tmp_path, wish: dict) -> None:
    clip = engine.generate(dataclasses.replace(QUICK, **wish))
    path = clip.save(tmp_path / "clip.mp4")
    again = request_of(read_record(path), {})
    assert {name: getattr(again, name) for name in wish} == wish
    assert np.array_equal(Engine.load(again, record=read_record(path)).generate(again).frames, clip.frames)
    assert not np.array_equal(clip.frames, engine.generate(QUICK).frames)


def test_a_time_shift_moves_the_steps_to_noisier_times(engine: Engine) -> None:
    scheduler = engine.pipeline.scheduler.with_time_shift(3.0)
    scheduler.set_timesteps(4, height=64, width=64, num_frames=17)
    even = torch.tensor([1.0, 0.75, 0.5, 0.25]).double()
    assert torch.allclose(scheduler.timesteps.double() / 1000, 3 * even / (1 + 2 * even), atol=1e-6)
    plain = engine.generate(dataclasses.replace(QUICK, time_shift=1.0))
    assert np.array_equal(plain.frames, engine.generate(QUICK).frames), "the bundled model's times are spread evenly"


@pytest.mark.parametrize("name", GUIDERS)
def test_every_guider_combines_two_predictions(name: str) -> None:
    guider = make_guider(name, 3.0)
    guider.set_state(1, 4, torch.tensor(500))
    guider.prepare_inputs({})  # type: ignore[arg-type]
    torch.manual_seed(0)
    one, other = torch.randn(2, 1, 4, 2, 8, 8).unbind()
    assert guider.forward(one, other).pred.isfinite().all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("apq", "unknown guider 'apq'; did you mean apg"),
        ("apg:eta", "expected options such as apg:guidance_rescale=0.7"),
        ("apg:eta=", "expected options"),
        ("apg:eta=0,eta=1", "says eta twice"),
        ("cfg:guidance_scale=7", "is `guidance_scale`"),
        ("", "unknown guider"),
        ("cfg:" + "x" * 2000, "at most 1000 characters"),
    ],
)
def test_what_is_no_guider_is_told_before_a_model_is_loaded(text: str, words: str) -> None:
    with pytest.raises(OpenSoraError, match=words):
        parse_guider(text)
    with pytest.raises(OpenSoraError, match=words):
        ClipRequest(PROMPT, guider=text).check()


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"guider": "apg:etta=0"}, "unknown option 'etta'; did you mean 'eta'"),
        ({"guider": "apg:eta=much"}, "eta is the text 'much', expected a number"),
        ({"guider": "apg", "guidance_scale": 1.0}, "`guider` has no effect"),
        ({"guider": "apg", "image_guidance_scale": 2.0}, "leave out `image_guidance_scale`"),
        ({"time_shift": 0.0}, "`time_shift` is 0"),
        ({"time_shift": float("nan")}, "`time_shift` is nan"),
    ],
)
def test_wishes_that_cannot_be_granted(engine: Engine, wish: dict, words: str) -> None:
    with pytest.raises(OpenSoraError, match=words):
        engine.prepare([dataclasses.replace(QUICK, **wish)])


def test_a_time_shift_is_for_rectified_flow(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    arguments = [PROMPT, "--model", "toybox-iddpm", "--time-shift", "3", "--output", str(tmp_path / "a.mp4")]
    assert main(["generate", *arguments]) == 2
    assert "a time shift is for models of rectified flow" in capsys.readouterr().err
