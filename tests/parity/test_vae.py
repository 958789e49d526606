"""Autoencoders against the reference: every size, option and case is read from the fixture."""

import re

import pytest
import torch

from opensora.errors import OpenSoraError
from opensora.models.autoencoders.temporal import TemporalAutoencoder
from opensora.models.autoencoders.video import VideoAutoencoder

REFERENCE_FACTOR = 0.18215  # hard-coded in the reference; a fixture that names another one wins


def close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    torch.testing.assert_close(ours, reference, atol=2e-5, rtol=1e-4)


def spatial_config(config: dict, weights: dict[str, torch.Tensor]) -> dict:
    """AutoencoderKL keywords; `weights` are named as in AutoencoderKL."""
    known = ("block_out_channels", "layers_per_block", "norm_num_groups", "sample_size", "act_fn")
    return {
        "latent_channels": weights["post_quant_conv.weight"].shape[0],
        **{name: config[name] for name in known if name in config},
    }


def temporal_config(config: dict, weights: dict[str, torch.Tensor]) -> dict:
    known = ("channel_multipliers", "filters", "num_groups", "num_res_blocks", "temporal_downsample")
    return {
        "in_channels": weights["encoder.conv_in.conv.weight"].shape[1],
        "latent_channels": weights["post_quant_conv.conv.weight"].shape[0],
        **{name: config[name] for name in known if name in config},
    }


def to_clips(frames: torch.Tensor, batch: int) -> torch.Tensor:
    """(B T), C, h, w -> B, C, T, h, w."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


def under(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def check_all_read(fixture, pattern: str) -> None:
    """No number of the reference goes by unseen because of its name."""
    assert not [name for name in fixture.under("out") if not re.fullmatch(pattern, name)]


def refused(autoencoder: VideoAutoencoder, video: torch.Tensor) -> bool:
    """Whether a clip does not fill its latent cells: the reference cuts such a clip, we refuse it."""
    if all(edge % autoencoder.spatial_factor == 0 for edge in video.shape[-2:]):
        return False
    with pytest.raises(OpenSoraError, match="multiple of"):
        autoencoder.encode_video(video)
    return True


# ---- the 2D part alone (1.0, 1.1)


@pytest.fixture
def kl(golden):
    fixture = golden("vae_kl_v1_2")
    check_all_read(fixture, r"posterior\.(mean|logvar)|(encode_mode|encode_sample|decode)(_mb\d+)?")
    weights = fixture.under("sd")
    factor = float(fixture.meta["config"].get("scaling", REFERENCE_FACTOR))
    autoencoder = VideoAutoencoder(
        spatial=spatial_config(fixture.meta["config"], under(weights, "module.")),
        latent_space={"scaling_factor": factor},
        micro_batch_size=None,
    ).eval()
    autoencoder.load_state_dict({f"spatial_vae.{name}": value for name, value in weights.items()})
    return fixture, autoencoder


@torch.no_grad()
def test_frames_encode(kl):
    fixture, autoencoder = kl
    video = fixture["in.x"]
    if refused(autoencoder, video):
        return
    posterior = autoencoder.encode_frames(video)
    close(posterior.mean, to_clips(fixture["out.posterior.mean"], len(video)))
    close(posterior.logvar, to_clips(fixture["out.posterior.logvar"], len(video)))
    noise = to_clips(fixture["in.noise"], len(video))
    for size, name in micro_batch_cases(fixture, "encode_sample"):
        autoencoder.micro_batch_size = size
        close(autoencoder.encode_video(video, sample=True, frame_noise=noise), fixture[name])
    for size, name in micro_batch_cases(fixture, "encode_mode"):
        autoencoder.micro_batch_size = size
        close(autoencoder.encode_video(video), fixture[name])


@torch.no_grad()
def test_frames_decode(kl):
    fixture, autoencoder = kl
    for size, name in micro_batch_cases(fixture, "decode"):
        autoencoder.micro_batch_size = size
        close(autoencoder.decode_latents(fixture["in.z"], fixture["in.z"].shape[2]), fixture[name])


def micro_batch_cases(fixture, stem: str) -> list[tuple[int | None, str]]:
    """(micro batch size, tensor name): `out.stem` and every `out.stem_mbN`."""
    found = [re.fullmatch(rf"out\.{stem}(?:_mb(\d+))?", name) for name in fixture.tensors]
    cases = [(int(match[1]) if match[1] else None, match[0]) for match in found if match]
    assert cases
    return cases


# ---- the temporal part alone


@torch.no_grad()
def test_temporal(golden):
    fixture = golden("vae_temporal_v1_2")
    weights = fixture.under("sd")
    autoencoder = TemporalAutoencoder(**temporal_config(fixture.meta["config"], weights)).eval()
    autoencoder.load_state_dict(weights)
    lengths = cases(fixture)
    assert lengths
    check_all_read(fixture, rf"({'|'.join(lengths)})\.(mean|logvar|kl|nll|decode_of_mean)")
    for case in lengths:
        frame_latents = fixture[f"in.{case}.x"]
        posterior = autoencoder.encode(frame_latents)
        close(posterior.mean, fixture[f"out.{case}.mean"])
        close(posterior.logvar, fixture[f"out.{case}.logvar"])
        close(posterior.kl(), fixture[f"out.{case}.kl"])
        close(posterior.nll(posterior.mean + 0.3), fixture[f"out.{case}.nll"])
        decoded = autoencoder.decode(fixture[f"out.{case}.mean"], frame_latents.shape[2])
        close(decoded, fixture[f"out.{case}.decode_of_mean"])


def cases(fixture) -> list[str]:
    """Names of the clips of a fixture: `in.NAME.x`."""
    return [match[1] for name in fixture.tensors if (match := re.fullmatch(r"in\.(.+)\.x", name))]


# ---- both, in chunks (1.2)


@pytest.fixture
def pipeline(golden):
    fixture = golden("vae_pipeline_v1_2")
    config, weights = fixture.meta["config"], fixture.under("sd")

    def per_channel(name: str) -> list[float] | None:
        if name not in weights:
            return None
        channels = weights["temporal_vae.post_quant_conv.conv.weight"].shape[0]
        return weights[name].flatten().expand(channels).tolist()

    temporal = temporal_config(config["temporal"], under(weights, "temporal_vae."))
    autoencoder = VideoAutoencoder(
        spatial=spatial_config(config["kl"], under(weights, "spatial_vae.module.")),
        temporal={"type": "causal3d", **temporal},
        latent_space={
            "scaling_factor": float(config.get("scaling", REFERENCE_FACTOR)),
            "shift": per_channel("shift"),
            "scale": per_channel("scale"),
        },
        micro_frame_size=config["micro_frame_size"],
        micro_batch_size=config["micro_batch_size"],
    ).eval()
    autoencoder.load_state_dict(weights)
    return fixture, autoencoder


@torch.no_grad()
def test_pipeline(pipeline):
    fixture, autoencoder = pipeline
    micro_frame_size = autoencoder.micro_frame_size
    assert cases(fixture)
    kinds = r"z_mode|z_sample|decode_of_z_mode|latent_size|z_mode_nomicro|z_sample_nomicro|decode_nomicro"
    check_all_read(fixture, rf"({'|'.join(cases(fixture))})\.({kinds})")
    for case in cases(fixture):
        video = fixture[f"in.{case}.x"]
        num_frames = video.shape[2]
        if refused(autoencoder, video):
            continue
        for suffix in ("", "_nomicro"):
            autoencoder.micro_frame_size = None if suffix else micro_frame_size
            if f"out.{case}.z_mode{suffix}" in fixture:
                close(autoencoder.encode_video(video), fixture[f"out.{case}.z_mode{suffix}"])
            if f"out.{case}.z_sample{suffix}" in fixture:
                latents = autoencoder.encode_video(
                    video,
                    sample=True,
                    frame_noise=to_clips(fixture[f"in.{case}.noise_spatial"], len(video)),
                    latent_noise=fixture[f"in.{case}.noise_temporal"],
                )
                close(latents, fixture[f"out.{case}.z_sample{suffix}"])
            decoded = f"out.{case}.decode_nomicro" if suffix else f"out.{case}.decode_of_z_mode"
            if decoded in fixture:
                close(autoencoder.decode_latents(fixture[f"out.{case}.z_mode{suffix}"], num_frames), fixture[decoded])


def test_pipeline_latent_size(pipeline):
    fixture, autoencoder = pipeline
    for case in cases(fixture):
        if refused(autoencoder, fixture[f"in.{case}.x"]):
            continue
        size = tuple(fixture[f"in.{case}.x"].shape[2:])
        latent_size = autoencoder.latent_size(size)
        assert latent_size == tuple(fixture[f"out.{case}.z_mode"].shape[2:])
        reference = fixture[f"out.{case}.latent_size"].tolist()
        assert latent_size[0] == reference[0]
        if autoencoder.spatial_factor == 8:  # the reference says 8 whatever its 2D autoencoder does
            assert list(latent_size) == reference


# ---- latent sizes


def shapes_only(temporal_factor: int, micro_frame_size: int | None) -> VideoAutoencoder:
    """A small autoencoder with eight pixels a cell."""
    halvings = temporal_factor.bit_length() - 1
    temporal = {
        "type": "causal3d",
        "filters": 4,
        "num_groups": 2,
        "num_res_blocks": 1,
        "channel_multipliers": [1] * (halvings + 1),
        "temporal_downsample": [True] * halvings,
    }
    return VideoAutoencoder(
        spatial={"block_out_channels": [8] * 4, "norm_num_groups": 4},
        temporal=temporal,
        micro_frame_size=micro_frame_size,
    )


def test_latent_sizes(golden_json):
    tables = golden_json("vae_latent_sizes_v1_2")
    alone = {int(num_frames): latent for num_frames, latent in tables.get("temporal_only", {}).items()}
    factors = [f for f in (1, 2, 4, 8, 16) if all(-(-frames // f) == latent for frames, latent in alone.items())]
    factor = 4 if 4 in factors else factors[0]
    temporal_vae = shapes_only(factor, None).temporal_vae
    assert temporal_vae is not None
    for num_frames, latent in alone.items():
        assert temporal_vae.latent_frames(num_frames) == latent
    for name, table in tables.items():
        match = re.fullmatch(r"pipeline_(\d+)x(\d+)_micro(\w+)", name)
        if not match:
            assert name == "temporal_only", f"unknown table {name}"
            continue
        height, width = int(match[1]), int(match[2])
        autoencoder = shapes_only(factor, int(match[3]) if match[3].isdigit() else None)
        for num_frames, expected in table.items():
            whole = (int(num_frames), height // 8 * 8, width // 8 * 8)
            assert list(autoencoder.latent_size(whole)) == expected
            if whole[1:] != (height, width):  # the reference cuts what does not fill a cell
                with pytest.raises(OpenSoraError, match="multiple of 8"):
                    autoencoder.latent_size((int(num_frames), height, width))
