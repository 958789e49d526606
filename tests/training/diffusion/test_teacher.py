"""Learning from a model's answers in place of the clips: what it says is of these latents, and its pupil becomes it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import make_pipeline
from tiny_tasks import diffusion_config

from opensora.cli.main import main
from opensora.diffusion.process import RectifiedFlowProcess
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.training.diffusion.task import DiffusionTask
from opensora.training.diffusion.text import TrainedText

KEY = BatchKey(0, 0)
MASKS = {"head": 0.5}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    make_pipeline().save_pretrained(folder)
    return folder


def task_of(kind: str, teacher: Path, folder: Path, **changes: Any) -> DiffusionTask:
    config = diffusion_config(
        kind,
        folder,
        text=TrainedText(),
        transformer=None,
        init_from=str(teacher),
        teacher=str(teacher),
        frame_masks=MASKS,
        preview=None,
        **changes,
    )
    setup = config.build("cpu")
    setup.data.open(folder / "run")
    assert isinstance(setup.task, DiffusionTask)
    return setup.task


def test_a_pupil_that_is_its_teacher_has_nothing_to_learn(teacher: Path, tmp_path: Path) -> None:
    task = task_of("flow", teacher, tmp_path, object_weight=0.0)
    task.module.eval()  # without the text encoder's dropout
    batch = task.prepare(KEY)
    assert batch.frame_mask is not None and not batch.frame_mask.all() and batch.drop_text.any()
    assert task.loss(batch, KEY)["velocity"].max() < 1e-10
    with torch.no_grad():
        task.networks.transformer.final_layer.linear.bias.add_(1.0)
    assert task.loss(batch, KEY)["velocity"].min().item() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("kind", ["flow", "iddpm"])
def test_what_a_teacher_answers_mixes_to_the_noisy_latents(kind: str, teacher: Path, tmp_path: Path) -> None:
    """Clean latents and noise of its own, in the rates of the pupil's process; and not those that were mixed."""
    new = ("last_layer",) if kind == "iddpm" else ()
    task = task_of(kind, teacher, tmp_path, new_parts=new)
    batch, process = task.prepare(KEY), task.networks.noise_process
    noisy = process.corrupt(batch.clips.latents, batch.noise, batch.t)
    assert task.networks.teacher is not None
    clean, noise = task.networks.teacher.answer(noisy, process, batch)
    signal, rest = (rate.view(-1, 1, 1, 1, 1) for rate in process.rates(batch.t))
    mask = torch.ones(batch.clips.latents.shape[0], batch.clips.latents.shape[2], dtype=torch.bool)
    generated = (mask if batch.frame_mask is None else batch.frame_mask)[:, None, :, None, None].expand_as(noisy)
    torch.testing.assert_close((signal * clean + rest * noise)[generated], noisy[generated], rtol=1e-4, atol=1e-5)
    assert (clean - batch.clips.latents).abs().max() > 0.1


def test_the_variance_is_learnt_of_clips(teacher: Path, tmp_path: Path) -> None:
    """A teacher's one answer has no variance."""
    task = task_of("iddpm", teacher, tmp_path, new_parts=("last_layer",))
    batch = task.prepare(KEY)
    taught = task.loss(batch, KEY)
    task.networks.teacher = None
    plain = task.loss(batch, KEY)
    assert torch.equal(taught["vb"], plain["vb"])
    assert not torch.allclose(taught["epsilon"], plain["epsilon"])


def test_a_teacher_of_another_process_is_refused_in_a_line(tmp_path: Path) -> None:
    make_pipeline("iddpm").save_pretrained(tmp_path / "iddpm")
    with pytest.raises(OpenSoraError, match=r"objective\.teacher .*iddpm was trained with IDDPM; a teacher is a model"):
        task_of("iddpm", tmp_path / "iddpm", tmp_path)


def test_a_run_is_planned_with_its_teacher(teacher: Path, tmp_path: Path, capsys) -> None:
    args = ["train", "toybox_iddpm", "objective.init_from=toybox", "objective.teacher=toybox", "--dry-run"]
    code = main([*args, "objective.autoencoder=toybox", "--device", "cpu", "--output", str(tmp_path / "run")])
    assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
def test_rates_are_those_that_latents_are_mixed_in(sigma_min: float) -> None:
    process = RectifiedFlowProcess(sigma_min=sigma_min)
    clean, noise = torch.randn(2, 3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([0.0, 400.0, 1000.0])
    signal, rest = (rate.view(-1, 1, 1, 1, 1) for rate in process.rates(t))
    torch.testing.assert_close(signal * clean + rest * noise, process.corrupt(clean, noise, t))
