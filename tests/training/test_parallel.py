"""Many ranks train what one rank trains: losses, weights, averages; on any number of ranks a run goes on."""

import functools
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from tiny_regression import Block, assert_equal_weights, final_weights, recipe, run_until

import opensora.training.muon
from opensora.errors import OpenSoraError
from opensora.training.config import Recipe
from opensora.training.muon import orthogonalize
from opensora.training.parallel import wrap_blocks
from opensora.training.trainer import Trainer

# In bfloat16 a last bit of a gradient, which sums of ranks round otherwise, now and then becomes 2^-8 of an update.
float32_muon = mock.patch.object(
    opensora.training.muon, "orthogonalize", functools.partial(orthogonalize, dtype=torch.float32)
)


@float32_muon
def train(recipe: Recipe, folder: Path, stop_after: int | None = None) -> None:
    """See `run_until`."""
    run_until(recipe, folder, stop_after)


def figures(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path, tolerance: float) -> None:
    """Final averaged weights and the logged course."""
    torch.testing.assert_close(final_weights(other), final_weights(one), rtol=tolerance, atol=tolerance)
    for a, b in zip(figures(one), figures(other), strict=True):
        for name in ("loss", "mse", "norm", "grad_norm", "loss/bucket/first", "loss/bucket/second"):
            assert b[name] == pytest.approx(a[name], rel=10 * tolerance), f"{name} of step {a['step']}"


@pytest.mark.multi
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("sharding", ["full", "none"])
@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_ranks_train_what_microbatches_of_one_rank_train(
    tmp_path: Path, num_ranks: int, sharding: str, matrices: str
) -> None:
    train(recipe(microbatches=4, matrices=matrices), tmp_path / "one")
    ranks = recipe(microbatches=4 // num_ranks, sharding=sharding, matrices=matrices)
    run_ranks(num_ranks, train, ranks, tmp_path / "ranks")
    assert_same_run(tmp_path / "one", tmp_path / "ranks", 1e-5)


@pytest.mark.multi
@pytest.mark.parametrize("sharding", ["full", "none"])
def test_a_critic_is_trained_on_all_ranks(tmp_path: Path, sharding: str) -> None:
    train(recipe(microbatches=2, critic=True), tmp_path / "one")
    run_ranks(2, train, recipe(microbatches=1, critic=True, sharding=sharding), tmp_path / "ranks")
    assert_same_run(tmp_path / "one", tmp_path / "ranks", 1e-5)
    for a, b in zip(figures(tmp_path / "one"), figures(tmp_path / "ranks"), strict=True):
        assert b["critic_loss"] == pytest.approx(a["critic_loss"], rel=1e-4)


@pytest.mark.multi
def test_bf16_ranks_stay_near_one_rank(tmp_path: Path) -> None:
    """Weights are gathered in bfloat16, sums of gradients stay float32."""
    train(recipe(microbatches=2, precision="bf16", matrices="adamw"), tmp_path / "one")
    run_ranks(2, train, recipe(microbatches=1, precision="bf16", matrices="adamw"), tmp_path / "ranks")
    assert_same_run(tmp_path / "one", tmp_path / "ranks", 5e-3)
    assert {w.dtype for w in final_weights(tmp_path / "ranks").values()} == {torch.float32}


@pytest.mark.multi
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_ranks_that_compute_activations_again_train_the_same(tmp_path: Path, recompute: str) -> None:
    train(recipe(microbatches=2), tmp_path / "one")
    run_ranks(2, train, recipe(microbatches=1, activation_checkpointing=recompute), tmp_path / "ranks")
    assert_same_run(tmp_path / "one", tmp_path / "ranks", 1e-5)


@pytest.mark.multi
@pytest.mark.slow
def test_compiled_ranks_train_the_same(tmp_path: Path) -> None:
    train(recipe(steps=4, microbatches=2, dropout=0), tmp_path / "one")
    compiled = recipe(steps=4, microbatches=1, dropout=0, compile=True, activation_checkpointing="selective")
    run_ranks(2, train, compiled, tmp_path / "ranks", timeout_s=500)
    assert_same_run(tmp_path / "one", tmp_path / "ranks", 1e-4)


@pytest.mark.multi
@pytest.mark.parametrize("num_ranks", [1, 4])
@pytest.mark.parametrize("sharding", ["full", "none"])
def test_a_run_of_two_ranks_goes_on_on_another_number(tmp_path: Path, num_ranks: int, sharding: str) -> None:
    """The stream of data goes on, so the weights are those of the run that never stopped."""
    run_ranks(2, train, recipe(microbatches=2, critic=True), tmp_path / "whole")
    run_ranks(2, train, recipe(microbatches=2, critic=True), tmp_path / "cut", 5)
    assert figures(tmp_path / "cut")[-1]["step"] == 5
    changed = recipe(microbatches=4 // num_ranks, critic=True, sharding=sharding)
    run_ranks(num_ranks, train, changed, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 1e-5)


@float32_muon
def previewed(recipe: Recipe, folder: Path) -> tuple[list[tuple[int, int]], list[str]]:
    """Where the rank's batches lay, and which classes its blocks have when all is done."""
    trainer = Trainer(recipe, folder)
    trainer.run()
    task, setup = trainer.task, trainer.setup
    assert list(dict.fromkeys(setup.data.prefetched)) == task.prepared  # all prefetched, once each, in order
    return [(d.step, d.position) for d in task.prepared], [type(b).__name__ for b in setup.partition.blocks]


@pytest.mark.multi
def test_previews_of_ranks_show_the_averaged_weights_and_leave_them_sharded(tmp_path: Path) -> None:
    train(recipe(microbatches=2, steps=4, preview_every=2), tmp_path / "one")
    settings = {"steps": 4, "preview_every": 2, "activation_checkpointing": "full"}
    results = run_ranks(2, previewed, recipe(microbatches=1, **settings), tmp_path / "ranks")
    previews = [[f["preview"] for f in figures(tmp_path / n) if "preview" in f] for n in ("one", "ranks")]
    assert len(previews[0]) == 2
    assert previews[1] == pytest.approx(previews[0], rel=1e-4)
    for rank, (places, kinds) in enumerate(results):
        assert places == [(step, 2 * step + rank) for step in range(4)]
        assert kinds == ["FSDPBlock"] * 3


@pytest.mark.multi
def test_a_stop_asked_of_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    run_ranks(2, train, recipe(), tmp_path, 4)  # only the first rank is asked
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003", "step-00000004"]


def refused(recipe: Recipe, folder: Path) -> str:
    with pytest.raises(OpenSoraError) as error:
        Trainer(recipe, folder)
    return str(error.value)


@pytest.mark.multi
def test_ranks_that_do_not_divide_into_sequences_are_refused(tmp_path: Path) -> None:
    messages = run_ranks(2, refused, recipe(sequence_parallel=3), tmp_path)
    assert len(set(messages)) == 1
    assert "loop.sequence_parallel is 3 and the run has 2 ranks" in messages[0]
    assert not list(tmp_path.iterdir())


def test_one_process_cannot_share_a_clip(tmp_path: Path) -> None:
    assert "the run has 1 rank" in refused(recipe(sequence_parallel=2), tmp_path)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_computing_activations_again_changes_nothing(tmp_path: Path, recompute: str) -> None:
    Trainer(recipe(), tmp_path / "kept").run()
    Trainer(recipe(activation_checkpointing=recompute), tmp_path / "again").run()
    assert_equal_weights(final_weights(tmp_path / "kept"), final_weights(tmp_path / "again"))


def test_selective_checkpointing_keeps_more_than_full_and_less_than_none() -> None:
    def kept_bytes(recompute: str) -> int:
        block = Block(64)
        if recompute != "none":
            wrap_blocks([block], recompute, compiled=False)
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            block(torch.randn(32, 64, requires_grad=True))
        parameters = {p.data_ptr() for p in block.parameters()}
        return sum(t.nbytes for pointer, t in kept.items() if pointer not in parameters)

    assert kept_bytes("full") < kept_bytes("none")


@pytest.mark.slow
def test_a_compiled_network_trains_the_same(tmp_path: Path) -> None:
    train(recipe(steps=4, dropout=0), tmp_path / "plain")  # compiled dropout draws other numbers
    train(recipe(steps=4, dropout=0, compile=True), tmp_path / "compiled")
    assert_same_run(tmp_path / "plain", tmp_path / "compiled", 1e-4)
