"""The deep compression autoencoder of Open-Sora 2.0 against the reference: settings are read from the fixtures."""

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.models.autoencoders import dc_ae
from opensora.models.autoencoders.dc_ae import VideoDCAutoencoder
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.tiles import Tile, in_tiles


def close(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours, reference, atol=2e-5, rtol=1e-4)


def config_of(meta: dict[str, Any]) -> dict[str, Any]:
    """Keywords from the reference's words, "encoder.width_list=[8,16] encoder.norm=rms3d ..."."""
    words = dict(word.split("=", 1) for word in meta["config"].split())
    kinds = words["encoder.block_type"].strip("[]").split(",")
    assert words["decoder.block_type"] == words["encoder.block_type"]
    assert words["decoder.width_list"] == words["encoder.width_list"]
    assert words["decoder.temporal_upsample"] == words["encoder.temporal_downsample"]
    temporal = json.loads(words["encoder.temporal_downsample"].lower())
    assert not temporal[-1]
    return {
        "latent_channels": int(words["latent_channels"]),
        "widths": json.loads(words["encoder.width_list"]),
        "encoder_depths": json.loads(words["encoder.depth_list"]),
        "decoder_depths": json.loads(words["decoder.depth_list"]),
        "attention": [{"ResBlock": False, "EViTS5_GLU": True}[kind] for kind in kinds],
        "temporal_downsample": temporal[:-1],
    }


def build(fixture, **options: Any) -> VideoDCAutoencoder:
    autoencoder = VideoDCAutoencoder(**{**config_of(fixture.meta), **options})
    autoencoder.load_state_dict(fixture.weights())
    words = dict(word.split("=", 1) for word in fixture.meta["config"].split())
    assert autoencoder.spatial_factor == int(words["spatial_compression_ratio"])
    assert autoencoder.temporal_factor == int(words["time_compression_ratio"])
    return autoencoder.eval().requires_grad_(False)


def seen(fixture) -> set[str]:
    return set(fixture.under("out"))


# ---- layers


@torch.no_grad()
def test_layers(golden):
    fixture = golden("dc_ae_v2_0_layers")
    config, weights = fixture.meta["config"], fixture.weights()
    local = {name.removeprefix("local."): value for name, value in weights.items() if name.startswith("local.")}
    attention = dc_ae.LiteMLA(config["channels"], config["dim"], config["scales"])
    attention.load_state_dict({name: value for name, value in weights.items() if not name.startswith("local.")})
    gated = dc_ae.GLUMBConv(config["channels"])
    gated.load_state_dict(local)
    close(attention.qkv(fixture["in.x"]), fixture["mid.qkv"])
    close(dc_ae.linear_attention(fixture["mid.qkv"], config["dim"]), fixture["out.linear_att_of_qkv"])
    close(attention(fixture["in.x"]), fixture["out.y"])
    close(gated(fixture["in.x"]), fixture["out.local"])
    half = attention.bfloat16()(fixture["in.x"].bfloat16())
    torch.testing.assert_close(half.float(), fixture["out.y_bf16"].float(), atol=5e-2, rtol=1e-4)
    shuffles = {name for name in seen(fixture) if re.match(r"pixel|up\.|down\.", name)}
    assert seen(fixture) - shuffles == {"linear_att_of_qkv", "y", "local", "y_bf16"}


def test_shuffles(golden):
    fixture = golden("dc_ae_v2_0_layers")
    assert torch.equal(dc_ae.pixel_unshuffle_3d(fixture["in.unshuffle"], (2, 2, 2)), fixture["out.pixel_unshuffle_3d"])
    assert torch.equal(dc_ae.pixel_shuffle_3d(fixture["in.shuffle"], (2, 2, 2)), fixture["out.pixel_shuffle_3d"])
    compared = 0
    for name in seen(fixture):
        if not (match := re.fullmatch(r"(down|up)\.T(\d+)\.temporal(True|False)", name)):
            continue
        compared += 1
        way, num_frames, temporal = match[1], int(match[2]), match[3] == "True"
        given, expected = fixture[f"in.down.T{num_frames}"], fixture[f"out.{name}"]
        factors = (2 if temporal and num_frames > 1 else 1, 2, 2)
        if way == "down":
            ours = dc_ae.average_channels(dc_ae.pixel_unshuffle_3d(given, factors), expected.shape[1])
        else:
            repeated = dc_ae.repeat_channels(given, expected.shape[1] * factors[0] * 4)
            ours = dc_ae.pixel_shuffle_3d(repeated, factors)
        close(ours, expected)
    assert compared == 8


# ---- whole clips


def test_four_frames(golden):
    """The reference decodes their only latent frame as an image; asked for four frames, ours makes four."""
    fixture = golden("dc_ae_v2_0")
    assert seen(fixture) == {"z", "decode", "latent_size"}
    autoencoder = build(fixture)
    latents = autoencoder.encode_video(fixture["in.x"])
    close(latents, fixture["out.z"])
    close(autoencoder.decode_latents(fixture["out.z"], 1), fixture["out.decode"])
    assert autoencoder.decode_latents(fixture["out.z"], 4).shape == fixture["in.x"].shape
    assert list(autoencoder.latent_size(fixture["in.x"].shape[2:])) == fixture["out.latent_size"].tolist()


@pytest.mark.parametrize("case", [0, 1, 2])
def test_clip(golden, case):
    fixture = golden("dc_ae_v2_0_video")
    cases = fixture.meta["cases_B_T_H_W"]
    assert len(cases) == 3
    autoencoder, shape = build(fixture), cases[case]
    num_frames = shape[1]
    video = fixture[f"in.{num_frames}.x"]
    assert [video.shape[0], *video.shape[2:]] == shape
    found = {name for name in seen(fixture) if name.startswith(f"{num_frames}.")}
    decoded = f"{num_frames}.decode" if f"{num_frames}.decode" in found else f"{num_frames}.decode_sub"
    latents = fixture[f"out.{num_frames}.z"]
    close(autoencoder.encode_video(video), latents)
    ours = autoencoder.decode_latents(latents, num_frames)
    close(ours[..., ::2, ::2] if decoded.endswith("_sub") else ours, fixture[f"out.{decoded}"])
    assert list(autoencoder.latent_size(video.shape[2:])) == fixture[f"out.{num_frames}.latent_size"].tolist()
    named = {decoded, f"{num_frames}.z", f"{num_frames}.latent_size"}
    scaled = {f"{num_frames}.scaled{end}" for end in (".z", ".decode_of_unscaled_z_sub", "_training.z")}
    assert found == named | (scaled if num_frames == 8 else set())


def test_scaling_factor(golden):
    """Declared in the reference's training, where nothing applies it; inference declares none."""
    fixture = golden("dc_ae_v2_0_video")
    autoencoder, video = build(fixture), fixture["in.8.x"]
    with torch.no_grad():
        close(autoencoder.encoder(video), fixture["out.8.scaled_training.z"])
    autoencoder.set_latent_space(LatentSpace(fixture.meta["scaling_factor"], "divide"))
    close(autoencoder.encode_video(video), fixture["out.8.scaled.z"])
    ours = autoencoder.decode_latents(fixture["out.8.z"], 8)
    close(ours[..., ::2, ::2], fixture["out.8.scaled.decode_of_unscaled_z_sub"])


# ---- tiles


MODES = {"none": (False, False), "spatial": (True, False), "temporal": (False, True), "both": (True, True)}


@pytest.mark.parametrize("mode", MODES)
def test_tiles(golden, mode):
    fixture = golden("dc_ae_v2_0_tiled")
    assert seen(fixture) == {f"{name}.{kind}" for name in MODES for kind in ("z", "decode_sub")} | {"stale.z"}
    meta, (spatial, temporal) = fixture.meta, MODES[mode]
    assert meta["tile_overlap_factor"] == 0.25
    autoencoder = build(
        fixture,
        tile_sample_size=meta["spatial_tile_size"] if spatial else None,
        tile_sample_frames=meta["temporal_tile_size"] if temporal else None,
    )
    for edge, name in ((autoencoder._latent_tile.size, "spatial"), (autoencoder._latent_tile.frames, "temporal")):
        assert edge in (None, meta[f"{name}_tile_latent_size"])
    close(autoencoder.encode_video(fixture["in.x"]), fixture[f"out.{mode}.z"])
    ours = autoencoder.decode_latents(fixture["in.z"], 28)
    if temporal:  # the reference decodes the last latent frame as an image, and shows the last frame of the tile before
        ours = torch.cat([ours[:, :, :24], ours[:, :, 27:]], dim=2)
    every = 2 if mode == "both" else 5
    close(ours[:, :, ::every, ::2, ::2], fixture[f"out.{mode}.decode_sub"])


@torch.no_grad()
def test_tiles_whose_latent_size_was_left_as_it_was(golden):
    """What the reference makes of other tile sizes; ours derives one size from the other."""
    fixture = golden("dc_ae_v2_0_tiled")
    meta, autoencoder = fixture.meta, build(fixture)
    given, stale = Tile(meta["spatial_tile_size"], meta["temporal_tile_size"]), Tile(32, 8)
    close(in_tiles(autoencoder.encoder, fixture["in.x"], given, stale), fixture["out.stale.z"])


def test_lengths(golden_json):
    tables = golden_json("dc_ae_v2_0_lengths")
    assert tables["tile_overlap_factor"] == 0.25
    options: dict[str, Any] = {"widths": [8] * 3, "encoder_depths": [1] * 3, "decoder_depths": [1] * 3}
    options |= {"attention": [False] * 3, "temporal_downsample": [True, True], "latent_channels": 8}
    torch.manual_seed(0)
    frames = tables["temporal_tile_size"]
    autoencoder = VideoDCAutoencoder(**options, tile_sample_frames=frames, tile_sample_size=None).requires_grad_(False)
    for given, expected in tables["encode_latents"].items():
        num_frames = int(given)
        if num_frames == 1 or num_frames % 4 == 0:
            assert autoencoder.encode_video(torch.zeros(1, 3, num_frames, 4, 4)).shape[2] == expected
        else:
            assert expected == 1 if num_frames == 2 else expected == "ERR:AssertionError"
            with pytest.raises(OpenSoraError, match="multiple of 4, or 1"):
                autoencoder.latent_frames(num_frames)
    is_last = tables["last_frame_is_last_of_previous_tile"]
    assert tables["decode_frames"].keys() == tables["decode_frames_untiled"].keys()
    for given, expected in tables["decode_frames"].items():
        latents, whole = int(given), tables["decode_frames_untiled"][given]
        video = autoencoder.decode_latents(torch.zeros(1, 8, latents, 1, 1), whole)
        assert video.shape[2] == whole
        assert expected in (whole, whole - 3)
        assert (expected != whole) == is_last.get(given, False), "only a lone latent frame at the end loses frames"
        if expected != whole:
            assert_no_frame_is_made_alone(autoencoder, latents)


def assert_no_frame_is_made_alone(autoencoder: VideoDCAutoencoder, latents: int) -> None:
    seen: list[int] = []
    hook = autoencoder.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    autoencoder.decode_latents(torch.zeros(1, 8, latents, 1, 1), 4 * latents)
    hook.remove()
    assert min(seen) > 1
