"""Transformers whose tokens lie on several ranks compute what one process computes, forward and backward."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig
from ranks import run_ranks
from switches import Switches
from tiny_transformers import SIZES, build, inputs
from torch import Tensor

from opensora.distributed.sequence_parallel import bytes_switched
from opensora.errors import OpenSoraError
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3
from opensora.models.stdit4 import STDiT4

MODELS = [STDiT, STDiT2, STDiT3, STDiT4]
# Latent frames, rows, columns; patches are 2 x 2. Neither 2 nor 4 ranks divide 5 frames or 21 patches. The second clip
# has fewer frames than there are ranks, the third fewer patches.
LATENTS = [(5, 14, 6), (1, 5, 7), (3, 2, 2)]
KINDS = ["plain", "frame mask", "checkpointing", "bf16"]

Case = tuple[type, tuple[int, int, int], str]
CASES: list[Case] = [
    *((cls, size, "plain") for cls in MODELS for size in LATENTS),
    *((cls, LATENTS[0], kind) for cls in MODELS for kind in KINDS[1:]),
    *((STDiT4, LATENTS[0], kind) for kind in ("known frames", "no windows")),
]
# Whole ones, and narrower ones at the edges, so that ranks hold windows of other shapes.
WINDOWS: dict[type, dict[str, Any]] = {STDiT4: {"kernel_size": (2, 2, -1)}}


def forward_and_backward(case: Case, group: Any = None, compiled: bool = False) -> dict[str, Tensor]:
    """The prediction, and the gradient of a loss by everything; with a group, its mean over the ranks."""
    cls, size, kind = case
    options = {"kernel_size": None, "use_spatial_rope": False} if kind == "no windows" else WINDOWS.get(cls, {})
    model, arguments = build(cls, **options).train(), inputs(size=size)  # the text of the second sample is padded
    if kind == "checkpointing":
        model.enable_gradient_checkpointing()
    if kind == "bf16":
        model.to(torch.bfloat16)
    if kind == "frame mask":
        generated = torch.ones(2, size[0], dtype=torch.bool)
        generated[0, 0] = generated[1, 2:4] = False
        arguments["frame_mask"] = generated
    if kind == "known frames":
        latents = torch.randn(arguments["hidden_states"].shape, generator=torch.Generator().manual_seed(3))
        known = torch.zeros(2, size[0], dtype=torch.bool)
        known[0, 0] = known[1, 3:] = True
        arguments["channel_conditioning"] = ChannelConditioning(latents, known)
    if group is not None:
        model.enable_sequence_parallel(group)
    if compiled:
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")  # the slow part is writing C++
    leaves = {name: arguments[name].requires_grad_() for name in ("hidden_states", "encoder_hidden_states")}
    leaves |= {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    sample = model(**arguments, **SIZES).sample
    weights = torch.randn(sample.shape, generator=torch.Generator().manual_seed(2))
    (sample * weights).mean().backward()
    if kind != "known frames":  # nothing reached their embedders
        leaves = {name: leaf for name, leaf in leaves.items() if not name.startswith("x_embedder_cond")}
    found = {"sample": sample.detach()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        if group is not None:
            dist.all_reduce(leaf.grad, group=group)
            leaf.grad /= group.size()
        found[name] = leaf.grad
    return found


def assert_equal(case: Case, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        if case[2] == "bf16":
            error = (found[name] - value).float().norm() / value.float().norm()
            assert error < 0.1, f"{case} {name}: off by {error:.3f} of its norm"
        else:
            where = f"{case} {name}: "
            torch.testing.assert_close(found[name], value, msg=where.__add__)


# ---- everything that takes several processes, started once for each number of them ----------------------------------


def bytes_sent(cls: type) -> list[int]:
    model = build(cls, **WINDOWS.get(cls, {})).requires_grad_(False)
    model.enable_sequence_parallel(dist.group.WORLD)
    with Switches() as switches:
        model(**inputs(size=LATENTS[0]), **SIZES)
    return switches.sent


def after_disabling(cls: type) -> bool:
    model = build(cls).requires_grad_(False)
    before = model(**inputs(), **SIZES).sample
    model.enable_sequence_parallel(dist.group.WORLD)
    model.disable_sequence_parallel()
    with Switches() as switches:
        after = model(**inputs(), **SIZES).sample
    return torch.equal(before, after) and not switches.sent


def mistakes() -> list[str]:
    said = []
    cached, shared = build(STDiT3), build(STDiT3)
    cached.enable_cache(FirstBlockCacheConfig())
    shared.enable_sequence_parallel(dist.group.WORLD)
    for attempt in (
        lambda: cached.enable_sequence_parallel(dist.group.WORLD),
        lambda: shared.enable_cache(FirstBlockCacheConfig()),
    ):
        with pytest.raises(OpenSoraError) as error:
            attempt()
        said.append(str(error.value))
    shared.enable_cache(MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4))  # decides alike on all ranks
    return said


def in_parallel() -> dict[str, Any]:
    world = dist.group.WORLD
    return {
        "cases": [forward_and_backward(case, world) for case in CASES],
        "sent": [bytes_sent(cls) for cls in MODELS],
        "disabled": [after_disabling(cls) for cls in MODELS],
        "mistakes": mistakes(),
    }


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request) -> list[dict[str, Any]]:
    return run_ranks(request.param, in_parallel)


@pytest.mark.multi
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_process(ranks, case):
    expected = forward_and_backward(case)
    for rank in ranks:
        assert_equal(case, rank["cases"][CASES.index(case)], expected)


@pytest.mark.multi
def test_all_ranks_return_the_same(ranks):
    for rank in ranks[1:]:
        for found, first in zip(rank["cases"], ranks[0]["cases"], strict=True):
            assert torch.equal(found["sample"], first["sample"])


@pytest.mark.multi
def test_two_switches_for_each_pair_of_attentions(ranks):
    """... and the prediction's gathering; as many bytes as plans are told."""
    for rank in ranks:
        for *switches, _gathering in rank["sent"]:
            assert len(switches) == 2 * 2  # depth 2
            assert sum(switches) == bytes_switched(2, 5, 21, 24, 2, len(ranks), bytes_per_value=4)


@pytest.mark.multi
def test_disabling_leaves_nothing_behind(ranks):
    assert all(all(rank["disabled"]) for rank in ranks)


@pytest.mark.multi
def test_a_cache_whose_ranks_would_decide_differently_is_refused(ranks):
    for message in (message for rank in ranks for message in rank["mistakes"]):
        assert "FirstBlockCache does not work with sequence parallelism" in message


def compiled() -> list[dict[str, Tensor]]:
    return [forward_and_backward((cls, LATENTS[0], "frame mask"), dist.group.WORLD, compiled=True) for cls in MODELS]


@pytest.mark.multi
@pytest.mark.slow
def test_compiled_blocks_equal_eager():
    for of_rank in run_ranks(2, compiled, timeout_s=600):
        for cls, found in zip(MODELS, of_rank, strict=True):
            case = (cls, LATENTS[0], "frame mask")
            assert_equal(case, found, forward_and_backward(case))
