"""Whole pipelines of Open-Sora 1.3, from files as they were published to frames, against plain formulas in float64.

The formulas of `plain_v1_3` know nothing of the package and are themselves held against a fixture; the text encoder is
the library's own, in float64; the autoencoder is held against the reference elsewhere (`test_vae_v1_3.py`), and decodes
here what the formulas come to.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny_published
import torch
from huggingface_hub import constants
from parity import plain_v1_3
from tiny_pipeline import seeded
from torch import Tensor

from opensora.checkpoints.loading import load_pipeline
from opensora.checkpoints.published import PUBLISHED
from opensora.generation.loops import generate_loops, goes_on_in_latents
from opensora.geometry import VideoSize

TOLERANCE = 1e-4  # of the largest value; float32 against float64
PROMPT = "a small red ball rolls left"
NAME = "opensora-1.3-i2v"
SPELLED = f"{PROMPT} the aesthetic score is excellent."
STEPS = 12  # some of which are not guided
HEIGHT, WIDTH, NUM_FRAMES = 48, 80, 17


def test_the_formulas_are_those_of_the_reference(golden):
    """Windows of 8 x 8 in a grid of 10 x 11, one frame of which is known."""
    fixture = golden("stdit3_v1_3_window72")
    case, config = fixture.meta["cases"][0], fixture.meta["config"]
    w = {name: tensor.double() for name, tensor in fixture.weights().items()}
    named = {name: tensor.double() for name, tensor in fixture.under(f"in.{case['n']}").items()}
    length = case["lens"][1]
    known = torch.zeros_like(named["x"][1])
    known[:, case["mi"]] = named["cond"][1][:, case["mi"]]
    found = plain_v1_3.stdit4(
        w,
        named["x"][1],
        float(named["timestep"][1]),
        named["y"][1, 0, :length],
        w["y_embedder.y_embedding"][:length],
        known,
        case["mi"],
        num_heads=config["num_heads"],
        kernel=config["kernel_size"],
        input_sq_size=config["input_sq_size"],
        height=case["h"],
        width=case["w"],
        fps=case["fps"],
    )
    torch.testing.assert_close(found, fixture[f"out.{case['n']}.cond"][1].double(), atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Any:
    """From the published files, in float32; frames of 3 x 5 patches in windows of 2 x 2."""
    cache: Path = tmp_path_factory.mktemp("hub")
    entry = tiny_published.tiny(NAME, height=HEIGHT, width=WIDTH, num_frames=NUM_FRAMES)
    config = {**entry.transformer.config, "kernel_size": [2, 2, -1], "input_sq_size": 64, "model_max_length": 60}
    entry = dataclasses.replace(entry, transformer=dataclasses.replace(entry.transformer, config=config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setitem(PUBLISHED, NAME, entry)
        tiny_published.write_published(cache, entry)
        pipe = load_pipeline(NAME, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def states_of(pipe: Any, spelled: str) -> Tensor:
    """The prompt's states and no padding, in float64."""
    ids = pipe.tokenizer([spelled], return_tensors="pt").input_ids
    try:
        return pipe.text_encoder.double()(input_ids=ids).last_hidden_state[0]
    finally:
        pipe.text_encoder.float()


def expected_latents(
    pipe: Any,
    noise: Tensor,
    known: Tensor | None,
    draw: Any,
    *,
    num_frames: int = NUM_FRAMES,
    steps: int = STEPS,
    num_known: int = 1,
) -> Tensor:
    """Of a clip of which nothing is known, or the first `num_known` latent frames."""
    w = {name: tensor.double() for name, tensor in pipe.transformer.state_dict().items()}
    text = states_of(pipe, SPELLED)
    null_text, frames = w["y_embedder.y_embedding"][: len(text)], list(range(num_known)) if known is not None else []
    told = {"height": HEIGHT, "width": WIDTH, "fps": 24, "input_sq_size": 64, "kernel": [2, 2, -1], "num_heads": 2}

    def network(x: Tensor, t: float, branch: str) -> Tensor:
        shown = known if known is None or branch != "unconditional" else known * 0
        states = text if branch == "text" else null_text
        return plain_v1_3.stdit4(w, x, 1000 * t, states, null_text, shown, frames, **told)[: len(x)]  # type: ignore[arg-type]

    times = [plain_v1_3.shifted(1 - i / steps, HEIGHT, WIDTH, num_frames) for i in range(steps)]
    return plain_v1_3.sample(network, noise.double(), times, known, frames, draw)


@pytest.mark.parametrize("from_image", [False, True], ids=["text to video", "image to video"])
@torch.no_grad()
def test_a_clip(pipeline, from_image):
    codec = pipeline.autoencoder
    size = codec.latent_size((NUM_FRAMES, HEIGHT, WIDTH))
    noise = torch.randn((1, codec.latent_channels, *size), generator=torch.Generator().manual_seed(1))
    picture = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
    known, drawn = None, torch.Generator().manual_seed(3)
    if from_image:
        known = torch.zeros(noise.shape[1:], dtype=torch.float64)
        known[:, 0] = codec.encode_video(2 * picture[None, :, None] - 1)[0, :, 0].double()
    expected = expected_latents(
        pipeline, noise[0], known, lambda: torch.randn(noise.shape, generator=drawn)[0].double()
    )
    options: dict[str, Any] = {"latents": noise, "num_inference_steps": STEPS}
    options |= {"image": picture} if from_image else {}
    latents = pipeline(PROMPT, output_type="latent", generator=torch.Generator().manual_seed(3), **options).frames
    torch.testing.assert_close(latents[0].double(), expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
    frames = pipeline(PROMPT, output_type="pt", generator=torch.Generator().manual_seed(3), **options).frames
    decoded = codec.decode_latents(expected[None].float(), NUM_FRAMES) / 2 + 0.5
    torch.testing.assert_close(frames, decoded.clamp(0, 1).transpose(1, 2), rtol=0, atol=1e-3)


@torch.no_grad()
def test_a_long_video(pipeline):
    """The second clip is given the last chunk of the first one's latents, and all latents are decoded together."""
    codec, num_frames, steps, carried = pipeline.autoencoder, 33, 2, 5
    shape, drawn = (1, codec.latent_channels, *codec.latent_size((num_frames, HEIGHT, WIDTH))), seeded(7)[0]

    def draw() -> Tensor:
        return torch.randn(shape, generator=drawn)[0].double()

    options: dict[str, Any] = {"num_frames": num_frames, "steps": steps, "num_known": carried}
    first = expected_latents(pipeline, draw(), None, None, **options)
    known = torch.zeros_like(first)
    known[:, :carried] = first[:, -carried:]
    second = expected_latents(pipeline, draw(), known, draw, **options)
    latents = torch.cat([first, second[:, carried:]], dim=1)
    size = VideoSize(num_frames, HEIGHT, WIDTH)
    found = generate_loops(
        pipeline, PROMPT, num_loops=2, size=size, generator=seeded(7), num_inference_steps=steps
    ).frames
    expected = codec.decode_latents(latents[None].float(), 33 + 16) / 2 + 0.5
    assert codec.latent_frames(33 + 16) == 15  # of which ten are decoded at a time
    torch.testing.assert_close(found, expected.clamp(0, 1).transpose(1, 2), rtol=0, atol=1e-3)


def test_latents_that_begin_no_chunk_are_made_anew_of_frames(pipeline):
    size = VideoSize(33, HEIGHT, WIDTH)
    assert goes_on_in_latents(pipeline, size, 5)
    assert not goes_on_in_latents(pipeline, size, 3)
    options: dict[str, Any] = {"num_loops": 2, "size": size, "num_inference_steps": 1, "generator": seeded(0)}
    assert generate_loops(pipeline, PROMPT, condition_frames=3, **options).frames.shape[1] == 33 + 33 - 9


@pytest.mark.parametrize(("from_image", "computed", "of_all"), [(False, 50, 60), (True, 70, 90)])
def test_branches_without_weight_are_not_computed(pipeline, from_image, computed, of_all):
    """In 10 of 30 steps nothing is guided."""
    rows: list[int] = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda _module, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    image = {"image": torch.rand(3, 16, 16)} if from_image else {}
    pipeline(PROMPT, num_inference_steps=30, height=16, width=16, output_type="latent", generator=0, **image)
    handle.remove()
    assert sum(rows) == computed and of_all == 30 * (3 if from_image else 2)
