"""STDiT3 against the reference, number by number."""

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch

from opensora.models.clip_conditions import ClipConditions
from opensora.models.stdit3 import STDiT3


@pytest.fixture(scope="module")
def fixture(golden):
    return golden("stdit3_v1_2")


@pytest.fixture(scope="module")
def model(fixture) -> STDiT3:
    # The recorded configuration may also hold switches of the reference that change no number, such as its kernels.
    known = inspect.signature(STDiT3.__init__).parameters
    config = {name: value for name, value in fixture.meta["config"].items() if name in known}
    model = STDiT3(**config).eval().requires_grad_(False)
    model.load_state_dict(fixture.under("sd"))
    return model


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def inputs(fixture, case: str) -> dict[str, Any]:
    """Arguments of `forward`, without masks."""
    named = fixture.under(f"in.{case}")
    return {
        "hidden_states": named["x"],
        "timestep": named["timestep"],
        "encoder_hidden_states": named["y"].squeeze(1),
        "clip_conditions": told(named),
    }


def told(named: dict[str, torch.Tensor]) -> ClipConditions:
    """The network is told no number of frames."""
    return ClipConditions(named["fps"], named["height"], named["width"], num_frames=named["x"].shape[2])


def cases(fixture) -> list[str]:
    return sorted({name.split(".")[1] for name in fixture.tensors if name.startswith("in.")})


def test_every_output_is_read(fixture):
    """No number of the reference goes by unseen because of its name."""
    variants = {"nomaskx", "x_mask", "no_text_mask", "cfg_batch", "cfg_batch_xmask"}
    assert {name.partition(".")[0] for name in fixture.under("out")} <= set(cases(fixture))
    assert {name.partition(".")[2] for name in fixture.under("out")} <= variants


def test_outputs(fixture, model):
    compared = 0
    for case in cases(fixture):
        arguments = inputs(fixture, case)
        variants = {
            "nomaskx": {"encoder_attention_mask": fixture[f"in.{case}.mask"]},
            "x_mask": {
                "encoder_attention_mask": fixture[f"in.{case}.mask"],
                "frame_mask": fixture[f"in.{case}.x_mask"].bool(),
            },
            "no_text_mask": {},
        }
        for variant, masks in variants.items():
            if f"out.{case}.{variant}" in fixture:
                close(model(**arguments, **masks).sample, fixture[f"out.{case}.{variant}"])
                compared += 1
    assert compared


def test_guidance_batch(fixture, model):
    """Conditional and null rows in one batch; the null rows read as many tokens as the conditional ones."""
    compared = 0
    for case in cases(fixture):
        named = fixture.under(f"in.{case}")
        for variant in ("cfg_batch", "cfg_batch_xmask"):
            if f"out.{case}.{variant}" not in fixture:
                continue
            text, mask = named["y"].squeeze(1), named["mask"]
            null = model.null_text[: text.shape[1]].expand_as(text)
            context = model.encode_text(torch.cat([text, null]), mask.repeat(2, 1))
            sample = model(
                named["x"].repeat(2, 1, 1, 1, 1),
                named["timestep"].repeat(2),
                text_context=context,
                clip_conditions=told(named).repeat(2),
                frame_mask=named["x_mask"].bool().repeat(2, 1) if variant.endswith("xmask") else None,
            ).sample
            close(sample, fixture[f"out.{case}.{variant}"])
            compared += 1
    if not compared:
        pytest.skip("the fixture holds no guidance batch")


def test_intermediates(fixture, model):
    """What the submodules return, for the cases that record it (all without frame mask)."""
    modules = {name.replace(".", "_"): module for name, module in model.named_modules() if name}
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _module, _args, out, name=name: seen.update({name: out}))
        for name, module in modules.items()
    ]
    compared = 0
    for case in cases(fixture):
        recorded = fixture.under(f"mid.{case}")
        if not recorded:
            continue
        model(**inputs(fixture, case), encoder_attention_mask=fixture[f"in.{case}.mask"])
        for name, expected in recorded.items():
            assert name in seen, f"no module returns {name}"
            close(seen[name].reshape(expected.shape), expected)
            compared += 1
    for hook in hooks:
        hook.remove()
    if not compared:
        pytest.skip("the fixture holds no intermediates of these modules")


def test_number_and_tensor_conditions_agree(fixture, model):
    """Sizes and frame rates of a batch may come as one number."""
    case = cases(fixture)[0]
    arguments = inputs(fixture, case)
    clip = arguments["clip_conditions"]
    numbers = {name: getattr(clip, name)[0].item() for name in ("fps", "height", "width")}
    if any((getattr(clip, name) != value).any() for name, value in numbers.items()):
        pytest.skip("the samples of this case differ in size or frame rate")
    arguments["clip_conditions"] = replace(clip, **numbers)
    mask = fixture[f"in.{case}.mask"]
    sample = model(**arguments, encoder_attention_mask=mask).sample
    close(sample, fixture[f"out.{case}.nomaskx"])
