"""The rectified-flow scheduler: its schedule, its steps, conditioning frames, and its configuration."""

from typing import Any

import pytest
import torch
from diffusers import SchedulerMixin

from opensora.diffusion import flow
from opensora.errors import OpenSoraError
from opensora.models.schedulers.base import process_of
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler

SHIFTED: dict[str, Any] = {"height": 240, "width": 426, "num_frames": 51}


def latents(batch: int = 2, frames: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, batch, 4, frames, 2, 2, generator=generator)
    return clean, noise


def run(scheduler: RectifiedFlowScheduler, sample: torch.Tensor, network, **options) -> torch.Tensor:
    for t in scheduler.timesteps:
        sample = scheduler.step(network(sample, t), t, sample, **options).prev_sample
    return sample


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, 30, 1000])
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_timesteps_descend_from_pure_noise_and_never_reach_zero(steps, discrete, shift):
    scheduler = RectifiedFlowScheduler(use_discrete_timesteps=discrete, use_timestep_transform=shift)
    scheduler.set_timesteps(steps, **SHIFTED)
    assert scheduler.timesteps.shape == (steps,) and scheduler.timesteps.dtype == torch.float32
    assert scheduler.timesteps[0] == 1000 and scheduler.timesteps[-1] > 0
    assert (scheduler.timesteps.diff() < 0).all()
    if discrete and not shift:
        assert torch.equal(scheduler.timesteps, scheduler.timesteps.round())


def test_plain_timesteps_are_evenly_spaced():
    scheduler = RectifiedFlowScheduler(num_train_timesteps=500)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [500, 400, 300, 200, 100]


def test_larger_and_longer_videos_spend_more_steps_in_noise():
    scheduler = RectifiedFlowScheduler(use_timestep_transform=True)
    middles = []
    for height, width, num_frames in [(256, 256, 1), (512, 512, 1), (512, 512, 17), (1024, 1024, 17), (1024, 1024, 51)]:
        scheduler.set_timesteps(10, height=height, width=width, num_frames=num_frames)
        middles.append(scheduler.timesteps[5].item())
    assert middles == sorted(middles) and middles[1] == 500


@pytest.mark.parametrize("rule", ["latent", "after_first"])
@pytest.mark.parametrize("num_frames", [1, 2, 5, 16])
def test_short_clips_have_a_schedule(rule, num_frames):
    """Departure: the reference's schedule for these lengths is NaN."""
    scheduler = RectifiedFlowScheduler(use_timestep_transform=True, transform_frames=rule)
    scheduler.set_timesteps(8, height=256, width=256, num_frames=num_frames)
    assert torch.isfinite(scheduler.timesteps).all() and (scheduler.timesteps.diff() < 0).all()


def test_frames_are_counted_as_the_autoencoder_makes_them():
    ratio = {
        factor: RectifiedFlowScheduler(temporal_factor=factor, micro_frame_size=None).time_shift.ratio(512, 512, 16)
        for factor in (1, 4)
    }
    assert ratio[1] == 4.0 and ratio[4] == 2.0


def test_the_autoencoders_own_count_goes_first():
    for options in ({}, {"transform": "tokens"}):
        shift = RectifiedFlowScheduler(**options).time_shift
        one, four = (shift.ratio(512, 512, 99, num_latents=count) for count in (1, 4))
        assert four == pytest.approx(2 * one)


def test_shift_of_open_sora_2():
    """256px 16:9 are 252 tokens, 768px 2304; 33 latent frames."""
    options: Any = {"transform": "tokens", "micro_frame_size": None}
    shift = RectifiedFlowScheduler(**options).time_shift
    assert shift.ratio(192, 336, 129) == pytest.approx(5.7326, abs=1e-4)
    assert shift.ratio(576, 1024, 129) == pytest.approx(11.872, abs=1e-3)
    assert RectifiedFlowScheduler(token_px=32, **options).time_shift.ratio(576, 1024, 128) == pytest.approx(
        6.6, abs=1e-3
    )
    both = RectifiedFlowScheduler(use_timestep_transform=True, token_px=32, training_token_px=64, **options)
    trained = RectifiedFlowScheduler.from_config(both.config).noise_process().time_shift
    assert trained is not None and trained.ratio(576, 1024, 128) == pytest.approx(5.327, abs=1e-3)
    assert both.time_shift.ratio(576, 1024, 128) == pytest.approx(6.6, abs=1e-3)
    fixed = RectifiedFlowScheduler(transform_ratio=3.0, **options).time_shift
    assert fixed.ratio(192, 336, 129) == fixed.ratio(576, 1024, 1) == 3.0


def test_a_step_follows_the_velocity_that_networks_predict():
    sample, velocity = latents()
    stepped = []
    for direction, sign in (("data - noise", 1), ("noise - data", -1)):
        scheduler = RectifiedFlowScheduler(velocity=direction)
        scheduler.set_timesteps(4)
        stepped.append(scheduler.step(sign * velocity, scheduler.timesteps[0], sample).prev_sample)
    torch.testing.assert_close(stepped[0], sample + 0.25 * velocity)
    assert torch.equal(*stepped)


def test_scale_is_for_videos_only_under_the_later_rule():
    for rule, image in [("latent", 3.0), ("after_first", 1.0)]:
        scheduler = RectifiedFlowScheduler(transform_frames=rule, transform_scale=3.0)
        assert scheduler.time_shift.ratio(512, 512, 1) == image
        assert scheduler.time_shift.ratio(512, 512, 5) == pytest.approx(3.0 * (2**0.5 if rule == "latent" else 1.0))


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
def test_true_velocity_leads_to_the_data(shift, steps):
    clean, noise = latents()
    scheduler = RectifiedFlowScheduler(use_timestep_transform=shift)
    scheduler.set_timesteps(steps, **SHIFTED)
    result = run(scheduler, noise, lambda sample, t: flow.velocity_target(clean, noise))
    torch.testing.assert_close(result, clean, rtol=1e-5, atol=1e-5)


def test_variance_channels_are_ignored_and_a_tuple_is_returned_on_request():
    clean, noise = latents()
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[1]
    stepped = scheduler.step(clean, t, noise).prev_sample
    assert torch.equal(scheduler.step(torch.cat([clean, noise], dim=1), t, noise, return_dict=False)[0], stepped)


def test_batch_of_two_is_two_of_one():
    clean, noise = latents()
    strength = torch.tensor([[1.0, 0.5, 0.0, 1.0], [0.0, 1.0, 0.7, 0.2]])
    scheduler = RectifiedFlowScheduler(use_timestep_transform=True)
    scheduler.set_timesteps(6, **SHIFTED)

    def sample(rows: slice) -> torch.Tensor:
        z = torch.where((strength == 1)[:, None, :, None, None], noise, clean)[rows]
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)[rows]]
        for t in scheduler.timesteps:
            z, frame_mask = scheduler.activate_frames(z, t, strength[rows], generator=generators)
            z = scheduler.step(torch.sin(z), t, z, frame_mask=frame_mask).prev_sample
        return z

    together = sample(slice(0, 2))
    for row in range(2):
        assert torch.equal(together[row : row + 1], sample(slice(row, row + 1)))


# --- conditioning frames ----------------------------------------------------------------------------------------------


def test_conditioning_frames_come_back_bit_for_bit():
    clean, noise = latents()
    frame_mask = torch.tensor([[False, True, True, True], [True, True, False, False]])
    start = torch.where(frame_mask[:, None, :, None, None], noise, clean)
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(5)
    result = run(scheduler, start, lambda sample, t: torch.cos(sample), frame_mask=frame_mask)
    for row, frame in (~frame_mask).nonzero().tolist():
        assert torch.equal(result[row, :, frame], clean[row, :, frame])
    for row, frame in frame_mask.nonzero().tolist():
        assert not torch.equal(result[row, :, frame], start[row, :, frame])


def test_a_bool_mask_is_a_strength_of_zero_or_one():
    clean, noise = latents()
    frame_mask = torch.tensor([[False, True, True, True]] * 2)
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        sample, active = scheduler.activate_frames(clean, t, frame_mask, noise=noise)
        assert torch.equal(sample, clean) and torch.equal(active, frame_mask)


def test_a_frame_of_partial_strength_is_noised_once_when_its_time_comes():
    clean, noise = latents(batch=1, frames=1)
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(10)
    changed = []
    for t in scheduler.timesteps:
        sample, active = scheduler.activate_frames(clean, t, torch.tensor([[0.4]]), noise=noise)
        assert active.item() is (t.item() <= 400)
        if not torch.equal(sample, clean):
            changed.append(t.item())
            torch.testing.assert_close(sample, flow.interpolate(clean, noise, 0.4))
    assert changed == [400]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"sample_method": "logit-normal"}, {"use_discrete_timesteps": True}])
def test_drawn_timesteps_are_shifted_like_the_sampled_ones(options):
    """Departure: the reference scales the shift in sampling or in training, but never in both."""
    drawn, sampled = [], []
    for shift in (False, True):
        scheduler = RectifiedFlowScheduler(use_timestep_transform=shift, transform_scale=2.0, **options)
        drawn.append(process_of(scheduler).draw_times(64, **SHIFTED, generator=torch.Generator().manual_seed(0)))
        scheduler.set_timesteps(10, **SHIFTED)
        sampled.append(scheduler.timesteps)
    assert drawn[0].min() >= 0 and drawn[0].max() <= 1000 and drawn[0].shape == (64,)
    ratio = 2.0 * RectifiedFlowScheduler().time_shift.ratio(**SHIFTED)
    for plain, shifted in (drawn, sampled):
        torch.testing.assert_close(flow.time_shift(plain / 1000, ratio) * 1000, shifted)


def test_noise_is_added_on_the_networks_time_scale():
    clean, noise = latents()
    scheduler = RectifiedFlowScheduler()
    noisy = scheduler.add_noise(clean, noise, torch.tensor([0, 250]))
    torch.testing.assert_close(noisy[0], clean[0])
    torch.testing.assert_close(noisy[1], 0.75 * clean[1] + 0.25 * noise[1])


# --- configuration ----------------------------------------------------------------------------------------------------


def test_configuration_survives_a_folder(tmp_path):
    scheduler = RectifiedFlowScheduler(
        use_timestep_transform=True, transform_frames="after_first", temporal_factor=8, sample_method="logit-normal"
    )
    scheduler.save_pretrained(tmp_path)
    again = RectifiedFlowScheduler.from_pretrained(tmp_path)
    assert isinstance(again, SchedulerMixin)
    for name, value in scheduler.config.items():
        assert name.startswith("_") or again.config[name] == value
    for one in (scheduler, again):
        one.set_timesteps(4, **SHIFTED)
    assert torch.equal(scheduler.timesteps, again.timesteps)


def test_diffusers_interface():
    scheduler = RectifiedFlowScheduler()
    sample = torch.zeros(1)
    assert scheduler.scale_model_input(sample, 3) is sample
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1 and len(scheduler) == 1000


@pytest.mark.parametrize(
    "options",
    [
        {"sample_method": "normal"},
        {"transform_frames": "all"},
        {"num_train_timesteps": 0},
        {"transform": "pixels"},
        {"velocity": "up"},
        {"token_px": 0},
        {"training_token_px": 0},
    ],
)
def test_bad_configurations_are_refused(options):
    with pytest.raises(OpenSoraError, match=next(iter(options))):
        RectifiedFlowScheduler(**options)


@pytest.mark.parametrize("steps", [0, -3, 2.5, True])
def test_bad_step_counts_are_refused(steps):
    with pytest.raises(OpenSoraError, match="num_inference_steps"):
        RectifiedFlowScheduler().set_timesteps(steps)


def test_bad_calls_are_refused():
    clean, noise = latents()
    scheduler = RectifiedFlowScheduler(use_timestep_transform=True)
    with pytest.raises(OpenSoraError, match="needs all three"):
        scheduler.set_timesteps(5, height=240, width=426)
    with pytest.raises(OpenSoraError, match="needs all three"):
        process_of(scheduler).draw_times(2)
    scheduler.set_timesteps(5, **SHIFTED)
    with pytest.raises(OpenSoraError, match="nearest"):
        scheduler.step(clean, 123.0, noise)
    with pytest.raises(OpenSoraError, match="one timestep"):
        scheduler.step(clean, torch.tensor([1000.0, 1000.0]), noise)
    with pytest.raises(OpenSoraError, match="channels"):
        scheduler.step(clean[:, :3], 1000.0, noise)
    with pytest.raises(OpenSoraError, match="frame_strength"):
        scheduler.activate_frames(clean, 1000.0, torch.ones(2, 3))
    with pytest.raises(OpenSoraError, match="at most 1000"):
        RectifiedFlowScheduler(use_discrete_timesteps=True).set_timesteps(1001)


def test_a_mask_of_the_wrong_shape_is_refused():
    clean, noise = latents()
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(3)
    t, mask = scheduler.timesteps[0], torch.ones(clean.shape[2], dtype=torch.bool)
    with pytest.raises(OpenSoraError, match="frame_mask of shape"):
        scheduler.step(noise, t, clean, frame_mask=mask)
    with pytest.raises(OpenSoraError, match="frame_strength of shape"):
        scheduler.activate_frames(clean, t, mask)
