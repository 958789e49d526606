"""AdamW in eight bits: it learns what AdamW learns, its moments do not get stuck, and it takes little memory."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_regression import assert_equal_weights, final_weights, recipe, run_until
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.training.adamw8 import BYTES_OF_A_NUMBER, MOMENTS, AdamW8
from opensora.training.optimizer import Optimizer, OptimizerConfig
from opensora.training.trainer import Trainer


def moment(optimizer: AdamW8, parameter: nn.Parameter, name: str) -> Tensor:
    state = optimizer.state[parameter]
    return MOMENTS[name].decode(state[name], state[f"{name}_factors"])


def learnt(optimizer_of, steps: int = 300) -> tuple[list[float], Tensor]:
    """Losses of a network that imitates another one, and its weights."""
    torch.manual_seed(0)
    network, other = (nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32)) for _ in range(2))
    optimizer = optimizer_of([p for p in network.parameters() if p.ndim > 1])
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 32)
        loss = (network(x) - other(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.9, 0.999)])
def test_it_learns_what_adamw_learns(betas: tuple[float, float]) -> None:
    settings = {"lr": 2e-3, "betas": betas, "weight_decay": 0.01}
    exact, weights = learnt(lambda parameters: torch.optim.AdamW(parameters, **settings))
    coarse, others = learnt(lambda parameters: AdamW8(parameters, **settings))
    start = nn.Parameter(learnt(lambda parameters: torch.optim.AdamW(parameters, lr=0.0), steps=1)[1])
    assert sum(exact[-20:]) < 0.2 * sum(exact[:20]) and sum(coarse[-20:]) < 1.05 * sum(exact[-20:])
    assert torch.cosine_similarity(weights - start, others - start, dim=0) > 0.98


@pytest.mark.parametrize("beta2", [0.98, 0.995])
def test_moments_do_not_stick(beta2: float) -> None:
    """A step changes them by far less than the way from one code to the next, up as well as down."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(4, 256))
    optimizer = AdamW8([parameter], lr=1e-3, betas=(0.9, beta2))
    sizes = torch.logspace(-3, 0, 128).repeat(2)  # within a block
    found = []
    for size in (1.0, 0.1):
        for _ in range(round(16 / (1 - beta2))):
            parameter.grad = size * sizes * torch.randn(4, 256).sign()
            optimizer.step()
            found.append(moment(optimizer, parameter, "exp_avg_sq").mean(0))
    ratios = torch.stack(found[-len(found) // 8 :]).mean(0) / (0.1 * sizes).square()
    is_large = sizes > 0.1  # codes are coarse for what is small beside its block; on average they are right, too
    assert (ratios[is_large] - 1).abs().max() < 0.1 and float(ratios.mean()) == pytest.approx(1, abs=0.05)


def test_what_is_rare_moves_weights_by_no_more_than_what_is_frequent() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(2, 128))
    optimizer = AdamW8([parameter], lr=1.0, betas=(0.9, 0.98))
    for step in range(200):
        before = parameter.detach().clone()
        rare = torch.rand(2, 128) < 0.05
        parameter.grad = torch.randn(2, 128) * torch.where(rare, 1.0, 0.0) * 10.0 ** -torch.randint(0, 7, (2, 128))
        optimizer.step()
        assert (parameter - before).abs().max() < 1 / 0.02**0.5, step  # as of AdamW: (1 - beta1) / sqrt(1 - beta2) < 1


@pytest.mark.parametrize("shape", [(64, 256), (64, 8, 32), (6, 100)])
def test_a_number_takes_two_bytes(shape: tuple[int, ...]) -> None:
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = AdamW8([parameter], lr=1e-3)
    parameter.grad = torch.randn(shape)
    optimizer.step()
    state = {name: value for name, value in optimizer.state[parameter].items() if name != "step"}
    size = sum(value.numel() * value.element_size() for value in state.values())
    assert size == pytest.approx(BYTES_OF_A_NUMBER * parameter.numel(), rel=0.02)


def test_vectors_and_norms_are_adamws() -> None:
    named = [("w", nn.Parameter(torch.zeros(4, 4))), ("b", nn.Parameter(torch.zeros(4)))]
    optimizer = Optimizer(named, set(), OptimizerConfig(matrices="adamw", state_bits=8))
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0)
    dtypes = {name: value.dtype for name, value in optimizer.state_dict().items()}
    assert (dtypes["exp_avg/w"], dtypes["exp_avg_sq/w"], dtypes["exp_avg/b"]) == (
        torch.int8,
        torch.uint8,
        torch.float32,
    )


def test_it_is_for_adamw() -> None:
    with pytest.raises(
        OpenSoraError, match=r"optimizer\.state_bits is 8, which is for AdamW; give optimizer\.matrices"
    ):
        OptimizerConfig(state_bits=8)


def small(**changes):
    return recipe(matrices="adamw", state_bits=8, **changes)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    Trainer(small(), tmp_path / "whole").run()
    trainer = Trainer(small(), tmp_path / "cut")

    def stop(step: int, *_) -> None:
        trainer.stop_requested = step == 5

    trainer.on_step = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    with pytest.raises(OpenSoraError, match=r"loop\.optimizer\.state_bits=None \(was 8\)"):
        Trainer(recipe(matrices="adamw"), tmp_path / "cut")
    Trainer(small(), tmp_path / "cut").run()
    assert_equal_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut"))


@pytest.mark.multi
def test_ranks_train_what_one_rank_trains_and_go_on_on_another_number(tmp_path: Path) -> None:
    run_until(small(microbatches=4), tmp_path / "one")
    one = final_weights(tmp_path / "one")
    run_ranks(2, run_until, small(microbatches=2), tmp_path / "ranks")
    run_ranks(2, run_until, small(microbatches=2), tmp_path / "cut", 5)
    run_ranks(4, run_until, small(microbatches=1), tmp_path / "cut")
    for name in ("ranks", "cut"):
        torch.testing.assert_close(final_weights(tmp_path / name), one, rtol=1e-3, atol=1e-4)
