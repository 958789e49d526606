"""Open-Sora 2.0 in miniature: two text encoders, no text is an empty one; saved, loaded, offloaded."""

import json
from typing import Any

import pytest
import torch
from tiny_pipeline import DEFAULTS, TEXT_WIDTH, make_autoencoder, make_text_encoder, seeded
from tiny_v2_0 import make_clip_encoder

from opensora import load_pipeline
from opensora.models.mmdit import MMDiT
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler
from opensora.pipeline import OpenSoraPipeline
from opensora.toybox.captions import MAX_TOKENS, build_tokenizer

PROMPT = "a small red ball rolls left"


def make_pipeline(**defaults: Any) -> OpenSoraPipeline:
    torch.manual_seed(2)
    transformer = MMDiT(
        in_channels=4, hidden_size=32, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6),
        caption_channels=TEXT_WIDTH, pooled_channels=24, model_max_length=MAX_TOKENS,
    ).eval()  # fmt: skip
    pipeline = OpenSoraPipeline(
        transformer=transformer,
        scheduler=RectifiedFlowScheduler(),
        autoencoder=make_autoencoder(),
        text_encoder=make_text_encoder(),
        tokenizer=build_tokenizer(),
        text_encoder_2=make_clip_encoder(),
        tokenizer_2=build_tokenizer(),
        **{"cfg_channels": None, **DEFAULTS, **defaults},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipe() -> OpenSoraPipeline:
    return make_pipeline()


def sample(pipe: OpenSoraPipeline, prompt: Any = PROMPT, **options: Any) -> torch.Tensor:
    return pipe(prompt, **{"generator": seeded(1), "output_type": "latent", **options}).frames


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_text_steers_and_no_text_is_an_empty_one(pipe):
    plain = sample(pipe)
    assert plain.shape[1] == 4 and (sample(pipe, "a large blue square") - plain).abs().max() > 1e-3
    text, null = pipe.encode_prompt(PROMPT)
    assert text.pooled is not None and null is not None
    near(sample(pipe, None, prompt_embeds=text), plain)
    near(sample(pipe, None, prompt_embeds=text, negative_prompt_embeds=null), plain)
    empty = pipe.text_conditioner.encode([""])
    torch.testing.assert_close(null.states, empty.states)
    assert (sample(pipe, negative_prompt="a large blue square") - plain).abs().max() > 1e-3


def test_a_batch_is_its_videos_one_by_one(pipe):
    prompts = [PROMPT, "a large blue square"]
    both = sample(pipe, prompts, generator=seeded(1, 2))
    for i, prompt in enumerate(prompts):
        near(both[i : i + 1], sample(pipe, prompt, generator=seeded(1 + i)))


def test_saved_and_loaded_and_offloaded(pipe, tmp_path):
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModel"]
    near(sample(load_pipeline(tmp_path, device="cpu")), expected)
    offloaded = load_pipeline(tmp_path, device="cpu", offload=True)
    offloaded.set_progress_bar_config(disable=True)
    near(sample(offloaded), expected)
    for name in ("text_encoder", "text_encoder_2"):
        assert all(parameter.is_meta for parameter in getattr(offloaded, name).parameters())
    near(sample(OpenSoraPipeline.from_pretrained(tmp_path)), expected)
    near(sample(OpenSoraPipeline.from_pipe(pipe)), expected)


def test_prompts_tell_rate_and_motion():
    pipe = make_pipeline(scores={"fps": 24, "motion": 4})
    assert pipe.spell(["a ball"]) == ["a ball. 24 FPS. 4 motion score."]
    assert pipe.spell(["a ball"], pipe.rated_scores({"motion": 7}, 12)) == ["a ball. 12 FPS. 7 motion score."]
    assert pipe.spell_negative(["a ball"]) == ["a ball"]
    assert make_pipeline().rated_scores({"motion": 7}, 12) == {"motion": 7}
