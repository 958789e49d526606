"""Starting from weights that lack something: nothing is new that was not named, and what is new changes nothing."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_transformers import SIZES, TINY, build, inputs
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.models.clip_conditions import ClipConditions
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3
from opensora.models.stdit4 import STDiT4
from opensora.training.diffusion.adaptation import build_transformer, choose_trained, start_from

IMAGE = {"clip_conditions": ClipConditions(fps=120.0, height=512.0, width=512.0, num_frames=1.0)}


def image_weights(**changes: Any) -> tuple[dict[str, Tensor], STDiT]:
    """Weights as an image model has them (PixArt's names), and a network of 1.0 that computes what that one would.

    The 1.0 network draws single frames like the image model as long as its attention along time adds nothing.
    """
    model = build(STDiT, input_size=(1, 8, 8), **changes)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn_temp.proj.weight)
        torch.nn.init.zeros_(block.attn_temp.proj.bias)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if "attn_temp" not in name}
    del weights["pos_embed_temporal"]
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"].squeeze(2)  # a 2D convolution
    return weights, model


def images(batch: int = 2) -> dict[str, Tensor]:
    return inputs(batch, size=(1, 8, 8))


PARTS = {STDiT: ("temporal_blocks",), STDiT3: ("temporal_blocks", "conditions")}


@torch.no_grad()
def test_more_latent_channels_start_as_repetitions_of_few(caplog) -> None:
    """What a model of 3 channels predicts, one of 6 does that is shown them twice."""
    weights, image_model = image_weights()
    torch.manual_seed(5)
    model = STDiT4(
        **{**TINY, "in_channels": 6, "qk_norm": False, "kernel_size": None, "use_spatial_rope": False}
    ).eval()
    with caplog.at_level(logging.WARNING):
        start_from(model, weights, ("temporal_blocks", "conditions"), source="image.pth")
    assert "the 3 latent channels of the weights are repeated to 6" in caplog.text
    arguments = images()
    expected = image_model(**arguments, **IMAGE).sample
    twice = model(**{**arguments, "hidden_states": arguments["hidden_states"].repeat(1, 2, 1, 1, 1)}, **IMAGE).sample
    mean, variance = expected.chunk(2, dim=1)
    torch.testing.assert_close(twice, torch.cat([mean, mean, variance, variance], dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", PARTS)
@torch.no_grad()
def test_the_adapted_model_equals_the_image_model_on_single_frames(cls: Any, caplog) -> None:
    weights, image_model = image_weights()
    torch.manual_seed(5)
    options = {"input_size": (3, 8, 8)} if cls is STDiT else {"qk_norm": False, "input_sq_size": 512}
    model = cls(**{**TINY, **options})
    with caplog.at_level(logging.WARNING):
        new = start_from(model, weights, PARTS[cls], source="image.pth")
    assert set(new) == set(PARTS[cls]) and all(new.values())
    assert all(f"{count} tensors of {part} are new" in caplog.text for part, count in new.items())
    expected = image_model(**images(), **IMAGE).sample
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(model.eval()(**images(), **IMAGE).sample, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_video_begins_as_its_frames() -> None:
    """Blocks over time add nothing at first, so every frame is drawn like an image of its own."""
    weights, _ = image_weights()
    model = STDiT3(**{**TINY, "qk_norm": False})
    start_from(model, weights, ("temporal_blocks", "conditions"), source="image.pth")
    clip = inputs(2, size=(3, 8, 8))
    video = model.eval()(**clip, **IMAGE).sample
    for frame in range(3):
        alone = clip | {"hidden_states": clip["hidden_states"][:, :, frame : frame + 1]}
        torch.testing.assert_close(model(**alone, **IMAGE).sample[:, :, 0], video[:, :, frame], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_new_norms_and_a_new_last_layer() -> None:
    weights, _ = image_weights()
    model = STDiT3(**{**TINY, "qk_norm": True})
    parts = ("temporal_blocks", "conditions", "qk_norm", "last_layer")
    start_from(model, weights, parts, source="image.pth")
    norms = [tensor for name, tensor in model.state_dict().items() if "spatial_blocks" in name and "_norm." in name]
    assert norms and all((tensor == 1).all() for tensor in norms)
    assert not model.eval()(**images(), **IMAGE).sample.any(), "a new last layer predicts zero"
    for name in ("spatial_blocks.1.attn.qkv.weight", "spatial_blocks.0.mlp.fc2.bias"):
        assert torch.equal(model.state_dict()[name], weights[name.removeprefix("spatial_")])


@pytest.mark.parametrize(("left_out", "told"), [("temporal_blocks", "temporal_blocks"), ("conditions", "conditions")])
def test_nothing_is_new_that_was_not_named(left_out: str, told: str) -> None:
    weights, _ = image_weights()
    named: Any = tuple(part for part in ("temporal_blocks", "conditions") if part != left_out)
    with pytest.raises(OpenSoraError, match=rf"image\.pth lacks \d+ tensors of {told}.*objective\.new_parts"):
        start_from(STDiT3(**{**TINY, "qk_norm": False}), weights, named, source="image.pth")


def test_weights_that_lack_anything_else_are_refused() -> None:
    weights, _ = image_weights()
    del weights["blocks.1.mlp.fc1.weight"]
    everything: Any = ("temporal_blocks", "conditions", "qk_norm", "last_layer")
    with pytest.raises(OpenSoraError, match="1 missing tensors"):
        start_from(STDiT3(**TINY), weights, everything, source="image.pth")


@torch.no_grad()
def test_from_the_second_generation_to_the_third() -> None:
    """What attends in time is another network there, and left behind; so are conditions that the third lacks."""
    before = build(STDiT2, qk_norm=True)
    model = STDiT3(**{**TINY, "qk_norm": True})
    new = start_from(model, before.state_dict(), ("temporal_blocks", "conditions"), source="1.1")
    assert set(new) == {"temporal_blocks"}, "it has a frame rate already"
    for name, tensor in model.state_dict().items():
        if name.startswith("spatial_blocks."):
            assert torch.equal(tensor, before.state_dict()[name.removeprefix("spatial_")]), name
    assert torch.isfinite(model.eval()(**inputs(), **SIZES).sample).all()


def test_from_a_file(tmp_path: Path) -> None:
    """As a user names it: a file of weights, options of the network, and what is new."""
    weights, _ = image_weights()
    path = tmp_path / "image.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    options = {**TINY, "qk_norm": False}
    model = build_transformer("STDiT3", options, str(path), ("temporal_blocks", "conditions"), "cpu")
    assert model.training
    loaded = model.state_dict()["spatial_blocks.0.cross_attn.kv_linear.weight"]
    assert torch.equal(loaded, weights["blocks.0.cross_attn.kv_linear.weight"])
    for device in ("cpu", "meta"):  # names and shapes are enough for a plan
        with pytest.raises(OpenSoraError, match=r"objective\.new_parts: conditions,temporal_blocks"):
            build_transformer("STDiT3", options, str(path), (), device)
    planned = build_transformer("STDiT3", options, str(path), ("temporal_blocks", "conditions"), "meta")
    assert all(weight.is_meta for weight in planned.parameters())
    wider = {**options, "hidden_size": 2 * options["hidden_size"]}
    with pytest.raises(OpenSoraError, match="another name or shape than those of the STDiT3 wanted here"):
        build_transformer("STDiT3", wider, str(path), ("temporal_blocks", "conditions"), "meta")


@pytest.mark.parametrize("cls", [STDiT, STDiT2, STDiT3])
def test_which_parameters_are_trained(cls: Any) -> None:
    def trained(train: Any, freeze: bool) -> set[str]:
        model = cls(**TINY)
        choose_trained(model, train, freeze_text_embedder=freeze)
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    everything, in_time, in_space = (trained(kind, False) for kind in ("all", "temporal", "spatial"))
    assert in_time and in_space and in_time | in_space == everything and not in_time & in_space
    assert all("temp" in name for name in in_time) and not any("temp" in name for name in in_space)
    text = everything - trained("all", True)
    assert text and all(name.startswith("y_embedder.") for name in text)
