"""The judge: shapes of what it reads, sizes and lengths it accepts, the bundled weights on real clips."""

import pytest
import torch

from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.evaluation.judge import Judge, load_judge
from opensora.evaluation.toybox import real_accuracy
from opensora.recipes.toybox_judge import JudgeTaskConfig, spoil, toybox_judge
from opensora.toybox.specs import ATTRIBUTES, World, sample_specs
from opensora.toybox.world import render


@pytest.fixture(scope="module")
def small_judge() -> Judge:
    torch.manual_seed(0)
    return Judge(dim=8).eval()


@pytest.mark.parametrize("shape", [(2, 3, 17, 64, 64), (1, 3, 2, 40, 96), (3, 3, 9, 128, 128)])
def test_reads_any_size_and_length(small_judge: Judge, shape: tuple[int, ...]):
    logits = small_judge(torch.rand(shape) * 2 - 1)
    assert {name: values.shape for name, values in logits.items()} == {
        name: (shape[0], len(labels)) for name, labels in ATTRIBUTES.items()
    }
    for labels in small_judge.read(torch.rand(shape) * 2 - 1):
        assert all(labels[name] in ATTRIBUTES[name] for name in ATTRIBUTES)


@pytest.mark.parametrize("shape", [(3, 17, 64, 64), (1, 1, 17, 64, 64), (1, 3, 1, 64, 64)])
def test_refuses_what_is_no_batch_of_clips(small_judge: Judge, shape: tuple[int, ...]):
    with pytest.raises(OpenSoraError, match="the judge got shape"):
        small_judge(torch.zeros(shape))


def test_a_still_background_is_nothing_to_the_motion_network(small_judge: Judge):
    video = torch.rand(1, 3, 9, 64, 64)
    differences = small_judge.motion_tower.convolutions[0].weight[:, : 3 * 9]
    seen = []
    small_judge.motion_tower.convolutions[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    small_judge.read_motion(video[:, :, :1].expand_as(video))
    assert seen[0].shape[1] == 30
    assert differences.shape[1] == 27
    assert seen[0][:, :27].abs().max() < 1e-6


def test_saved_and_loaded_it_reads_the_same(small_judge: Judge, tmp_path):
    small_judge.save_pretrained(tmp_path)
    video = torch.rand(1, 3, 5, 64, 64)
    again = load_judge(tmp_path)
    assert again.labels == small_judge.labels
    for name, tensor in small_judge.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    for name, values in small_judge(video).items():
        torch.testing.assert_close(again(video)[name], values)
    with pytest.raises(OpenSoraError, match="no judge"):
        load_judge(tmp_path / "nothing")


def test_training_batches_depend_on_the_draw_alone_and_losses_are_per_clip():
    setup = JudgeTaskConfig(batch_size=4, dim=8).build("cpu")
    task = setup.task
    first, again, other = (task.prepare(BatchKey(0, step)) for step in (3, 3, 4))
    assert torch.equal(first.video, again.video)
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.video, other.video)
    losses = task.loss(first, BatchKey(0, 3))
    assert {name: loss.shape for name, loss in losses.items()} == dict.fromkeys(ATTRIBUTES, (4,))
    assert setup.not_matrices <= {name for name, _ in task.module.named_parameters()}


def test_spoilt_clips_stay_recognisable():
    video, _ = render(sample_specs(8, 0, World()), num_frames=9)
    worse = spoil(video, torch.Generator().manual_seed(0))
    error = (worse - video).square().mean(dim=(1, 2, 3, 4)).sqrt()
    assert worse.shape == video.shape
    assert error.min() > 0.005
    assert error.max() < 0.35


def test_the_recipe_exports_a_judge_in_half_precision(tmp_path):
    recipe = toybox_judge()
    task = recipe.objective.build("cpu").task
    task.export(task.module, tmp_path)
    size_bytes = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size_bytes < 3e6
    assert next(load_judge(tmp_path).parameters()).dtype == torch.float32


def test_the_bundled_judge_reads_real_held_out_clips():
    accuracy = real_accuracy(load_judge(), n=60, seed=11)
    assert min(accuracy[name] for name in ATTRIBUTES) >= 0.96


def test_the_bundled_judge_reads_other_sizes_and_lengths():
    assert min(real_accuracy(load_judge(), n=24, seed=12, size=(33, 96, 96), batch_size=8).values()) >= 0.85
