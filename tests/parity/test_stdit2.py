"""STDiT2 against the reference, number by number, with and without normed queries and keys."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference_config import transformer_config

from opensora.models.clip_conditions import ClipConditions
from opensora.models.embeddings import position_embedding_2d
from opensora.models.stdit2 import STDiT2


@pytest.fixture(scope="module", params=["stdit2_v1_1_noqknorm", "stdit2_v1_1_qknorm"])
def fixture(request, golden):
    return golden(request.param)


@pytest.fixture(scope="module")
def model(fixture) -> STDiT2:
    model = STDiT2(**transformer_config(fixture)).eval().requires_grad_(False)
    model.load_state_dict(fixture.under("sd"))
    return model


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def cases(fixture) -> list[str]:
    return sorted({name.split(".")[1] for name in fixture.tensors if name.startswith("in.")})


CONDITIONS = {"fps": "fps", "height": "height", "width": "width", "num_frames": "num_frames", "aspect_ratio": "ar"}


def inputs(fixture, case: str) -> dict[str, Any]:
    """Arguments of `forward`, without masks."""
    named = fixture.under(f"in.{case}")
    return {
        "hidden_states": named["x"],
        "timestep": named["timestep"],
        "encoder_hidden_states": named["y"].squeeze(1),
        "clip_conditions": ClipConditions(**{ours: named[theirs] for ours, theirs in CONDITIONS.items()}),
    }


def test_every_output_is_read(fixture):
    """No number of the reference goes by unseen because of its name."""
    variants = {"nomaskx", "x_mask", "no_text_mask", "cfg_batch", "cfg_batch_xmask"}
    assert {name.partition(".")[0] for name in fixture.under("out")} <= set(cases(fixture))
    assert {name.partition(".")[2] for name in fixture.under("out")} <= variants


def test_outputs(fixture, model):
    compared = 0
    for case in cases(fixture):
        mask, frame_mask = fixture[f"in.{case}.mask"], fixture[f"in.{case}.x_mask"].bool()
        for variant, masks in {
            "nomaskx": {"encoder_attention_mask": mask},
            "x_mask": {"encoder_attention_mask": mask, "frame_mask": frame_mask},
            "no_text_mask": {},
        }.items():
            if f"out.{case}.{variant}" in fixture:
                close(model(**inputs(fixture, case), **masks).sample, fixture[f"out.{case}.{variant}"])
                compared += 1
    assert compared


def test_guidance_batch(fixture, model):
    """Conditional and null rows in one batch; the null rows read as many tokens as the conditional ones."""
    compared = 0
    for case in cases(fixture):
        for variant in ("cfg_batch", "cfg_batch_xmask"):
            if f"out.{case}.{variant}" not in fixture:
                continue
            arguments = inputs(fixture, case)
            text = arguments.pop("encoder_hidden_states")
            null = model.null_text[: text.shape[1]].expand_as(text)
            context = model.encode_text(torch.cat([text, null]), fixture[f"in.{case}.mask"].repeat(2, 1))
            clip = arguments.pop("clip_conditions").repeat(2)
            twice = {name: torch.cat([value, value]) for name, value in arguments.items()} | {"clip_conditions": clip}
            if variant.endswith("xmask"):
                twice["frame_mask"] = fixture[f"in.{case}.x_mask"].bool().repeat(2, 1)
            close(model(**twice, text_context=context).sample, fixture[f"out.{case}.{variant}"])
            compared += 1
    if not compared:
        pytest.skip("the fixture holds no guidance batch")


def test_intermediates(fixture, model):
    """What the submodules return, for the cases that record it (all without frame mask)."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _module, _args, out, name=name: seen.update({name.replace(".", "_"): out}))
        for name, module in model.named_modules()
        if name
    ]
    compared = 0
    for case in cases(fixture):
        recorded = fixture.under(f"mid.{case}")
        recorded.pop("pos_emb", None)  # test_patch_positions
        model(**inputs(fixture, case), encoder_attention_mask=fixture[f"in.{case}.mask"])
        for name, expected in recorded.items():
            assert name in seen, f"no module returns {name}"
            close(seen[name].reshape(expected.shape), expected)
            compared += 1
    for hook in hooks:
        hook.remove()
    if not compared:
        pytest.skip("the fixture holds no intermediates of these modules")


def test_patch_positions(fixture, model):
    compared = 0
    for case in cases(fixture):
        if f"mid.{case}.pos_emb" not in fixture:
            continue
        named, expected = fixture.under(f"in.{case}"), fixture[f"mid.{case}.pos_emb"]
        h, w = (-(-n // p) for n, p in zip(named["x"].shape[3:], model.patch_size[1:], strict=True))
        scale = torch.sqrt(named["height"][:1] * named["width"][:1]) / model.input_sq_size
        close(position_embedding_2d(h, w, expected.shape[-1], scale, base_size=round(math.sqrt(h * w))), expected)
        compared += 1
    if not compared:
        pytest.skip("the fixture holds no positions")


def test_ratio_follows_from_the_size(fixture, model):
    """What the samples say of the ratio is what the model derives from pixels."""
    for case in cases(fixture):
        arguments = inputs(fixture, case)
        clip = arguments["clip_conditions"]
        if not torch.allclose(clip.aspect_ratio, clip.height / clip.width):
            continue
        arguments["clip_conditions"] = replace(clip, aspect_ratio=None)
        sample = model(**arguments, encoder_attention_mask=fixture[f"in.{case}.mask"]).sample
        close(sample, fixture[f"out.{case}.nomaskx"])
