"""The loop: exact resume, survival of a kill, non-finite steps, averaging, rates."""

import itertools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from opensora.distributed.seeding import Draw
from opensora.errors import OpenSoraError
from opensora.training.config import LoopConfig, Recipe
from opensora.training.ema import EMA
from opensora.training.objective import Objective
from opensora.training.optimizer import Optimizer, OptimizerConfig, learning_rate_factor
from opensora.training.trainer import Trainer


class Regression(Objective):
    """A two-layer network learning a fixed linear map, with a convolution so that Muon sees a kernel."""

    not_matrices = {"0.weight"}

    def __init__(self, poison_steps: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(6, 16), nn.Unflatten(1, (4, 4)), nn.Conv1d(4, 3, 3), nn.Flatten())
        self.poison_steps = poison_steps

    def prepare(self, draw: Draw):
        x = torch.randn(8, 6, generator=draw.generator("x"))
        return x * float("nan") if draw.step in self.poison_steps else x

    def loss(self, batch, draw):
        error = (self.module(batch) - batch).square().mean(dim=1)
        return {"mse": error, "_norm": batch.norm(dim=1)}

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.module.state_dict(), folder / "weights.pt")


@dataclass(frozen=True)
class RegressionConfig:
    poison_steps: tuple[int, ...] = ()

    def build(self, device: str) -> Regression:
        return Regression(self.poison_steps)


def recipe(steps: int = 12, poison_steps: tuple[int, ...] = (), **loop) -> Recipe:
    settings = {"checkpoint_every": 3, "log_every": 1, "precision": "fp32", "microbatches": 2, **loop}
    return Recipe("regression", RegressionConfig(poison_steps), LoopConfig(steps=steps, **settings))


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model" / "weights.pt", weights_only=True)


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


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


def test_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from test_trainer import Trainer, recipe\n"
        "Trainer(recipe(), Path(sys.argv[2]), on_step=lambda step, *_: print(step, flush=True)).run()\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 7:
            process.kill()
            break
    process.wait()
    resumed = Trainer(recipe(), tmp_path / "killed")
    assert resumed.step >= 3  # that of step 6 may have been under way
    resumed.run()
    Trainer(recipe(), tmp_path / "whole").run()
    assert_equal_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "killed"))


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


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"microbatches": 0}, {"keep_checkpoints": 0}, {"log_every": -1}, {"ema_decay": 1.0}]
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
