"""Adapters beside a base in eight bits: they learn what others learn, and all around them is as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_pipeline import make_pipeline
from tiny_tasks import write_clips

from opensora.adapters.adapter import read_adapter
from opensora.adapters.reading import ADAPTER_FILE
from opensora.checkpoints.loading import load_pipeline
from opensora.data.clips import ManifestClips
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.models.int8 import is_int8
from opensora.planning.devices import find_device
from opensora.planning.tracing import weight_bytes
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.config import DiffusionTaskConfig
from opensora.training.diffusion.lora import LoRAConfig
from opensora.training.diffusion.noise import Flow
from opensora.training.diffusion.text import FrozenText
from opensora.training.optimizer import OptimizerConfig
from opensora.training.plan import TrainingPlan
from opensora.training.trainer import Trainer

H100 = find_device("h100")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base and clips."""
    folder = tmp_path_factory.mktemp("place")
    make_pipeline().save_pretrained(folder / "tiny")
    write_clips(folder / "clips")
    return folder


def recipe(place: Path, base_dtype: Any, start: Path | None = None, **loop: Any) -> Recipe:
    base = str(place / "tiny")
    objective = DiffusionTaskConfig(
        data=ManifestClips({"64x64": {"5": (1.0, 2)}}, place / "clips" / "clips.csv", num_workers=0),
        diffusion=Flow(),
        autoencoder=base,
        text=FrozenText(base),
        init_from=base,
        train=LoRAConfig(rank=4, base_dtype=base_dtype, init_adapter=start and str(start)),
    )
    optimizer = OptimizerConfig(matrices="adamw", lr=0.01, warmup_steps=0, decay=0.0)
    settings = {"steps": 3, "precision": "fp32", "log_every": 1, "checkpoint_every": 0, "ema_decay": 0.5}
    return Recipe("lora", objective, LoopConfig(**settings | loop, optimizer=optimizer))


def train(recipe: Recipe, folder: Path) -> Path:
    torch.set_num_threads(1)
    return Trainer(recipe, folder).run()


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])


def held_out_loss(place: Path, cache: Path, adapter: Path | None) -> float:
    """Of the base in float32 with an adapter, on noise and times that no run has seen."""
    setup = recipe(place, None, adapter).objective.build("cpu")
    setup.data.open(cache)
    keys = [BatchKey(1, position, 0) for position in range(16)]
    with torch.no_grad():
        terms = [setup.task.loss(setup.task.prepare(key), key) for key in keys]
    return float(torch.stack([term.mean() for of_batch in terms for term in of_batch.values()]).sum())


def changes(adapter: Path) -> torch.Tensor:
    """What an adapter adds to all weights."""
    layers = read_adapter(adapter).layers
    return torch.cat([(layers[name][1] @ layers[name][0]).flatten() for name in sorted(layers)])


@pytest.mark.slow
def test_an_adapter_learns_what_it_learns_beside_the_base_as_it_is(place, tmp_path):
    made = {dtype: train(recipe(place, dtype, steps=40), tmp_path / str(dtype)) for dtype in (None, "int8")}
    one, other = (losses(tmp_path / str(dtype)) for dtype in made)
    assert 0 < (one - other).abs().max() < 0.005 * one.mean() and one[-10:].mean() < 0.95 * one[:10].mean()
    assert torch.cosine_similarity(changes(made[None]), changes(made["int8"]), dim=0) > 0.9
    before = held_out_loss(place, tmp_path / "cache", None)
    better = {dtype: before - held_out_loss(place, tmp_path / "cache", path) for dtype, path in made.items()}
    assert better["int8"] > 0.95 * better[None] > 0.02 * before
    load_pipeline(place / "tiny", adapters={made["int8"]: 1.0})  # it belongs to the base that was read, and says how
    origin = read_adapter(made["int8"]).origin
    assert origin is not None and origin.training["lora"]["base_dtype"] == "int8"


def test_a_run_is_bound_to_the_base_as_it_was_read(place, tmp_path):
    for dtype in (None, "int8"):
        Trainer(recipe(place, dtype), tmp_path / str(dtype))
    frozen = [(tmp_path / str(dtype) / "frozen.json").read_text() for dtype in (None, "int8")]
    assert frozen[0] == frozen[1] and "the frozen part of what is trained" in json.loads(frozen[0])


def test_a_stopped_run_goes_on_bit_for_bit(place, tmp_path):
    whole = train(recipe(place, "int8", checkpoint_every=1), tmp_path / "whole")
    trainer = Trainer(recipe(place, "int8", checkpoint_every=1), tmp_path / "stopped")
    trainer.stop_requested = True
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    with pytest.raises(OpenSoraError, match=r"objective\.train\.base_dtype=None \(was int8\)"):
        Trainer(recipe(place, None, checkpoint_every=1), tmp_path / "stopped")
    resumed = train(recipe(place, "int8", checkpoint_every=1), tmp_path / "stopped")
    first, second = load_file(whole / ADAPTER_FILE), load_file(resumed / ADAPTER_FILE)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_activations_are_computed_again_as_they_were(place, tmp_path, recompute):
    once = changes(train(recipe(place, "int8"), tmp_path / "once"))
    again = changes(train(recipe(place, "int8", activation_checkpointing=recompute), tmp_path / "again"))
    assert torch.equal(once, again) and once.any()


@pytest.mark.multi
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sharding", ["full", "none"])
def test_ranks_train_what_one_rank_trains(place, tmp_path, sharding, precision):
    train(recipe(place, "int8", microbatches=2, precision=precision), tmp_path / "one")
    run_ranks(2, train, recipe(place, "int8", sharding=sharding, precision=precision), tmp_path / "ranks")
    one, ranks = (changes(tmp_path / name / "model") for name in ("one", "ranks"))
    assert torch.cosine_similarity(one, ranks, dim=0) > (0.9999 if precision == "fp32" else 0.98)
    tolerance = 1e-4 if precision == "fp32" else 1e-2
    torch.testing.assert_close(losses(tmp_path / "ranks"), losses(tmp_path / "one"), rtol=tolerance, atol=0)


def test_a_plan_counts_eight_bits_and_the_same_work(place):
    whole, eight = (TrainingPlan(recipe(place, dtype), H100) for dtype in (None, "int8"))
    network = recipe(place, "int8").objective.build("cpu").task.module
    assert is_int8(network) and eight.memory.weights == weight_bytes(network) < 0.6 * whole.memory.weights
    shape = eight.networks.shapes[0]
    for recompute in ("none", "full"):
        costs = [plan.changed(activation_checkpointing=recompute).cost(shape) for plan in (whole, eight)]
        flops = [(cost.flops, cost.recomputed_flops) for cost in costs]
        assert flops[0] == flops[1] and flops[0][0] > 0
    sent = [plan.changed(world_size=4).cost(shape).sent_bytes for plan in (whole, eight)]
    assert sent[1] < sent[0]
