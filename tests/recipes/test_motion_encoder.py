"""The training of the motion encoder: what it is told is true, and what nobody knows is not asked for."""

import math
from pathlib import Path

import pytest
import torch

from opensora.distributed.seeding import BatchKey
from opensora.evaluation.motion_encoder import load_motion_encoder
from opensora.recipes.motion_encoder import (
    MOTIONS,
    MotionTaskConfig,
    describe_flow,
    known_error,
    motion_encoder,
)
from opensora.toybox.disturbances import DISTURBANCES

SMALL = MotionTaskConfig(batch_size=8, most_frames=6, dim=8, features=16)


def test_whole_motions_are_read_off_the_flow() -> None:
    flow = torch.zeros(4, 2, 3, 8, 8)
    flow[0, 0] = 2  # to the right
    x = (torch.arange(8) - 3.5) / 8
    flow[1, 0], flow[1, 1] = x.expand(8, -1), x[:, None].expand(-1, 8)  # growing from the middle
    flow[2, 1, ::2], flow[2, 1, 1::2] = 1, -1  # down, up, down
    known = describe_flow(flow)
    assert known.shape == (4, MOTIONS)
    names = ("x", "y", "speed", "growth", "turn", "places", "pairs", "back", "rest")
    read = [dict(zip(names, row.tolist(), strict=True)) for row in known]
    assert read[0]["x"] == read[0]["speed"] == 1
    assert read[0]["places"] == read[0]["pairs"] == read[0]["back"] == read[0]["rest"] == 0
    assert read[1]["growth"] > 0.2
    assert abs(read[1]["turn"]) < 1e-6
    assert read[1]["places"] > 0
    assert read[2]["back"] == pytest.approx(0.5)
    assert read[2]["pairs"] > 0.3
    assert read[3]["rest"] == 1


def test_a_cut_is_left_out_and_a_clip_of_which_more_is_unknown_is_not_described() -> None:
    flow = torch.ones(2, 2, 4, 8, 8)
    flow[0, :, 1] = flow[1, :, 1:3] = math.nan
    known = describe_flow(flow)
    torch.testing.assert_close(known[0], describe_flow(torch.ones(1, 2, 4, 8, 8))[0])
    assert known[1].isnan().all()


def test_only_what_is_known_is_asked_for() -> None:
    wanted = torch.tensor([[1.0, math.nan], [math.nan, math.nan], [0.0, 0.0]])
    errors = known_error(torch.zeros(3, 2), wanted)
    assert errors.tolist() == pytest.approx([1 - 0.125, 0, 0])


def test_batches_depend_on_the_draw_alone_and_losses_are_per_clip() -> None:
    setup = SMALL.build("cpu")
    first, again, other = (setup.task.prepare(BatchKey(0, step)) for step in (3, 3, 4))
    assert torch.equal(first.video, again.video)
    assert torch.equal(first.labels, again.labels)
    assert first.video.shape != other.video.shape or not torch.equal(first.video, other.video)
    assert first.strengths.shape == (8, len(DISTURBANCES))
    toys = first.flow.isnan().flatten(1).any(dim=1)
    assert toys.sum() >= 2, "a quarter of the clips are of the toy world, whose flow nobody tells"
    assert (first.labels[~toys] == -100).all()
    losses = setup.task.loss(first, BatchKey(0, 3))
    assert {name: loss.shape for name, loss in losses.items()} == dict.fromkeys(
        ("flow", "motions", "disturbances", "toy_motion"), (8,)
    )
    assert all(loss.isfinite().all() for loss in losses.values())
    assert setup.not_matrices <= {name for name, _ in setup.task.module.named_parameters()}


def test_the_recipe_exports_an_encoder_in_half_precision(tmp_path: Path) -> None:
    task = motion_encoder().objective.build("cpu").task
    task.export(task.module, tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1.5e6
    encoder = load_motion_encoder(tmp_path)
    assert next(encoder.parameters()).dtype == torch.float32
    video = torch.rand(2, 3, 4, 64, 64) * 2 - 1
    with torch.no_grad():
        found, expected = encoder(video), task.module.encoder.eval()(video)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)  # weights rounded to 11 bits
