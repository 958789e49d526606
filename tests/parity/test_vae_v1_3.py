"""The autoencoder of Open-Sora 1.3 against the reference: settings and cases are read from the fixtures."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.models.autoencoders import causal
from opensora.models.autoencoders.causal import CausalVideoAutoencoder
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.statistics_v1_3 import STATISTICS


def close(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours, reference, atol=2e-5, rtol=1e-4)


def exact(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-6)


def build(fixture, **options: Any) -> CausalVideoAutoencoder:
    config = fixture.meta["config"]
    assert config["in_channels"] == config["out_ch"] == 3
    autoencoder = CausalVideoAutoencoder(
        latent_channels=config["z_channels"],
        filters=config["ch"],
        channel_multipliers=config["ch_mult"],
        num_res_blocks=config["num_res_blocks"],
        **options,
    )
    autoencoder.load_state_dict(fixture.weights())
    return autoencoder.eval().requires_grad_(False)


def space(name: str | None) -> LatentSpace:
    return LatentSpace() if name is None else LatentSpace.from_dict(STATISTICS[name])


def seen(fixture) -> list[str]:
    """Names of all results, each of which a test must have compared."""
    return sorted(fixture.under("out"))


# ---- layers


BLOCKS = {
    "attn": lambda: causal.CausalAttention(32, 32),
    "conv_k1": lambda: causal.CausalConv3d(32, 8, kernel_size=1),
    "conv_k3": lambda: causal.CausalConv3d(32, 8),
    "down2d": lambda: causal.SpatialDownsample(32),
    "down3d": lambda: causal.Downsample(32),
    "resblock_widen": lambda: causal.ResnetBlock(32, 64, 32),
    "up2d": lambda: causal.SpatialUpsample(32),
    "up3d": lambda: causal.Upsample(32, 32),
}


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_layer(golden, name):
    fixture = golden("vae_v1_3_blocks")
    assert seen(fixture) == sorted(fixture.meta["blocks"]) == sorted(BLOCKS)
    layer: nn.Module = BLOCKS[name]()
    weights = {k.removeprefix(f"{name}."): v for k, v in fixture.weights().items() if k.startswith(f"{name}.")}
    layer.load_state_dict(weights)
    close(layer(fixture["in.x"]), fixture[f"out.{name}"])


# ---- whole clips


@pytest.mark.parametrize("frames", ["1", "17", "33"])
def test_clip(golden, frames):
    fixture = golden("vae_v1_3")
    assert {name.partition(".")[0] for name in seen(fixture)} == {"1", "17", "33"}
    kinds = r"post_mean|z_mode_(video_overlap|plain|v5)|decode_video_overlap|latent_size"
    assert all(re.fullmatch(rf"\d+\.({kinds})", name) for name in seen(fixture))
    video, num_frames = fixture[f"in.{frames}.x"], int(frames)
    autoencoder = build(fixture, latent_space=STATISTICS["video"])
    close(autoencoder.encode_raw(video).mode(), fixture[f"out.{frames}.post_mean"])
    latents = fixture[f"out.{frames}.z_mode_video_overlap"]
    close(autoencoder.encode_video(video), latents)
    close(autoencoder.decode_latents(latents, num_frames), fixture[f"out.{frames}.decode_video_overlap"])
    size = (num_frames, video.shape[3], video.shape[4])
    assert list(autoencoder.latent_size(size)) == fixture[f"out.{frames}.latent_size"].tolist()
    for name, statistics in (("z_mode_plain", None), ("z_mode_v5", "video_5frames")):
        if f"out.{frames}.{name}" in fixture:
            autoencoder.set_latent_space(space(statistics))
            close(autoencoder.encode_video(video), fixture[f"out.{frames}.{name}"])


# ---- chunks


@pytest.fixture
def chunks(golden):
    fixture = golden("vae_v1_3_chunks")
    results = {f"enc.{case}.z_mode" for case in fixture.meta["encode"]}
    results |= {f"dec.{case}" for case in fixture.meta["decode"]}
    assert {name for name in seen(fixture) if not re.match(r"(un)?norm\.", name)} == results
    return fixture


def test_chunks_encode(chunks):
    for case, settings in chunks.meta["encode"].items():
        num_frames, reference = settings["frames"], chunks[f"out.enc.{case}.z_mode"]
        video = chunks["in.x"][:, :, :num_frames]
        autoencoder = build(chunks, micro_frame_size=settings["micro_frame_size"])
        autoencoder.set_latent_space(space(settings["normalization"]))
        if settings["temporal_overlap"]:
            latents = autoencoder.encode_raw(video).mode()
        else:  # ours always share a frame; these are clips of their own
            clips = video.split(settings["micro_frame_size"], dim=2)
            latents = torch.cat([autoencoder.encode_raw(clip).mode() for clip in clips], dim=2)
        assert latents.shape[2] == settings["latents_made"]
        close(autoencoder.latent_space.normalise(latents), reference)
        if num_frames % 16 == 1 and settings["temporal_overlap"]:
            close(autoencoder.encode_video(video), reference)
            assert list(autoencoder.latent_size((num_frames, 16, 24))) == settings["latent_size"]


def test_lengths_with_a_cut_off_end_are_refused(chunks):
    """The reference makes a latent frame of what is left, and neither counts nor decodes it."""
    autoencoder = build(chunks)
    for num_frames, nearest in ((20, "17 or 33"), (51, "49 or 65")):
        with pytest.raises(OpenSoraError, match=f"{num_frames} must be 1 more than a multiple of 16.*{nearest}"):
            autoencoder.encode_video(chunks["in.x"][:, :, :num_frames])


def test_chunks_decode(chunks):
    for case, settings in chunks.meta["decode"].items():
        latents, every = chunks["in.z"][:, :, : settings["latents"]], settings["stored_hw_every"]
        autoencoder = build(chunks, micro_frame_size=settings["micro_frame_size"])
        autoencoder.set_latent_space(space(settings["normalization"]))
        raw = autoencoder.latent_space.denormalise(latents)
        clips = (raw,) if settings["temporal_overlap"] else raw.split(5, dim=2)
        video = torch.cat([autoencoder.decode_raw(clip, settings["frames"]) for clip in clips], dim=2)
        assert video.shape[2] == settings["frames"]
        close(video[..., ::every, ::every], chunks[f"out.dec.{case}"])
        if settings["frames"] % 16 == 1 and settings["temporal_overlap"]:
            assert torch.equal(autoencoder.decode_latents(latents, settings["frames"]), video)


def test_normalisation(chunks):
    found = [match for name in seen(chunks) if (match := re.fullmatch(r"(un)?norm\.(\w+)\.(\d+)", name))]
    assert len(found) == 12
    for match in found:
        latent_space, latents = space(match[2]), chunks["in.z"][:, :, : int(match[3])]
        ours = latent_space.denormalise(latents) if match[1] else latent_space.normalise(latents)
        exact(ours, chunks[f"out.{match[0]}"])


# ---- tables


def test_statistics(golden_json):
    published = golden_json("vae_v1_3_stats")
    for name, declared in STATISTICS.items():
        for ours, theirs in (("shift", "mean"), ("scale", "std")):
            assert torch.equal(torch.tensor(declared[ours]), torch.tensor(published[name][theirs]))


def test_latent_sizes(golden_json):
    """Chunks without overlap are not ours; where the reference leaves frames or pixels out, we refuse."""
    table = golden_json("vae_latent_sizes_v1_3")
    real = table.pop("real_encoder_hw_for_width16")
    compared = 0
    for name, expected in table.items():
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)\|micro_frame(\w+)\|overlap(\w+)", name)
        assert match, name
        num_frames, height, width = (int(match[i]) for i in (1, 2, 3))
        micro_frame_size = None if match[4] == "None" else int(match[4])
        if micro_frame_size and match[5] == "False":
            continue
        autoencoder = sizes_of(micro_frame_size)
        whole = num_frames % autoencoder.frame_multiple == 1
        if whole and height % 8 == 0 and width % 8 == 0:
            assert list(autoencoder.latent_size((num_frames, height, width))) == expected
            compared += 1
            continue
        with pytest.raises(OpenSoraError, match="multiple of"):
            autoencoder.latent_size((num_frames, height, width))
        if whole:
            assert autoencoder.latent_frames(num_frames) == expected[0]
    assert compared >= 12
    encoder = sizes_of(17).encoder
    for height, cells in real.items():
        assert list(encoder(torch.zeros(1, 3, 1, int(height), 16)).shape[3:]) == cells


def sizes_of(micro_frame_size: int | None) -> CausalVideoAutoencoder:
    options: dict[str, Any] = {"filters": 4, "channel_multipliers": [1] * 4, "num_groups": 2, "num_res_blocks": 1}
    return CausalVideoAutoencoder(**options, micro_frame_size=micro_frame_size).requires_grad_(False)
