import copy
import json

import pytest
import torch

from opensora.checkpoints.published import PUBLISHED
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.video import VideoAutoencoder

SPATIAL = {"block_out_channels": [4, 8], "norm_num_groups": 2, "layers_per_block": 1}
CAUSAL = {
    "type": "causal3d",
    "filters": 4,
    "num_groups": 2,
    "num_res_blocks": 1,
    "channel_multipliers": [1, 2, 2],
    "temporal_downsample": [True, True],
}
FOLDED = {"type": "folded", "dim": 8, "encoder_depth": 1, "decoder_depth": 1}
SPACE = {"scaling_factor": 0.5, "shift": [0.1, -0.2, 0.3, 0.4], "scale": [2.0, 0.5, 1.5, 3.0], "trained_with": "test"}
# A convolution library may add up in another order for another number of frames.
ROUNDING = {"atol": 2e-5, "rtol": 1e-5}
PARTS = pytest.mark.parametrize("temporal", [None, CAUSAL, FOLDED], ids=["frames", "causal3d", "folded"])


def make(temporal=CAUSAL, **options) -> VideoAutoencoder:
    torch.manual_seed(0)
    values = {"spatial": SPATIAL, "latent_space": SPACE, "micro_frame_size": 5, "micro_batch_size": 4, **options}
    return VideoAutoencoder(temporal=temporal, **values).eval()


def clip(num_frames: int = 7, batch: int = 1, seed: int = 0, edge: int = 8) -> torch.Tensor:
    return torch.rand(batch, 3, num_frames, edge, edge, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- results


@PARTS
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("num_frames", [1, 5, 7, 10])
@torch.no_grad()
def test_shapes(temporal, patch, num_frames):
    autoencoder = make(temporal, spatial_patch_size=patch)
    assert autoencoder.spatial_factor == 2 * patch
    assert autoencoder.temporal_factor == (4 if temporal else 1)
    latents = autoencoder.encode_video(clip(num_frames))
    assert latents.shape == (1, 4, *autoencoder.latent_size((num_frames, 8, 8)))
    assert latents.dtype == torch.float32
    video = autoencoder.decode_latents(latents, num_frames)
    assert video.shape == (1, 3, num_frames, 8, 8)
    assert torch.equal(autoencoder(clip(num_frames)).sample, video), "encoding is deterministic"


@PARTS
@torch.no_grad()
def test_micro_batches_change_nothing(temporal):
    autoencoder, videos = make(temporal), clip(batch=2)
    results = []
    for size in (None, 1, 3, 4, 100):
        autoencoder.micro_batch_size = size
        latents = autoencoder.encode_video(videos, sample=True, generator=torch.Generator().manual_seed(3))
        results.append((latents, autoencoder.decode_latents(latents, 7)))
    for latents, decoded in results[1:]:
        torch.testing.assert_close(latents, results[0][0], **ROUNDING)
        torch.testing.assert_close(decoded, results[0][1], **ROUNDING)


@PARTS
@torch.no_grad()
def test_batch_of_two_is_two_of_one(temporal):
    autoencoder, videos = make(temporal), clip(batch=2)
    latents = autoencoder.encode_video(videos)
    singly = torch.cat([autoencoder.encode_video(one) for one in videos.split(1)])
    torch.testing.assert_close(latents, singly, **ROUNDING)
    decoded = torch.cat([autoencoder.decode_latents(one, 7) for one in latents.split(1)])
    torch.testing.assert_close(autoencoder.decode_latents(latents, 7), decoded, **ROUNDING)


@PARTS
@torch.no_grad()
def test_chunks_know_nothing_of_each_other(temporal):
    autoencoder, video = make(temporal), clip(12)
    latents = autoencoder.encode_video(video)
    chunks = video.split([5, 5, 2], dim=2)
    torch.testing.assert_close(latents, torch.cat([autoencoder.encode_video(chunk) for chunk in chunks], dim=2))
    parts = latents.split([autoencoder.latent_frames(chunk.shape[2]) for chunk in chunks], dim=2)
    decoded = [autoencoder.decode_latents(part, chunk.shape[2]) for part, chunk in zip(parts, chunks, strict=True)]
    torch.testing.assert_close(autoencoder.decode_latents(latents, 12), torch.cat(decoded, dim=2))


@pytest.mark.parametrize(
    ("temporal", "micro_frame_size", "changed", "kept"),
    [(None, None, 6, 6), (CAUSAL, 5, 5, 2), (FOLDED, 5, 5, 2), (FOLDED, None, 8, 2)],
    ids=["frames", "causal3d chunks", "folded chunks", "folded whole"],
)
@torch.no_grad()
def test_later_frames_never_change_earlier_latents(temporal, micro_frame_size, changed, kept):
    """Over chunks everywhere; within one where no normalisation looks over time (see the temporal tests for that)."""
    autoencoder = make(temporal, micro_frame_size=micro_frame_size)
    first, second = clip(12), clip(12)
    second[:, :, changed:] = clip(12 - changed, seed=1)
    before, after = autoencoder.encode_video(first), autoencoder.encode_video(second)
    torch.testing.assert_close(before[:, :, :kept], after[:, :, :kept], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, :, kept:], after[:, :, kept:], atol=1e-3)


@torch.no_grad()
def test_sampling():
    autoencoder, video = make(), clip()
    draws = [
        autoencoder.encode_video(video, sample=True, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    zero = autoencoder.encode_video(
        video, sample=True, frame_noise=torch.zeros(1, 4, 7, 4, 4), latent_noise=torch.zeros(1, 4, 3, 4, 4)
    )
    assert torch.equal(zero, autoencoder.encode_video(video))


@PARTS
@torch.no_grad()
def test_the_posterior_is_of_the_normalised_latents(temporal):
    autoencoder, video = make(temporal), clip(batch=2)
    posterior = autoencoder.posterior(video)
    assert torch.equal(posterior.mean, autoencoder.encode_video(video))
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    own = "latent_noise" if temporal else "frame_noise"
    frames = autoencoder.encode_frames(video)
    silent = {"frame_noise": torch.zeros_like(frames.mean)} if temporal else {}
    sampled = autoencoder.encode_video(video, sample=True, **silent | {own: noise})
    torch.testing.assert_close(posterior.sample(noise=noise), sampled)


@torch.no_grad()
def test_the_parts_make_the_whole():
    autoencoder, video = make(), clip()
    frame_latents = autoencoder.encode_frames(video).mode()
    latents = autoencoder.encode_time(frame_latents).mode()
    assert torch.equal(autoencoder.latent_space.normalise(latents), autoencoder.encode_video(video))
    frames = autoencoder.decode_frames(autoencoder.decode_time(latents, 7))
    torch.testing.assert_close(frames, autoencoder(video).sample)


@torch.no_grad()
def test_latent_space_is_applied():
    plain = make(latent_space=None, temporal=None)
    divided = make(latent_space={"scaling_factor": 4.0, "convention": "divide"}, temporal=None)
    torch.testing.assert_close(divided.encode_video(clip()), plain.encode_video(clip()) / 4)
    torch.testing.assert_close(divided(clip()), plain(clip()))
    shifted = make(latent_space=SPACE, temporal=None)
    expected = (plain.encode_video(clip()) * 0.5 - torch.tensor(SPACE["shift"]).view(4, 1, 1, 1)) / torch.tensor(
        SPACE["scale"]
    ).view(4, 1, 1, 1)
    torch.testing.assert_close(shifted.encode_video(clip()), expected)


@torch.no_grad()
def test_half_precision_keeps_latents_in_float32():
    autoencoder = make()
    exact = autoencoder.encode_video(clip())
    latents = autoencoder.to(torch.bfloat16).encode_video(clip())
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, exact, atol=0.05, rtol=0.05)
    assert autoencoder.decode_latents(latents, 7).dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient():
    def gradients(autoencoder: VideoAutoencoder) -> list[torch.Tensor]:
        autoencoder.zero_grad()
        autoencoder(clip()).sample.square().mean().backward()
        return [parameter.grad.clone() for parameter in autoencoder.parameters() if parameter.grad is not None]

    autoencoder = make().train()
    plain = gradients(autoencoder)
    autoencoder.enable_gradient_checkpointing()
    assert plain
    torch.testing.assert_close(gradients(autoencoder), plain)


# ---- configuration and files


@PARTS
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@torch.no_grad()
def test_save_and_load(temporal, low_cpu_mem_usage, tmp_path):
    autoencoder = make(temporal, spatial_patch_size=2)
    autoencoder.save_pretrained(tmp_path)
    loaded = VideoAutoencoder.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert loaded.latent_space == autoencoder.latent_space
    assert loaded.config["temporal"] == autoencoder.config["temporal"]
    assert torch.equal(loaded.encode_video(clip()), autoencoder.encode_video(clip()))


@torch.no_grad()
def test_copies_are_independent():
    autoencoder = make()
    twin = copy.deepcopy(autoencoder)
    twin.set_latent_space(LatentSpace(0.25))
    assert autoencoder.latent_space.scaling_factor == 0.5
    autoencoder.load_state_dict(autoencoder.state_dict())


def test_published_ones_build_without_memory():
    with torch.device("meta"):
        published = VideoAutoencoder(**PUBLISHED["opensora-1.2"].autoencoder.config)
        frames = VideoAutoencoder(**PUBLISHED["opensora-1.0-hq-16x256x256"].autoencoder.config)
    assert published.latent_size((51, 240, 424)) == (15, 30, 53)
    assert frames.latent_size((16, 256, 256)) == (16, 32, 32)
    assert (published.spatial_factor, published.temporal_factor, frames.temporal_factor) == (8, 4, 1)
    assert published.latent_space.scaling_factor == frames.latent_space.scaling_factor == 0.18215


@torch.no_grad()
def test_published_files_may_share_or_lack_shift_and_scale():
    autoencoder = make(latent_space={"shift": [0.5] * 4, "scale": [2.0] * 4})
    weights = autoencoder.state_dict()
    autoencoder.load_state_dict({**weights, "shift": torch.tensor(0.5), "scale": torch.tensor(2.0)})
    autoencoder.load_state_dict({name: value for name, value in weights.items() if name not in ("shift", "scale")})
    assert autoencoder.latent_space.shift == (0.5,) * 4
    assert torch.equal(autoencoder.state_dict()["shift"], torch.full((1, 4, 1, 1, 1), 0.5))


@torch.no_grad()
def test_statistics_stored_in_half_precision_are_the_same_declaration(tmp_path):
    autoencoder = make()
    for kind in (torch.bfloat16, torch.float16):
        autoencoder.load_state_dict({name: value.to(kind) for name, value in autoencoder.state_dict().items()})
    autoencoder.save_pretrained(tmp_path)
    VideoAutoencoder.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)


# ---- two declarations


def test_weights_with_another_latent_space_are_refused():
    other = make(latent_space={**SPACE, "shift": [0.1, -0.2, 0.3, 0.9]})
    with pytest.raises(OpenSoraError) as caught:
        make().load_state_dict(other.state_dict())
    message = str(caught.value)
    assert "0.4" in message and "0.9" in message and "the weights" in message and "the configuration" in message
    assert "Keep the checkpoint's" in message and "override_latent_space" in message


@torch.no_grad()
def test_an_edited_folder_is_refused_unless_overridden(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["latent_space"]["scale"][0] = 2.5
    path.write_text(json.dumps(config))
    with pytest.raises(OpenSoraError, match=r"scale is \[2\.5, .* but \[2\.0, "):
        VideoAutoencoder.from_pretrained(tmp_path)

    loaded = VideoAutoencoder.from_pretrained(tmp_path, override_latent_space=config["latent_space"])
    assert loaded.latent_space.overridden
    assert loaded.latent_space.scale == (2.5, 0.5, 1.5, 3.0)
    assert loaded.latent_space.declared_by_weights.scale == pytest.approx((2.0, 0.5, 1.5, 3.0))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    reloaded = VideoAutoencoder.from_pretrained(again)
    assert reloaded.latent_space == loaded.latent_space, "the override travels with the folder"
    assert torch.equal(reloaded.encode_video(clip()), loaded.encode_video(clip()))


def test_the_spatial_options_may_not_contradict_the_latent_space():
    with pytest.raises(OpenSoraError, match=r"0\.18215 .* 0\.13025"):
        make(spatial={**SPATIAL, "scaling_factor": 0.13025}, latent_space={"scaling_factor": 0.18215})
    make(spatial={**SPATIAL, "scaling_factor": 0.5}, latent_space={"scaling_factor": 2.0, "convention": "divide"})


def test_a_configuration_field_cannot_slip_in_while_loading(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(OpenSoraError, match="override_latent_space"):
        VideoAutoencoder.from_pretrained(tmp_path, latent_space={"scaling_factor": 1.0})


@PARTS
@torch.no_grad()
def test_measured_latents_are_normalised(temporal, tmp_path):
    autoencoder = make(temporal, latent_space={"scaling_factor": 3.0})
    videos = [clip(batch=2, seed=seed) for seed in range(3)]
    measured = autoencoder.measure_latent_space(videos, trained_with="three random clips")
    latents = torch.cat([autoencoder.encode_video(video) for video in videos]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(dim=1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=1, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    assert measured.scaling_factor == 3.0 and measured.trained_with == "three random clips"
    autoencoder.save_pretrained(tmp_path)
    assert VideoAutoencoder.from_pretrained(tmp_path).latent_space == measured


# ---- mistakes


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((17, 60, 64), r"height 60 px .* multiple of 8; use 56 or 64"),
        ((17, 64, 5), r"width 5 px .* multiple of 8; use 8"),
        ((0, 64, 64), "0 frames"),
        ((17, 0, 64), "height 0 px"),
    ],
)
def test_impossible_sizes(size, message):
    with pytest.raises(OpenSoraError, match=message):
        make(spatial_patch_size=4).latent_size(size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temporal": {"type": "recurrent"}}, "'recurrent' given; known are causal3d, folded"),
        ({"temporal": {"filters": 4}}, "type None"),
        ({"temporal": {**CAUSAL, "filter": 4}}, "temporal: unknown option 'filter'"),
        ({"temporal": {**FOLDED, "in_channels": 8}}, "in_channels is 8"),
        ({"spatial": {**SPATIAL, "blocks": 3}}, "spatial: unknown option 'blocks'"),
        ({"spatial": {**SPATIAL, "in_channels": 12}}, "in_channels is 12"),
        ({"micro_frame_size": 0}, "micro_frame_size is 0"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"latent_space": {"scale": [1.0, 2.0]}}, "2 channels"),
    ],
)
def test_impossible_configurations(options, message):
    with pytest.raises(OpenSoraError, match=message):
        make(**options)


def test_impossible_calls():
    autoencoder = make()
    with pytest.raises(OpenSoraError, match="3 latent frames given for a video of 12 frames, which has 5"):
        autoencoder.decode_latents(torch.zeros(1, 4, 3, 4, 4), 12)
    with pytest.raises(OpenSoraError, match=r"expected \(B, 4, N"):
        autoencoder.decode_latents(torch.zeros(1, 8, 3, 4, 4), 7)
    with pytest.raises(OpenSoraError, match=r"expected \(B, 3, T"):
        autoencoder.encode_video(torch.zeros(1, 1, 4, 8, 8))
    with pytest.raises(OpenSoraError, match="floating point"):
        autoencoder.encode_video(torch.zeros(1, 3, 4, 8, 8, dtype=torch.uint8))
    with pytest.raises(OpenSoraError, match="sample=True"):
        autoencoder.encode_video(clip(), generator=torch.Generator())
    with pytest.raises(OpenSoraError, match="noise of shape"):
        autoencoder.encode_video(clip(), sample=True, frame_noise=torch.zeros(1))
    frames = make(temporal=None)
    with pytest.raises(OpenSoraError, match="no temporal part"):
        frames.encode_time(torch.zeros(1, 4, 3, 4, 4))
    with pytest.raises(OpenSoraError, match="2 latent frames given for a video of 3 frames"):
        frames.decode_latents(torch.zeros(1, 4, 2, 4, 4), 3)


def test_figures_for_each_latent_frame_are_not_of_weights_that_store_them():
    pairs = [[value, value] for value in (0.1, 0.2, 0.3, 0.4)]
    with pytest.raises(OpenSoraError, match="takes one per channel"):
        make(latent_space={"shift": pairs})
    with pytest.raises(OpenSoraError, match="takes one per channel"):
        make().set_latent_space(LatentSpace(scale=tuple(map(tuple, pairs))))
