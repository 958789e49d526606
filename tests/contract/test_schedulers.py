"""What diffusers expects of a scheduler, in the shape of its own tests, of every scheduler and way to sample."""

import copy
import inspect
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.testing import assert_close

from opensora.errors import OpenSoraError
from opensora.models.schedulers import SAMPLERS
from opensora.models.schedulers.base import Scheduler, check_scheduler, process_of
from opensora.models.schedulers.dpm_solver import DPMSolverScheduler
from opensora.models.schedulers.iddpm import IDDPMScheduler
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler

SCHEDULERS: dict[str, Callable[[], Scheduler]] = {
    "flow": RectifiedFlowScheduler,
    "ancestral": lambda: IDDPMScheduler(beta_end=0.01, float32_tables=True),
    "ddim": lambda: IDDPMScheduler(sampler="ddim", ddim_eta=0.5, prediction_type="sample"),
    "dpm-solver++": lambda: DPMSolverScheduler(beta_schedule="cosine"),
}
NUM_STEPS = 7
SHAPE = (2, 4, 3, 2, 2)


@pytest.fixture(params=SCHEDULERS)
def make(request: pytest.FixtureRequest) -> Callable[[], Scheduler]:
    return SCHEDULERS[request.param]


@pytest.fixture
def scheduler(make: Callable[[], Scheduler]) -> Any:
    made = make()
    made.set_timesteps(NUM_STEPS)
    return made


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(latents: Tensor, timestep: Tensor | float) -> Tensor:
    """Some smooth function of what a network is given, with variance channels, which not all schedulers read."""
    return torch.cat([0.9 * latents, torch.tanh(latents + float(timestep) / 1000)], dim=1)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def step(scheduler: Any, latents: Tensor, timestep: Any, generator: Any = None) -> Tensor:
    prediction = network(scheduler.scale_model_input(latents, timestep), timestep)
    return scheduler.step(prediction, timestep, latents, generator=generator or generators(0, 1)).prev_sample


def loop(scheduler: Any, latents: Tensor, seeds: tuple[int, ...] = (0, 1)) -> Tensor:
    sources = generators(*seeds)
    for timestep in scheduler.timesteps:
        latents = step(scheduler, latents, timestep, sources)
    return latents


def options_of(scheduler: Any) -> dict[str, Any]:
    """Its configuration as keywords of its class."""
    return {
        name: scheduler.config[name]
        for name in inspect.signature(type(scheduler).__init__).parameters.keys() - {"self"}
    }


# --- configuration ----------------------------------------------------------------------------------------------------


def test_configuration_survives_a_folder_and_makes_the_same_scheduler(scheduler: Any, tmp_path: Path) -> None:
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == type(scheduler).__name__
    assert options_of(loaded) == options_of(scheduler)
    loaded.set_timesteps(NUM_STEPS)
    assert torch.equal(loop(loaded, normal(0)), loop(scheduler, normal(0)))


def test_compatibles_are_made_of_each_others_configuration_and_back(scheduler: Any) -> None:
    expected = loop(scheduler, normal(0))
    for kind in scheduler.compatibles:
        back = type(scheduler).from_config(kind.from_config(scheduler.config).config)
        assert options_of(back) == options_of(scheduler)
        back.set_timesteps(NUM_STEPS)
        assert torch.equal(loop(back, normal(0)), expected)


def test_compatibles_are_those_that_sample_the_same_models() -> None:
    gaussian = {IDDPMScheduler, DPMSolverScheduler}
    assert set(IDDPMScheduler().compatibles) == set(DPMSolverScheduler().compatibles) == gaussian
    assert RectifiedFlowScheduler().compatibles == []
    assert {name for kind in gaussian for name in kind.samplers} == set(SAMPLERS)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_is_swapped_by_its_name(sampler: str) -> None:
    for own in ("ancestral", "dpm-solver++"):
        swapped = SCHEDULERS[own]().with_sampler(sampler)
        assert sampler in swapped.samplers and swapped.config.get("sampler", sampler) in (sampler, "ancestral")
    with pytest.raises(OpenSoraError, match="for models that predict noise"):
        RectifiedFlowScheduler().with_sampler(sampler)


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_a_schedule_has_as_many_timesteps_as_asked_for_and_descends(scheduler: Any) -> None:
    assert scheduler.timesteps.shape == (NUM_STEPS,) and scheduler.num_inference_steps == NUM_STEPS
    assert (scheduler.timesteps.diff() < 0).all()
    assert len(scheduler) == 1000 and scheduler.order == 1 and scheduler.init_noise_sigma == 1
    assert scheduler.scale_model_input(normal(0), scheduler.timesteps[0]) is not None


@pytest.mark.parametrize("as_list", [True, False])
def test_the_default_timesteps_given_are_the_default_schedule(make: Any, scheduler: Any, as_list: bool) -> None:
    given = make()
    given.set_timesteps(timesteps=scheduler.timesteps.tolist() if as_list else scheduler.timesteps)
    assert torch.equal(given.timesteps, scheduler.timesteps) and given.timesteps.dtype == scheduler.timesteps.dtype
    assert given.num_inference_steps == NUM_STEPS
    assert torch.equal(loop(given, normal(0)), loop(scheduler, normal(0)))


def test_other_timesteps_are_another_schedule(make: Any, scheduler: Any) -> None:
    given, timesteps = make(), [900, 500, 100]
    given.set_timesteps(timesteps=timesteps)
    assert given.timesteps.tolist() == timesteps and given.num_inference_steps == 3
    assert not torch.allclose(loop(given, normal(0)), loop(scheduler, normal(0)))


@pytest.mark.parametrize("timesteps", [[], [100, 500], [500, 500], [2000, 500], [500, -1], [[500, 100]], [torch.nan]])
def test_impossible_timesteps_are_refused_in_one_line(scheduler: Any, timesteps: Any) -> None:
    with pytest.raises(OpenSoraError, match=r"got timesteps=.*expected strictly descending .*numbers in") as error:
        scheduler.set_timesteps(timesteps=timesteps)
    assert "\n" not in str(error.value)
    assert len(scheduler.timesteps) == NUM_STEPS  # nothing has happened


def test_a_number_of_steps_beside_a_schedule_is_refused(scheduler: Any) -> None:
    with pytest.raises(OpenSoraError, match="give one of them"):
        scheduler.set_timesteps(5, timesteps=[900, 100])


def test_fractions_between_training_steps_are_refused_where_there_are_none() -> None:
    with pytest.raises(OpenSoraError, match="whole numbers"):
        IDDPMScheduler().set_timesteps(timesteps=torch.tensor([500.5, 100.0]))


def test_noise_levels_of_a_flow_are_its_timesteps() -> None:
    default, given = RectifiedFlowScheduler(use_timestep_transform=True), RectifiedFlowScheduler()
    default.set_timesteps(NUM_STEPS, height=240, width=426, num_frames=51)
    assert default.sigmas.shape == (NUM_STEPS + 1,) and default.sigmas[0] == 1 and default.sigmas[-1] == 0
    assert_close(default.sigmas[:-1].float() * 1000, default.timesteps)
    given.set_timesteps(sigmas=default.sigmas[:-1])
    assert torch.equal(given.timesteps, default.timesteps)
    with pytest.raises(OpenSoraError, match=r"got sigmas=.*\(0, 1\]"):
        given.set_timesteps(sigmas=[2.0, 1.0])
    with pytest.raises(OpenSoraError, match="give one of them"):
        given.set_timesteps(sigmas=[1.0], timesteps=[1000.0])


@pytest.mark.parametrize("name", ["ancestral", "ddim", "dpm-solver++"])
def test_signal_levels_of_a_gaussian_schedule(name: str) -> None:
    scheduler: Any = SCHEDULERS[name]()
    abar = scheduler.alphas_cumprod
    assert abar.shape == (1000,) and (abar.diff() < 0).all() and abar[-1] > 0 and abar[0] < 1
    noisy = scheduler.add_noise(torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1), torch.tensor([300]))
    assert_close(noisy.square().squeeze(), abar[300].float())


# --- one step ---------------------------------------------------------------------------------------------------------


def test_a_tuple_holds_what_the_output_does_and_the_prediction_may_be_named(scheduler: Any) -> None:
    t, latents = scheduler.timesteps[2], normal(0)
    arguments = {"model_output": network(latents, t), "timestep": t, "sample": latents}
    output = scheduler.step(**arguments, generator=generators(0, 1))
    plain = scheduler.step(**arguments, generator=generators(0, 1), return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], output.prev_sample)
    assert torch.equal(plain[0], output[0]) and not torch.equal(plain[0], latents)


@pytest.mark.parametrize("kind", [float, lambda t: t, lambda t: t.reshape(1), lambda t: t.double()])
def test_timesteps_may_be_numbers_or_tensors(make: Any, scheduler: Any, kind: Any) -> None:
    other = make()
    other.set_timesteps(NUM_STEPS)
    sources, latents = generators(0, 1), normal(0)
    for t in other.timesteps:
        latents = step(other, latents, kind(t), sources)
    assert torch.equal(latents, loop(scheduler, normal(0)))


def test_several_timesteps_at_once_are_refused(scheduler: Any) -> None:
    with pytest.raises(OpenSoraError, match="one timestep"):
        scheduler.step(network(normal(0), 0), scheduler.timesteps[:2], normal(0))


def test_step_index_counts_and_a_new_run_begins_anew(scheduler: Any) -> None:
    assert scheduler.step_index is None and scheduler.begin_index is None
    latents = normal(0)
    for i, t in enumerate(scheduler.timesteps):
        latents = step(scheduler, latents, t)
        assert scheduler.step_index == i + 1
    scheduler.set_begin_index(3)
    assert scheduler.begin_index == 3
    scheduler.set_timesteps(NUM_STEPS)
    assert scheduler.step_index is None and scheduler.begin_index is None


def test_frames_whose_turn_came_before_the_run_began_are_noised_at_its_first_step(scheduler: Any) -> None:
    begin, clean, noise = 4, normal(0), normal(1)
    strength = torch.tensor([[1.0, 0.8, 0.1]] * 2)
    timestep = scheduler.timesteps[begin]
    late, _ = scheduler.activate_frames(clean, timestep, strength, noise=noise)
    assert torch.equal(late, clean)  # its turn was earlier, when nobody asked
    scheduler.set_begin_index(begin)
    late, _ = scheduler.activate_frames(clean, timestep, strength, noise=noise)
    assert_close(late[:, :, 1], scheduler.add_noise(clean, noise, timestep)[:, :, 1])
    assert torch.equal(late[:, :, 0], clean[:, :, 0]) and torch.equal(late[:, :, 2], clean[:, :, 2])


def test_noise_is_added_at_every_timestep_more_of_it_at_higher_ones(scheduler: Any) -> None:
    clean, noise, levels = normal(0), normal(1), []
    for t in scheduler.timesteps:
        noisy = scheduler.add_noise(clean, noise, t.expand(2))
        assert noisy.shape == clean.shape and noisy.dtype == clean.dtype and noisy.isfinite().all()
        assert_close(scheduler.add_noise(clean, noise, t), noisy)
        levels.append(float(scheduler.add_noise(torch.zeros(SHAPE), torch.ones(SHAPE), t).mean()))
    assert levels == sorted(set(levels), reverse=True)


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_is_decided_by_its_seeds(make: Any, scheduler: Any) -> None:
    torch.manual_seed(99)
    first = loop(scheduler, normal(0))
    again = make()
    again.set_timesteps(NUM_STEPS)
    assert torch.equal(loop(again, normal(0)), first)
    assert first.isfinite().all() and not torch.equal(loop(again, normal(1)), first)


def test_a_scheduler_may_be_used_again(scheduler: Any) -> None:
    first = loop(scheduler, normal(0))
    scheduler.set_timesteps(3)
    loop(scheduler, normal(5))
    scheduler.set_timesteps(NUM_STEPS)
    assert torch.equal(loop(scheduler, normal(0)), first)


def test_a_batch_is_its_single_samples(scheduler: Any) -> None:
    both = loop(scheduler, normal(0))
    for i in range(2):
        scheduler.set_timesteps(NUM_STEPS)
        assert_close(loop(scheduler, normal(0)[i : i + 1], seeds=(i,)), both[i : i + 1])


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_do_not_disturb_each_other(scheduler: Any, duplicate: Any) -> None:
    expected = [loop(scheduler, normal(0))]
    scheduler.set_timesteps(4)
    expected.append(loop(scheduler, normal(1)))
    scheduler.set_timesteps(NUM_STEPS)
    # The copy is made in the middle of a run, and laid out for another while that one goes on.
    sources, latents = [generators(0, 1), generators(0, 1)], [normal(0), normal(1)]
    latents[0] = step(scheduler, latents[0], scheduler.timesteps[0], sources[0])
    other = duplicate(scheduler)
    other.set_timesteps(4)
    for i in range(NUM_STEPS - 1):
        if i < 4:
            latents[1] = step(other, latents[1], other.timesteps[i], sources[1])
        latents[0] = step(scheduler, latents[0], scheduler.timesteps[i + 1], sources[0])
    assert torch.equal(latents[0], expected[0]) and torch.equal(latents[1], expected[1])


def test_a_copy_made_in_the_middle_of_a_run_can_end_it(scheduler: Any) -> None:
    expected, latents, sources = loop(scheduler, normal(0)), normal(0), generators(0, 1)
    scheduler.set_timesteps(NUM_STEPS)
    for i, t in enumerate(scheduler.timesteps):
        scheduler = copy.deepcopy(scheduler) if i == 3 else scheduler
        latents = step(scheduler, latents, t, sources)
    assert torch.equal(latents, expected)


def test_copies_share_their_tables(scheduler: Any) -> None:
    other = copy.deepcopy(scheduler)
    assert other is not scheduler and other.timesteps is scheduler.timesteps
    assert other.config == scheduler.config


def test_a_run_changes_nothing_that_a_copy_shares(scheduler: Any) -> None:
    """What two threads could trip over in the middle of a step."""
    other = copy.deepcopy(scheduler)

    def inside() -> dict[str, dict[str, int]]:
        parts = {name: part for name, part in vars(other).items() if hasattr(part, "__dict__")}
        return {name: {key: id(value) for key, value in vars(part).items()} for name, part in parts.items()}

    before = inside()
    for t in scheduler.timesteps[:2]:
        step(scheduler, normal(0), t)
    scheduler.set_timesteps(3)
    assert inside() == before and len(other.timesteps) == NUM_STEPS


def test_two_threads_each_with_a_copy_make_their_own_clips(scheduler: Any) -> None:
    expected = {}
    for seed in (0, 1):
        scheduler.set_timesteps(NUM_STEPS + seed)
        expected[seed] = loop(scheduler, normal(seed))
    found: dict[int, Tensor] = {}
    turn = threading.Barrier(2)

    def run(seed: int) -> None:
        mine, sources, latents = copy.deepcopy(scheduler), generators(0, 1), normal(seed)
        mine.set_timesteps(NUM_STEPS + seed)
        for i, t in enumerate(mine.timesteps):
            if i < NUM_STEPS:
                turn.wait(timeout=20)
            latents = step(mine, latents, t, sources)
        found[seed] = latents

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in (0, 1))


# --- what a scheduler is asked ----------------------------------------------------------------------------------------


def test_guided_channels_are_those_of_the_published_samplers() -> None:
    assert [IDDPMScheduler().default_cfg_channels(n) for n in (2, 4)] == [2, 3]
    assert RectifiedFlowScheduler().default_cfg_channels(4) is None
    assert [SCHEDULERS[name]().guides_all_channels for name in SCHEDULERS] == [False, False, False, True]


@pytest.mark.parametrize("foreign", [FlowMatchEulerDiscreteScheduler, DDIMScheduler, object])
def test_foreign_schedulers_are_refused_in_one_sentence_that_names_the_sign(foreign: type) -> None:
    for ask in (check_scheduler, process_of):
        with pytest.raises(OpenSoraError, match=rf"got a {foreign.__name__} .*x - e towards the data .*e - x") as error:
            ask(foreign())
        assert "\n" not in str(error.value)


def test_nothing_is_trained_with_a_solver() -> None:
    with pytest.raises(OpenSoraError, match="DPMSolverScheduler"):
        process_of(DPMSolverScheduler())
