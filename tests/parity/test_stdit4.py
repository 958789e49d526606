"""STDiT4 (the transformer of Open-Sora 1.3) against the reference, number by number."""

import inspect
from typing import Any

import pytest
import torch

from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.clip_conditions import ClipConditions
from opensora.models.stdit4 import FORMAT, STDiT4
from opensora.models.windows import WindowGrid

VARIANTS = {"nomaskx", "plain", "x_mask", "cond", "cond_emptyidx", "cfg3"}


@pytest.fixture(scope="module", params=["plain", "window", "window72"])
def fixture(request, golden):
    return golden(f"stdit3_v1_3_{request.param}")


@pytest.fixture(scope="module")
def model(fixture) -> STDiT4:
    known = inspect.signature(STDiT4.__init__).parameters
    config = {name: value for name, value in fixture.meta["config"].items() if name in known}
    model = STDiT4(**config).eval().requires_grad_(False)
    model.load_state_dict(fixture.under("sd") | dequantised(fixture.under("sdq")))
    return model


def dequantised(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that a fixture holds in 8 bits, exactly."""
    return {name: value.float() * 2.0 ** (-9 if value.ndim > 1 else -6) for name, value in stored.items()}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def cases(fixture) -> dict[str, dict[str, Any]]:
    return {case["n"]: case for case in fixture.meta["cases"]}


def inputs(fixture, case: str) -> dict[str, Any]:
    """Arguments of `forward`, without masks of frames."""
    named = fixture.under(f"in.{case}")
    return {
        "hidden_states": named["x"],
        "timestep": named["timestep"],
        "encoder_hidden_states": named["y"].squeeze(1),
        "encoder_attention_mask": named["mask"],
        "clip_conditions": ClipConditions(named["fps"], named["height"], named["width"], named["x"].shape[2]),
    }


def known_frames(fixture, case: str) -> ChannelConditioning:
    latents = fixture[f"in.{case}.cond"]
    mask = torch.zeros(len(latents), latents.shape[2], dtype=torch.bool)
    mask[:, cases(fixture)[case]["mi"]] = True
    return ChannelConditioning(latents, mask)


def guidance_batch(fixture, case: str, model: STDiT4) -> dict[str, Any]:
    """Rows of the text with known frames, of the null text with them, of the null text with their mask alone."""
    arguments = inputs(fixture, case)
    text, known = arguments.pop("encoder_hidden_states"), known_frames(fixture, case)
    null = model.null_text[: text.shape[1]].expand_as(text)
    arguments["clip_conditions"] = arguments["clip_conditions"].repeat(3)
    repeated = {
        name: value.repeat(3, *[1] * (value.ndim - 1)) for name, value in arguments.items() if torch.is_tensor(value)
    }
    return {
        **arguments,
        **repeated,
        "encoder_hidden_states": torch.cat([text, null, null]),
        "channel_conditioning": ChannelConditioning.cat([known, known, known.without_latents()]),
    }


def arguments_of(fixture, case: str, variant: str, model: STDiT4) -> dict[str, Any]:
    if variant == "cfg3":
        return guidance_batch(fixture, case, model)
    arguments = inputs(fixture, case)
    if variant == "x_mask":
        arguments["frame_mask"] = fixture[f"in.{case}.x_mask"].bool()
    if variant == "cond":
        arguments["channel_conditioning"] = known_frames(fixture, case)
    if variant == "cond_emptyidx":
        arguments["channel_conditioning"] = ChannelConditioning.none(arguments["hidden_states"])
    return arguments


def test_outputs(fixture, model):
    outputs = fixture.under("out")
    for name, expected in outputs.items():
        case, _, variant = name.partition(".")
        assert variant in VARIANTS, f"nothing is compared with out.{name}"
        close(model(**arguments_of(fixture, case, variant, model)).sample, expected)
    assert outputs


def test_intermediates(fixture, model):
    """What the submodules return, for the cases that record it (without masks of frames)."""
    modules = {name.replace(".", "_"): module for name, module in model.named_modules() if name}
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _module, _args, out, name=name: seen.update({name: out}))
        for name, module in modules.items()
    ]
    compared = 0
    for case, settings in cases(fixture).items():
        recorded = fixture.under(f"mid.{case}")
        if recorded:
            model(**inputs(fixture, case))
        h, w = -(-settings["H"] // 2), -(-settings["W"] // 2)
        for name, expected in recorded.items():
            close(as_recorded(seen[name], name, (h, w), model, expected.shape), expected)
            compared += 1
    for hook in hooks:
        hook.remove()
    if not compared:
        pytest.skip("the fixture holds no intermediates of these modules")


def as_recorded(
    tokens: torch.Tensor, name: str, grid: tuple[int, int], model: STDiT4, shape: torch.Size
) -> torch.Tensor:
    """Patches row by row; within a block over time the reference keeps the frames last, or the patches first."""
    tokens = tokens if tokens.ndim == 4 else tokens.unflatten(0, (2, -1))
    if model.window is not None:
        order = WindowGrid.cut(*grid, *model.window, tokens.device).order
        tokens = tokens[:, :, order.argsort()]
    if name.startswith("temporal") and name.endswith("attn"):
        tokens = tokens.transpose(1, 2)
    return tokens.reshape(shape)


def test_one_size_for_all_may_be_a_number(fixture, model):
    case = next(iter(cases(fixture)))
    arguments, told = inputs(fixture, case), cases(fixture)[case]
    arguments["clip_conditions"] = ClipConditions(told["fps"], told["h"], told["w"], told["T"])
    variant = "plain" if f"out.{case}.plain" in fixture else "nomaskx"
    close(model(**arguments).sample, fixture[f"out.{case}.{variant}"])


def test_start_from_four_latent_channels(golden):
    """The first and last layer of a model of 4 latent channels, for 16."""
    fixture = golden("adapt_16ch_v1_3")
    width = fixture.meta["hidden_size"]
    with torch.device("meta"):
        model = STDiT4(hidden_size=width, num_heads=2, depth=1, caption_channels=4, model_max_length=2)
    adapted = FORMAT.from_ancestor(model, fixture.under("in"))
    expected = {FORMAT.name_of_ancestor(name): tensor for name, tensor in fixture.under("out").items()}
    assert adapted.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(adapted[name], tensor), name
