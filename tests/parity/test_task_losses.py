"""The reference's recorded losses, made by a whole training task: its own corruption, prediction and `loss`.

The task is fed the fixture's latents, noise, times and masks, and the fixtures' toy network for a transformer.
"""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from opensora.data.batch import LatentBatch
from opensora.diffusion.process import GaussianProcess
from opensora.distributed.seeding import BatchKey
from opensora.models.clip_conditions import ClipConditions
from opensora.models.text.conditioner import TextStates
from opensora.recipes.debug import debug_task
from opensora.training.diffusion.batch import DiffusionBatch
from opensora.training.diffusion.noise import IDDPM, Flow
from opensora.training.diffusion.task import DiffusionTask

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


class Toy:
    """The fixtures' linear network, called like a transformer; the recorded losses did not tell it the mask."""

    def __init__(self, fixture: Any) -> None:
        self.a, self.b, self.d = (fixture[f"in.toy.{name}"].reshape(1, -1, 1, 1, 1) for name in "abd")
        self.seen: list[Tensor] = []

    def __call__(self, noisy: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Any:
        self.seen.append(noisy)
        channels = torch.arange(self.a.shape[1]) % noisy.shape[1]
        t = timestep.float().reshape(-1, 1, 1, 1, 1)
        words = encoder_hidden_states.flatten(1).mean(dim=1).reshape(-1, 1, 1, 1, 1)
        return SimpleNamespace(sample=self.a * noisy[:, channels] + self.b * t / 1000 + self.d * words)


def task_of(fixture: Any, model: str, diffusion: Flow | IDDPM) -> tuple[DiffusionTask, Toy]:
    task = debug_task(model, diffusion).build("cpu").task
    assert isinstance(task, DiffusionTask)
    toy = Toy(fixture)
    task.networks.transformer = toy  # type: ignore[assignment]
    return task, toy


def losses(task: DiffusionTask, fixture: Any, mask: Tensor | None) -> dict[str, Tensor]:
    clean = fixture["in.x_start"]
    size = torch.full((len(clean),), 32.0)
    conditions = ClipConditions(size, size, size, clean.shape[2])
    batch = DiffusionBatch(
        LatentBatch(clean, [""] * len(clean), conditions, "fixture"),
        noise=fixture["in.noise"],
        t=fixture["in.t"],
        text=TextStates(fixture["in.y"], torch.ones(len(clean), 1)),
        drop_text=torch.zeros(len(clean), dtype=torch.bool),
        frame_mask=mask,
    )
    return task.loss(batch, BatchKey(0, 0))


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([term for name, term in terms.items() if not name.startswith("_")]).sum(dim=0)


def expected_of(fixture: Any, name: str, mask: Tensor | None) -> Tensor:
    """Departure: of a sample without a generated frame the reference has a division by zero, and we have 0."""
    return fixture[name] if mask is None else torch.where(mask.any(dim=1), fixture[name], 0.0)


def test_rectified_flow(golden) -> None:
    fixture = golden("rflow_v1_2_losses")
    task, toy = task_of(fixture, "opensora-1.2", Flow())
    for case, mask in (("plain", None), ("mask", fixture["in.mask"].bool())):
        terms = losses(task, fixture, mask)
        assert_close(total(terms), expected_of(fixture, f"out.{case}.loss", mask), **TOLERANCE)
        if f"mid.{case}.x_t" in fixture:
            assert_close(toy.seen[-1], fixture[f"mid.{case}.x_t"], **TOLERANCE)


CASES = {
    "iddpm_v1_0_core": ("out.training_losses", "opensora-1.0-16x256x256", r"default|xstart"),
    "iddpm_v1_1_losses": ("out", "opensora-1.1-stage2", r"plain|mask|weights|mask_weights"),
    "iddpm_v1_2_losses": ("out", "opensora-1.1-stage2", r"plain|mask|weights|mask_weights"),
}


@pytest.mark.parametrize("name", CASES)
def test_iddpm(name: str, golden) -> None:
    fixture = golden(name)
    prefix, model, wanted = CASES[name]
    names = [key for key in fixture.tensors if re.fullmatch(rf"{re.escape(prefix)}\.({wanted})\.loss", key)]
    assert names
    for key in names:
        case = key.split(".")[-2]
        diffusion = IDDPM(
            prediction_type="sample" if case == "xstart" else "epsilon", float32_tables=name != "iddpm_v1_0_core"
        )
        task, toy = task_of(fixture, model, diffusion)
        assert isinstance(task.networks.noise_process, GaussianProcess)
        if "weights" in case:
            task.networks.noise_process = replace(task.networks.noise_process, timestep_weights=fixture["in.weights"])
        mask = fixture["in.mask"].bool() if "mask" in case else None
        terms = losses(task, fixture, mask)
        assert_close(total(terms), expected_of(fixture, key, mask), **TOLERANCE)
        for part, ours in (("mse", diffusion.prediction_type), ("vb", "vb")):
            assert_close(terms[ours], expected_of(fixture, key.removesuffix("loss") + part, mask), **TOLERANCE)
        if mask is not None and "mid.mask.x_t" in fixture:
            assert_close(toy.seen[-1], fixture["mid.mask.x_t"], **TOLERANCE)


def test_speed_draws_what_the_reference_draws(golden) -> None:
    """Half of the steps by the recorded probabilities, the other half mirrored at the last meaningful step."""
    fixture = golden("iddpm_v1_1_tables")
    if "out.speed.p" not in fixture:
        pytest.skip("the fixture holds no SpeeD tables")
    task = debug_task("opensora-1.1-stage2", IDDPM(steps="speed", float32_tables=True)).build("cpu").task
    assert isinstance(task, DiffusionTask)
    drawn = task.networks.noise_process.draw_times(4001, generator=torch.Generator().manual_seed(0))
    half, meaningful = 2001, int(fixture["out.speed.meaningful_steps"])
    first, mirrored = drawn[:half], drawn[half:]
    assert torch.equal(mirrored, (meaningful - first).abs()[: len(mirrored)])
    probabilities = fixture["out.speed.p"].float()
    likely = probabilities > probabilities.median() * 2
    share = likely[first].float().mean()
    assert_close(share, probabilities[likely].sum(), atol=0.03, rtol=0)
