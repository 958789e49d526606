"""Clip after clip: lengths, what is carried over, texts and references of their own."""

import itertools
from typing import Any

import pytest
import torch
from tiny_pipeline import make_pipeline, seeded

from opensora.conditioning.frames import condition, encode_in_place
from opensora.errors import OpenSoraError
from opensora.generation.loops import generate_loops
from opensora.geometry import VideoSize

PROMPT = "a small red ball rolls left"
SIZE = VideoSize(17, 16, 24)


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline("flow", num_frames=17)


def loops(pipe, prompt: str | list[str] = PROMPT, **options: Any) -> torch.Tensor:
    options = {"num_loops": 3, "size": SIZE, "generator": seeded(0), "num_inference_steps": 2} | options
    return generate_loops(pipe, prompt, **options).frames


def test_length_and_the_first_clip(pipe):
    frames = loops(pipe, condition_frames=3)
    assert frames.shape == (1, 17 + 2 * (17 - 9), 3, 16, 24)
    alone = pipe(PROMPT, generator=seeded(0), num_inference_steps=2, output_type="pt").frames
    torch.testing.assert_close(frames[:, :17], alone)
    assert loops(pipe, num_loops=1).shape[1] == 17


def test_a_later_clip_is_given_the_end_of_the_one_before(pipe):
    calls: list[Any] = []
    encoded: list[Any] = []

    class Recording:
        def __init__(self) -> None:
            self.config, self.autoencoder, self.on_device = pipe.config, pipe.autoencoder, pipe.on_device
            self.transformer = pipe.transformer

        def encode_prompt(self, texts: Any, *args: Any, **options: Any) -> Any:
            encoded.append(list(texts))
            return pipe.encode_prompt(texts, *args, **options)

        def __call__(self, **options: Any) -> Any:
            output = pipe(**options)
            calls.append((options["conditioning"], output.frames, options["prompt_embeds"]))
            return output

    loops(Recording(), prompt="|0|a red ball|2|a blue square", condition_frames=2)
    assert calls[0][0] is None
    for (_, before, _), (conditioning, _, _) in itertools.pairwise(calls):
        assert conditioning.strength.tolist() == [[0, 0, 1, 1, 1]]
        end = before[:, -5:].transpose(1, 2) * 2 - 1
        torch.testing.assert_close(conditioning.latents[:, :, :2], encode_in_place(pipe.autoencoder, end, 17, 0, 2))
    assert encoded == [["a red ball"], ["a blue square"]]
    first, second, third = (text for _, _, text in calls)
    assert first is second and third is not first


def test_loops_of_one_prompt_encode_its_text_once(pipe):
    calls = []
    hook = pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        loops(pipe, num_loops=4, negative_prompt="a big blue square", num_inference_steps=1)
    finally:
        hook.remove()
    assert len(calls) == 2  # the prompt, and the negative prompt


def test_two_prompts_and_references(pipe):
    image = torch.rand(3, 1, 16, 24) * 2 - 1
    frames = loops(
        pipe,
        [PROMPT, "a big blue square"],
        num_loops=2,
        generator=seeded(0, 1),
        conditioning=lambda loop: condition(pipe.autoencoder, SIZE, last_image=image) if loop == 1 else None,
    )
    assert frames.shape[:2] == (2, 17 + 12)
    torch.testing.assert_close(
        frames[:1],
        loops(
            pipe,
            num_loops=2,
            conditioning=lambda loop: condition(pipe.autoencoder, SIZE, last_image=image) if loop else None,
        ),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("options", [{"num_loops": 0}, {"condition_frames": 5}, {"condition_frames": 0}])
def test_impossible_loops(pipe, options):
    with pytest.raises(OpenSoraError, match="expected 1"):
        loops(pipe, **options)


def test_what_loops_do_not_take(pipe):
    for options in ({"num_videos_per_prompt": 2}, {"return_dict": False}, {"output_type": "np"}):
        with pytest.raises(OpenSoraError, match="leave it out"):
            loops(pipe, **options)
    with pytest.raises(OpenSoraError, match="one latent frame"):
        loops(pipe, size=VideoSize(1, 16, 24))
