"""Numbers of the reference's IDDPM: tables, distributions, losses and sampling trajectories.

Tables are float64 for 1.0, float32 for 1.1 and 1.2. Everything else a fixture was made with is read from it.
"""

import re
from typing import Any

import pytest
import torch
from guided import combined
from torch.testing import assert_close

from opensora.diffusion import gaussian
from opensora.diffusion.losses import mean_per_sample, speed_tables, training_losses
from opensora.errors import OpenSoraError
from opensora.models.guidance import ChannelGuidance, GuidanceStep, default_guider
from opensora.models.schedulers.iddpm import IDDPMScheduler

F32 = {"atol": 2e-5, "rtol": 1e-4}
TABLE_NAMES = set(gaussian.GaussianTables.__dataclass_fields__) - {"timestep_map"}


def betas_like(reference: torch.Tensor) -> torch.Tensor:
    """Our betas of the reference schedule these are: the linear or the cosine one of as many steps."""
    candidates = [gaussian.cosine_betas(len(reference))]
    if len(reference) > 20:
        candidates.append(gaussian.linear_betas(len(reference)))
    return min(candidates, key=lambda betas: float((betas - reference.double()).abs().max()))


def scheduler_of(fixture, **config: Any) -> IDDPMScheduler:
    """Our scheduler of the fixture's training schedule; a fixture that names none was made with the usual one."""
    meta = {**fixture.meta, **fixture.meta.get("config", {})}
    num_steps = len(fixture["in.weights"]) if "in.weights" in fixture else 1000
    for key in ("diffusion_steps", "num_timesteps", "num_train_timesteps"):
        num_steps = int(meta.get(key, num_steps))
    names: dict[str, Any] = {"linear": "linear", "cosine": "cosine", "squaredcos_cap_v2": "cosine"}
    schedule = names[meta.get("noise_schedule", meta.get("beta_schedule", "linear"))]
    return IDDPMScheduler(num_steps, schedule, **config)


def options_of(case: str, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Our keywords of a case whose name joins words of `known` with underscores; any other word fails the test."""
    words = re.findall("|".join(sorted(known, key=len, reverse=True)), case)
    assert "_".join(words) == case, f"case {case} is not one of these tests: {', '.join(known)}"
    return {key: value for word in words for key, value in known[word].items()}


def matches(fixture, pattern: str) -> list[re.Match[str]]:
    """Tensors of such a name; a fixture without any skips the test, `test_every_output_is_read` sees to the others."""
    found = [match for key in fixture.tensors if (match := re.fullmatch(pattern, key))]
    return found or pytest.skip(f"the fixture holds no {pattern}")


class Toy:
    """The network of the fixtures: a_c x + b_c t / 1000 + d_c mean(y) + e_c mask, channels of x repeated as needed."""

    def __init__(self, fixture) -> None:
        parameters = [fixture[f"in.toy.{name}"] for name in "abde"]
        self.a, self.b, self.d, self.e = (p[None, :, None, None, None] for p in parameters)

    def __call__(self, x, timestep, y, frame_mask=None, num_channels: int | None = None) -> torch.Tensor:
        channels = torch.arange(self.a.shape[1]) % x.shape[1]
        t = torch.as_tensor(timestep).float().expand(len(x))[:, None, None, None, None]
        s = y.flatten(1).mean(dim=1)[:, None, None, None, None]
        m = 0.0 if frame_mask is None else frame_mask.float()[:, None, :, None, None]
        return (self.a * x[:, channels] + self.b * t / 1000 + self.d * s + self.e * m)[:, :num_channels]


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("iddpm_v1_0_tables", torch.float64, {"rtol": 1e-10, "atol": 1e-14}),
        ("iddpm_v1_1_tables", torch.float32, {"rtol": 1e-4, "atol": 1e-6}),
    ],
)
def test_tables(golden, name: str, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    fixture = golden(name)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in fixture.under("out").items():
        group, _, table = key.rpartition(".")
        groups.setdefault(group, {})[table] = tensor
    betas = betas_like(groups["full"]["betas"])  # which the respaced ones are made of
    for group, reference in groups.items():
        if group == "speed":
            continue
        if group.startswith("spaced"):
            spec = group.removeprefix("spaced") or fixture.meta["respacing"]
            tables = gaussian.make_tables(betas, gaussian.respaced_timesteps(len(betas), spec), dtype=dtype)
            if "timestep_map" in reference:
                assert torch.equal(tables.timestep_map, reference["timestep_map"].long())
        else:
            tables = gaussian.make_tables(betas_like(reference["betas"]), dtype=dtype)
        for table in TABLE_NAMES & reference.keys():
            actual = getattr(tables, table)
            assert actual.dtype == dtype
            assert_close(actual, reference[table], **tolerance, msg=lambda text, t=f"{group}.{table}": f"{t}: {text}")
        assert len(reference.keys() - TABLE_NAMES - {"timestep_map"}) == 0


def test_speed_tables(golden) -> None:
    fixture = golden("iddpm_v1_1_tables")
    reference = fixture.under("out.speed")
    if not reference:
        pytest.skip("the fixture holds no SpeeD tables")
    betas = betas_like(fixture["out.full.betas"])
    speed = speed_tables(gaussian.make_tables(betas, dtype=torch.float32))
    assert speed.meaningful_steps == int(reference["meaningful_steps"])
    # Where the slope crosses the threshold, a last bit of the float32 table (which depends on the CPU) is 2 % of p.
    assert_close(speed.probabilities, reference["p"], rtol=0.05, atol=0)
    near = torch.isclose(speed.probabilities, reference["p"], rtol=1e-4, atol=1e-6)
    assert near.float().mean() > 0.99
    assert_close(speed.snr, reference["snr"], rtol=1e-4, atol=1e-6)
    assert_close(speed.weights, reference["weights"], rtol=1e-4, atol=1e-6)


def test_space_timesteps(golden_json) -> None:
    fixture = golden_json("space_timesteps")
    cases: dict[str, Any] = fixture["results"] | fixture["errors"]
    for key, expected in cases.items():
        num_steps, spec = 1000, key
        if ";" in key:
            prefix, spec = key.split(";")
            num_steps = int(prefix.removeprefix("num_timesteps="))
        counts = spec.split(",")
        if "0" in counts:  # Departure: the reference keeps no step of such a section, here it is a mistake.
            expected = "an error"
        if isinstance(expected, list):
            assert gaussian.respaced_timesteps(num_steps, spec) == expected, key
        elif expected.startswith("ok:"):
            assert len(gaussian.respaced_timesteps(num_steps, spec)) == int(expected.removeprefix("ok:")), key
        else:
            with pytest.raises(OpenSoraError):
                gaussian.respaced_timesteps(num_steps, spec)


# --- distributions and losses -----------------------------------------------------------------------------------------


def test_forward_process(golden) -> None:
    fixture = golden("iddpm_v1_0_core")
    tables = scheduler_of(fixture).train_tables
    clean, noise, t = (fixture[f"in.{name}"] for name in ("x_start", "noise", "t"))
    noisy = gaussian.q_sample(tables, clean, t, noise)
    assert_close(noisy, fixture["out.q_sample"], **F32)
    marginal = gaussian.q_distribution(tables, clean, t)
    posterior = gaussian.q_posterior(tables, clean, noisy, t)
    for name, value in marginal._asdict().items():
        assert_close(value.expand_as(clean), fixture[f"out.q_mean_variance.{name}"], **F32)
    for name, value in posterior._asdict().items():
        name = "log_variance_clipped" if name == "log_variance" else name
        assert_close(value.expand_as(clean), fixture[f"out.q_posterior.{name}"], **F32)
    assert_close(mean_per_sample(clean), fixture["out.mean_flat"], **F32)


P_CASES: dict[str, dict[str, Any]] = {
    "clip0": {},
    "clip1": {"clip": True},
    "fixed_large": {"variance_type": "fixed_large"},
    "fixed_small": {"variance_type": "fixed_small"},
    "xstart": {"prediction_type": "sample"},
    "respaced": {},
}


def test_reverse_distribution(golden) -> None:
    fixture = golden("iddpm_v1_0_core")
    cases = sorted({match[1] for match in matches(fixture, r"out\.p_mean_variance\.(.+)\.\w+")})
    for case in cases:
        scheduler = scheduler_of(fixture)
        noisy, t = fixture["out.q_sample"], fixture["in.t"]
        tables, options = scheduler.train_tables, options_of(case, P_CASES)
        if "respaced" in case:
            scheduler.set_timesteps(fixture.meta["steps"])
            tables, t = scheduler.tables, fixture["in.t_respaced"]
        num_channels = noisy.shape[1] if "variance_type" in options else None
        prediction = Toy(fixture)(noisy, tables.timestep_map[t], fixture["in.y"], num_channels=num_channels)
        reverse = gaussian.p_distribution(tables, prediction, noisy, t, **options)
        for name, expected in fixture.under(f"out.p_mean_variance.{case}").items():
            actual = getattr(reverse, "clean" if name == "pred_xstart" else name).expand_as(expected)
            assert_close(actual, expected, **F32, msg=lambda text, n=f"{case}.{name}": f"{n}: {text}")


LOSS_CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {},
    "rescaled": {"loss_type": "rescaled_mse"},
    "rescaled_mse": {"loss_type": "rescaled_mse"},
    "kl": {"loss_type": "rescaled_kl"},
    "rescaled_kl": {"loss_type": "rescaled_kl"},
    "fixed_large": {"variance_type": "fixed_large"},
    "fixed_small": {"variance_type": "fixed_small"},
    "xstart": {"prediction_type": "sample"},
    "mask": {"frame_mask": "in.mask"},
    "weights": {"timestep_weights": "in.weights"},
}


def assert_losses(actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None, name: str) -> None:
    """Compare losses per sample. Departure: without a generated frame the reference divides by zero, here it is 0."""
    if mask is not None:
        expected = torch.where(mask.any(dim=1), expected, 0.0)
    assert_close(actual, expected, **F32, msg=lambda text: f"{name}: {text}")


def check_losses(fixture, prefix: str, tables: gaussian.GaussianTables) -> None:
    clean, noise, t = (fixture[f"in.{name}"] for name in ("x_start", "noise", "t"))
    cases = sorted({match[1] for match in matches(fixture, rf"{re.escape(prefix)}\.([^.]+)\.\w+")})
    for case in cases:
        options = options_of(case, LOSS_CASES)
        options = {k: fixture[v] if str(v).startswith("in.") else v for k, v in options.items()}
        mask = options.get("frame_mask")
        steps = t if mask is None else gaussian.frame_timesteps(t, mask)
        noisy = gaussian.q_sample(tables, clean, steps, noise)
        for seen in {f"mid.{case}.x_t", "mid.mask.x_t" if mask is not None else ""} & fixture.tensors.keys():
            assert_close(noisy, fixture[seen], **F32)
        num_channels = clean.shape[1] if "variance_type" in options else None
        prediction = Toy(fixture)(noisy, tables.timestep_map[t], fixture["in.y"], num_channels=num_channels)
        losses = training_losses(tables, prediction, clean=clean, noisy=noisy, noise=noise, t=t, **options)
        for name, expected in fixture.under(f"{prefix}.{case}").items():
            assert_losses(getattr(losses, name), expected, mask, f"{case}.{name}")


def test_losses_v1_0(golden) -> None:
    fixture = golden("iddpm_v1_0_core")
    check_losses(fixture, "out.training_losses", scheduler_of(fixture).train_tables)


@pytest.mark.parametrize("version", ["1_1", "1_2"])
def test_losses_with_masks_and_weights(golden, version: str) -> None:
    fixture = golden(f"iddpm_v{version}_losses")
    scheduler = scheduler_of(fixture, float32_tables=True)
    check_losses(fixture, "out", scheduler.train_tables)
    clean = fixture["in.x_start"]
    assert_close(mean_per_sample(clean), fixture["out.mean_flat"], **F32)
    masked = mean_per_sample(clean, fixture["in.mask"])
    assert_losses(masked, fixture["out.mean_flat_mask"], fixture["in.mask"].bool(), "mean_flat_mask")


# --- sampling ---------------------------------------------------------------------------------------------------------


def sample(
    fixture,
    scheduler: IDDPMScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor | None,
    *,
    cfg_channels: int | None = None,
    guided: bool = False,
    strength: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Run a pipeline's loop; returns every step's latents, and the latents and frame mask that the network saw."""
    toy, num_samples = Toy(fixture), len(latents)
    scheduler.set_timesteps(fixture.meta["steps"])
    guider = default_guider(fixture.meta["cfg_scale"]) if guided else None
    guidance = ChannelGuidance(guider, cfg_channels, latents.shape[1])
    trajectory, seen = [], []
    for step, timestep in enumerate(scheduler.timesteps):
        # The reference draws for the unconditional rows too, and discards what becomes of them.
        draw = iter([] if noise is None else noise.unflatten(0, (len(scheduler.timesteps), -1))[step, :, :num_samples])
        mask = None
        if strength is not None:
            latents, mask = scheduler.activate_frames(latents, timestep, strength, noise=next(draw))
            seen.append((latents, mask))
        cond = toy(latents, timestep, fixture["in.y"], mask)
        uncond = toy(latents, timestep, fixture["in.y_null"], mask) if guided else None
        state = GuidanceStep(step, len(scheduler.timesteps), timestep)
        prediction = combined(guidance, cond, uncond, state)
        out = scheduler.step(prediction, timestep, latents, frame_mask=mask, noise=next(draw, None))
        latents = out.prev_sample
        trajectory.append(latents)
    return torch.stack(trajectory), seen


def assert_trajectory(actual: torch.Tensor, expected: torch.Tensor, *, float32_tables: bool) -> None:
    if float32_tables:
        # The rounding of float32 tables grows with the steps and the values; ours are made in the same order.
        assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    else:
        assert_close(actual, expected, **F32)


def test_ancestral_loop(golden) -> None:
    fixture = golden("iddpm_v1_0_loops")
    scheduler = scheduler_of(fixture)
    trajectory, _ = sample(fixture, scheduler, fixture["in.z"], fixture["in.p_loop.noise"])
    assert_trajectory(trajectory, fixture["out.p_loop.traj"], float32_tables=False)


@pytest.mark.parametrize(
    ("name", "float32_tables"),
    [("iddpm_v1_0_loops", False), ("iddpm_v1_1_sample", True), ("iddpm_v1_2_sample", True)],
)
def test_ddim_loop(golden, name: str, float32_tables: bool) -> None:
    fixture = golden(name)
    for match in matches(fixture, r"out\.(ddim_eta([\d.]+))\.traj"):
        case, eta = match[1], float(match[2])
        scheduler = scheduler_of(fixture, sampler="ddim", ddim_eta=eta, float32_tables=float32_tables)
        noise = fixture.tensors.get(f"in.{case}.noise")
        trajectory, _ = sample(fixture, scheduler, fixture["in.z"], noise)
        assert_trajectory(trajectory, fixture[match[0]], float32_tables=float32_tables)


def test_ddim_inversion(golden) -> None:
    fixture = golden("iddpm_v1_0_loops")
    cases = matches(fixture, r"out\.ddim_reverse_t(\d+)\.sample")
    scheduler = scheduler_of(fixture)
    scheduler.set_timesteps(fixture.meta["steps"])
    noisy = fixture["in.z"]
    for match in cases:
        t = torch.full((len(noisy),), int(match[1]))
        prediction = Toy(fixture)(noisy, scheduler.tables.timestep_map[t], fixture["in.y"])
        reverse = gaussian.p_distribution(scheduler.tables, prediction, noisy, t)
        actual = gaussian.ddim_inverse_step(scheduler.tables, reverse.clean, noisy, t)
        assert_close(actual, fixture[match[0]], **F32)


def test_guided_loop_v1_0(golden) -> None:
    fixture = golden("iddpm_v1_0_loops")
    latents = fixture["in.cfg_sample.z"]
    scheduler = scheduler_of(fixture)
    noise = fixture["in.cfg_sample.noise"]
    trajectory, _ = sample(fixture, scheduler, latents, noise, guided=True, cfg_channels=3)
    assert_trajectory(trajectory, fixture["out.cfg_sample.traj2B"][:, : len(latents)], float32_tables=False)
    assert_trajectory(trajectory[-1], fixture["out.cfg_sample.final"], float32_tables=False)


@pytest.mark.parametrize("version", ["1_1", "1_2"])
def test_guided_loops_with_frame_masks(golden, version: str) -> None:
    fixture = golden(f"iddpm_v{version}_sample")
    latents = fixture["in.z"]
    # The reference's seed was the same for all cases without a mask, so their noise is stored once.
    plain_noise = [tensor for key, tensor in fixture.tensors.items() if re.fullmatch(r"in\.cfg_?[^_]+\.noise", key)]
    for match in matches(fixture, r"out\.(cfg_?(\d+|none)(_mask)?)\.final"):
        case, masked = match[1], match[3] is not None
        channels = None if match[2] == "none" else int(match[2])
        own_noise = fixture.tensors.get(f"in.{case}.noise")
        noise = own_noise if masked or own_noise is not None else plain_noise[0]
        scheduler = scheduler_of(fixture, float32_tables=True)
        strength = fixture["in.mask"] if masked else None
        if channels is not None and channels > latents.shape[1]:  # Departure: variances are never guided.
            with pytest.raises(OpenSoraError, match="cfg_channels"):
                sample(fixture, scheduler, latents, noise, guided=True, cfg_channels=channels, strength=strength)
            continue
        trajectory, seen = sample(
            fixture, scheduler, latents, noise, guided=True, cfg_channels=channels, strength=strength
        )
        assert_trajectory(trajectory[-1], fixture[f"out.{case}.final"], float32_tables=True)
        if f"out.{case}.traj2B" in fixture:
            expected = fixture[f"out.{case}.traj2B"][:, : len(latents)]
            assert len(trajectory) == len(expected)
            for actual_step, expected_step in zip(trajectory, expected, strict=True):
                assert_trajectory(actual_step, expected_step, float32_tables=True)
        for step, (model_latents, model_mask) in enumerate(seen):
            if f"mid.{case}.model_x" in fixture:
                expected = fixture[f"mid.{case}.model_x"][step, : len(latents)]
                assert_trajectory(model_latents, expected, float32_tables=True)
            if f"mid.{case}.x_mask" in fixture:
                assert torch.equal(model_mask, fixture[f"mid.{case}.x_mask"][step, : len(latents)].bool())


OUTPUTS = {
    "iddpm_v1_0_core": r"q_sample|q_mean_variance\.\w+|q_posterior\.\w+|mean_flat|"
    r"p_mean_variance\..+|training_losses\..+",
    "iddpm_v1_0_loops": r"p_loop\.traj|ddim_eta[\d.]+\.traj|ddim_reverse_t\d+\.sample|cfg_sample\.(traj2B|final)",
    **dict.fromkeys(("iddpm_v1_1_losses", "iddpm_v1_2_losses"), r"mean_flat(_mask)?|[^.]+\.(loss|mse|vb)"),
    **dict.fromkeys(
        ("iddpm_v1_1_sample", "iddpm_v1_2_sample"),
        r"cfg_?(\d+|none)(_mask)?\.(final|traj2B)|ddim_eta[\d.]+\.traj",
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_is_read(golden, name: str) -> None:
    """No number of the reference goes by unseen because of its name."""
    unread = [key for key in golden(name).under("out") if not re.fullmatch(OUTPUTS[name], key)]
    assert not unread
