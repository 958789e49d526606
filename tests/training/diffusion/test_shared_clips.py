"""Ranks that share clips, sharded weights and all, train what one rank trains."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_tasks import diffusion_config

from opensora.training.config import LoopConfig, Recipe
from opensora.training.optimizer import OptimizerConfig
from opensora.training.trainer import Trainer

LOOP: dict[str, Any] = {"steps": 3, "precision": "fp32", "log_every": 1, "checkpoint_every": 0, "ema_decay": 0.5}


def train(recipe: Recipe, folder: Path) -> None:
    torch.set_num_threads(1)
    Trainer(recipe, folder).run()


def recipe(folder: Path, **loop: Any) -> Recipe:
    """Flow on 2 clips a batch, with conditioning frames; 2 x 3 cells of latents make 2 patches, one half empty."""
    objective = diffusion_config("flow", folder, preview=None, frame_masks={"image_head": 0.5, "random": 0.5})
    return Recipe("shared", objective, LoopConfig(**LOOP | loop, optimizer=OptimizerConfig(matrices="adamw", lr=1e-3)))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    parts = sorted((folder / "model").rglob("*.safetensors"))
    return {f"{path.parent.name}: {name}": tensor for path in parts for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train(recipe(folder, microbatches=2), folder / "run")
    return folder


@pytest.mark.multi
@pytest.mark.parametrize(
    ("num_ranks", "loop"),
    [
        (2, {"microbatches": 2}),
        (4, {"sharding": "none"}),
        (4, {"activation_checkpointing": "full"}),
        (4, {"activation_checkpointing": "selective"}),
    ],
    ids=str,
)
def test_ranks_that_share_clips_train_what_one_trains(alone, tmp_path, num_ranks, loop):
    """Two ranks to a clip; of four, two have batches of their own."""
    run_ranks(num_ranks, train, recipe(alone, sequence_parallel=2, **loop), tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(alone / "run"), rel=1e-4)
    expected = weights(alone / "run")
    assert weights(tmp_path / "run").keys() == expected.keys() and any("transformer" in name for name in expected)
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=f"{name}: ".__add__)
