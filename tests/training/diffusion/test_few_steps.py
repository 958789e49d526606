"""A teacher's guided path learnt in few steps: what is learnt is that path, and what comes out samples in few steps."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipeline import make_pipeline, seeded
from tiny_tasks import diffusion_config, family_config, write_clips
from torch import Tensor, nn

import opensora
from opensora.checkpoints.catalogue import settings_in_words
from opensora.data.batch import LatentBatch
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.generation.engine import Engine
from opensora.generation.request import ClipRequest
from opensora.models.clip_conditions import ClipConditions
from opensora.models.guidance import ChannelGuidance
from opensora.models.stdit3 import STDiT3
from opensora.models.text.conditioner import T5Conditioner
from opensora.pipeline import OpenSoraPipeline
from opensora.planning.devices import find_device
from opensora.recipes import find_recipe
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.batch import DiffusionBatch
from opensora.training.diffusion.config import DiffusionTaskConfig
from opensora.training.diffusion.few_steps import FewSteps, GuidedTeacher, pieces
from opensora.training.diffusion.lora import LoRAConfig
from opensora.training.diffusion.noise import IDDPM, Flow
from opensora.training.diffusion.task import DiffusionTask
from opensora.training.diffusion.text import FrozenText, TrainedText
from opensora.training.optimizer import OptimizerConfig
from opensora.training.plan import TrainingPlan
from opensora.training.trainer import Trainer
from opensora.weights import fingerprint

CPU = find_device("cpu")
KEY = BatchKey(0, 0)
PROMPTS = ["a small red ball rolls left over the grass", "a large blue square grows on white"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    make_pipeline().save_pretrained(folder)
    return folder


def student_config(teacher: Path, folder: Path, few_steps: FewSteps, **changes: Any) -> DiffusionTaskConfig:
    options: dict[str, Any] = {
        "diffusion": Flow(time_shift=True),
        "autoencoder": str(teacher),
        "text": FrozenText(str(teacher)),
        "transformer": None,
        "init_from": str(teacher),
        "teacher": str(teacher),
        "few_steps": few_steps,
        "drop_text": 0.0,
        "object_weight": 0.0,
        "preview": None,
    }
    return diffusion_config("flow", folder, **options | changes)


def task_of(config: DiffusionTaskConfig, folder: Path) -> DiffusionTask:
    setup = config.build("cpu")
    setup.data.open(folder / "run")
    assert isinstance(setup.task, DiffusionTask)
    return setup.task


def batch_of(pipeline: OpenSoraPipeline, noise: Tensor) -> DiffusionBatch:
    """The clips of `PROMPTS`, as a pipeline would begin them."""
    text, _ = pipeline.encode_prompt(PROMPTS, None)
    conditions = ClipConditions(fps=8.0, height=torch.full((2,), 16.0), width=torch.full((2,), 24.0), num_frames=5)
    clips = LatentBatch(torch.zeros_like(noise), PROMPTS, conditions, "5f")
    return DiffusionBatch(clips, noise, torch.zeros(2), text, None)


SIZE = {"height": 16, "width": 24, "num_frames": 5, "num_latents": 2}


# --- the path ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(4, 4), (2, 4), (1, 4)], ids=str)
def test_the_path_is_that_of_the_teachers_pipeline_bit_for_bit(steps: tuple[int, int], teacher: Path) -> None:
    """Guidance, time shift and Euler steps are those of sampling; where a piece is one step, it is that very step."""
    num_steps, teacher_steps = steps
    pipeline = opensora.load_pipeline(teacher)
    pipeline.set_progress_bar_config(disable=True)
    seen: list[Tensor] = []

    def keep(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return {}

    noise = torch.randn(2, 4, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_inference_steps": teacher_steps, "latents": noise, "generator": seeded(0, 1)}
    pipeline(PROMPTS, **options, output_type="latent", callback_on_step_end=keep)
    settings = FewSteps(num_steps, teacher_steps)
    walker = GuidedTeacher(
        teacher, settings, pipeline.scheduler, pipeline.transformer, device="cpu", dtype=torch.float32
    )
    path = walker.walk(batch_of(pipeline, noise), None, walker.timesteps(**SIZE))
    assert torch.equal(path[0], noise) and len(path) == num_steps + 1
    for reached, sampled in zip(path[1:], seen[walker.every - 1 :: walker.every], strict=True):
        assert torch.equal(reached, sampled)


def test_a_student_visits_the_timesteps_where_pieces_begin(teacher: Path) -> None:
    pipeline = opensora.load_pipeline(teacher)
    scheduler = pipeline.scheduler
    for num_steps, teacher_steps in ((4, 20), (3, 21), (7, 49)):
        settings = FewSteps(num_steps, teacher_steps)
        walker = GuidedTeacher(teacher, settings, scheduler, pipeline.transformer, device="cpu", dtype=torch.float32)
        scheduler.set_timesteps(num_steps, **SIZE)
        assert walker.timesteps(**SIZE)[:: walker.every] == scheduler.timesteps.tolist()


class LinearVelocity(nn.Module):
    """A network whose velocity is the latents times one number where it reads a text, another where it reads none."""

    text_conditioner, guidance_rule, reads_guidance = T5Conditioner, ChannelGuidance, False

    def __init__(self, text: float, null: float) -> None:
        super().__init__()
        self.factors = torch.tensor([text, null])

    def encode_text(self, **text: Tensor) -> Tensor:
        return text.get("drop_text", torch.zeros(len(text["encoder_hidden_states"]), dtype=torch.bool))

    def cache_context(self, name: str, **step: int) -> Any:
        return torch.no_grad()

    def forward(self, latents: Tensor, timestep: Tensor, text_context: Tensor, **told: Any) -> Any:
        return SimpleNamespace(sample=self.factors[text_context.long()][:, None, None, None, None] * latents)


def test_of_a_linear_velocity_the_student_is_known_in_closed_form(teacher: Path) -> None:
    """Euler steps of length d multiply by 1 + d a each, with a the guided factor; so pieces are known, and learnt."""
    pipeline = make_pipeline()
    settings = FewSteps(num_steps=2, teacher_steps=6, guidance_scale=2.0)
    walker = GuidedTeacher(
        teacher, settings, pipeline.scheduler, pipeline.transformer, device="cpu", dtype=torch.float32
    )
    walker.transformer = LinearVelocity(text=0.5, null=-0.25)
    guided = -0.25 + 2.0 * (0.5 - -0.25)
    noise = torch.randn(2, 4, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    batch, timesteps = batch_of(pipeline, noise), walker.timesteps(**SIZE)
    process = pipeline.scheduler.noise_process()
    learnt = pieces(batch, walker.walk(batch, None, timesteps), timesteps[::3], process)
    times = [timestep / 1000 for timestep in timesteps] + [0.0]
    factors = [1 + (times[i] - times[i + 1]) * guided for i in range(6)]
    at, expected = 1.0, []
    for piece in (0, 1):
        through = factors[3 * piece] * factors[3 * piece + 1] * factors[3 * piece + 2]
        expected.append(at * (through - 1) / (times[3 * piece] - times[3 * piece + 3]) * noise)
        at *= through
    target = learnt.clips.latents - learnt.noise
    torch.testing.assert_close(target, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert learnt.t.tolist() == [timesteps[0]] * 2 + [timesteps[3]] * 2
    assert learnt.clips.captions == PROMPTS * 2 and len(learnt.text) == 4


@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
def test_pieces_are_mixed_to_the_path_again(sigma_min: float) -> None:
    """Noise and clean latents of a piece are such that what training sees is the path, and learns its velocity."""
    pipeline = make_pipeline()
    path = list(torch.randn(3, 2, 4, 2, 2, 3, generator=torch.Generator().manual_seed(1)).unbind())
    process = dataclasses.replace(pipeline.scheduler.noise_process(), sigma_min=sigma_min)
    learnt = pieces(batch_of(pipeline, path[0]), path, [1000.0, 400.0], process)
    noisy = process.corrupt(learnt.clips.latents, learnt.noise, learnt.t)
    torch.testing.assert_close(noisy, torch.cat(path[:2]), rtol=1e-4, atol=1e-5)
    velocity = torch.cat([(path[1] - path[0]) / 0.6, (path[2] - path[1]) / 0.4])
    exact = process.losses(velocity, clean=learnt.clips.latents, noisy=noisy, noise=learnt.noise, t=learnt.t)
    assert exact["velocity"].max() < 1e-8


def test_conditioning_frames_stay_clean_all_the_way(teacher: Path, tmp_path: Path) -> None:
    task = task_of(student_config(teacher, tmp_path, FewSteps(2, 4), frame_masks={"head": 1.0}), tmp_path)
    batch = task.prepare(KEY)
    assert batch.frame_mask is not None and not batch.frame_mask.all()
    given = ~batch.frame_mask[:, None, :, None, None].expand_as(batch.noise)
    clips = task.data.batch(KEY).latents
    noisy = task.networks.noise_process.corrupt(batch.clips.latents, batch.noise, batch.t, batch.frame_mask)
    torch.testing.assert_close(noisy[given], torch.cat([clips, clips])[given])


# --- what is learnt ---------------------------------------------------------------------------------------------------


def train(config: DiffusionTaskConfig, folder: Path, stop_after: int | None = None, **loop: Any) -> Trainer:
    options: dict[str, Any] = {"precision": "fp32", "log_every": 1, "checkpoint_every": 2, "ema_decay": 0.9}
    trainer = Trainer(Recipe("tiny", config, LoopConfig(**options | loop)), folder)
    if stop_after is None:
        trainer.run()
        return trainer

    def on_step(step: int, steps: int, figures: dict[str, float]) -> None:
        trainer.stop_requested = step == stop_after

    trainer.on_step = on_step
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    return trainer


def latents_of(model: Path | OpenSoraPipeline, **options: Any) -> Tensor:
    pipeline = opensora.load_pipeline(model) if isinstance(model, Path) else model
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS * 4, generator=seeded(*range(50, 58)), output_type="latent", **options).frames


@pytest.mark.slow
def test_a_student_is_nearer_to_its_teachers_end_than_the_teacher_in_as_few_steps(
    teacher: Path, tmp_path: Path
) -> None:
    config = student_config(teacher, tmp_path, FewSteps(2, 20))
    optimizer = OptimizerConfig(matrices="adamw", lr=3e-3, warmup_steps=2, decay=0.8)
    train(config, tmp_path / "run", steps=60, checkpoint_every=0, optimizer=optimizer)
    end = latents_of(teacher, num_inference_steps=20)
    student = latents_of(tmp_path / "run" / "model")
    teacher_in_two = latents_of(teacher, num_inference_steps=2)
    assert (student - end).square().mean() < 0.7 * (teacher_in_two - end).square().mean()


def test_a_run_that_was_stopped_is_the_run_that_was_not_bit_for_bit(teacher: Path, tmp_path: Path) -> None:
    config = student_config(teacher, tmp_path, FewSteps(2, 4), frame_masks={"head": 0.5})
    whole = train(config, tmp_path / "whole", steps=4, microbatches=2)
    train(config, tmp_path / "halves", steps=4, microbatches=2, stop_after=2)
    halves = train(config, tmp_path / "halves", steps=4, microbatches=2)
    for name, weight in whole.module.state_dict().items():
        assert torch.equal(weight, halves.module.state_dict()[name]), name


def test_another_teacher_is_refused(teacher: Path, tmp_path: Path) -> None:
    """Its weights are part of what a run is bound to."""
    other = tmp_path / "other"
    make_pipeline().save_pretrained(other)
    config = dataclasses.replace(student_config(teacher, tmp_path, FewSteps(2, 4)), teacher=str(other))
    train(config, tmp_path / "run", steps=4, stop_after=2)
    changed = make_pipeline()
    with torch.no_grad():
        changed.transformer.final_layer.linear.weight.add_(1.0)
    changed.save_pretrained(other)
    with pytest.raises(OpenSoraError, match="began with other contents of: teacher"):
        train(config, tmp_path / "run", steps=4)


@pytest.mark.parametrize("version", ["1.2", "1.3", "2.0"])
def test_every_generation_of_rectified_flow_learns_few_steps(version: str, tmp_path: Path) -> None:
    """With known frames beside the noise and in its place, null texts that are learnt and that are encoded."""
    first = family_config(version, write_clips(tmp_path / "clips"), export_dtype="float32")
    whole: Any = first.build("cpu").task
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in whole.module.parameters():  # as it is initialised, a network answers zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    whole.export(whole.module, tmp_path / "teacher")
    start = {"transformer": None, "init_from": str(tmp_path / "teacher"), "teacher": str(tmp_path / "teacher")}
    undropped: dict[str, Any] = {"drop_text": 0.0, "drop_pooled": None, "drop_of_known": {}}
    task = task_of(dataclasses.replace(first, few_steps=FewSteps(2, 4), **start, **undropped), tmp_path)
    for position in range(3):
        batch = task.prepare(BatchKey(0, position))
        loss = task.loss(batch, KEY)["velocity"]
        assert len(batch.noise) == len(loss) == 4 and torch.isfinite(loss).all() and loss.min() > 0


# --- the student ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    config = student_config(teacher, folder, FewSteps(2, 4), defaults={"num_inference_steps": 30})
    train(config, folder / "run", steps=1)
    return folder / "run" / "model"


def test_a_student_samples_in_its_steps_and_says_whose_it_is(student: Path, teacher: Path) -> None:
    pipeline = opensora.load_pipeline(student)
    pipeline.set_progress_bar_config(disable=True)
    assert (pipeline.config.num_inference_steps, pipeline.config.guidance_scale) == (2, 1.0)
    weights = load_file(next((teacher / "transformer").glob("*.safetensors")))
    expected = {"teacher": teacher.parent.name, "teacher_steps": 4, "guidance_scale": 3.0, "num_steps": 2}
    said = pipeline.config.distilled_from
    assert expected.items() <= said.items() and said["cfg_channels"] == [0, 1, 2, 3]
    assert said["fingerprint"] == fingerprint({**pipeline.transformer.state_dict(), **weights})
    output = pipeline("a red ball", generator=0, output_type="latent")
    assert output.num_evaluations == 2 and output.settings["distilled_from"] == said


@pytest.mark.parametrize(
    ("asked", "said"),
    [({}, None), ({"num_inference_steps": 8}, "8 steps"), ({"guidance_scale": 2.0}, "guidance")],
    ids=str,
)
def test_other_steps_or_guidance_are_made_and_noted(student: Path, asked: dict[str, Any], said: str | None) -> None:
    request = ClipRequest("a red ball", model=str(student), seed=1, **asked)
    clip = Engine.load(request).generate(request)
    assert clip.record is not None and clip.record.pipeline["distilled_from"]["num_steps"] == 2
    notes = [note for note in clip.record.notes if "distilled" in note]
    assert notes == ([] if said is None else notes) and len(notes) == (said is not None)
    assert said is None or f"it is asked for {said}, which it did not learn" in notes[0]


def test_a_model_that_says_nothing_of_its_steps_is_refused() -> None:
    for said in ({}, {"num_steps": 0}, {"num_steps": "4"}):
        with pytest.raises(OpenSoraError, match=r"distilled_from is .*expected an object whose num_steps"):
            make_pipeline(distilled_from=said)


def test_what_a_model_was_distilled_from_is_told_in_words() -> None:
    described: dict[str, Any] = {
        "scheduler": {"class": "RectifiedFlowScheduler"},
        "latent_space": {"scaling_factor": 0.5},
        "text_tokens": 24,
        "defaults": {
            "num_frames": 5,
            "height": 16,
            "width": 24,
            "fps": 8,
            "cfg_channels": None,
            "num_inference_steps": 2,
            "guidance_scale": 1.0,
            "distilled_from": {"teacher": "toybox", "teacher_steps": 20, "guidance_scale": 2.5, "num_steps": 2},
        },
    }
    assert ("distilled from", "toybox, its 20 steps at guidance 2.5") in settings_in_words(described)


def test_a_student_is_a_teacher_of_fewer_steps(student: Path, tmp_path: Path) -> None:
    """Its guidance is 1, so it is asked once a step."""
    task = task_of(student_config(student, tmp_path, FewSteps(1, 2)), tmp_path)
    assert task.networks.walker is not None and task.networks.walker.guidance_scale == 1
    seen: list[int] = []
    task.networks.walker.transformer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    batch = task.prepare(KEY)
    assert seen == [3, 3] and len(batch.noise) == 3


def test_an_adapter_learns_few_steps_and_says_so(teacher: Path, tmp_path: Path) -> None:
    config = student_config(teacher, tmp_path, FewSteps(2, 4), train=LoRAConfig(2))
    train(config, tmp_path / "run", steps=1)
    pipeline = opensora.load_pipeline(teacher, adapters={tmp_path / "run" / "model": 1.0})
    assert torch.isfinite(latents_of(pipeline, num_inference_steps=2, guidance_scale=1.0)).all()


# --- before it starts -------------------------------------------------------------------------------------------------


def test_a_plan_counts_the_teachers_work_and_memory(teacher: Path, tmp_path: Path) -> None:
    """Clips go through the teacher twice a step of its own, and through the student once a piece."""
    plans = [
        TrainingPlan(Recipe("tiny", student_config(teacher, tmp_path, FewSteps(2, steps)), LoopConfig(steps=2)), CPU)
        for steps in (4, 8)
    ]
    four, eight = ((plan, plan.cost(plan.networks.shapes[0])) for plan in plans)
    assert four[1].flops == eight[1].flops and four[1].tokens == 2 * 3 * 2 * 2  # pieces, clips, frames, patches
    a_clip_once = four[0].networks.work(four[0].networks.shapes[0]).forward / (2 * 3)
    four_steps_more = eight[1].frozen_flops - four[1].frozen_flops
    assert 0.4 * 4 * 2 * 3 * a_clip_once < four_steps_more < 4 * 2 * 3 * a_clip_once  # the text is read in once
    without = dataclasses.replace(student_config(teacher, tmp_path, FewSteps(2, 4)), few_steps=None, teacher=None)
    plain = TrainingPlan(Recipe("tiny", without, LoopConfig(steps=2)), CPU).memory
    weights = sum(p.numel() * 4 for p in make_pipeline().transformer.parameters())
    assert four[0].memory.frozen == pytest.approx(plain.frozen + weights, rel=0.01)
    assert four[0].memory.activations > plain.activations


@pytest.mark.parametrize("name", ["distill_toybox", "distill_v1_2"])
def test_recipes_are_planned_without_a_file(name: str) -> None:
    plan = find_recipe(name).objective.plan()  # type: ignore[attr-defined]
    shape = min(plan.shapes(), key=lambda shape: shape.batch_size * shape.num_frames * shape.height)
    walker = plan.networks.walker
    assert walker is not None and next(walker.transformer.parameters()).is_meta
    assert len(plan.meta_batch(shape).noise) == walker.settings.num_steps * shape.batch_size
    assert plan.networks.defaults["num_inference_steps"] == walker.settings.num_steps == 4
    assert plan.networks.defaults["guidance_scale"] == 1 != walker.guidance_scale
    assert "teacher" in plan.frozen_workloads(shape)


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"few_steps": FewSteps, "args": (0, 4)}, r"num_steps is 0; give 1 or more"),
        ({"few_steps": FewSteps, "args": (4, 18)}, r"teacher_steps is 18, which 4 steps .* a multiple, such as 16"),
        ({"teacher": None}, r"few_steps are those of a teacher; name the model by objective\.teacher"),
        ({"diffusion": IDDPM()}, r"few_steps is for rectified flow alone"),
        ({"text": TrainedText()}, r"freeze the text encoder: objective\.text\.type=FrozenText"),
        ({"drop_text": 0.1}, r"nothing is dropped; give objective\.drop_text=0"),
        ({"few_steps": FewSteps, "args": (2, 4, -1.0)}, r"guidance_scale=-1\.0; expected a finite number"),
    ],
)
def test_wrong_settings_are_refused_in_a_line(
    changes: dict[str, Any], message: str, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(OpenSoraError, match=message) as raised:
        if "args" in changes:
            changes = {"few_steps": FewSteps(*changes["args"])}
        dataclasses.replace(student_config(teacher, tmp_path, FewSteps(2, 4)), **changes).build("cpu")
    assert "\n" not in str(raised.value)


def test_a_teacher_of_other_latents_or_texts_is_refused(teacher: Path, tmp_path: Path) -> None:
    config = student_config(teacher, tmp_path, FewSteps(2, 4))
    sizes = dict(make_pipeline().transformer.config)
    for name, what in (("in_channels", "latent channels"), ("caption_channels", "channels of text")):
        student = STDiT3(**{**sizes, name: 8})
        pipeline = opensora.load_pipeline(teacher)
        with pytest.raises(OpenSoraError, match=rf"reads \d+ {what}, the transformer to be trained 8; name a teacher"):
            assert config.few_steps is not None
            GuidedTeacher(teacher, config.few_steps, pipeline.scheduler, student, device="cpu", dtype=torch.float32)


def test_a_teacher_of_another_process_is_refused(teacher: Path, tmp_path: Path) -> None:
    make_pipeline("iddpm").save_pretrained(tmp_path / "iddpm")
    config = dataclasses.replace(student_config(teacher, tmp_path, FewSteps(2, 4)), teacher=str(tmp_path / "iddpm"))
    with pytest.raises(OpenSoraError, match=r"iddpm was trained with IDDPM; a teacher is a model of rectified flow"):
        config.build("cpu")
