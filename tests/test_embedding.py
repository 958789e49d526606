"""The engine inside a program of somebody else's: several threads, an event loop, progress, cancellation."""

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipeline import make_pipeline
from torch import nn

from opensora.errors import OpenSoraError
from opensora.generation.clip import Clip
from opensora.generation.engine import Engine
from opensora.generation.loading import LoadedModel
from opensora.generation.progress import Cancelled, Progress
from opensora.generation.record import read_record, request_of
from opensora.generation.request import ClipRequest
from opensora.media.read import read_video

PROMPT = "a small red ball rolls left"
LOADED = LoadedModel("tiny", "a" * 64)
KINDS = {"flow": ("flow", None), "ancestral": ("iddpm", None), "dpm-solver++": ("iddpm", "dpm-solver++")}


def engine_and_requests(kind: str) -> tuple[Engine, list[ClipRequest]]:
    """One engine, and clips that differ in prompt, seed and number of steps."""
    family, sampler = KINDS[kind]
    engine = Engine(make_pipeline(family), LOADED)
    first = ClipRequest(PROMPT, seed=1, num_inference_steps=6, sampler=sampler)
    return engine, [first, replace(first, prompt="a big blue square", seed=2, num_inference_steps=9)]


def state_of(engine: Engine) -> dict[str, object]:
    """What a call could leave behind on the pipeline and its networks."""
    pipe = engine.pipeline
    networks = [pipe.transformer, pipe.autoencoder, pipe.text_encoder]
    modules = [module for network in networks for module in network.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in modules)
    values = {name: value for name, value in vars(pipe).items() if not isinstance(value, nn.Module)}
    # diffusers notes class and version in a configuration when it is first shown.
    scheduler = {name: str(value) for name, value in vars(pipe.scheduler).items() if name != "_internal_dict"}
    return {"hooks": hooks, "values": repr(values), "scheduler": scheduler, "threads": threading.active_count()}


@pytest.mark.parametrize("kind", KINDS)
def test_two_threads_make_the_clips_of_one(kind):
    engine, requests = engine_and_requests(kind)
    alone = [engine.generate(request).frames for request in requests]
    before = state_of(engine)
    barrier = threading.Barrier(2)

    def generate(request: ClipRequest) -> np.ndarray:
        barrier.wait(timeout=60)
        return engine.generate(request).frames

    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(generate, requests))
    for expected, made in zip(alone, together, strict=True):
        assert np.array_equal(expected, made)
    assert state_of(engine) == before


def test_an_asyncio_program_makes_clips_while_it_does_other_things():
    engine, requests = engine_and_requests("flow")
    alone = [engine.generate(request).frames for request in requests]
    events: list[list[Progress]] = [[], []]

    async def program() -> list[Clip]:
        return await asyncio.gather(
            *(
                asyncio.to_thread(engine.generate, request, on_progress=told.append)
                for request, told in zip(requests, events, strict=True)
            )
        )

    clips = asyncio.run(program())
    for expected, clip, told, request in zip(alone, clips, events, requests, strict=True):
        assert np.array_equal(expected, clip.frames)
        steps = request.num_inference_steps
        assert [event.step for event in told if event.stage == "denoising"] == list(range(1, int(steps or 0) + 1))


def test_events_come_in_order_loop_by_loop():
    engine, _ = engine_and_requests("flow")
    events: list[Progress] = []
    request = ClipRequest(PROMPT, num_frames=17, loop=2, num_inference_steps=2)
    engine.generate(request, on_progress=events.append)
    of_one = [("encoding", 0, 0), ("denoising", 1, 2), ("denoising", 2, 2), ("decoding", 2, 2)]
    assert [(e.loop, e.stage, e.step, e.num_steps) for e in events] == [(loop, *e) for loop in (0, 1) for e in of_one]
    assert {event.num_loops for event in events} == {2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [0, 2])
def test_a_cancel_takes_effect_within_one_step_and_leaves_nothing(kind, after, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine, requests = engine_and_requests(kind)
    expected = engine.generate(requests[0]).frames
    gc.collect()
    before, steps = state_of(engine), []
    hook = engine.pipeline.transformer.register_forward_hook(lambda *_: steps.append(1))
    try:
        with pytest.raises(Cancelled):
            engine.generate(requests[0], cancelled=lambda: after == 0 or len(steps) >= after)
    finally:
        hook.remove()
    assert len(steps) == after  # none that was not begun
    assert state_of(engine) == before and not list(tmp_path.iterdir())
    assert np.array_equal(engine.generate(requests[0]).frames, expected)


def test_one_of_two_threads_is_cancelled_and_the_other_is_not():
    engine, requests = engine_and_requests("flow")
    expected = engine.generate(requests[1]).frames
    with ThreadPoolExecutor(2) as threads:
        stopped = threads.submit(engine.generate, requests[0], cancelled=lambda: True)
        made = threads.submit(engine.generate, requests[1], cancelled=lambda: False)
        assert np.array_equal(made.result(timeout=60).frames, expected)
        assert isinstance(stopped.exception(timeout=60), Cancelled)


# --- files and data ---------------------------------------------------------------------------------------------------


def test_a_saved_clip_holds_its_colours_and_how_to_make_it_again(tmp_path):
    engine, requests = engine_and_requests("flow")
    clip = engine.generate(requests[0])
    path = clip.save(tmp_path / "clip.png")
    assert np.array_equal(read_video(path)[0], clip.frames)
    record = read_record(path)
    assert record == read_record(tmp_path / "clip.png.json") == clip.record
    request = replace(request_of(record, {}), model=None, device=None, dtype=None)
    again = engine.generate(request)
    assert np.array_equal(again.frames, clip.frames) and again.record == clip.record
    clip.save(tmp_path / "clip.png", metadata=False)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.png"]


@pytest.mark.parametrize("output_type", ["pt", "np", "pil"])
def test_what_a_pipeline_returns_is_saved_with_its_colours(output_type, tmp_path):
    pipe = make_pipeline("flow")
    generator = torch.Generator().manual_seed(0)
    output = pipe(PROMPT, generator=generator, num_inference_steps=1, output_type=output_type)
    clip = Clip.of(output)
    path = clip.save(tmp_path / "clip.png")
    assert clip.fps == output.settings["fps"]
    expected = np.stack([np.asarray(frame) for frame in output.frames[0]])
    expected = expected / 255 if output_type == "pil" else expected
    expected = expected.transpose(0, 2, 3, 1) if output_type == "pt" else expected
    assert np.abs(read_video(path)[0] / 255 - expected).max() <= 0.5 / 255 + 1e-6


def test_a_request_is_plain_data():
    request = ClipRequest(
        PROMPT, num_frames="4s", channel_scales=[7.0, 1.0], scores={"flow": None}, image=Path("a.png")
    )
    assert ClipRequest.from_json(request.to_json()) == request
    assert ClipRequest.from_json('{"prompt": "x", "loop": 2}') == ClipRequest("x", loop=2)
    with pytest.raises(OpenSoraError, match="num_frame"):
        ClipRequest.from_json('{"prompt": "x", "num_frame": 2}')


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"num_frames": 3, "height": 20}, "nearest valid"),
        ({"loop": 0}, "`loop` is 0"),
        ({"strength": 0.5}, "`edit`"),
        ({"model": "another"}, "`model` is 'another'"),
        ({"guidance_scale": -1.0}, "`guidance_scale` is -1"),
    ],
)
def test_mistakes_name_fields_and_no_options(wishes, message):
    engine, _ = engine_and_requests("flow")
    with pytest.raises(OpenSoraError, match=message) as caught:
        engine.generate(ClipRequest(PROMPT, **wishes))
    assert "--" not in str(caught.value)


def test_an_engine_of_unknown_numbers_is_refused():
    with pytest.raises(OpenSoraError, match="unknown dtype 'float8'"):
        Engine.load(ClipRequest("", model="toybox", dtype="float8"))  # type: ignore[arg-type]
