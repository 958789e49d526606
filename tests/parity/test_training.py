"""The moving average and the warm-up against the reference's recorded values."""

import pytest
import torch
from torch import nn

from opensora.training.ema import EMA
from opensora.training.optimizer import OptimizerConfig, learning_rate_factor


def module_of(tensors: dict[str, torch.Tensor], trained: set[str]) -> nn.Module:
    """A module that has the tensors of the fixture as its parameters."""
    module = nn.Module()
    for name, value in tensors.items():
        *path, leaf = name.split(".")
        owner = module
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if value.is_floating_point():
            owner.register_parameter(leaf, nn.Parameter(value.clone(), requires_grad=name in trained))
    return module


def test_a_constant_decay_averages_as_the_reference_does(golden):
    """What the reference leaves as it was (frozen weights, buffers) is not trained, and so not averaged here either."""
    fixture = golden("ema_v1_2")
    before, weights = fixture.under("in.ema"), fixture.under("in.model")
    stages = sorted({name.removeprefix("out.ema.").rsplit(".", 2)[0] for name in fixture.tensors if "out.ema" in name})
    assert len(stages) == 2
    first = fixture.under(f"out.ema.{stages[0]}")
    trained = {name for name in weights if not torch.equal(first[name], before[name])}
    average = EMA(module_of(before, trained), decay=0.0, warmup=False)
    assert average.average.keys() == trained
    module = module_of(weights, trained)
    for step, stage in enumerate(stages):
        average.decay = float(stage.removeprefix("decay").removeprefix("then"))
        average.update(module, step)
        for name, expected in fixture.under(f"out.ema.{stage}").items():
            torch.testing.assert_close(average.average.get(name, before[name]), expected, rtol=1e-6, atol=1e-7)


def test_the_rate_warms_up_as_the_reference_does(golden_json):
    fixture = golden_json("lr_warmup_v1_2")
    for warmup_steps, rates in fixture["lrs"].items():
        config = OptimizerConfig(warmup_steps=int(warmup_steps), decay=0.0)
        ours = [fixture["base_lr"] * learning_rate_factor(step, len(rates), config) for step in range(len(rates))]
        assert ours == pytest.approx(rates, rel=1e-12), f"{warmup_steps} steps of warm-up"


@pytest.mark.parametrize("version", ["1_3", "2_0"])
def test_the_rate_warms_up_from_0(version, golden_json):
    """The reference may begin above 0, which no published configuration does: 1.3 then ends as much too high."""
    fixture = golden_json(f"lr_warmup_v{version}")
    base, compared = fixture.pop("base_lr"), 0
    for name, rates in fixture.items():
        warmup_steps, start = name.split("|")
        initial = float(start.removeprefix("initial"))
        config = OptimizerConfig(warmup_steps=int(warmup_steps.removeprefix("warmup")), decay=0.0)
        factors = [learning_rate_factor(step, len(rates), config) for step in range(len(rates))]
        span = base - initial if version == "2_0" else base
        theirs = [initial + factor * span if factor < 1 else base for factor in factors]
        assert theirs == pytest.approx(rates, rel=1e-9), name
        compared += initial == 0
    assert compared
