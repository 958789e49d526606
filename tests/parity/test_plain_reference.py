"""The plain formulas that whole pipelines are held against, held against the fixtures themselves."""

import math
import re
from typing import Any

import pytest
import torch
from parity import plain_autoencoder, plain_samplers, plain_transformers
from reference_config import transformer_config


def close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    """The fixtures were computed in float32."""
    torch.testing.assert_close(ours, reference.double(), rtol=0, atol=2e-5 * max(1.0, float(reference.abs().max())))


# --- transformers -----------------------------------------------------------------------------------------------------


def network_of(fixture: Any, case: dict[str, torch.Tensor], row: int) -> Any:
    """A version's formulas for one row: (text, frames) -> output."""
    w, config = plain_transformers.double(fixture.under("sd")), transformer_config(fixture)
    latents, timestep = case["x"][row].double(), float(case["timestep"][row])
    told: dict[str, Any] = {"num_heads": config["num_heads"]}
    if "spatial_blocks.0.scale_shift_table" in w:
        function, names = plain_transformers.stdit3, ("height", "width", "fps")
    elif "t_block_temp.1.weight" in w:
        function, names = plain_transformers.stdit2, ("height", "width", "fps", "num_frames", "ar")
    else:
        function, names = plain_transformers.stdit, ()
        told |= {name: config[name] for name in ("space_scale", "time_scale")}
    if names:
        told["input_sq_size"] = config["input_sq_size"]
        told |= {{"ar": "ratio"}.get(name, name): float(case[name][row]) for name in names}
    return lambda text, frames: function(w, latents, timestep, text.double(), frames, **told)


def cases_of(fixture: Any) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Inputs and outputs of every case; fixtures of one case have no names for it."""
    if "in.x" in fixture:
        return [(fixture.under("in"), fixture.under("out"))]
    names = sorted({name.split(".")[1] for name in fixture.tensors if name.startswith("in.")})
    return [(fixture.under(f"in.{name}"), fixture.under(f"out.{name}")) for name in names]


@pytest.mark.parametrize("name", ["stdit_v1_0", "stdit_v1_1plus_xmask", "stdit2_v1_1_qknorm", "stdit3_v1_2"])
def test_transformers(golden, name):
    fixture = golden(name)
    null_text = fixture["sd.y_embedder.y_embedding"]
    compared = 0
    for case, outputs in cases_of(fixture):
        batch = len(case["x"])
        for variant, expected in outputs.items():
            for row in range(len(expected)):
                sample, network = row % batch, network_of(fixture, case, row % batch)
                mask = case[variant if variant.startswith("mask_") else "mask"][sample].bool()
                text = case["y"][sample, 0] if row < batch else null_text  # null rows come second
                text = text if variant in ("nomask", "no_text_mask") else text[mask]
                masked = variant in ("x_mask", "cfg_batch_xmask")
                close(network(text, case["x_mask"][sample].tolist() if masked else None), expected[row])
                compared += 1
    assert compared


# --- samplers ---------------------------------------------------------------------------------------------------------


def toy_of(fixture: Any, row: int) -> plain_samplers.Network:
    """The linear network of the fixtures, with text and without."""
    a, b, d, e = (fixture[f"in.toy.{name}"].double().reshape(-1, 1, 1, 1) for name in "abde")

    def one(x: torch.Tensor, timestep: float, text: torch.Tensor, frames: list[bool] | None) -> torch.Tensor:
        told = torch.tensor(frames or [False] * x.shape[1], dtype=torch.float64).reshape(1, -1, 1, 1)
        repeated = x[torch.arange(len(a)) % len(x)]
        return a * repeated + b * timestep / 1000 + d * text.double().mean() + e * told

    return lambda x, timestep, frames: (
        one(x, timestep, fixture["in.y"][row], frames),
        one(x, timestep, fixture["in.y_null"][row], frames),
    )


def test_tables(golden):
    for version, float32 in (("1_0", False), ("1_1", True)):
        fixture = golden(f"iddpm_v{version}_tables")
        spaced = next(match for name in fixture.tensors if (match := re.match(r"out\.(spaced(\d+))\.", name)))
        expected = fixture.under(f"out.{spaced[1]}")
        tables = plain_samplers.iddpm_tables(int(spaced[2]), float32=float32)
        assert tables.timesteps == expected["timestep_map"].tolist()
        for ours, theirs in {
            "log_posterior_variance": "posterior_log_variance_clipped",
            "sqrt_abar": "sqrt_alphas_cumprod",
            "sqrt_one_minus_abar": "sqrt_one_minus_alphas_cumprod",
            "sqrt_recip_abar": "sqrt_recip_alphas_cumprod",
            "sqrt_recipm1_abar": "sqrt_recipm1_alphas_cumprod",
            "coefficient_of_clean": "posterior_mean_coef1",
            "coefficient_of_noisy": "posterior_mean_coef2",
        }.items():
            rtol, atol = (2e-6, 1e-6) if float32 else (1e-10, 1e-14)
            torch.testing.assert_close(getattr(tables, ours), expected[theirs].double(), rtol=rtol, atol=atol)
        torch.testing.assert_close(tables.log_beta.exp(), expected["betas"].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "case", "channels"),
    [
        ("iddpm_v1_0_loops", "cfg_sample", 3),
        ("iddpm_v1_1_sample", "cfg3", 3),
        ("iddpm_v1_1_sample", "cfg3_mask", 3),
        ("iddpm_v1_1_sample", "cfg_none", 4),
    ],
)
def test_iddpm(golden, name, case, channels):
    fixture = golden(name)
    start = fixture["in.cfg_sample.z"] if "in.cfg_sample.z" in fixture else fixture["in.z"]
    recorded = fixture.tensors.get(f"in.{case}.noise", fixture.tensors.get("in.cfg_none.noise"))
    for row in range(len(start)):
        noise = iter(recorded[:, row].double())
        final = plain_samplers.iddpm(
            toy_of(fixture, row),
            start[row].double(),
            lambda noise=noise: next(noise),
            num_steps=fixture.meta["steps"],
            scale=fixture.meta["cfg_scale"],
            channels=channels,
            float32_tables=name != "iddpm_v1_0_loops",
            mask=fixture["in.mask"][row].tolist() if case.endswith("mask") else None,
        )
        close(final, fixture[f"out.{case}.final"][row])


def test_rectified_flow(golden):
    fixture = golden("rflow_v1_2_sample")
    for case in ("plain", "transform", "plain_mask", "transform_mask"):
        for row in range(len(fixture["in.z"])):
            steps = fixture.meta["steps"]
            timesteps = [(1 - i / steps) * 1000 for i in range(steps)]
            if "transform" in case:
                height, width = (float(fixture[f"in.{name}"][row]) for name in ("height", "width"))
                # The reference takes a batch for images if its first video is one.
                num_frames = 1 if fixture["in.num_frames"][0] == 1 else int(fixture["in.num_frames"][row])
                if 1 < num_frames < 17:
                    continue  # all times become 0
                timesteps = [1000 * plain_samplers.shifted_time(t / 1000, height, width, num_frames) for t in timesteps]
            noise = iter(fixture[f"in.{case}.noise"][:, row].double() if case.endswith("mask") else [])
            final = plain_samplers.rectified_flow(
                toy_of(fixture, row),
                fixture["in.z"][row].double(),
                lambda noise=noise: next(noise),
                timesteps=timesteps,
                scale=fixture.meta["cfg_scale"],
                channels=len(fixture["in.z"][row]),
                mask=fixture["in.mask"][row].tolist() if case.endswith("mask") else None,
            )
            close(final, fixture[f"out.{case}.final"][row])


def test_placing(golden_json):
    def frames(first: int, length: int) -> torch.Tensor:
        return torch.arange(first, first + length, dtype=torch.float64).reshape(1, -1, 1, 1)

    for strategy, loop, align, (mask,), expected in golden_json("inference_utils_v1_2")["apply_mask_strategy"]:
        clip = torch.zeros(1, len(mask), 1, 1, dtype=torch.float64)
        placed, strengths = plain_samplers.place(clip, [frames(100, 8), frames(200, 3)], strategy or "", loop, align)
        assert strengths == pytest.approx(mask)
        assert placed.flatten().tolist() == expected


# --- autoencoders -----------------------------------------------------------------------------------------------------


def clips(fixture: Any) -> list[str]:
    return [match[1] for name in fixture.tensors if (match := re.fullmatch(r"in\.(.+)\.x", name))]


def test_temporal_autoencoder(golden):
    fixture = golden("vae_temporal_v1_2")
    w, groups = plain_transformers.double(fixture.under("sd")), fixture.meta["config"]["num_groups"]
    for case in clips(fixture):
        x = fixture[f"in.{case}.x"][0].double()
        mean, log_variance = plain_autoencoder.encode_chunk(x, w, groups)
        close(mean, fixture[f"out.{case}.mean"][0])
        close(log_variance, fixture[f"out.{case}.logvar"][0])
        close(plain_autoencoder.decode_chunk(mean, w, groups, x.shape[1]), fixture[f"out.{case}.decode_of_mean"][0])


def test_video_autoencoder(golden):
    fixture = golden("vae_pipeline_v1_2")
    config, w = fixture.meta["config"], plain_transformers.double(fixture.under("sd"))
    spatial, temporal = (
        {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}
        for prefix in ("spatial_vae.module.", "temporal_vae.")
    )
    kl = plain_autoencoder.frame_autoencoder(spatial, **config["kl"])
    shift, scale = (w[name].reshape(-1, 1, 1, 1) for name in ("shift", "scale"))
    groups, chunk = config["temporal"]["num_groups"], config["micro_frame_size"]
    factor = 2 ** sum(config["temporal"]["temporal_downsample"])
    for case in clips(fixture):
        video = fixture[f"in.{case}.x"][0].double()
        z = plain_autoencoder.encode_time(plain_autoencoder.encode_frames(kl, video), temporal, groups, chunk)
        z = plain_autoencoder.normalised(z, shift, scale)
        close(z, fixture[f"out.{case}.z_mode"][0])
        z = plain_autoencoder.denormalised(z, shift, scale)
        assert z.shape[1] == sum(math.ceil(len(part) / factor) for part in torch.arange(video.shape[1]).split(chunk))
        frames = plain_autoencoder.decode_time(z, temporal, groups, video.shape[1], chunk, factor)
        close(plain_autoencoder.decode_frames(kl, frames), fixture[f"out.{case}.decode_of_z_mode"][0])
