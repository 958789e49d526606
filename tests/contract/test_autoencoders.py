"""Every autoencoder in the shape of diffusers' model tests: files, offloading, casting, slices and tiles, its manner.

Offloading runs on a CPU, where its hooks are counted and weights that are away are seen to be away.
"""

import copy
import json
from importlib.resources import files
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.toybox.specs import sample_specs
from opensora.toybox.world import render
from opensora.weights import fingerprint

CPU = torch.device("cpu")
FRAMES = 7
SPACE = {"scaling_factor": 0.5, "shift": [0.1, -0.2, 0.3, 0.4], "scale": [2.0, 0.5, 1.5, 3.0], "trained_with": "test"}
SPATIAL = {"block_out_channels": [4, 8], "norm_num_groups": 2, "layers_per_block": 1, "sample_size": 16}
CAUSAL = {
    "type": "causal3d",
    "filters": 4,
    "num_groups": 2,
    "num_res_blocks": 2,
    "channel_multipliers": [1, 2, 2],
    "temporal_downsample": [True, True],
}
FOLDED = {"type": "folded", "dim": 16, "encoder_depth": 2, "decoder_depth": 2}
# diffusers' decoder over time has 32 groups in every norm.
OVER_TIME = {"block_out_channels": [32, 32], "layers_per_block": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "frames": {},
    "patches": {"spatial_patch_size": 2},
    "causal3d": {"temporal": CAUSAL},
    "folded": {"temporal": FOLDED},
    "causal3d, patches": {"temporal": CAUSAL, "spatial_patch_size": 2},
    "temporal decoder": {"spatial": OVER_TIME, "temporal_decoder": {"chunk_size": 4}},
}


def build(variant: str) -> VideoAutoencoder:
    torch.manual_seed(0)
    options = {"spatial": SPATIAL, "latent_space": SPACE, "micro_frame_size": 5, **VARIANTS[variant]}
    return VideoAutoencoder(**options).eval().requires_grad_(False)


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> VideoAutoencoder:
    """A tiny autoencoder of each kind, to be changed."""
    return build(request.param)


def clips(batch: int = 1, edge: int = 16) -> Tensor:
    return torch.rand(batch, 3, FRAMES, edge, edge, generator=torch.Generator().manual_seed(0)) * 2 - 1


def there_and_back(model: VideoAutoencoder, video: Tensor | None = None) -> tuple[Tensor, Tensor]:
    latents = model.encode_video(clips() if video is None else video)
    return latents, model.decode_latents(latents, FRAMES)


def near(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # the two tensors that are no modules
@pytest.mark.parametrize(
    "keywords",
    [{}, {"low_cpu_mem_usage": False}, {"device_map": {"": "cpu"}}, {"device_map": "parts"}],
    ids=["with accelerate", "without", "device map", "device map of parts"],
)
@pytest.mark.parametrize("shards", [False, True], ids=["whole", "shards"])
def test_saved_and_loaded(model, keywords, shards, tmp_path):
    model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if shards else {}))
    if shards:
        index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == model.state_dict().keys()
        assert len(set(index["weight_map"].values())) > 1
    if keywords.get("device_map") == "parts":
        keywords = {"device_map": {name: "cpu" for name, _ in model.named_children()}}
    loaded = VideoAutoencoder.from_pretrained(tmp_path, **keywords)
    assert loaded.latent_space == model.latent_space
    assert loaded.to_json_string() == model.to_json_string()
    assert not list(loaded.buffers()), "figures of the latent space are no tensors of a model"
    near(there_and_back(loaded), there_and_back(model))


@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_weights_on_disk_behind_a_device_map(model, tmp_path):
    expected = there_and_back(model)
    model.save_pretrained(tmp_path / "saved")
    places = {name: "disk" for name, _ in model.named_children()}
    folders = {"device_map": places, "offload_folder": tmp_path / "away"}
    loaded = VideoAutoencoder.from_pretrained(tmp_path / "saved", **folders)
    assert set(places) == {name for name, _ in model.named_children()}, "the caller's own"
    assert loaded.spatial_vae.module.encoder.conv_in.weight.is_meta
    near(there_and_back(loaded), expected)


@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_a_device_map_cuts_between_blocks(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    if model.config["temporal_decoder"] is not None:
        pytest.skip("diffusers' decoder over time is one block")
    kinds = model._get_no_split_modules("auto")
    small = 2 * max(sum(p.nbytes for p in block.parameters()) for block in model.modules() if is_block(block, kinds))
    places = accelerate.infer_auto_device_map(model, {0: small, "cpu": 10**9}, no_split_module_classes=kinds)
    assert set(places.values()) == {0, "cpu"}
    cut = {name.rpartition(".")[0] for name in places}
    assert not any(is_block(model.get_submodule(name), kinds) for name in cut)
    model.save_pretrained(tmp_path)
    loaded = VideoAutoencoder.from_pretrained(tmp_path, device_map=dict.fromkeys(places, "cpu"))
    near(there_and_back(loaded), there_and_back(model))


def is_block(module: nn.Module, kinds: list[str]) -> bool:
    return type(module).__name__ in kinds


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_loaded_in_half_precision(model, low_cpu_mem_usage, name, tmp_path):
    model.save_pretrained(tmp_path)
    keywords: dict[str, Any] = {name: torch.bfloat16, "low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = VideoAutoencoder.from_pretrained(tmp_path, **keywords)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.latent_space == model.latent_space
    for found, expected in zip(there_and_back(loaded), there_and_back(model), strict=True):
        assert found.dtype == torch.float32
        assert 0 < (found - expected).abs().mean() < 0.05 * expected.abs().mean()


# ---- one latent space -----------------------------------------------------------------------------------------------


def test_what_is_declared_computes_and_is_saved(model):
    latents, video = there_and_back(model)
    raw = model.latent_space.denormalise(latents)
    space = LatentSpace(0.5, shift=(1.0, 2.0, 3.0, 4.0), scale=(5.0, 6.0, 7.0, 8.0))
    model.set_latent_space(space)
    shift, scale = (torch.tensor(values).view(1, 4, 1, 1, 1) for values in (space.shift, space.scale))
    near(model.encode_video(clips()), (raw - shift) / scale)
    near(model.decode_latents((raw - shift) / scale, FRAMES), video)
    assert torch.equal(model.state_dict()["shift"], shift) and torch.equal(model.state_dict()["scale"], scale)
    assert LatentSpace.from_dict(model.config["latent_space"]) == space
    with pytest.raises(OpenSoraError, match="the weights"):
        model.load_state_dict({**model.state_dict(), "scale": scale + 1})
    for stored in ({}, {"shift": shift.half()}, {"shift": shift.bfloat16(), "scale": scale.half()}):
        weights = {name: value for name, value in model.state_dict().items() if name not in ("shift", "scale")}
        model.load_state_dict({**weights, **stored})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_cast_touches_the_latent_space(model, dtype):
    latents = there_and_back(model)[0]
    space = copy.deepcopy(model.latent_space)
    stored = copy.deepcopy([model.state_dict()[name] for name in ("shift", "scale")])
    nn.Module.to(nn.Module.to(model, dtype), torch.float32)
    assert model.latent_space == space
    assert all(
        torch.equal(model.state_dict()[name], value) for name, value in zip(("shift", "scale"), stored, strict=True)
    )
    assert torch.equal(model.latent_space.normalise(latents), space.normalise(latents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fingerprints_are_those_of_the_file(model, dtype, tmp_path):
    """Also where it holds the figures in half precision; what they are rounded to computes nothing."""
    rounded = {name: value.to(dtype) for name, value in model.state_dict().items()}
    save_file(rounded, tmp_path / "rounded.safetensors")
    model.load_state_dict(load_file(tmp_path / "rounded.safetensors"))
    assert fingerprint(model.state_dict()) == fingerprint(rounded)
    assert fingerprint(nn.Module.to(model, dtype).state_dict()) == fingerprint(rounded)
    assert model.latent_space.shift == tuple(SPACE["shift"])


def test_an_override_computes_and_leaves_the_weights_their_own(model, tmp_path):
    raw = model.latent_space.denormalise(model.encode_video(clips()))
    model.save_pretrained(tmp_path)
    other = LatentSpace(0.5, shift=(9.0,) * 4, scale=(3.0,) * 4)
    for keywords in ({}, {"low_cpu_mem_usage": False}):
        loaded = VideoAutoencoder.from_pretrained(tmp_path, override_latent_space=other, **keywords)
        near(loaded.encode_video(clips()), (raw - 9.0) / 3.0)
        assert loaded.latent_space.declared_by_weights == model.latent_space
        assert torch.equal(loaded.state_dict()["shift"], model.state_dict()["shift"])
        same = VideoAutoencoder.from_pretrained(tmp_path, override_latent_space=model.latent_space, **keywords)
        assert not same.latent_space.overridden


# ---- offloading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_group_offload(model, level, where, blocks, tmp_path):
    expected = there_and_back(model)
    model.enable_group_offload(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=level,
        num_blocks_per_group=blocks,
        use_stream=False,
        offload_to_disk_path=str(tmp_path) if where == "disk" else None,
    )
    if where == "disk":
        assert list(tmp_path.glob("*.safetensors"))
        for parameter in model.parameters():  # what lies in memory while the weights are away is anything
            parameter.data.fill_(torch.nan)
    near(there_and_back(model), expected)


def test_sequential_offload(model):
    accelerate = pytest.importorskip("accelerate")
    expected = there_and_back(model)
    accelerate.cpu_offload(model, CPU, offload_buffers=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    near(there_and_back(model), expected)
    assert all(parameter.is_meta for parameter in model.parameters())


WAYS_IN = {
    "forward": lambda model, video, latents: model(video),
    "encode": lambda model, video, latents: model.encode(video),
    "decode": lambda model, video, latents: model.decode(latents, FRAMES),
    "encode_video": lambda model, video, latents: model.encode_video(video),
    "decode_latents": lambda model, video, latents: model.decode_latents(latents, FRAMES),
    "posterior": lambda model, video, latents: model.posterior(video),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_model_offload_is_told_of_every_way_in(model, way, monkeypatch):
    accelerate, came = pytest.importorskip("accelerate"), []
    video, latents = clips(), model.encode_video(clips())
    _, hook = accelerate.cpu_offload_with_hook(model, CPU)
    bring_in = hook.hook.pre_forward

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        came.append(module)
        return bring_in(module, *args, **kwargs)

    monkeypatch.setattr(hook.hook, "pre_forward", counted)
    WAYS_IN[way](model, video, latents)
    assert came and set(came) == {model}


# ---- casting and training -------------------------------------------------------------------------------------------


def test_layerwise_casting_keeps_norms(model):
    expected = there_and_back(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    cast = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float8_e4m3fn}
    layers = (nn.Conv2d, nn.Conv3d, nn.Linear)
    wanted = {name for name, module in model.named_modules() if isinstance(module, layers) and "norm" not in name}
    assert cast == {f"{name}.{kind}" for name in wanted for kind, _ in model.get_submodule(name).named_parameters()}
    assert model.dtype == torch.float32
    for found, whole in zip(there_and_back(model), expected, strict=True):
        assert 0 < (found - whole).abs().mean() < 0.3 * whole.abs().mean()


def test_gradient_checkpointing_changes_no_gradient(model):
    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(clips()).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train().requires_grad_(True)
    plain = gradients()
    model.enable_gradient_checkpointing()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    near(gradients(), plain)


# ---- slices and tiles -----------------------------------------------------------------------------------------------


def test_slices_are_to_the_bit_what_each_clip_is_alone(model):
    video = clips(batch=3)
    latents = model.encode_video(video)
    singles = [model.encode_video(one) for one in video.split(1)]
    decoded = [model.decode_latents(one, FRAMES) for one in latents.split(1)]
    near(torch.cat(singles), latents)
    near(torch.cat(decoded), model.decode_latents(latents, FRAMES))

    def drawn() -> Tensor:
        return model.encode_video(video, sample=True, generator=torch.Generator().manual_seed(1))

    together = drawn()
    model.enable_slicing()
    assert model.use_slicing
    assert torch.equal(model.encode_video(video), torch.cat(singles))
    assert torch.equal(model.decode_latents(latents, FRAMES), torch.cat(decoded))
    near(drawn(), together)
    batches = []
    model.spatial_vae.module.encoder.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    model.micro_batch_size = None
    model.encode_video(video)
    assert batches == [FRAMES] * 3, "a clip at a time"
    model.disable_slicing()
    model.encode_video(video)
    assert batches[3:] == [3 * FRAMES]


def test_tiles_are_those_of_diffusers(model):
    video, small = clips(edge=32), clips(edge=16)
    whole, known = there_and_back(model, video), model.encode_video(small)
    if model.config["temporal_decoder"] is not None:
        with pytest.raises(OpenSoraError, match="cannot be tiled"):
            model.enable_tiling()
        assert not model.use_tiling
        return
    with pytest.raises(OpenSoraError, match=f"multiple of {4 * model.spatial_factor}"):
        model.enable_tiling(3 * model.spatial_factor)
    model.enable_tiling(16)
    assert model.use_tiling
    tiled = there_and_back(model, video)
    for found, expected in zip(tiled, whole, strict=True):
        assert found.shape == expected.shape and not torch.allclose(found, expected, atol=1e-3)
    patch = model.config["spatial_patch_size"]
    theirs = copy.deepcopy(model.spatial_vae.module)
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = 16 // patch, 16 // model.spatial_factor
    frames = F.pixel_unshuffle(video[0].transpose(0, 1), patch)
    found = model.encode_frames(video).mean
    near(found[0].transpose(0, 1), theirs.encode(frames).latent_dist.mean)
    pictures = F.pixel_shuffle(theirs.decode(found[0].transpose(0, 1)).sample, patch)
    near(model.decode_frames(found)[0].transpose(0, 1), pictures)
    assert torch.equal(model.encode_video(small), known), "what is no larger than a tile stays whole"
    model.disable_tiling()
    assert not model.use_tiling
    for found, expected in zip(there_and_back(model, video), whole, strict=True):
        assert torch.equal(found, expected)


def test_tiles_of_a_trained_one_are_close_to_the_whole():
    trained = VideoAutoencoder.from_pretrained(files("opensora.toybox") / "weights" / "toybox" / "autoencoder")
    trained.requires_grad_(False)
    video = render(sample_specs(1, seed=0), 2, 128, 128)[0]
    whole = trained(video).sample
    trained.enable_tiling(96)
    error = (trained(video).sample - whole).square().mean()
    assert 0 < error < 0.2 * (whole - whole.mean()).square().mean()


# ---- diffusers' manner ----------------------------------------------------------------------------------------------


def test_encode_returns_a_distribution(model):
    video = clips(batch=2)
    distribution = model.encode(video).latent_dist
    assert torch.equal(distribution.mode(), model.encode_video(video))
    assert torch.equal(model.encode(video, return_dict=False)[0].mean, distribution.mean)
    theirs = DiagonalGaussianDistribution(torch.cat([distribution.mean, distribution.logvar], dim=1).flatten(2))
    for name in ("mean", "logvar", "std", "var"):
        near(getattr(distribution, name).flatten(2), getattr(theirs, name))
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, again, other = (distribution.sample(generator) for generator in seeds)
    assert torch.equal(first, again) and not torch.equal(first, other)
    near(first.flatten(2), theirs.sample(torch.Generator().manual_seed(1)))
    near(distribution.kl(), 0.5 * (theirs.mean**2 + theirs.var - 1.0 - theirs.logvar).sum(dim=(1, 2)))
    near(distribution.nll(first), theirs.nll(first.flatten(2), dims=[1, 2]))


def test_decode_returns_a_sample(model):
    latents, video = there_and_back(model)
    assert torch.equal(model.decode(latents, FRAMES).sample, video)
    assert torch.equal(model.decode(latents, FRAMES, return_dict=False)[0], video)
    assert torch.equal(model.decode(latents, num_frames=FRAMES).sample, model(clips()).sample)
    shortest = model.decode(latents).sample.shape[2]
    assert model.latent_frames(shortest) == latents.shape[2] and shortest <= FRAMES
    assert shortest == 1 or model.latent_frames(shortest - 1) < latents.shape[2]
    sampled = model(clips(), sample_posterior=True, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
    assert sampled.shape == video.shape and not torch.equal(sampled, video)


def test_a_batch_is_its_clips(model):
    video = clips(batch=3)
    near(model(video).sample, torch.cat([model(one).sample for one in video.split(1)]))
