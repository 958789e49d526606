"""Autoencoders of one network in the shape of diffusers' model tests: files, offloading, casting, ways in."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.models.autoencoders.causal import CausalVideoAutoencoder
from opensora.models.autoencoders.dc_ae import VideoDCAutoencoder
from opensora.models.autoencoders.hunyuan import HunyuanVideoAutoencoder
from opensora.models.autoencoders.joint import JointCodec

CPU = torch.device("cpu")
FRAMES = {CausalVideoAutoencoder: 9, VideoDCAutoencoder: 8, HunyuanVideoAutoencoder: 9}
OPTIONS: dict[type[JointCodec], dict[str, Any]] = {
    CausalVideoAutoencoder: {
        "latent_channels": 3,
        "filters": 4,
        "channel_multipliers": [1, 2, 2],
        "num_res_blocks": 1,
        "temporal_downsample": [True, True],
        "num_groups": 2,
        "micro_frame_size": 5,
        "micro_batch_size": 2,
    },
    VideoDCAutoencoder: {
        "latent_channels": 4,
        "widths": [4, 4, 8],
        "encoder_depths": [1, 1, 1],
        "decoder_depths": [1, 1, 1],
        "attention": [False, False, True],
        "temporal_downsample": [True, True],
        "head_dim": 4,
        "tile_sample_size": 16,
        "tile_sample_frames": 16,
    },
    HunyuanVideoAutoencoder: {
        "latent_channels": 4,
        "block_out_channels": [8, 8, 8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
}


@pytest.fixture(params=OPTIONS, ids=lambda cls: cls.__name__)
def model(request: pytest.FixtureRequest) -> JointCodec:
    """A tiny one of each kind, to be changed."""
    torch.manual_seed(0)
    options = {"latent_space": {"scaling_factor": 0.5}, **OPTIONS[request.param]}
    return request.param(**options).eval().requires_grad_(False)


def there_and_back(model: JointCodec) -> tuple[Tensor, Tensor]:
    num_frames = FRAMES[type(model)]
    video = torch.rand(1, 3, num_frames, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = model.encode_video(video)
    return latents, model.decode_latents(latents, num_frames)


def near(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("keywords", [{}, {"low_cpu_mem_usage": False}, {"device_map": "parts"}], ids=str)
def test_saved_in_shards_and_loaded(model, keywords, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.state_dict().keys() and len(set(index["weight_map"].values())) > 1
    if keywords.get("device_map") == "parts":
        pytest.importorskip("accelerate")
        keywords = {"device_map": {name: "cpu" for name, _ in model.named_children()}}
    loaded = type(model).from_pretrained(tmp_path, **keywords)
    assert loaded.to_json_string() == model.to_json_string() and not list(loaded.buffers())
    near(there_and_back(loaded.requires_grad_(False)), there_and_back(model))


def test_sequential_offload(model):
    accelerate = pytest.importorskip("accelerate")
    expected = there_and_back(model)
    accelerate.cpu_offload(model, CPU, offload_buffers=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    near(there_and_back(model), expected)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload_to_disk(model, level, tmp_path):
    expected = there_and_back(model)
    model.enable_group_offload(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=level,
        num_blocks_per_group=1,
        use_stream=False,
        offload_to_disk_path=str(tmp_path),
    )
    for parameter in model.parameters():  # what lies in memory while the weights are away is anything
        parameter.data.fill_(torch.nan)
    near(there_and_back(model), expected)


def test_layerwise_casting_keeps_norms(model):
    rounded = copy.deepcopy(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    cast = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float8_e4m3fn}
    layers = (nn.Conv2d, nn.Conv3d, nn.Linear)
    wanted = {name for name, module in model.named_modules() if isinstance(module, layers) and "norm" not in name}
    assert cast == {f"{name}.{kind}" for name in wanted for kind, _ in model.get_submodule(name).named_parameters()}
    for name in cast:
        weight = rounded.get_parameter(name)
        weight.copy_(weight.to(torch.float8_e4m3fn))
    near(there_and_back(model), there_and_back(rounded))


WAYS_IN = {
    "forward": lambda model, video, latents: model(video),
    "encode": lambda model, video, latents: model.encode(video),
    "decode": lambda model, video, latents: model.decode(latents, video.shape[2]),
    "encode_video": lambda model, video, latents: model.encode_video(video),
    "decode_latents": lambda model, video, latents: model.decode_latents(latents, video.shape[2]),
    "encode_raw": lambda model, video, latents: model.encode_raw(video),
    "decode_raw": lambda model, video, latents: model.decode_raw(latents, video.shape[2]),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_model_offload_is_told_of_every_way_in(model, way, monkeypatch):
    accelerate, came = pytest.importorskip("accelerate"), []
    latents, video = there_and_back(model)
    _, hook = accelerate.cpu_offload_with_hook(model, CPU)
    bring_in = hook.hook.pre_forward

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        came.append(module)
        return bring_in(module, *args, **kwargs)

    monkeypatch.setattr(hook.hook, "pre_forward", counted)
    WAYS_IN[way](model, video, latents)
    assert came and set(came) == {model}
