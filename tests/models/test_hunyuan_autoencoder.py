from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo
from torch import Tensor

from opensora.checkpoints.components import load_component
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.hunyuan import HunyuanVideoAutoencoder
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.identify import identify

TINY: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": [8, 8, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
OURS: dict[str, Any] = {**TINY, "latent_space": {"scaling_factor": 0.5}, "tile_sample_size": 32}


def make(**options: Any) -> HunyuanVideoAutoencoder:
    torch.manual_seed(0)
    return HunyuanVideoAutoencoder(**{**OURS, **options}).eval().requires_grad_(False)


def clip(num_frames: int, batch: int = 1, edge: int = 16) -> Tensor:
    return torch.rand(batch, 3, num_frames, edge, edge, generator=torch.Generator().manual_seed(0)) * 2 - 1


def near(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_lengths():
    codec = make()
    assert [codec.latent_frames(n) for n in (1, 5, 33, 129)] == [1, 2, 9, 33]
    assert [codec.frames_before(k, 9) for k in range(4)] == [0, 1, 5, 9]
    with pytest.raises(OpenSoraError, match=r"num_frames 8 must be 1 more than a multiple of 4.*5 or 9"):
        codec.encode_video(clip(8))
    with pytest.raises(OpenSoraError, match="height 20 px"):
        codec.encode_video(clip(5, edge=20))
    with pytest.raises(OpenSoraError, match="2 latent frames given for a video of 9 frames, which has 3"):
        codec.decode_latents(torch.zeros(1, 4, 2, 2, 2), 9)


@pytest.mark.parametrize("options", [{"temporal_compression_ratio": 2}, {"tile_sample_size": 24}])
def test_options_that_do_not_fit(options):
    with pytest.raises(OpenSoraError, match=next(iter(options))):
        make(**options)


def test_it_is_the_network_of_diffusers_in_its_tiles():
    codec, theirs = make(), AutoencoderKLHunyuanVideo(**{**TINY, "block_out_channels": (8, 8, 8, 8)}).eval()
    theirs.load_state_dict(codec.state_dict())
    theirs.requires_grad_(False).enable_tiling(32, 32, 16, 24, 24, 12)
    video = clip(21, edge=40)
    for framewise in (False, True):
        theirs.use_framewise_encoding = theirs.use_framewise_decoding = framewise
        codec.enable_tiling(tile_sample_frames=16 if framewise else None)
        latents = codec.encode_video(video)
        near(latents, theirs.encode(video).latent_dist.mode() * 0.5)
        near(codec.decode_latents(latents, 21), theirs.decode(latents / 0.5).sample)


def test_there_and_back():
    codec, video = make(), clip(9, batch=2)
    latents = codec.encode_video(video)
    assert latents.shape == (2, 4, 3, 2, 2) and latents.dtype == torch.float32
    decoded = codec.decode_latents(latents, 9)
    assert decoded.shape == video.shape and decoded.dtype == torch.float32
    drawn = [codec.encode_video(video, sample=True, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    codec.enable_slicing()
    assert torch.equal(codec.encode_video(video), torch.cat([codec.encode_video(one) for one in video.split(1)]))
    near(codec.decode_latents(latents, 9), decoded)


def test_later_frames_never_change_earlier_convolutions():
    """Group norm looks at the whole clip; with it out of the way an image is the first frame of any clip."""
    codec = make()
    for module in list(codec.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    near(codec.encode_video(clip(9))[:, :, :1], codec.encode_video(clip(9)[:, :, :1]))


def test_gradients_are_the_same_recomputed():
    def gradients(recompute: bool) -> dict[str, Tensor]:
        codec = make().train().requires_grad_(True)
        if recompute:
            codec.enable_gradient_checkpointing()
        codec(clip(5)).sample.square().mean().backward()
        return {name: parameter.grad for name, parameter in codec.named_parameters()}

    near(gradients(True), gradients(False))


def test_saved_and_loaded(tmp_path):
    codec = make()
    codec.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = HunyuanVideoAutoencoder.from_pretrained(tmp_path, torch_dtype=dtype)
        found, expected = loaded.encode_video(clip(5)), codec.encode_video(clip(5))
        assert found.dtype == torch.float32 and loaded.latent_space == codec.latent_space
        assert (found - expected).abs().mean() <= (0 if dtype == torch.float32 else 0.1) * expected.abs().mean()
    other = HunyuanVideoAutoencoder.from_pretrained(tmp_path, override_latent_space=LatentSpace(1.0))
    near(other.encode_video(clip(5)), 2 * codec.encode_video(clip(5)))


def test_recognised_and_loaded_from_diffusers_folder(tmp_path):
    codec = make(latent_space={"scaling_factor": 0.3})
    identity = identify(codec.state_dict())
    assert identity is not None and "HunyuanVideo" in identity.summary
    told = {name: codec.config[name] for name in TINY if name != "norm_num_groups"}
    assert identity.config == {**told, "mid_block_add_attention": True}
    theirs = AutoencoderKLHunyuanVideo(**{**TINY, "block_out_channels": (8, 8, 8, 8)}, scaling_factor=0.3)
    theirs.load_state_dict(codec.state_dict())
    theirs.save_pretrained(tmp_path)
    loaded = load_component(tmp_path, HunyuanVideoAutoencoder)
    assert loaded.latent_space.factor == 0.3 and loaded.config["norm_num_groups"] == 4
    near(loaded.encode_video(clip(5)), codec.encode_video(clip(5)))


def test_a_2d_autoencoder_of_diffusers_may_declare_a_shift(tmp_path):
    """FLUX's does; it is subtracted before the factor."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 3}
    theirs = AutoencoderKL(**options, scaling_factor=0.4, shift_factor=0.1).eval()
    theirs.save_pretrained(tmp_path)
    frames = clip(1)
    mean = theirs.encode(frames[:, :, 0]).latent_dist.mode()
    loaded = load_component(tmp_path, VideoAutoencoder).requires_grad_(False)
    near(loaded.encode_video(frames)[:, :, 0], ((mean - 0.1) * 0.4).detach())
