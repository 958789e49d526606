"""Plans of runs: what ranks keep, send and compute, against the parts that will do it."""

from dataclasses import replace

import pytest
import torch

from opensora.data.clips import ManifestClips
from opensora.data.degradation import Degradation
from opensora.errors import OpenSoraError
from opensora.planning.devices import find_device
from opensora.recipes import find_recipe
from opensora.training.optimizer import Optimizer, OptimizerConfig
from opensora.training.plan import TrainingPlan

H100 = find_device("h100")


def recipe(**loop):
    """The debug recipe of 1.2 with other settings of its loop."""
    found = find_recipe("v1_2_debug")
    return replace(found, loop=replace(found.loop, **{"activation_checkpointing": "full", **loop}))


def on_clips(batch_size: int):
    """The same on clips that are encoded when they are needed."""
    found = recipe()
    data = ManifestClips({"144p": {"17": (1.0, batch_size), "1": (1.0, 3 * batch_size)}})
    return replace(found, objective=replace(found.objective, data=data))


@pytest.fixture(scope="module")
def plan():
    return TrainingPlan(recipe(), H100)


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_what_optimisers_accumulate_is_what_is_planned(matrices):
    run = recipe(optimizer=OptimizerConfig(matrices=matrices))
    planned = TrainingPlan(run, H100).memory
    setup = run.objective.build("cpu")
    trained = {n: p for n, p in setup.task.module.named_parameters() if p.requires_grad}
    optimizer = Optimizer(list(trained.items()), setup.not_matrices, run.loop.optimizer)
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    accumulated = [t for name, t in optimizer.state_dict().items() if not name.startswith("step/")]
    assert planned.optimizer == sum(t.numel() * t.element_size() for t in accumulated)
    assert planned.gradients == planned.average == sum(4 * p.numel() for p in trained.values())


def test_ranks_share_weights_or_keep_them_all(plan):
    alone, shared = plan.memory, plan.changed(world_size=8).memory
    copied = plan.changed(world_size=8, sharding="none").memory
    for part in ("weights", "gradients", "optimizer", "average"):
        assert getattr(shared, part) == pytest.approx(getattr(alone, part) / 8, abs=1)
        assert getattr(copied, part) == getattr(alone, part)
    assert alone.communication == 0 < copied.communication and shared.communication > 0
    assert shared.frozen == copied.frozen == alone.frozen > 0


def test_several_microbatches_keep_whole_gradients(plan):
    one, two = plan.changed(world_size=4), plan.changed(world_size=4, microbatches=2)
    assert two.memory.gradients == pytest.approx(5 * one.memory.gradients, rel=1e-3)  # 1 + 1/4 in place of 1/4
    shape = plan.networks.shapes[0]
    assert two.cost(shape).flops == 2 * one.cost(shape).flops
    # weights are gathered for every microbatch, gradients are sent once
    assert one.cost(shape).sent_bytes < two.cost(shape).sent_bytes < 2 * one.cost(shape).sent_bytes


def test_ranks_that_share_clips_share_their_work_and_send_tokens(plan):
    shape = plan.networks.shapes[0]
    alone, shared = plan.changed(world_size=2).cost(shape), plan.changed(world_size=2, sequence_parallel=2).cost(shape)
    assert alone.switched_bytes == 0 < shared.switched_bytes
    assert shared.flops == alone.flops // 2 and shared.recomputed_flops == alone.recomputed_flops // 2
    assert shared.frozen_flops == alone.frozen_flops  # each of them prepares the whole batch
    assert plan.changed(world_size=2, sequence_parallel=2).num_data_ranks == 1


def test_what_is_recomputed_follows_the_setting(plan):
    shape = plan.networks.shapes[0]
    costs = {what: plan.changed(activation_checkpointing=what).cost(shape) for what in ("none", "selective", "full")}
    assert costs["none"].recomputed_flops == costs["selective"].recomputed_flops == 0
    full = costs["full"]
    assert 0.2 < full.recomputed_flops / full.flops < 1 / 3
    assert full.flops == costs["none"].flops


def test_slow_links_decide_the_time_of_a_step_that_computes_little(plan):
    slow = plan.changed(world_size=16)  # more than one machine
    cost = slow.cost(plan.networks.shapes[0])
    assert cost.seconds == cost.sending_s == pytest.approx(cost.sent_bytes / (H100.network_gb_s * 1e9))


def test_frozen_work_of_a_batch_is_told_from_one_clip():
    networks = TrainingPlan(on_clips(20), H100).networks
    for shape in networks.shapes:
        workloads = networks.task_plan.frozen_workloads(shape)
        assert set(workloads) == {"autoencoder", "text_encoder"}
        flops = sum(networks._frozen.trace(workload).flops for workload in workloads.values())
        assert networks.frozen_flops(shape) == pytest.approx(flops, rel=1e-6)


def test_clips_that_are_made_worse_are_encoded_twice():
    def encoding(degradation: Degradation | None) -> float:
        clips = on_clips(20)
        objective = replace(clips.objective, degradation=degradation)
        networks = TrainingPlan(replace(clips, objective=objective), H100).networks
        workload = networks.task_plan.frozen_workloads(networks.shapes[0])["autoencoder"]
        return networks._frozen.trace(workload).flops

    assert encoding(Degradation()) == pytest.approx(2 * encoding(None), rel=1e-6)


@pytest.mark.slow
def test_smaller_batches_fit():
    tight = TrainingPlan(on_clips(400), replace(H100, memory_bytes=6 * 2**30))
    assert not tight.fits()
    smaller = tight.smaller_batches()
    assert smaller
    for shape in tight.networks.largest:
        if shape.label in smaller:
            size = smaller[shape.label]
            assert 0 < size < shape.batch_size
            needed = tight.memory_of(replace(shape, batch_size=size)).total
            assert 0.7 * 6 * 2**30 < needed <= 6 * 2**30


def test_ranks_that_cannot_share_clips_are_refused():
    with pytest.raises(OpenSoraError, match=r"loop\.sequence_parallel is 2 and the run has 3 ranks"):
        TrainingPlan(recipe(sequence_parallel=2), H100, world_size=3)
