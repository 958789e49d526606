"""An MMDiT whose tokens of text and video lie on several ranks computes what one process computes, both ways."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from switches import Switches
from tiny_mmdit import TINY, build, inputs
from torch import Tensor

from opensora.distributed.sequence_parallel import bytes_switched

# Latent frames, rows, columns; patches are 2 x 2, texts have 5 tokens. Ranks divide neither, nor do 3 the 2 heads of 2
# clips; the second clip has fewer patches than there are ranks.
SIZES = [(3, 6, 10), (1, 2, 3)]
EVEN = (3, 4, 12)
KINDS = ["plain", "checkpointing", "nothing known"]
CASES = [(size, kind) for size in SIZES for kind in KINDS if size == SIZES[0] or kind == "plain"]


def forward_and_backward(case: tuple[tuple[int, int, int], str], group: Any = None) -> dict[str, Tensor]:
    """The prediction, and the gradient of a loss by everything; with a group, its mean over the ranks."""
    size, kind = case
    model, arguments = build().train(), inputs(size=size)
    if kind == "checkpointing":
        model.enable_gradient_checkpointing()
    if kind == "nothing known":
        del arguments["channel_conditioning"]
    if group is not None:
        model.enable_sequence_parallel(group)
    leaves = {name: arguments[name].requires_grad_() for name in ("hidden_states", "encoder_hidden_states")}
    leaves |= dict(model.named_parameters())
    sample = model(**arguments).sample
    (sample * torch.randn(sample.shape, generator=torch.Generator().manual_seed(2))).mean().backward()
    found = {"sample": sample.detach()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        if group is not None:
            dist.all_reduce(leaf.grad, group=group)
            leaf.grad /= group.size()
        found[name] = leaf.grad
    return found


def in_parallel() -> dict[str, Any]:
    model = build().requires_grad_(False)
    before = model(**inputs()).sample
    model.enable_sequence_parallel(dist.group.WORLD)  # type: ignore[arg-type]
    model.disable_sequence_parallel()
    cases = [forward_and_backward(case, dist.group.WORLD) for case in CASES]
    disabled = torch.equal(before, model(**inputs()).sample)
    model.enable_sequence_parallel(dist.group.WORLD)  # type: ignore[arg-type]
    with Switches() as switches:
        model(**inputs(size=EVEN))
    return {"cases": cases, "disabled": disabled, "sent": switches.sent}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(request.param, in_parallel)


@pytest.mark.multi
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_process(ranks, case):
    expected = forward_and_backward(case)
    for rank in ranks:
        found = rank["cases"][CASES.index(case)]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=f"{case} {name}: ".__add__)


@pytest.mark.multi
def test_two_switches_for_each_layer(ranks):
    """As many bytes as plans are told, where ranks divide text and video; then the prediction is gathered."""
    tokens = (2, EVEN[0] * EVEN[1] * EVEN[2] // 4, TINY["hidden_size"])
    told = bytes_switched(*build().switched(tokens), 4, len(ranks), bytes_per_value=4)
    for rank in ranks:
        *switches, _gathering = rank["sent"]
        assert len(switches) == 2 * 4  # 2 layers of two streams, 2 of one
        # 5 tokens of text on 2 or 3 ranks take the room of 6.
        assert sum(switches) == pytest.approx(told, rel=0.02) and sum(switches) >= told


@pytest.mark.multi
def test_disabling_leaves_nothing_behind(ranks):
    assert all(rank["disabled"] for rank in ranks)
