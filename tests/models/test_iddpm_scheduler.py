"""The IDDPM scheduler as a diffusers citizen, its samplers, and conditioning frames in whole or in part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.diffusion import gaussian
from opensora.errors import OpenSoraError
from opensora.models.schedulers.iddpm import IDDPMScheduler

SHAPE = (2, 4, 3, 2, 2)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def network(latents: Tensor, timestep: Tensor, frame_mask: Tensor | None = None) -> Tensor:
    """Some smooth function of everything a network is given, with variance channels."""
    mask = 0.0 if frame_mask is None else frame_mask.float()[:, None, :, None, None]
    t = float(timestep) / 1000
    return torch.cat([0.9 * latents + 0.1 * mask, torch.tanh(latents + t)], dim=1)


def run(scheduler: IDDPMScheduler, latents: Tensor, strength: Tensor | None = None, generator: Any = None) -> Tensor:
    for timestep in scheduler.timesteps:
        mask = None
        if strength is not None:
            latents, mask = scheduler.activate_frames(latents, timestep, strength, generator=generator)
        prediction = network(latents, timestep, mask)
        latents = scheduler.step(prediction, timestep, latents, frame_mask=mask, generator=generator).prev_sample
    return latents


# --- configuration and schedule ---------------------------------------------------------------------------------------

CONFIG = {
    "num_train_timesteps": 500,
    "beta_schedule": "cosine",
    "prediction_type": "sample",
    "variance_type": "fixed_large",
    "sampler": "ddim",
    "ddim_eta": 0.25,
    "float32_tables": True,
}


def test_configuration_survives_saving_and_loading(tmp_path: Path) -> None:
    scheduler = IDDPMScheduler(**CONFIG)
    scheduler.save_pretrained(tmp_path)
    loaded = IDDPMScheduler.from_pretrained(tmp_path)
    for other in (loaded, IDDPMScheduler.from_config(scheduler.config)):
        assert {name: other.config[name] for name in CONFIG} == CONFIG
        assert torch.equal(other.train_tables.alphas_cumprod, scheduler.train_tables.alphas_cumprod)
        assert other.sampler == "ddim"


def test_configuration_of_one_sampler_makes_the_other() -> None:
    ddim = IDDPMScheduler.from_config(IDDPMScheduler(beta_end=0.01).config, sampler="ddim")
    assert (ddim.config["sampler"], ddim.config["beta_end"]) == ("ddim", 0.01)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta_schedule", "quadratic"),
        ("prediction_type", "v_prediction"),
        ("variance_type", "learned"),
        ("sampler", "euler"),
        ("ddim_eta", -0.1),
        ("num_train_timesteps", 0),
    ],
)
def test_bad_configuration_is_refused(name: str, value: object) -> None:
    with pytest.raises(OpenSoraError, match=f"got {name}="):
        IDDPMScheduler(**{name: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("spec", "length", "first"), [(100, 100, 999), ("ddim50", 50, 980), ("10,15,20", 45, 999)])
def test_timesteps_are_those_of_the_training_schedule(spec: int | str, length: int, first: int) -> None:
    scheduler = IDDPMScheduler()
    scheduler.set_timesteps(spec)
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == length
    assert (int(scheduler.timesteps[0]), int(scheduler.timesteps[-1])) == (first, 0)
    assert torch.all(scheduler.timesteps.diff() < 0)


def test_without_a_number_every_training_step_is_taken() -> None:
    scheduler = IDDPMScheduler(200)
    before = scheduler.timesteps
    scheduler.set_timesteps()
    assert before.tolist() == scheduler.timesteps.tolist() == list(range(199, -1, -1))


def test_foreign_timestep_is_refused() -> None:
    scheduler = IDDPMScheduler()
    scheduler.set_timesteps("ddim50")
    for timestep in (981, 980.5):
        with pytest.raises(OpenSoraError, match="nearest: 980"):
            scheduler.step(normal(0, (2, 8, 3, 2, 2)), timestep, normal(1))


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
@pytest.mark.parametrize("float32_tables", [False, True])
def test_network_that_knows_the_answer_leads_there(
    sampler: Any, beta_schedule: Any, prediction_type: Any, float32_tables: bool
) -> None:
    scheduler = IDDPMScheduler(
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        variance_type="fixed_small",
        sampler=sampler,
        float32_tables=float32_tables,
    )
    scheduler.set_timesteps(10)
    clean, latents = normal(0), normal(1)
    for index, timestep in zip(range(9, -1, -1), scheduler.timesteps, strict=True):
        answer = clean
        if prediction_type == "epsilon":
            answer = gaussian.predict_epsilon(scheduler.tables, latents, torch.tensor([index]), clean)
        latents = scheduler.step(answer, timestep, latents, generator=generators(0)[0]).prev_sample
    # With float32 tables the last step weighs the clean estimate by 0.9998 instead of 1.
    tolerance = 2e-3 if float32_tables else 1e-5
    torch.testing.assert_close(latents, clean, atol=tolerance, rtol=tolerance)


def test_ddim_without_eta_is_deterministic_and_draws_nothing() -> None:
    scheduler = IDDPMScheduler(sampler="ddim")
    scheduler.set_timesteps(10)
    generator = generators(3)[0]
    before = generator.get_state()
    first = run(scheduler, normal(0), generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(first, run(scheduler, normal(0)))


def test_last_step_adds_and_draws_no_noise() -> None:
    scheduler = IDDPMScheduler()
    scheduler.set_timesteps(10)
    generator = generators(3)[0]
    before = generator.get_state()
    prediction = network(normal(0), scheduler.timesteps[-1])
    drawn = scheduler.step(prediction, scheduler.timesteps[-1], normal(0), generator=generator).prev_sample
    given = scheduler.step(prediction, scheduler.timesteps[-1], normal(0), noise=normal(1)).prev_sample
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(drawn, given)


@pytest.mark.parametrize("config", [{}, {"sampler": "ddim", "ddim_eta": 0.5}])
def test_generator_decides_and_batch_of_two_is_two_of_one(config: dict[str, Any]) -> None:
    scheduler = IDDPMScheduler(**config)
    scheduler.set_timesteps(6)
    together = run(scheduler, normal(0), generator=generators(1, 2))
    for i in range(2):
        alone = run(scheduler, normal(0)[i : i + 1], generator=generators(i + 1))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-6, atol=1e-6)
    assert not torch.equal(together, run(scheduler, normal(0), generator=generators(3, 4)))


def test_tuple_and_output_hold_the_same() -> None:
    scheduler = IDDPMScheduler()
    scheduler.set_timesteps(5)
    arguments = (network(normal(0), torch.tensor(500)), scheduler.timesteps[1], normal(0))
    output = scheduler.step(*arguments, noise=normal(1))
    prev_sample, clean = scheduler.step(*arguments, noise=normal(1), return_dict=False)
    assert torch.equal(output.prev_sample, prev_sample)
    assert torch.equal(output.pred_original_sample, clean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_steps_keep_the_dtype_of_the_latents(dtype: torch.dtype) -> None:
    scheduler = IDDPMScheduler()
    scheduler.set_timesteps(5)
    latents = normal(0).to(dtype)
    strength = torch.full((2, 3), 0.8)
    for timestep in scheduler.timesteps:
        latents, mask = scheduler.activate_frames(latents, timestep, strength)
        latents = scheduler.step(network(latents, timestep).to(dtype), timestep, latents, frame_mask=mask).prev_sample
    assert latents.dtype == dtype
    assert scheduler.add_noise(latents, latents, torch.tensor([3, 4])).dtype == dtype


def test_steps_on_another_device_than_the_tables() -> None:
    """The meta device refuses to mix with the CPU, and stands in for an accelerator here."""
    scheduler = IDDPMScheduler(sampler="ddim", ddim_eta=0.5)
    scheduler.set_timesteps(5)
    latents, prediction = torch.empty(SHAPE, device="meta"), torch.empty((2, 8, 3, 2, 2), device="meta")
    for timestep in scheduler.timesteps:
        latents, mask = scheduler.activate_frames(latents, timestep, torch.rand(2, 3), noise=latents)
        latents = scheduler.step(prediction, timestep, latents, frame_mask=mask, noise=latents).prev_sample
    assert latents.device.type == "meta"
    assert latents.dtype == torch.float32


def test_wrong_shapes_are_refused() -> None:
    scheduler = IDDPMScheduler()
    with pytest.raises(OpenSoraError, match="got a prediction of 4 channels"):
        scheduler.step(normal(0), 999, normal(1))
    with pytest.raises(OpenSoraError, match="frame_mask"):
        scheduler.step(normal(0, (2, 8, 3, 2, 2)), 999, normal(1), frame_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(OpenSoraError, match="frame_strength"):
        scheduler.activate_frames(normal(0), 999, torch.ones(3))


def test_add_noise_takes_training_steps() -> None:
    scheduler = IDDPMScheduler()
    scheduler.set_timesteps(10)
    clean, noise, t = normal(0), normal(1), torch.tensor([0, 999])
    expected = gaussian.q_sample(scheduler.train_tables, clean, t, noise)
    assert torch.equal(scheduler.add_noise(clean, noise, t), expected)
    per_frame = scheduler.add_noise(clean, noise, t[:, None].expand(2, 3))
    assert torch.equal(per_frame, expected)
    one = scheduler.add_noise(clean, noise, scheduler.timesteps[3])
    assert torch.equal(one, scheduler.add_noise(clean, noise, scheduler.timesteps[3].expand(2)))


@pytest.mark.parametrize("timesteps", [torch.tensor([0, 1000]), torch.tensor([-1, 3]), torch.tensor([0.5, 3.0])])
def test_add_noise_refuses_impossible_steps(timesteps: Tensor) -> None:
    with pytest.raises(OpenSoraError, match="whole numbers in \\[0, 1000\\)"):
        IDDPMScheduler().add_noise(normal(0), normal(1), timesteps)


# --- frames -----------------------------------------------------------------------------------------------------------


def test_conditioning_frames_stay_bit_for_bit() -> None:
    scheduler = IDDPMScheduler()
    scheduler.set_timesteps(6)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    latents = normal(0)
    for timestep in scheduler.timesteps:
        prediction = network(latents, timestep, mask)
        latents = scheduler.step(prediction, timestep, latents, frame_mask=mask).prev_sample
    moved = (latents != normal(0)).any(dim=1).flatten(2).any(dim=2)
    assert torch.equal(moved, mask)


def test_full_strength_is_plain_sampling() -> None:
    scheduler = IDDPMScheduler(sampler="ddim")
    scheduler.set_timesteps(6)
    with_strength = run(scheduler, normal(0), torch.ones(2, 3), generators(0)[0])
    latents = normal(0)
    for timestep in scheduler.timesteps:
        prediction = network(latents, timestep, torch.ones(2, 3, dtype=torch.bool))
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    assert torch.equal(with_strength, latents)


def test_partial_strength_begins_where_its_share_of_steps_is_left() -> None:
    scheduler = IDDPMScheduler()
    scheduler.set_timesteps(10)
    strength = torch.tensor([[0.0, 0.29, 1.0]])
    clean = normal(0)[:1]
    latents, begun, seen_as_generated = clean, {}, {}
    for index, timestep in zip(range(9, -1, -1), scheduler.timesteps, strict=True):
        noise = normal(100 + index)[:1]
        model_latents, mask = scheduler.activate_frames(latents, timestep, strength, noise=noise)
        for frame in range(3):
            if not torch.equal(model_latents[:, :, frame], latents[:, :, frame]):
                begun[frame] = index
                expected = scheduler.add_noise(latents, noise, timestep)[:, :, frame]
                torch.testing.assert_close(model_latents[:, :, frame], expected)
            if mask[0, frame]:
                seen_as_generated.setdefault(frame, index)
        prediction = network(model_latents, timestep, mask)
        stepped = scheduler.step(prediction, timestep, model_latents, frame_mask=mask, noise=normal(index)[:1])
        latents = stepped.prev_sample
        for frame in (0, 1):
            if frame not in begun:
                assert torch.equal(latents[:, :, frame], clean[:, :, frame])
    # 0.29 of 10 steps: noised at step 2, a generated frame to the network from step 1.
    assert begun == {1: 2, 0: 0}
    assert seen_as_generated == {2: 9, 1: 1}


def test_strength_0_comes_back_nearly_as_given() -> None:
    scheduler = IDDPMScheduler()
    scheduler.set_timesteps(10)
    strength = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    result = run(scheduler, normal(0), strength, generators(0)[0])
    given = (strength == 0)[:, None, :, None, None].expand(SHAPE)
    torch.testing.assert_close(result[given], normal(0)[given], atol=0.1, rtol=0)


def test_frames_that_began_do_not_leak_into_another_step() -> None:
    scheduler = IDDPMScheduler()
    scheduler.set_timesteps(10)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    latents, timestep = normal(0), scheduler.timesteps[5]
    scheduler.activate_frames(latents, timestep, torch.full((2, 3), 0.4))
    other = scheduler.timesteps[6]
    assert torch.equal(scheduler.step(network(latents, other), other, latents, frame_mask=nothing).prev_sample, latents)
    again = scheduler.step(network(latents, timestep), timestep, latents, frame_mask=nothing).prev_sample
    assert torch.equal(again, latents)
