"""The decoder of Stable Video Diffusion in the video autoencoder: diffusers' results, chunks, files, mistakes."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from tiny_pipeline import make_pipeline, seeded
from torch import Tensor

from opensora.checkpoints.published import PUBLISHED
from opensora.checkpoints.published_parts import SVD_AUTOENCODER
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.video import VideoAutoencoder

FACTOR = 0.18215
# diffusers' decoder has 32 groups in every norm.
SPATIAL: dict[str, Any] = {"block_out_channels": [32, 32], "layers_per_block": 1}
TYPES = {"down_block_types": ["DownEncoderBlock2D"] * 2}
EDGE = 8
# A convolution library may add up in another order for another number of frames.
ROUNDING = {"atol": 2e-5, "rtol": 1e-4}


def make(chunk_size: int | None = None, **options: Any) -> VideoAutoencoder:
    torch.manual_seed(0)
    values = {"spatial": SPATIAL, "latent_space": {"scaling_factor": FACTOR}, "micro_frame_size": None, **options}
    return enliven(VideoAutoencoder(temporal_decoder={"chunk_size": chunk_size}, **values).eval())


def enliven(model: Any) -> Any:
    """As they are initialised, half of the layers over time do not count."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mix_factor"):
                parameter.fill_(0.7)
            elif "conv" in name:
                parameter.mul_(1.5)
    return model


def clip(num_frames: int = 5, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, num_frames, EDGE, EDGE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents_of(num_frames: int = 5, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(batch, 4, num_frames, EDGE // 2, EDGE // 2, generator=torch.Generator().manual_seed(seed))


def theirs(autoencoder: VideoAutoencoder) -> AutoencoderKLTemporalDecoder:
    """diffusers' own model of the same weights."""
    model = AutoencoderKLTemporalDecoder(**SPATIAL, **TYPES).eval()
    prefix = "spatial_vae.module."
    weights = autoencoder.state_dict().items()
    model.load_state_dict({name.removeprefix(prefix): value for name, value in weights if name.startswith(prefix)})
    return model


# ---- results


@pytest.mark.parametrize("num_frames", [1, 5])
@torch.no_grad()
def test_equals_diffusers(num_frames: int) -> None:
    autoencoder, videos, latents = make(), clip(num_frames, batch=2), latents_of(num_frames, batch=2)
    reference = theirs(autoencoder)
    expected = reference.encode(videos.transpose(1, 2).flatten(0, 1)).latent_dist.mode() * FACTOR
    torch.testing.assert_close(
        autoencoder.encode_video(videos), expected.unflatten(0, (2, -1)).transpose(1, 2), **ROUNDING
    )
    frames = latents.transpose(1, 2).flatten(0, 1) / FACTOR
    expected = reference.decode(frames, num_frames=num_frames).sample
    torch.testing.assert_close(
        autoencoder.decode_latents(latents, num_frames), expected.unflatten(0, (2, -1)).transpose(1, 2), **ROUNDING
    )


@torch.no_grad()
def test_one_frame_is_decoded_with_its_neighbours() -> None:
    latents = latents_of()
    other = latents.clone()
    other[:, :, 4] = latents_of(seed=2)[:, :, 4]
    before, after = make().decode_latents(latents, 5), make().decode_latents(other, 5)
    assert not torch.allclose(before[:, :, 3], after[:, :, 3], atol=1e-3)
    # While its encoding is that of the frame alone.
    videos = clip()
    torch.testing.assert_close(make().encode_video(videos)[:, :, :2], make().encode_video(videos[:, :, :2]), **ROUNDING)


@torch.no_grad()
def test_chunks_know_nothing_of_each_other() -> None:
    latents = latents_of(7, batch=2)
    whole, chunked = make(), make(chunk_size=3)
    parts = [whole.decode_latents(part, part.shape[2]) for part in latents.split(3, dim=2)]
    torch.testing.assert_close(chunked.decode_latents(latents, 7), torch.cat(parts, dim=2), **ROUNDING)
    assert not torch.allclose(chunked.decode_latents(latents, 7), whole.decode_latents(latents, 7), atol=1e-3)


@torch.no_grad()
def test_micro_batches_and_other_clips_change_nothing() -> None:
    videos, latents = clip(batch=2), latents_of(batch=2)
    expected = make(micro_batch_size=None)
    for size in (1, 3):
        autoencoder = make(micro_batch_size=size)
        torch.testing.assert_close(autoencoder.encode_video(videos), expected.encode_video(videos), **ROUNDING)
        torch.testing.assert_close(
            autoencoder.decode_latents(latents, 5), expected.decode_latents(latents, 5), **ROUNDING
        )
    singly = torch.cat([expected.decode_latents(one, 5) for one in latents.split(1)])
    torch.testing.assert_close(expected.decode_latents(latents, 5), singly, **ROUNDING)


@torch.no_grad()
def test_shapes_are_those_of_the_autoencoder_frame_by_frame() -> None:
    autoencoder = make()
    assert (autoencoder.spatial_factor, autoencoder.temporal_factor, autoencoder.latent_channels) == (2, 1, 4)
    assert autoencoder.latent_size((5, EDGE, EDGE)) == (5, 4, 4)
    assert autoencoder(clip()).sample.shape == clip().shape
    patched = make(spatial_patch_size=2)
    assert patched.latent_size((5, EDGE, EDGE)) == (5, 2, 2)
    assert patched(clip()).sample.shape == clip().shape


@torch.no_grad()
def test_half_precision_keeps_latents_and_video_in_float32() -> None:
    autoencoder = make()
    exact = autoencoder.decode_latents(latents_of(), 5)
    autoencoder.to(torch.bfloat16)
    assert autoencoder.encode_video(clip()).dtype == torch.float32
    video = autoencoder.decode_latents(latents_of(), 5)
    assert video.dtype == torch.float32
    torch.testing.assert_close(video, exact, atol=0.1 * float(exact.abs().max()), rtol=0)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    def gradients(autoencoder: VideoAutoencoder) -> list[Tensor]:
        autoencoder.zero_grad()
        autoencoder(clip()).sample.square().mean().backward()
        return [parameter.grad.clone() for parameter in autoencoder.parameters() if parameter.grad is not None]

    autoencoder = make().train()
    plain = gradients(autoencoder)
    autoencoder.enable_gradient_checkpointing()
    assert plain
    torch.testing.assert_close(gradients(autoencoder), plain)


# ---- files


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@torch.no_grad()
def test_save_and_load(low_cpu_mem_usage: bool, tmp_path) -> None:
    autoencoder = make(chunk_size=3)
    autoencoder.save_pretrained(tmp_path)
    loaded = VideoAutoencoder.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert loaded.config["temporal_decoder"] == {"chunk_size": 3}
    assert torch.equal(loaded.decode_latents(latents_of(), 5), autoencoder.decode_latents(latents_of(), 5))
    with pytest.raises(OpenSoraError, match="temporal_decoder given"):
        VideoAutoencoder.from_pretrained(tmp_path, temporal_decoder={})


def test_full_size_has_the_published_names_and_shapes() -> None:
    """Those of diffusers' model as Stable Video Diffusion configures it, its encoder that of Stable Diffusion."""
    sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    with torch.device("meta"):
        ours = VideoAutoencoder(**SVD_AUTOENCODER.config)
        frames = VideoAutoencoder(**PUBLISHED["opensora-1.0-hq-16x256x256"].autoencoder.config)
        published = AutoencoderKLTemporalDecoder(**sizes, down_block_types=("DownEncoderBlock2D",) * 4)
    prefix = "spatial_vae.module."
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    expected = {prefix + name: tensor.shape for name, tensor in published.state_dict().items()}
    assert shapes == expected | {"scale": (1, 4, 1, 1, 1), "shift": (1, 4, 1, 1, 1)}
    # 34 million parameters of Stable Diffusion's encoder and 64 of the new decoder.
    assert 97e6 < sum(parameter.numel() for parameter in published.parameters()) < 98e6
    theirs = {name: tensor.shape for name, tensor in frames.state_dict().items() if ".decoder." not in name}
    assert {name: shape for name, shape in shapes.items() if ".decoder." not in name}.items() <= theirs.items()
    assert ours.latent_space.differences(frames.latent_space) == {}
    assert isinstance(frames.spatial_vae.module, AutoencoderKL)


# ---- in the pipeline


def test_pipeline_decodes_with_it() -> None:
    pipe = make_pipeline("iddpm")
    options = {"generator": seeded(5), "height": EDGE, "width": EDGE, "num_frames": 5}
    pipe.register_modules(autoencoder=make())
    frames = pipe("a small red ball rolls left", **options, output_type="pt").frames
    latents = pipe("a small red ball rolls left", **{**options, "generator": seeded(5)}, output_type="latent").frames
    assert frames.shape == (1, 5, 3, EDGE, EDGE)
    with torch.no_grad():
        video = pipe.autoencoder.decode_latents(latents, 5)
    torch.testing.assert_close(frames, (video / 2 + 0.5).clamp(0, 1).transpose(1, 2))


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temporal_decoder": {"chunks": 3}}, "unknown option chunks; it takes chunk_size"),
        ({"temporal_decoder": {"chunk_size": 0}}, "chunk_size is 0"),
        ({"spatial": {**SPATIAL, "norm_num_groups": 32}}, "spatial: unknown option 'norm_num_groups'; known are"),
        ({"spatial": {**SPATIAL, "in_channels": 12}}, "in_channels is 12"),
    ],
)
def test_impossible_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OpenSoraError, match=message):
        VideoAutoencoder(**({"spatial": SPATIAL, "temporal_decoder": {}} | options))


def test_wrong_number_of_frames_is_refused() -> None:
    with pytest.raises(OpenSoraError, match="5 latent frames given for a video of 4 frames"):
        make().decode_latents(latents_of(5), 4)
