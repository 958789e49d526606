"""The real training tasks, tiny, on two ranks: what they export is what one rank exports."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_pipeline import make_pipeline
from tiny_tasks import diffusion_config, family_config, vae_config, write_clips

from opensora.recipes import find_recipe
from opensora.training.config import LoopConfig, Recipe, TaskConfig
from opensora.training.diffusion.few_steps import FewSteps
from opensora.training.diffusion.lora import LoRAConfig
from opensora.training.diffusion.text import FrozenText
from opensora.training.optimizer import OptimizerConfig
from opensora.training.trainer import Trainer
from opensora.training.vae.clips import Cut
from opensora.training.vae.config import VAETaskConfig
from opensora.training.vae.discriminator import DiscriminatorConfig

pytestmark = pytest.mark.multi


def train(objective: TaskConfig, folder: Path, loop: dict) -> None:
    torch.set_num_threads(1)
    settings = {"steps": 3, "precision": "fp32", "log_every": 1, "checkpoint_every": 2}
    settings["preview_every"] = 2 if getattr(objective, "preview", objective) is not None else 0
    optimizer = OptimizerConfig(matrices="adamw", lr=1e-2, eps=1e-4, warmup_steps=1)  # for Muon see test_parallel.py
    Trainer(Recipe("tiny", objective, LoopConfig(**settings | {"optimizer": optimizer} | loop)), folder).run()


def exported(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "model").rglob("*.safetensors"))
    assert files
    return {f"{file.parent.name}.{name}": value for file in files for name, value in load_file(file).items()}


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def assert_same_run(one: Path, other: Path) -> None:
    torch.testing.assert_close(exported(other), exported(one), rtol=1e-3, atol=1e-4)
    assert losses(other) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.parametrize("kind", ["flow", "iddpm"])
@pytest.mark.parametrize(
    "ranks",
    [
        {"sharding": "full", "activation_checkpointing": "selective"},
        {"sharding": "none"},
        {"sharding": "full", "sequence_parallel": 2, "microbatches": 2},
    ],
    ids=["sharded", "replicated", "sequence"],
)
def test_diffusion_on_two_ranks(tmp_path: Path, kind: str, ranks: dict) -> None:
    objective = diffusion_config(kind, tmp_path, frame_masks={"image_head": 0.5})
    train(objective, tmp_path / "one", {"microbatches": 2})
    run_ranks(2, train, objective, tmp_path / "ranks", ranks)
    assert_same_run(tmp_path / "one", tmp_path / "ranks")


@pytest.mark.parametrize("version", ["1.3", "2.0", "2.0-dc"])
@pytest.mark.parametrize("ranks", [{"sharding": "full"}, {"sequence_parallel": 2, "microbatches": 2}], ids=str)
def test_known_frames_on_two_ranks(tmp_path: Path, ranks: dict, version: str) -> None:
    """Clips are shown frames of their own wherever they are; ranks that share one hold windows of it (1.3), or a part
    of its text and a part of its video (2.0)."""
    objective = family_config(version, write_clips(tmp_path / "clips"), export_dtype="float32")
    train(objective, tmp_path / "one", {"microbatches": 2})
    run_ranks(2, train, objective, tmp_path / "ranks", ranks)
    assert_same_run(tmp_path / "one", tmp_path / "ranks")


@pytest.mark.parametrize("version", ["1.3", "2.0", "2.0-dc"])
def test_two_pairs_of_ranks_that_share_a_clip_each(tmp_path: Path, version: str) -> None:
    objective = family_config(version, write_clips(tmp_path / "clips"), export_dtype="float32")
    train(objective, tmp_path / "one", {"microbatches": 2})
    run_ranks(4, train, objective, tmp_path / "ranks", {"sharding": "full", "sequence_parallel": 2})
    assert_same_run(tmp_path / "one", tmp_path / "ranks")


@pytest.mark.parametrize("version", ["1.2", "2.0"])
@pytest.mark.parametrize("ranks", [{"sharding": "full"}, {"sequence_parallel": 2, "microbatches": 2}], ids=str)
def test_an_adapter_on_two_ranks(tmp_path: Path, ranks: dict, version: str) -> None:
    """The network is asked twice a step, once without the adapter."""
    manifest = write_clips(tmp_path / "clips")
    base = family_config(version, manifest).build("cpu").task.networks.transformer
    torch.nn.init.normal_(base.final_layer.linear.weight, std=0.2)  # zeros would hide all other layers
    base.save_pretrained(tmp_path / "base")
    adapter = LoRAConfig(2, preserve=0.3)
    objective = family_config(version, manifest, init_from=str(tmp_path / "base"), transformer=None, train=adapter)
    train(objective, tmp_path / "one", {"microbatches": 2})
    run_ranks(2, train, objective, tmp_path / "ranks", ranks)
    assert_same_run(tmp_path / "one", tmp_path / "ranks")
    assert any(line.get("change", 0) > 0 for line in map(json.loads, (tmp_path / "ranks" / "metrics.jsonl").open()))


@pytest.mark.parametrize("ranks", [{"sharding": "full"}, {"sequence_parallel": 2, "microbatches": 2}], ids=str)
def test_few_steps_on_two_ranks(tmp_path: Path, ranks: dict) -> None:
    """Each rank walks the teacher's path of its own clips, or all of one that it shares."""
    make_pipeline().save_pretrained(tmp_path / "teacher")
    teacher = str(tmp_path / "teacher")
    start = {"autoencoder": teacher, "init_from": teacher, "transformer": None, "text": FrozenText(teacher)}
    learnt = {"teacher": teacher, "few_steps": FewSteps(2, 4), "drop_text": 0.0, "preview": None}
    objective = diffusion_config("flow", tmp_path, **start, **learnt, frame_masks={"image_head": 0.5})
    train(objective, tmp_path / "one", {"microbatches": 2})
    run_ranks(2, train, objective, tmp_path / "ranks", ranks)
    assert_same_run(tmp_path / "one", tmp_path / "ranks")


@pytest.mark.parametrize("sharding", ["full", "none"])
@pytest.mark.parametrize("stage", ["frames", "pixels"])
def test_an_autoencoder_and_its_critic_on_two_ranks(tmp_path: Path, stage: str, sharding: str) -> None:
    discriminator = DiscriminatorConfig(dim=4, depth=2, start=1)
    objective = vae_config(stage, frames_per_clip=None, mse_weight=1.0, discriminator=discriminator)
    train(objective, tmp_path / "one", {"microbatches": 2})
    run_ranks(2, train, objective, tmp_path / "ranks", {"sharding": sharding})
    assert_same_run(tmp_path / "one", tmp_path / "ranks")


@pytest.mark.parametrize("recipe", ["vae_v1_3_debug", "vae_v2_0_dc_debug"])
def test_an_autoencoder_of_one_network_on_two_ranks(tmp_path: Path, recipe: str) -> None:
    """Against our own critic: the published one's norms look at all clips that a rank has at once."""
    objective = find_recipe(recipe).objective
    assert isinstance(objective, VAETaskConfig)
    discriminator = DiscriminatorConfig(dim=4, depth=2, start=1)
    objective = dataclasses.replace(objective, discriminator=discriminator)
    train(objective, tmp_path / "one", {"microbatches": 2})
    run_ranks(2, train, objective, tmp_path / "ranks", {"sharding": "full"})
    assert_same_run(tmp_path / "one", tmp_path / "ranks")


def test_an_autoencoder_whose_ranks_have_clips_of_different_lengths(tmp_path: Path) -> None:
    """Its blocks run more often for a longer clip, where ranks must not wait for each other."""
    objective = vae_config("pixels", frames_per_clip=None, cut=Cut(image_share=0.5), micro_batch_size=1)
    train(objective, tmp_path / "one", {"microbatches": 2})
    run_ranks(2, train, objective, tmp_path / "ranks", {"sharding": "full"})
    assert_same_run(tmp_path / "one", tmp_path / "ranks")
