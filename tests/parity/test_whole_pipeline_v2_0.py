"""Whole pipelines of Open-Sora 2.0, from files as they were published to frames, against plain formulas in float64.

The formulas of `plain_v2_0` know nothing of the package and are themselves held against a fixture; the text encoders
are the library's own, in float64; the autoencoders are held against the reference elsewhere (`test_hunyuan.py`,
`test_dc_ae.py`), and decode here what the formulas come to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_two_encoders
import torch
from huggingface_hub import constants
from parity import plain_v2_0
from torch import Tensor

from opensora.checkpoints.loading import load_pipeline
from opensora.checkpoints.published import PUBLISHED
from opensora.conditioning.frames import condition
from opensora.geometry import VideoSize

TOLERANCE = 1e-4  # of the largest value; float32 against float64
PROMPT = "a small red ball rolls left"
STEPS = 13  # some of which are not guided


def test_the_formulas_are_those_of_the_reference(golden):
    fixture = golden("mmdit_v2_0_b_unfused_liger_cond")
    w = {name: tensor.double() for name, tensor in fixture.weights().items()}
    for i in range(2):
        condition = torch.cat([fixture["in.masks"][i], fixture["in.masked_ref"][i]]).double()
        rounded = plain_v2_0.rounded_time
        try:
            plain_v2_0.rounded_time = lambda t: 1000 * t  # the fixture's times are float32
            found = plain_v2_0.mmdit(
                w,
                fixture["in.z"][i].double(),
                float(fixture["in.timesteps"][i].double()),
                fixture["in.txt"][i].double(),
                fixture["in.y_vec"][i].double(),
                condition,
                axes=fixture.meta["config"]["axes_dim"],
                p=2,
            )
        finally:
            plain_v2_0.rounded_time = rounded
        expected = fixture["out.pred"][i].double()
        torch.testing.assert_close(plain_v2_0.packed(found, 2), expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module", params=tiny_two_encoders.NAMES)
def pipeline(request, tmp_path_factory) -> Any:
    """A pipeline from the published files, in float32."""
    cache: Path = tmp_path_factory.mktemp("hub")
    entry = tiny_two_encoders.tiny(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setitem(PUBLISHED, request.param, entry)
        tiny_two_encoders.write_published(cache, entry)
        pipe = load_pipeline(request.param, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def texts_of(pipe: Any, text: str) -> tuple[Tensor, Tensor]:
    """States of T5 with its padding, and CLIP's vector, in float64."""
    t5, clip = pipe.text_encoder, pipe.text_encoder_2
    length = pipe.transformer.config.model_max_length
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = pipe.tokenizer([text], max_length=length, **options).input_ids
    clip_ids = pipe.tokenizer_2([text], max_length=clip.config.max_position_embeddings, **options).input_ids
    try:
        states = t5.double()(input_ids=ids).last_hidden_state[0]
        return states, clip.double()(input_ids=clip_ids).pooler_output[0]
    finally:
        t5.float()
        clip.float()


def video_of(num_frames: int, seed: int) -> Tensor:
    """(1, 3, T, 32, 48) in [-1, 1]."""
    return torch.rand(1, 3, num_frames, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def known_of(codec: Any, kind: str, video: Tensor, pictures: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Latents of what is shown, each encoded alone, and the latent frame where they begin."""
    long = 5 if codec.frame_offset else 8  # two latent frames
    head, tail = (codec.encode_video(picture)[0].double() for picture in pictures)
    return {
        "t2v": [],
        "i2v_head": [(head, 0)],
        "i2v_tail": [(tail, -1)],
        "i2v_loop": [(head, 0), (tail, -1)],
        "v2v_head": [(codec.encode_video(video[:, :, -long:])[0].double(), 0)],
        "v2v_tail": [(codec.encode_video(video[:, :, :long])[0].double(), -codec.latent_frames(long))],
    }[kind]


KINDS = ["t2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_clip(pipeline, kind):
    transformer, codec = pipeline.transformer, pipeline.autoencoder
    config = transformer.config
    w = {name: tensor.double() for name, tensor in transformer.state_dict().items()}
    num_frames = 13 if codec.frame_offset else 12
    size = codec.latent_size((num_frames, 32, 48))
    noise = torch.randn((1, config.in_channels, *size), generator=torch.Generator().manual_seed(1))
    pictures, video = (video_of(1, 2), video_of(1, 3)), video_of(19, 4)
    known = torch.zeros((config.in_channels + 1, *size), dtype=torch.float64)
    for latents, start in known_of(codec, kind, video, pictures):
        frames = slice(start % size[0], start % size[0] + latents.shape[1])
        known[0, frames], known[1:, frames] = 1, latents
    texts = {"text": texts_of(pipeline, f"{PROMPT}. 24 FPS. 4 motion score."), "null": texts_of(pipeline, "")}
    texts["nothing"] = texts["null"]

    def network(x: Tensor, t: float, branch: str) -> Tensor:
        condition = known * 0 if branch == "nothing" else known
        return plain_v2_0.mmdit(w, x, t, *texts[branch], condition, axes=[4, 6, 6], p=config.patch_size)

    # Tokens are counted by the side in pixels, whatever is left of them in so small a clip.
    tokens = 32 * 48 // pipeline.scheduler.config.token_px**2
    expected = plain_v2_0.sample(network, noise[0].double(), STEPS, tokens, from_image=kind.startswith("i2v"))
    if kind.startswith("i2v"):
        expected = torch.where(known[:1] > 0, known[1:], expected)

    options: dict[str, Any] = {"latents": noise, "num_inference_steps": STEPS, "num_frames": num_frames, "generator": 0}
    head, tail = ((picture[0, :, 0] + 1) / 2 for picture in pictures)
    options |= {"image": head} if kind in ("i2v_head", "i2v_loop") else {}
    options |= {"last_image": tail} if kind in ("i2v_tail", "i2v_loop") else {}
    if kind.startswith("v2v"):
        options["conditioning"] = condition(
            codec, VideoSize(num_frames, 32, 48), extend=video[0], backwards=kind == "v2v_tail", alone=True,
            condition_frames=2,
        )  # fmt: skip
    latents = pipeline(PROMPT, output_type="latent", **options).frames
    torch.testing.assert_close(latents[0].double(), expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
    frames = pipeline(PROMPT, output_type="pt", **options).frames
    decoded = codec.decode_latents(expected[None].float(), num_frames) / 2 + 0.5
    torch.testing.assert_close(frames, decoded.clamp(0, 1).transpose(1, 2), rtol=0, atol=1e-3)
