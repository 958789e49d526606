"""The DPM-Solver++ scheduler as a diffusers citizen, its accuracy, and conditioning frames in whole or in part."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.guiders import AdaptiveProjectedGuidance, BaseGuidance, ClassifierFreeZeroStarGuidance
from tiny_pipeline import make_pipeline, seeded
from torch import Tensor

from opensora.conditioning.frames import FrameConditioning
from opensora.diffusion import gaussian
from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
from opensora.models.schedulers.dpm_solver import DPMSolverScheduler
from opensora.models.schedulers.iddpm import IDDPMScheduler

SHAPE = (2, 4, 3, 2, 2)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(latents: Tensor, timestep: Tensor, frame_mask: Tensor | None = None) -> Tensor:
    """Some smooth function of everything a network is given, with variance channels."""
    mask = 0.0 if frame_mask is None else frame_mask.float()[:, None, :, None, None]
    t = float(timestep) / 1000
    return torch.cat([0.9 * latents + 0.1 * mask, torch.tanh(latents + t)], dim=1)


def run(scheduler: DPMSolverScheduler, latents: Tensor, frame_mask: Tensor | None = None) -> Tensor:
    for timestep in scheduler.timesteps:
        prediction = network(latents, timestep)
        latents = scheduler.step(prediction, timestep, latents, frame_mask=frame_mask).prev_sample
    return latents


# --- configuration and schedule ---------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "num_train_timesteps": 500,
    "beta_schedule": "cosine",
    "prediction_type": "sample",
    "variance_type": "fixed_large",
}


def test_configuration_survives_saving_and_loading(tmp_path: Path) -> None:
    scheduler = DPMSolverScheduler(**CONFIG)
    scheduler.save_pretrained(tmp_path)
    loaded = DPMSolverScheduler.from_pretrained(tmp_path)
    for other in (loaded, DPMSolverScheduler.from_config(scheduler.config)):
        assert {name: other.config[name] for name in CONFIG} == CONFIG
        for made in (scheduler, other):
            made.set_timesteps(7)
        torch.testing.assert_close(
            other.step(normal(0), other.timesteps[0], normal(1)).prev_sample,
            scheduler.step(normal(0), scheduler.timesteps[0], normal(1)).prev_sample,
        )


def test_sampler_of_a_model_is_swapped_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    own = {"beta_end": 0.01, "prediction_type": "sample", "variance_type": "fixed_small"}
    theirs = {"sampler": "ddim", "ddim_eta": 0.5, "float32_tables": True}
    iddpm = IDDPMScheduler(**own, **theirs)  # pyright: ignore[reportArgumentType]
    diffusers_logger = logging.getLogger("diffusers")
    diffusers_logger.addHandler(caplog.handler)
    try:
        swapped = DPMSolverScheduler.from_config(iddpm.config)
        back = IDDPMScheduler.from_config(swapped.config, sampler="ddim")
    finally:
        diffusers_logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert {name: swapped.config[name] for name in own} == own
    assert {name: back.config[name] for name in own} == own
    # What only the other class knows is kept for the way back.
    assert {name: back.config[name] for name in theirs} == theirs
    assert {name for name in back.config if not name.startswith("_")} == own.keys() | theirs.keys() | {
        "num_train_timesteps",
        "beta_schedule",
        "beta_start",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta_schedule", "quadratic"),
        ("prediction_type", "v_prediction"),
        ("variance_type", "learned"),
        ("num_train_timesteps", 0),
    ],
)
def test_bad_configuration_is_refused(name: str, value: object) -> None:
    with pytest.raises(OpenSoraError, match=f"got {name}="):
        DPMSolverScheduler(**{name: value})  # pyright: ignore[reportArgumentType]


def test_schedule_of_one_training_step_is_refused() -> None:
    with pytest.raises(OpenSoraError, match="at least 2 steps"):
        DPMSolverScheduler(num_train_timesteps=1, beta_schedule="cosine")


@pytest.mark.parametrize("steps", [0, -3, 2.5, "ddim50", True, None])
def test_bad_number_of_steps_is_refused(steps: Any) -> None:
    with pytest.raises(OpenSoraError, match="got num_inference_steps="):
        DPMSolverScheduler().set_timesteps(steps)


def test_timesteps_divide_the_way_evenly() -> None:
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999.0, 749.25, 499.5, 249.75]
    assert scheduler.num_inference_steps == 4
    assert scheduler.timesteps.dtype == torch.float32


def test_there_is_something_to_iterate_before_a_run_is_laid_out() -> None:
    scheduler = DPMSolverScheduler(num_train_timesteps=100)
    assert len(scheduler.timesteps) == len(scheduler) == 100
    assert torch.all(scheduler.timesteps.diff() < 0)


def test_cosine_schedule_begins_where_some_signal_is_left() -> None:
    """At its last step alpha is 5e-5: whatever is estimated there in float32 is rounding."""
    scheduler = DPMSolverScheduler(beta_schedule="cosine")
    scheduler.set_timesteps(10)
    first = scheduler.timesteps[0]
    one, none = torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1)
    ratio = scheduler.add_noise(one, none, first) / scheduler.add_noise(none, one, first)
    assert 980 < first < 999
    assert 0.006 < ratio < 0.008


def test_foreign_timestep_is_refused() -> None:
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(OpenSoraError, match=r"nearest: 749\.25"):
        scheduler.step(normal(0, (2, 8, 3, 2, 2)), 750, normal(1))
    with pytest.raises(OpenSoraError, match="got 2 timesteps"):
        scheduler.step(normal(0, (2, 8, 3, 2, 2)), scheduler.timesteps[:2], normal(1))


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 9, 10, 25])
@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_network_that_knows_the_answer_leads_there(num_steps: int, beta_schedule: Any, prediction_type: Any) -> None:
    """To the clean latents, still under the noise of the first training step: the noise the run began with."""
    scheduler = DPMSolverScheduler(
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        variance_type="fixed_small",
    )
    scheduler.set_timesteps(num_steps)
    clean, noise = normal(0), normal(1)
    latents = scheduler.add_noise(clean, noise, scheduler.timesteps[0])
    for timestep in scheduler.timesteps:
        answer = noise if prediction_type == "epsilon" else clean
        latents = scheduler.step(answer, timestep, latents).prev_sample
    torch.testing.assert_close(latents, scheduler.add_noise(clean, noise, 0), atol=2e-4, rtol=1e-4)


def test_half_the_step_is_a_quarter_of_the_error() -> None:
    """Of data drawn from a normal distribution the best estimate and the exact path are known in closed form."""
    mean, std = 0.5, 0.3
    latents = 2 * normal(0).double()
    one, none = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)

    def error(num_steps: int, looks_back: bool = True) -> float:
        scheduler = DPMSolverScheduler(prediction_type="sample", variance_type="fixed_small")
        scheduler.set_timesteps(num_steps)

        def marginal(timestep: Any) -> tuple[Tensor, Tensor, Tensor]:
            alpha, sigma = scheduler.add_noise(one, none, timestep), scheduler.add_noise(none, one, timestep)
            return alpha, sigma, (alpha * std).square() + sigma.square()

        alpha, _, variance = marginal(scheduler.timesteps[0])
        standing = (latents - alpha * mean) / variance.sqrt()  # does not change along the path
        sample = latents
        for timestep in scheduler.timesteps:
            alpha, sigma, variance = marginal(timestep)
            estimate = (alpha * std**2 * sample + sigma.square() * mean) / variance
            if not looks_back:
                scheduler.set_timesteps(num_steps)  # forgets
            sample = scheduler.step(estimate, timestep, sample).prev_sample
        alpha, _, variance = marginal(0)
        return float((sample - (alpha * mean + variance.sqrt() * standing)).abs().max())

    assert error(100) / error(200) == pytest.approx(4, rel=0.2)
    assert error(100, looks_back=False) / error(200, looks_back=False) == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize("num_steps", [9, 27])
def test_equals_plain_diffusers_where_the_grid_is_the_same(num_steps: int) -> None:
    """999 / 9 and 999 / 27 are whole, so diffusers' rounding of timesteps changes nothing."""
    ours = DPMSolverScheduler(variance_type="fixed_small")
    theirs = DPMSolverMultistepScheduler(final_sigmas_type="sigma_min")
    ours.set_timesteps(num_steps)
    theirs.set_timesteps(num_steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    sample = other = normal(0)
    for timestep, whole in zip(ours.timesteps, theirs.timesteps, strict=True):
        sample = ours.step(torch.sin(sample), timestep, sample).prev_sample
        other = theirs.step(torch.sin(other), whole, other, return_dict=False)[0]
    torch.testing.assert_close(sample, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("num_steps", "looks_back"), [(2, False), (9, False), (10, True)])
def test_last_step_of_a_short_run_is_of_first_order(num_steps: int, looks_back: bool) -> None:
    """The reference extrapolates into the last step from ten steps on."""
    scheduler, fresh = DPMSolverScheduler(), DPMSolverScheduler()
    for made in (scheduler, fresh):
        made.set_timesteps(num_steps)
    *_, before, last = scheduler.timesteps
    scheduler.step(network(normal(1), before), before, normal(1))
    stepped, without_past = (
        made.step(network(normal(0), last), last, normal(0)).prev_sample for made in (scheduler, fresh)
    )
    assert torch.equal(stepped, without_past) != looks_back


def test_a_run_does_not_look_back_into_another() -> None:
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(6)
    first = run(scheduler, normal(0))
    assert torch.equal(run(scheduler, normal(0)), first)


def test_batch_of_two_is_two_of_one_and_nothing_is_drawn() -> None:
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(6)
    before = torch.get_rng_state()
    together = run(scheduler, normal(0))
    for i in range(2):
        torch.testing.assert_close(run(scheduler, normal(0)[i : i + 1]), together[i : i + 1], rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), before)


# --- steps ------------------------------------------------------------------------------------------------------------


def test_variance_channels_are_ignored_and_required() -> None:
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(6)
    with_variance = [torch.cat([normal(1), normal(seed)], dim=1) for seed in (2, 3)]
    first, second = (scheduler.step(p, 999.0, normal(0)).prev_sample for p in with_variance)
    assert torch.equal(first, second)
    with pytest.raises(OpenSoraError, match="got a prediction of 4 channels"):
        scheduler.step(normal(0), 999.0, normal(1))


def test_every_channel_moves() -> None:
    """diffusers' own solver keeps three channels of a prediction with learned variance."""
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(6)
    assert (run(scheduler, normal(0)) != normal(0)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_steps_keep_the_dtype_of_the_latents(dtype: torch.dtype) -> None:
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(5)
    latents = normal(0).to(dtype)
    for timestep in scheduler.timesteps:
        latents, mask = scheduler.activate_frames(latents, timestep, torch.full((2, 3), 0.8))
        latents = scheduler.step(network(latents, timestep).to(dtype), timestep, latents, frame_mask=mask).prev_sample
    assert latents.dtype == dtype
    assert scheduler.add_noise(latents, latents, torch.tensor([3, 4])).dtype == dtype


def test_steps_on_another_device_than_the_tables() -> None:
    """The meta device refuses to mix with the CPU, and stands in for an accelerator here."""
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(5)
    latents, prediction = torch.empty(SHAPE, device="meta"), torch.empty((2, 8, 3, 2, 2), device="meta")
    for timestep in scheduler.timesteps:
        latents, mask = scheduler.activate_frames(latents, timestep, torch.rand(2, 3), noise=latents)
        latents = scheduler.step(prediction, timestep, latents, frame_mask=mask).prev_sample
    assert latents.device.type == "meta"
    assert latents.dtype == torch.float32


def test_tuple_and_output_hold_the_same() -> None:
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(5)
    arguments = (network(normal(0), torch.tensor(500)), scheduler.timesteps[0], normal(0))
    output, (prev_sample,) = scheduler.step(*arguments), scheduler.step(*arguments, return_dict=False)
    assert torch.equal(output.prev_sample, prev_sample)


def test_wrong_shapes_are_refused() -> None:
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(5)
    with pytest.raises(OpenSoraError, match="frame_mask"):
        scheduler.step(normal(0, (2, 8, 3, 2, 2)), 999, normal(1), frame_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(OpenSoraError, match="frame_strength"):
        scheduler.activate_frames(normal(0), 999, torch.ones(3))


def test_add_noise_agrees_with_the_training_schedule_and_fills_the_gaps() -> None:
    scheduler, iddpm = DPMSolverScheduler(), IDDPMScheduler()
    clean, noise, t = normal(0), normal(1), torch.tensor([0, 999])
    torch.testing.assert_close(scheduler.add_noise(clean, noise, t), iddpm.add_noise(clean, noise, t))
    per_frame = scheduler.add_noise(clean, noise, t[:, None].expand(2, 3))
    torch.testing.assert_close(per_frame, scheduler.add_noise(clean, noise, t))
    between = scheduler.add_noise(torch.zeros(SHAPE), torch.ones(SHAPE), 500.5)
    below, above = (
        gaussian.make_tables(gaussian.linear_betas(1000)).sqrt_one_minus_alphas_cumprod[i] for i in (500, 501)
    )
    assert (below < between).all() and (between < above).all()


@pytest.mark.parametrize("timesteps", [1000, -0.5, torch.tensor([3.0, float("nan")])])
def test_add_noise_refuses_times_outside(timesteps: Any) -> None:
    with pytest.raises(OpenSoraError, match=r"numbers in \[0, 999\]"):
        DPMSolverScheduler().add_noise(normal(0), normal(1), timesteps)


# --- frames -----------------------------------------------------------------------------------------------------------


def test_conditioning_frames_stay_bit_for_bit() -> None:
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(12)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    result = run(scheduler, normal(0), frame_mask=mask)
    moved = (result != normal(0)).any(dim=1).flatten(2).any(dim=2)
    assert torch.equal(moved, mask)
    # A network that treats frames alike makes the others as if nothing were given.
    chosen = mask[:, None, :, None, None].expand(SHAPE)
    torch.testing.assert_close(result[chosen], run(scheduler, normal(0))[chosen])


def run_with_strength(scheduler: DPMSolverScheduler, latents: Tensor, strength: Tensor) -> Tensor:
    for index, timestep in enumerate(scheduler.timesteps):
        latents, mask = scheduler.activate_frames(latents, timestep, strength, noise=normal(100 + index))
        latents = scheduler.step(network(latents, timestep), timestep, latents, frame_mask=mask).prev_sample
    return latents


def test_full_strength_is_plain_sampling_and_none_keeps_all() -> None:
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(12)
    full = run_with_strength(scheduler, normal(0), torch.ones(2, 3))
    torch.testing.assert_close(full, run(scheduler, normal(0)))
    assert torch.equal(run_with_strength(scheduler, normal(0), torch.zeros(2, 3)), normal(0))
    assert torch.equal(run_with_strength(scheduler, normal(0), torch.zeros(2, 3, dtype=torch.bool)), normal(0))


@pytest.mark.parametrize(
    ("strength", "num_steps", "begins"), [(0.3, 10, 7), (0.29, 100, 71), (0.31, 10, 7), (0.999, 4, 1)]
)
def test_partial_strength_begins_where_its_share_of_the_way_is_left(
    strength: float, num_steps: int, begins: int
) -> None:
    """From there the frame goes the way it would go alone, beginning with a step of first order."""
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(num_steps)
    strengths = torch.tensor([[1.0, strength, 0.0]])
    latents = clean = normal(0)[:1]
    alone: Tensor | None = None
    for index, timestep in enumerate(scheduler.timesteps):
        noise = normal(100 + index)[:1]
        latents, mask = scheduler.activate_frames(latents, timestep, strengths, noise=noise)
        assert mask.tolist() == [[True, index >= begins, False]]
        if index == begins:
            alone = scheduler.add_noise(clean, noise, timestep)
            torch.testing.assert_close(latents[:, :, 1], alone[:, :, 1])
        latents = scheduler.step(network(latents, timestep), timestep, latents, frame_mask=mask).prev_sample
        if index < begins:
            assert torch.equal(latents[:, :, 1:], clean[:, :, 1:])
    assert alone is not None
    fresh = DPMSolverScheduler()  # remembers no earlier step
    fresh.set_timesteps(num_steps)
    for timestep in fresh.timesteps[begins:]:
        alone = fresh.step(network(alone, timestep), timestep, alone).prev_sample
    torch.testing.assert_close(latents[:, :, 1], alone[:, :, 1])
    assert torch.equal(latents[:, :, 2], clean[:, :, 2])


# --- in the pipeline --------------------------------------------------------------------------------------------------

PROMPT = "a small red ball rolls left"


@pytest.fixture(scope="module")
def pipe():
    pipe = make_pipeline("iddpm")
    pipe.scheduler = DPMSolverScheduler.from_config(pipe.scheduler.config)
    return pipe


def latents_of(pipe, **options: Any) -> Tensor:
    return pipe(PROMPT, generator=seeded(5), output_type="latent", **options).frames


def test_pipeline_makes_a_clip_and_says_how(pipe) -> None:
    output = pipe(PROMPT, generator=seeded(5), output_type="pt")
    assert 0 <= output.frames.min() < output.frames.max() <= 1
    assert output.settings["scheduler"]["class"] == "DPMSolverScheduler"
    assert torch.equal(latents_of(pipe), latents_of(pipe))


@pytest.mark.parametrize("channels", [1, [0, 2], 3])
def test_other_channels_stay_conditional(pipe, channels: Any) -> None:
    """After one step from the same noise; later the channels meet in the network."""
    chosen = range(channels) if isinstance(channels, int) else channels
    others = [channel for channel in range(4) if channel not in chosen]
    guided = latents_of(pipe, num_inference_steps=1, guidance_scale=7.0, cfg_channels=channels)
    fully = latents_of(pipe, num_inference_steps=1, guidance_scale=7.0, cfg_channels="all")
    conditional = latents_of(pipe, num_inference_steps=1, guidance_scale=1.0)
    torch.testing.assert_close(guided[:, others], conditional[:, others], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guided[:, list(chosen)], fully[:, list(chosen)], atol=1e-4, rtol=1e-4)
    assert (guided - conditional)[:, list(chosen)].abs().mean() > 1e-3


@pytest.mark.parametrize("guider", [AdaptiveProjectedGuidance(5.0, eta=0.0), ClassifierFreeZeroStarGuidance(5.0)])
def test_every_guider_works(pipe, guider: BaseGuidance) -> None:
    guided = latents_of(pipe, guider=guider)
    assert torch.isfinite(guided).all()
    assert not torch.allclose(guided, latents_of(pipe, guidance_scale=5.0))


def test_conditioning_frames_of_a_pipeline_come_back_as_they_were(pipe) -> None:
    size = VideoSize(5, 16, 24)
    none = FrameConditioning.none(pipe.autoencoder, size)
    first = normal(9, tuple(none.latents[:, :, :1].shape))
    made = latents_of(pipe, num_inference_steps=6, conditioning=none.put(first, 0))
    assert torch.equal(made[:, :, :1], first)
    assert not torch.allclose(made[:, :, 1:], latents_of(pipe, num_inference_steps=6)[:, :, 1:])
    in_part = latents_of(pipe, num_inference_steps=6, conditioning=none.put(first, 0, strength=0.5))
    assert torch.isfinite(in_part).all() and not torch.allclose(in_part[:, :, :1], first)
