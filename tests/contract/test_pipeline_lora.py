"""Adapters in every pipeline by diffusers' methods: the clip that `load_pipeline(adapters=...)` makes, and no trace."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from tiny_pipeline import seeded
from tiny_published import pipeline_of
from torch import Tensor

from opensora.adapters.adapter import read_adapter
from opensora.adapters.reading import ADAPTER_FILE
from opensora.checkpoints.loading import load_pipeline
from opensora.errors import OpenSoraError
from opensora.pipeline import OpenSoraPipeline
from opensora.training.diffusion.lora import LoRAConfig, add_adapter, export_adapter

pytest.importorskip("peft")

PROMPT = "a red ball"
PIPELINES: dict[str, tuple[str, str | None]] = {
    "1.0": ("opensora-1.0-hq-16x256x256", "dpm-solver++"),
    "1.1": ("opensora-1.1-stage3", "ddim"),
    "1.2": ("opensora-1.2", None),
}


def sample(pipe: OpenSoraPipeline) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, generator=seeded(1), output_type="latent", num_inference_steps=2).frames


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def differs(actual: Tensor, other: Tensor) -> bool:
    return float((actual - other).abs().max()) > 0.01 * float(other.abs().max())


def with_adapter(pipe: OpenSoraPipeline, seed: int) -> tuple[Any, LoRAConfig]:
    """Its transformer with an adapter that does something."""
    config = LoRAConfig(rank=2, alpha=6)
    add_adapter(pipe.transformer, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return pipe.transformer, config


@pytest.fixture(scope="module", params=PIPELINES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline, two adapters that were exported, and one in diffusers' format, which says nothing of alpha."""
    folder = tmp_path_factory.mktemp("lora")
    pipeline_of(*PIPELINES[request.param]).save_pretrained(folder / "base")
    for name, seed in (("first", 1), ("second", 2)):
        transformer, config = with_adapter(load_pipeline(folder / "base"), seed)
        export_adapter(transformer, config, folder / name, base="tiny", training={})
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(transformer))
    OpenSoraPipeline.save_lora_weights(folder / "theirs", transformer_lora_layers=layers)
    return folder


def merged(stored: Path, **scales: float) -> Tensor:
    adapters = {stored / name: scale for name, scale in scales.items()}
    return sample(load_pipeline(stored / "base", adapters=adapters))


def untouched(pipe: OpenSoraPipeline, stored: Path) -> bool:
    """Whether nothing is left of any adapter."""
    names = [name for name, _ in pipe.transformer.named_modules()]
    fresh = load_pipeline(stored / "base").transformer.state_dict()
    kept = pipe.transformer.state_dict()
    same = kept.keys() == fresh.keys() and all(torch.equal(kept[name], fresh[name]) for name in fresh)
    return same and not any("lora" in name for name in names) and pipe.get_list_adapters() in ({}, {"transformer": []})


@pytest.mark.parametrize("form", ["first", f"first/{ADAPTER_FILE}", "theirs"])
def test_a_loaded_adapter_acts_as_one_that_is_merged(stored, form):
    pipe = load_pipeline(stored / "base")
    plain = sample(pipe)
    if form == "theirs":
        pipe.load_lora_weights(stored / form)
        assert read_adapter(stored / form).origin is None
        expected = merged(stored, theirs=1)
    else:
        pipe.load_lora_weights(str(stored / form))
        expected = merged(stored, first=1)
    near(sample(pipe), expected)
    assert differs(expected, plain)
    pipe.unload_lora_weights()
    assert untouched(pipe, stored)
    torch.testing.assert_close(sample(pipe), plain, rtol=0, atol=0)


def test_scales_and_several_at_once(stored):
    pipe = load_pipeline(stored / "base")
    plain = sample(pipe)
    for name in ("first", "second"):
        pipe.load_lora_weights(stored / name, adapter_name=name)
    for scales in ({"first": 1.0}, {"second": 0.5}, {"first": 0.5, "second": -0.25}):
        pipe.set_adapters(list(scales), adapter_weights=list(scales.values()))
        assert sorted(pipe.get_active_adapters()) == sorted(scales)
        near(sample(pipe), merged(stored, **scales))
    pipe.disable_lora()
    near(sample(pipe), plain)
    pipe.enable_lora()
    near(sample(pipe), merged(stored, first=0.5, second=-0.25))
    pipe.delete_adapters("second")
    assert pipe.get_list_adapters() == {"transformer": ["first"]}
    pipe.set_adapters("first", 2.0)
    near(sample(pipe), merged(stored, first=2.0))
    pipe.unload_lora_weights()
    assert untouched(pipe, stored)


def test_fused_and_taken_out_again(stored):
    pipe = load_pipeline(stored / "base")
    plain = sample(pipe)
    pipe.load_lora_weights(stored / "first", adapter_name="first")
    pipe.fuse_lora(lora_scale=0.5)
    assert pipe.num_fused_loras == 1
    near(sample(pipe), merged(stored, first=0.5))
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    near(sample(pipe), merged(stored, first=0.5))  # diffusers keeps the scale that was fused
    pipe.set_adapters("first")
    near(sample(pipe), merged(stored, first=1))
    pipe.unload_lora_weights()
    near(sample(pipe), plain)  # up to the rounding of adding and taking away
    assert not any("lora" in name for name, _ in pipe.transformer.named_modules())


def test_fused_for_good(stored):
    """What is fused stays when the adapters are unloaded, and can be saved."""
    pipe = load_pipeline(stored / "base")
    pipe.load_lora_weights(stored / "first")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    near(sample(pipe), merged(stored, first=1))
    pipe.save_pretrained(stored / "fused")
    near(sample(load_pipeline(stored / "fused")), merged(stored, first=1))


def test_a_copy_shares_the_adapter(stored):
    pipe = load_pipeline(stored / "base")
    copy = OpenSoraPipeline.from_pipe(pipe)
    pipe.load_lora_weights(stored / "first")
    near(sample(copy), merged(stored, first=1))


def test_offloaded_pipelines_take_adapters(stored):
    pytest.importorskip("accelerate")
    pipe = load_pipeline(stored / "base")
    pipe.load_lora_weights(stored / "first")
    pipe.enable_model_cpu_offload(device="cpu")
    near(sample(pipe), merged(stored, first=1))
    pipe.unload_lora_weights()
    assert differs(sample(pipe), merged(stored, first=1))


def test_an_adapter_of_something_else_is_refused(stored):
    pipe = load_pipeline(stored / "base")
    weights = {f"transformer.nowhere.0.attn.lora_{which}.weight": torch.ones(2, 2) for which in "AB"}
    with pytest.raises((OpenSoraError, ValueError)):
        pipe.load_lora_weights(weights)
    assert untouched(pipe, stored)


def test_diffusers_loads_adapters_of_other_weights(stored):
    """Which `load_pipeline(adapters=...)` refuses."""
    pipe = load_pipeline(stored / "base")
    with torch.no_grad():
        pipe.transformer.blocks[0].attn.proj.weight.add_(1)
    plain = sample(pipe)
    pipe.load_lora_weights(stored / "first")
    assert differs(sample(pipe), plain)


def test_where_weights_come_and_go_adapters_are_merged_and_not_loaded(stored):
    """`load_pipeline(offload=True)` on a CPU reads the weights anew, without what was loaded beside them."""
    pipe = load_pipeline(stored / "base", offload=True)
    with pytest.raises(OpenSoraError, match="adapters=") as error:
        pipe.load_lora_weights(stored / "first")
    assert "\n" not in str(error.value)
    near(
        sample(load_pipeline(stored / "base", adapters={stored / "first": 1.0}, offload=True)), merged(stored, first=1)
    )
