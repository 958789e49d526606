import copy
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from opensora.checkpoints.components import load_component
from opensora.checkpoints.published_parts import DC_AE_2_0, DC_AE_2_0_DECLARED_IN_TRAINING
from opensora.conditioning.frames import encode_in_place
from opensora.errors import OpenSoraError
from opensora.geometry import SizeRule
from opensora.models.autoencoders.dc_ae import (
    Downsample,
    LiteMLA,
    PaddedConv3d,
    Upsample,
    VideoDCAutoencoder,
    average_channels,
    linear_attention,
    pixel_shuffle_3d,
    pixel_unshuffle_3d,
    repeat_channels,
)
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.tiles import in_space, in_time
from opensora.models.identify import identify

TINY: dict[str, Any] = {
    "latent_channels": 4,
    "widths": [4, 4, 8],
    "encoder_depths": [1, 1, 1],
    "decoder_depths": [1, 2, 1],
    "attention": [False, True, True],
    "temporal_downsample": [True, True],
    "head_dim": 4,
    "scales": [3],
    "latent_space": {"scaling_factor": 2.0, "shift": [0.1, 0.2, -0.3, 0.0], "scale": [0.5, 1.5, 2.0, 1.0]},
    "tile_sample_size": 16,
    "tile_sample_frames": 16,
}


def make(**options: Any) -> VideoDCAutoencoder:
    torch.manual_seed(0)
    return VideoDCAutoencoder(**{**TINY, **options}).eval().requires_grad_(False)


def clip(num_frames: int, batch: int = 1, edge: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, num_frames, edge, edge, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def near(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


# ---- layers


def test_shortcuts_undo_each_other():
    x = torch.randn(2, 3, 4, 4, 6)
    for factors in ((2, 2, 2), (1, 2, 2)):
        folded = pixel_unshuffle_3d(x, factors)
        assert torch.equal(pixel_shuffle_3d(folded, factors), x)
        assert torch.equal(folded[:, 1], x[:, 0, :: factors[0], ::2, 1::2])
    assert torch.equal(average_channels(repeat_channels(x, 12), 3), x)


@pytest.mark.parametrize("num_frames", [1, 4])
def test_an_image_keeps_its_frame(num_frames):
    x = torch.randn(1, 4, num_frames, 4, 4)
    down, up = Downsample(4, 8, temporal=True), Upsample(8, 4, temporal=True)
    assert down(x).shape == (1, 8, max(1, num_frames // 2), 2, 2)
    assert up(down(x), num_frames == 1).shape == x.shape


def test_linear_attention_is_a_weighted_mean():
    torch.manual_seed(0)
    qkv = torch.randn(1, 2 * 12, 2, 3, 2)
    qkv[:, 0::12] = 1.0  # no query and no key is nothing but zeros
    qkv[:, 4::12] = 1.0
    found = linear_attention(qkv, head_dim=4).flatten(2)
    for head in range(2):
        q, k, v = qkv[0, 12 * head : 12 * (head + 1)].flatten(1).split(4)
        weights = q.relu().T @ k.relu()
        expected = (weights / weights.sum(dim=1, keepdim=True)) @ v.T
        near(found[0, 4 * head : 4 * (head + 1)], expected.T)
    large = LiteMLA(8, 4, [3]).half()(torch.full((1, 8, 4, 8, 8), 100.0).half())
    assert large.isfinite().all(), "sums over many positions leave half precision's range"


# ---- sizes


def test_lengths():
    codec = make()
    assert [codec.latent_frames(n) for n in (1, 4, 8, 32, 128)] == [1, 1, 2, 8, 32]
    assert [codec.shortest_clip(n) for n in (1, 2, 8)] == [1, 8, 32]
    assert [codec.frames_before(k, 12) for k in range(4)] == [0, 4, 8, 12]
    with pytest.raises(OpenSoraError, match=r"num_frames 3 must be a multiple of 4, or 1; the nearest valid is 1 or 4"):
        codec.encode_video(clip(3))
    with pytest.raises(OpenSoraError, match="3 latent frames given for a video of 8 frames, which has 2"):
        codec.decode_latents(torch.zeros(1, 4, 3, 2, 2), 8)


def test_a_rule_that_allows_images_besides():
    rule = SizeRule(frame_multiple=4, single_frame=True)
    assert [rule.nearest_frames(n) for n in (0, 1, 2, 3, 5, 6)] == [1, 1, 1, 4, 4, 8]
    assert [rule.frames_from(n) for n in (1, 2, 4, 5)] == [1, 4, 4, 8]


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_depths": [1]},
        {"attention": [True]},
        {"temporal_downsample": [True]},
        {"tile_sample_size": 24},
        {"tile_sample_frames": 20},
    ],
)
def test_options_that_do_not_fit(options):
    with pytest.raises(OpenSoraError, match=next(iter(options))):
        make(**options)


# ---- what it computes


@pytest.mark.parametrize("num_frames", [1, 4, 8, 20])
def test_there_and_back(num_frames):
    codec, video = make(), clip(num_frames, batch=2)
    latents = codec.encode_video(video)
    assert latents.shape == (2, 4, codec.latent_frames(num_frames), 2, 2) and latents.dtype == torch.float32
    decoded = codec.decode_latents(latents, num_frames)
    assert decoded.shape == video.shape and decoded.dtype == torch.float32
    near(torch.cat([codec.encode_video(one) for one in video.split(1)]), latents)
    codec.enable_slicing()
    assert torch.equal(codec.encode_video(video), torch.cat([codec.encode_video(one) for one in video.split(1)]))
    near(codec.decode_latents(latents, num_frames), decoded)


def test_there_is_nothing_to_draw():
    codec, video = make(), clip(8)
    latents = codec.encode_video(video)
    assert torch.equal(codec.encode_video(video, sample=True, generator=torch.Generator().manual_seed(1)), latents)
    distribution = codec.encode(video).latent_dist
    assert torch.equal(distribution.sample(), latents) and torch.equal(distribution.mode(), latents)
    assert not distribution.std.any() and distribution.kl().tolist() == [0.0]


def test_frames_in_the_places_that_they_take():
    codec, video = make(tile_sample_frames=None), clip(8)
    near(encode_in_place(codec, video[0], 8, 0, 2), codec.encode_video(video))
    still = torch.cat([video[:, :, :1].expand(-1, -1, 4, -1, -1), video[:, :, :4]], dim=2)
    near(encode_in_place(codec, video[0, :, :4], 8, 1, 1), codec.encode_video(still)[:, :, 1:])


def test_the_other_scaling_factor(tmp_path):
    """What a transformer trained on divided latents makes comes out at its contrast."""
    assert LatentSpace.from_dict(DC_AE_2_0.config["latent_space"]).factor == 1.0
    codec = make(latent_space=DC_AE_2_0.config["latent_space"])
    raw = codec.encode_video(clip(8))
    codec.save_pretrained(tmp_path)
    other = VideoDCAutoencoder.from_pretrained(tmp_path, override_latent_space=DC_AE_2_0_DECLARED_IN_TRAINING)
    near(other.encode_video(clip(8)), raw / 0.493)
    near(other.decode_latents(raw / 0.493, 8), codec.decode_latents(raw, 8))
    assert other.latent_space.overridden and "does not apply" in other.latent_space.trained_with


def test_gradients_are_the_same_recomputed():
    def gradients(recompute: bool) -> dict[str, Tensor]:
        codec = make().train().requires_grad_(True)
        if recompute:
            codec.enable_gradient_checkpointing()
            assert codec.decoder.stages[0].gradient_checkpointing
        codec(clip(8)).sample.square().mean().backward()
        return {name: parameter.grad for name, parameter in codec.named_parameters()}

    plain = gradients(False)
    assert all(gradient is not None for gradient in plain.values())
    near(gradients(True), plain)


# ---- tiles


def test_tiles_of_what_has_no_neighbours_are_the_whole():
    """A computation that looks at no neighbours is the same in tiles, blended or not."""
    video = clip(20, edge=40)
    near(in_space(lambda part: 2 * part, video, 16, 16), 2 * video)
    near(in_time(lambda part: 2 * part, video, 8, 8), 2 * video)
    halves = in_time(lambda part: part[:, :, ::2], video, 8, 4)
    near(halves, video[:, :, ::2])


def test_borders_are_blended_linearly():
    numbers = iter(range(9))
    found = in_time(lambda part: torch.full_like(part, float(next(numbers))), torch.zeros(1, 1, 14, 1, 1), 8, 8)
    assert found.flatten().tolist() == [0] * 6 + [0, 0.5, 1, 1, 1, 1, 1, 1.5]


def test_a_last_tile_that_is_too_short_is_left_out():
    seen: list[int] = []

    def noted(part: Tensor) -> Tensor:
        seen.append(part.shape[2])
        return part

    clip_of_13 = torch.arange(13.0).view(1, 1, 13, 1, 1)
    assert torch.equal(in_time(noted, clip_of_13, 8, 8, shortest=2), clip_of_13)
    assert seen == [8, 7]


def test_tiling_is_switched():
    codec, video = make(), clip(20, edge=24)
    tiled = codec.encode_video(video)
    assert codec.use_tiling
    codec.disable_tiling()
    whole = codec.encode_video(video)
    assert not codec.use_tiling and whole.shape == tiled.shape and not torch.allclose(whole, tiled, atol=1e-3)
    codec.enable_tiling()
    assert torch.equal(codec.encode_video(video), tiled)
    codec.enable_tiling(32, 32)
    assert torch.equal(codec.encode_video(video), whole), "what is no larger than a tile stays whole"


# ---- files


def test_saved_and_loaded(tmp_path):
    codec = make()
    codec.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = VideoDCAutoencoder.from_pretrained(tmp_path, torch_dtype=dtype)
        found, expected = loaded.encode_video(clip(8)), codec.encode_video(clip(8))
        assert found.dtype == torch.float32 and loaded.latent_space == codec.latent_space
        assert (found - expected).abs().mean() <= (0 if dtype == torch.float32 else 0.1) * expected.abs().mean()


def test_recognised_and_loaded_as_published(tmp_path):
    codec = make(head_dim=4)
    identity = identify(codec.state_dict())
    assert identity is not None and identity.summary == "deep compression autoencoder of Open-Sora 2.0"
    told = ("latent_channels", "widths", "encoder_depths", "decoder_depths", "attention", "head_dim", "scales")
    assert identity.config == {name: codec.config[name] for name in told}
    assert set(identity.unsure) == {"temporal_downsample", "latent_space"}
    save_file(codec.state_dict(), tmp_path / "ae.safetensors")
    loaded = load_component(tmp_path / "ae.safetensors", VideoDCAutoencoder, config=codec.config)
    near(loaded.encode_video(clip(8)), codec.encode_video(clip(8)))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_single_frame_meets_the_middle_of_a_kernel_alone(stride):
    """As torch's own convolution, which meets zeros besides."""
    torch.manual_seed(0)
    ours = PaddedConv3d(3, 8, 3, stride)
    theirs = torch.nn.Conv3d(3, 8, 3, stride, padding=1)
    theirs.load_state_dict(ours.state_dict())
    for num_frames in (1, 4):
        frames = torch.randn(2, 3, num_frames, 16, 12)
        torch.testing.assert_close(ours(frames), theirs(frames))
    picture = torch.randn(4, 3, 1, 64, 64)
    half = copy.deepcopy(ours).bfloat16()(picture.bfloat16())
    torch.testing.assert_close(half.float(), ours(picture), rtol=0.02, atol=0.02)
