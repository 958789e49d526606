"""The loop: exact resume, survival of a kill, non-finite steps, averaging, rates."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from tiny_regression import (
    KeysSeen,
    Regression,
    RegressionConfig,
    SumOfOnes,
    assert_equal_weights,
    final_weights,
    recipe,
    setup_of,
)
from torch import nn

from opensora.distributed.checkpoint import read_names
from opensora.errors import OpenSoraError
from opensora.training.config import LoopConfig
from opensora.training.ema import EMA
from opensora.training.metrics import Work
from opensora.training.optimizer import Optimizer, OptimizerConfig, learning_rate_factor
from opensora.training.task import TrainingSetup
from opensora.training.trainer import Trainer


class Interrupted(Exception):
    pass


def interrupt_after(last_step: int):
    def on_step(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == last_step:
            raise Interrupted

    return on_step


@pytest.mark.parametrize("last_step", [1, 4, 6, 11])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, last_step: int) -> None:
    Trainer(recipe(), tmp_path / "whole").run()
    with pytest.raises(Interrupted):
        Trainer(recipe(), tmp_path / "cut", on_step=interrupt_after(last_step)).run()
    resumed = Trainer(recipe(), tmp_path / "cut")
    expected = (last_step - 1) // 3 * 3  # a checkpoint is written after its step has been told
    assert resumed.step == expected
    resumed.run()
    assert_equal_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut"))


def test_metrics_of_a_resumed_run_read_as_one_run(tmp_path: Path) -> None:
    def steps_logged(folder: Path) -> list[str]:
        return [line.split(",")[0] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    with pytest.raises(Interrupted):
        Trainer(recipe(), tmp_path, on_step=interrupt_after(8)).run()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 9, "lo')
    Trainer(recipe(), tmp_path).run()
    assert steps_logged(tmp_path) == [f'{{"step": {i}' for i in range(1, 13)]


def test_a_stop_that_is_asked_for_loses_no_step(tmp_path: Path) -> None:
    def ask(step: int, steps: int, figures: dict[str, float]) -> None:
        trainer.stop_requested = step == 5

    trainer = Trainer(recipe(), tmp_path / "cut", on_step=ask)
    with pytest.raises(KeyboardInterrupt, match="after step 5"):
        trainer.run()
    resumed = Trainer(recipe(), tmp_path / "cut")
    assert resumed.step == 5
    resumed.run()
    Trainer(recipe(), tmp_path / "whole").run()
    assert_equal_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut"))


def test_a_device_may_have_a_number(tmp_path: Path) -> None:
    Trainer(recipe(steps=1, precision="bf16"), tmp_path, "cpu:0").run()
    assert all(torch.isfinite(w).all() for w in final_weights(tmp_path).values())


def test_non_finite_step_is_skipped_and_training_goes_on(tmp_path: Path) -> None:
    trainer = Trainer(recipe(poison_steps=(4, 5)), tmp_path)
    trainer.run()
    assert all(torch.isfinite(w).all() for w in final_weights(tmp_path).values())
    assert trainer.skipped_steps == 2 and trainer.bad_steps == 0
    assert [line["skipped_steps"] for line in lines(tmp_path)][-1] == 2
    assert Trainer(recipe(poison_steps=(4, 5)), tmp_path).skipped_steps == 2


def test_a_run_whose_frozen_weights_have_changed_is_refused(tmp_path: Path, monkeypatch) -> None:
    Trainer(recipe(steps=3), tmp_path).run()
    Trainer(recipe(steps=3), tmp_path)

    def with_other_weights(config: RegressionConfig, device: str) -> TrainingSetup:
        task = Regression(config)
        task.network.given.weight.data += 1
        return setup_of(task)

    monkeypatch.setattr(RegressionConfig, "build", with_other_weights)
    with pytest.raises(OpenSoraError, match="began with other contents of: the frozen part"):
        Trainer(recipe(steps=3), tmp_path)
    Trainer(recipe(steps=3), tmp_path / "another")


def test_a_run_that_never_wrote_a_checkpoint_binds_its_folder_to_nothing(tmp_path: Path) -> None:
    with pytest.raises(OpenSoraError, match="non-finite gradient"):
        Trainer(recipe(poison_steps=tuple(range(12)), max_bad_steps=3, checkpoint_every=0), tmp_path).run()
    Trainer(recipe(steps=3), tmp_path).run()
    with pytest.raises(OpenSoraError, match=r"poison_steps=\[1\] \(was \[\]\); use them"):
        Trainer(recipe(steps=3, poison_steps=(1,)), tmp_path)


def test_a_preview_that_fails_costs_no_step(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> dict[str, float]:
        raise OpenSoraError("a held-out clip has gone")

    monkeypatch.setattr(SumOfOnes, "show", fail)
    with pytest.raises(OpenSoraError, match="has gone"):
        Trainer(recipe(preview_every=3), tmp_path).run()
    assert Trainer(recipe(preview_every=3), tmp_path).step == 3


def test_work_is_counted_for_each_shape() -> None:
    """Batches of one label may have many lengths."""
    layer, work = nn.Linear(4, 4, bias=False), Work(peak_tflops=1.0)
    done = []
    for length in (3, 6, 3):
        batch, before = torch.ones(length, 4), work.done
        with work.counted(batch):
            layer(batch)
        done.append(work.done - before)
    assert done[0] == done[2] > 0 and done[1] == 2 * done[0]


def test_run_of_non_finite_steps_stops_with_advice(tmp_path: Path) -> None:
    with pytest.raises(OpenSoraError, match="non-finite gradient"):
        Trainer(recipe(poison_steps=tuple(range(12)), max_bad_steps=3), tmp_path).run()


def test_resuming_with_other_settings_is_refused_and_named(tmp_path: Path) -> None:
    Trainer(recipe(steps=3), tmp_path).run()
    Trainer(recipe(steps=3, checkpoint_every=1), tmp_path)
    with pytest.raises(OpenSoraError, match=r"loop\.seed=7 \(was 0\)"):
        Trainer(recipe(steps=3, seed=7), tmp_path)


@pytest.mark.parametrize("record_lacks", [False, True])
def test_a_setting_that_the_record_lacks_counts_as_changed(tmp_path: Path, record_lacks: bool) -> None:
    Trainer(recipe(steps=3), tmp_path).run()
    record = tmp_path / "recipe.json"
    if record_lacks:
        record.write_text(record.read_text().replace('"seed": 0,', ""))
        with pytest.raises(OpenSoraError, match=r"loop\.seed=0 \(was None\)"):
            Trainer(recipe(steps=3), tmp_path)
    else:
        Trainer(recipe(steps=3), tmp_path)


def test_zero_means_never(tmp_path: Path) -> None:
    Trainer(recipe(steps=3, log_every=0, checkpoint_every=0), tmp_path).run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_has_the_means_since_the_last_one_and_those_of_groups(tmp_path: Path) -> None:
    told = []
    Trainer(recipe(steps=5), tmp_path / "each", on_step=lambda step, steps, figures: told.append(figures)).run()
    Trainer(recipe(steps=5, log_every=3), tmp_path / "some").run()
    first, last = lines(tmp_path / "some")
    assert (first["step"], last["step"]) == (3, 5)
    for name in ("loss", "mse", "norm", "grad_norm"):
        assert first[name] == pytest.approx(sum(figures[name] for figures in told[:3]) / 3)
        assert last[name] == pytest.approx(sum(figures[name] for figures in told[3:]) / 2)
    each = lines(tmp_path / "each")
    low, high = (sorted(line[f"loss/bucket/{name}"] for line in each[:3]) for name in ("first", "second"))
    assert low[0] < first["loss/bucket/first"] < low[-1] and high[0] < first["loss/bucket/second"] < high[-1]


def test_figures_tell_the_work_and_what_the_data_say(tmp_path: Path) -> None:
    trainer = Trainer(recipe(steps=4, peak_tflops=1e-3), tmp_path)
    trainer.run()
    line = lines(tmp_path)[-1]
    assert line["unreadable"] == 2.0
    assert line["samples_per_s"] > 0 and line["peak_memory_gb"] > 0 and 0 <= line["data_s"] <= line["step_s"]
    matrices = [p.numel() for n, p in trainer.module.named_parameters() if p.ndim == 2 and p.requires_grad]
    per_batch = 3 * 2 * 8 * sum(matrices)  # forward and twice for backward, multiply and add, 8 samples
    counted = set(trainer.work.flops.values())
    assert all(0.5 * per_batch < flops < 1.2 * per_batch for flops in counted), (per_batch, counted)
    assert line["mfu"] > 0
    assert "mfu" not in lines(tmp_path / Trainer(recipe(steps=1), tmp_path / "unknown").run().parent)[-1]


def test_data_are_told_of_batches_ahead_of_time_but_not_beyond_the_end(tmp_path: Path) -> None:
    trainer = Trainer(recipe(steps=3, prefetch=3), tmp_path)
    trainer.run()
    task, data = trainer.task, trainer.setup.data
    assert [key.position for key in data.prefetched[:4]] == [0, 1, 2, 3]
    assert list(dict.fromkeys(data.prefetched)) == task.prepared
    assert [(draw.position, draw.step) for draw in task.prepared] == [(k, k // 2) for k in range(6)]


def test_a_resumed_critic_equals_one_that_was_never_interrupted(tmp_path: Path) -> None:
    whole = Trainer(recipe(critic=True), tmp_path / "whole")
    whole.run()
    with pytest.raises(Interrupted):
        Trainer(recipe(critic=True), tmp_path / "cut", on_step=interrupt_after(7)).run()
    resumed = Trainer(recipe(critic=True), tmp_path / "cut")
    assert resumed.step == 6
    resumed.run()
    assert_equal_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut"))
    assert whole.critic is not None and resumed.critic is not None
    assert_equal_weights(whole.critic.module.state_dict(), resumed.critic.module.state_dict())


def test_a_critic_learns_to_tell_and_the_module_to_deceive(tmp_path: Path) -> None:
    Trainer(recipe(steps=60, critic=True), tmp_path).run()
    losses = [line["critic_loss"] for line in lines(tmp_path)]
    assert min(losses[5:30]) < 0.98 * losses[0]


def test_frozen_weights_are_neither_trained_nor_averaged_nor_saved(tmp_path: Path) -> None:
    trainer = Trainer(recipe(steps=3), tmp_path)
    before = trainer.module.state_dict()["network.given.weight"].clone()
    trainer.run()
    assert torch.equal(final_weights(tmp_path)["network.given.weight"], before)
    names = read_names(tmp_path / "checkpoints" / "step-00000003")
    assert not [name for name in names if "given" in name]
    assert "module/network.stem.weight" in names and "average/network.stem.weight" in names


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(tmp_path: Path) -> None:
    Trainer(recipe(), tmp_path / "whole").run()
    with pytest.raises(Interrupted):
        Trainer(recipe(), tmp_path / "cut", on_step=interrupt_after(8)).run()
    newest = tmp_path / "cut" / "checkpoints" / "step-00000006"
    (weights,) = newest.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    resumed = Trainer(recipe(), tmp_path / "cut")
    assert resumed.step == 3
    (note,) = resumed.notes
    assert "step-00000006 is damaged" in note and "resuming from step-00000003" in note
    resumed.run()
    assert_equal_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut"))


def test_a_checkpoint_is_kept_although_a_damaged_one_is_newer(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        Trainer(recipe(keep_checkpoints=2), tmp_path, on_step=interrupt_after(8)).run()
    (weights,) = (tmp_path / "checkpoints" / "step-00000006").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])

    def ask(step: int, steps: int, figures: dict[str, float]) -> None:
        resumed.stop_requested = step == 4

    resumed = Trainer(recipe(keep_checkpoints=1), tmp_path, on_step=ask)
    with pytest.raises(KeyboardInterrupt, match="after step 4"):
        resumed.run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    assert Trainer(recipe(), tmp_path).step == 4


def test_a_run_that_could_not_begin_does_not_bind_its_folder(tmp_path: Path, monkeypatch) -> None:
    def fail(self: KeysSeen, cache: Path) -> None:
        raise OpenSoraError("no such manifest")

    monkeypatch.setattr(KeysSeen, "open", fail)
    with pytest.raises(OpenSoraError, match="no such manifest"):
        Trainer(recipe(poison_steps=(1,)), tmp_path)
    monkeypatch.undo()
    assert Trainer(recipe(), tmp_path).step == 0


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"muon_lr": 0.0}, {"betas": (0.9, 1.0)}, {"warmup_steps": -1}, {"decay": 1.5}, {"eps": 0.0}]
)
def test_impossible_rates_are_refused(wrong: dict) -> None:
    with pytest.raises(OpenSoraError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)


def test_a_step_that_is_not_finite_is_logged_as_json(tmp_path: Path) -> None:
    Trainer(recipe(steps=3, poison_steps=(1,)), tmp_path).run()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON")) for line in lines]
    assert logged[1]["loss"] is None and logged[2]["loss"] > 0


def test_another_size_of_a_step_is_told(tmp_path: Path) -> None:
    Trainer(recipe(steps=3), tmp_path).run()
    (note,) = Trainer(recipe(steps=3, microbatches=1), tmp_path).notes
    assert "a step now has 1 batches and had 2" in note


def test_the_module_is_as_before_after_a_preview(tmp_path: Path) -> None:
    trainer = Trainer(recipe(steps=3, activation_checkpointing="full", preview_every=1), tmp_path / "previewed")
    parameters = list(trainer.module.parameters())
    trainer.run()
    assert all(a is b for a, b in zip(parameters, trainer.module.parameters(), strict=True))
    assert trainer.module.training and "forward" in trainer.setup.partition.blocks[0].__dict__
    Trainer(recipe(steps=3), tmp_path / "plain").run()
    assert_equal_weights(final_weights(tmp_path / "previewed"), final_weights(tmp_path / "plain"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"microbatches": 0},
        {"keep_checkpoints": 0},
        {"log_every": -1},
        {"ema_decay": 1.0},
        {"prefetch": -1},
    ],
)
def test_impossible_loops_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(OpenSoraError, match=f"loop.{next(iter(wrong))}"):
        LoopConfig(**({"steps": 1} | wrong))


def test_loss_falls(tmp_path: Path) -> None:
    losses = []
    Trainer(recipe(steps=60), tmp_path, on_step=lambda _s, _n, figures: losses.append(figures["loss"])).run()
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_moving_average_follows_its_formula() -> None:
    module = nn.Linear(2, 1, bias=False)
    ema = EMA(module, decay=0.9)
    expected = module.weight.detach().clone()
    for step in range(40):
        with torch.no_grad():
            module.weight.add_(1.0)
        ema.update(module, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(ema.average["weight"], expected)


def test_learning_rate_warms_up_holds_and_falls_to_zero() -> None:
    config = OptimizerConfig(warmup_steps=10, decay=0.5)
    factors = [learning_rate_factor(step, 100, config) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10:50] == [1.0] * 40
    assert all(a > b for a, b in itertools.pairwise(factors[51:]))
    assert factors[100] == pytest.approx(0.0)


def test_muon_moves_a_kernel_by_a_near_orthogonal_matrix() -> None:
    kernel = nn.Parameter(torch.zeros(8, 4, 3))
    optimizer = Optimizer([("k", kernel)], set(), OptimizerConfig(muon_lr=1.0))
    torch.manual_seed(0)
    kernel.grad = torch.randn(8, 4, 3)
    optimizer.step(1.0)
    singular_values = torch.linalg.svdvals(kernel.detach().view(8, 12))
    assert singular_values.min() > 0.5
    assert singular_values.max() < 1.5
