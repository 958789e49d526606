"""Predictions for whole stages, and the choices that are proposed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_pipeline import make_pipeline
from tiny_published import pipeline_of
from tiny_two_encoders import pipeline_of as two_encoders_of
from torch import nn

from opensora.geometry import VideoSize
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.text.conditioner import T5Conditioner
from opensora.pipeline import OpenSoraPipeline
from opensora.planning.meta_pipeline import meta_pipeline
from opensora.planning.planner import ACCELERATOR, CPU, Planner, stored_weight_bytes
from opensora.planning.stages import COMPONENT_OF, Choices, Clip, branches_of, network_of, run_stage
from opensora.planning.tracing import LiveMemory, Tracer, weight_bytes

SIZE = VideoSize(9, 48, 64)


def make_wide_pipeline() -> OpenSoraPipeline:
    """With an autoencoder that takes more for frames at work than for those it has finished, as real ones do."""
    pipeline = make_pipeline()
    torch.manual_seed(4)
    autoencoder = VideoAutoencoder(
        spatial={"block_out_channels": [32, 32], "layers_per_block": 1, "norm_num_groups": 4},
        temporal={"type": "folded", "dim": 16, "encoder_depth": 1, "decoder_depth": 1},
    )
    pipeline.register_modules(autoencoder=autoencoder.eval())
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The configuration of a pipeline, saved with its weights."""
    path = tmp_path_factory.mktemp("model")
    make_wide_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def planner(folder) -> Planner:
    tracer = Tracer()
    return Planner(tracer, meta_pipeline(tracer, folder).pipeline, Clip(SIZE))


def default(planner: Planner) -> Choices:
    return planner.default(torch.float32)


@pytest.mark.parametrize("stage", COMPONENT_OF)
@pytest.mark.parametrize(
    "choices",
    [
        Choices(torch.float32, micro_batch_size=4),
        Choices(torch.bfloat16, micro_batch_size=4),
        Choices(torch.float32, micro_batch_size=1, sequential_guidance=True),
    ],
    ids=["float32", "bfloat16", "in portions"],
)
def test_tensors_without_data_take_what_real_ones_take(planner, stage, choices):
    """The same code, once on networks without data and once on real ones, counted the same way."""
    predicted = next(memory for memory in planner.stages(choices) if memory.name == stage)
    pipeline = make_wide_pipeline()
    network = network_of(pipeline, stage, choices)
    memory = LiveMemory()
    with memory:
        run_stage(pipeline, stage, Clip(SIZE), choices)
    assert 0.97 * memory.peak_bytes <= predicted.activation_bytes <= 1.03 * memory.peak_bytes
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*network.parameters(), *network.buffers())}
    assert predicted.weight_bytes == sum(tensors.values())


def test_half_precision_takes_half_of_the_weights(planner):
    full, half = (planner.stages(planner.default(dtype)) for dtype in (torch.float32, torch.bfloat16))
    for whole, part in zip(full, half, strict=True):
        kept = whole.name == "text"  # T5's second projections stay in float32, and so does the autoencoder's statistics
        assert part.weight_bytes == pytest.approx(whole.weight_bytes / 2, rel=0.3 if kept else 0.01)


def test_smaller_portions_take_less(planner):
    whole = default(planner)
    portions = planner.smallest(whole)
    (_, denoise, decode), (_, one_branch, one_frame) = planner.stages(whole), planner.stages(portions)
    assert 0.45 < one_branch.activation_bytes / denoise.activation_bytes < 0.75
    assert one_frame.activation_bytes < 0.7 * decode.activation_bytes


def test_more_frames_and_pixels_take_more(folder):
    tracer = Tracer()
    pipeline = meta_pipeline(tracer, folder).pipeline
    sizes = [VideoSize(5, 48, 64), SIZE, VideoSize(9, 96, 64)]
    needed = [Planner(tracer, pipeline, Clip(size)).peak(Choices(torch.float32))[1] for size in sizes]
    assert needed == sorted(needed) and len(set(needed)) == 3


def test_windows_can_be_planned(tmp_path):
    """Networks of 1.3: blocks over space and over time take different memory, and both are traced."""
    pipeline_of("opensora-1.3", num_frames=17).save_pretrained(tmp_path)
    tracer = Tracer()
    planner = Planner(tracer, meta_pipeline(tracer, tmp_path).pipeline, Clip(VideoSize(17, 48, 64)))
    text, denoise, decode = planner.stages(default(planner))
    assert min(text.activation_bytes, denoise.activation_bytes, decode.activation_bytes) > 0
    longer = Planner(tracer, meta_pipeline(tracer, tmp_path).pipeline, Clip(VideoSize(33, 48, 64)))
    assert longer.stages(default(planner))[1].activation_bytes > 1.3 * denoise.activation_bytes


def test_an_autoencoder_that_works_in_tiles_may_have_smaller_ones(tmp_path):
    """Those of 2.0; frames at once bound nothing there, so they are not proposed."""
    two_encoders_of("opensora-2.0").save_pretrained(tmp_path)
    tracer = Tracer()
    planner = Planner(tracer, meta_pipeline(tracer, tmp_path).pipeline, Clip(VideoSize(65, 64, 64)))
    whole = default(planner)
    ways = list(planner.alternatives([torch.float32]))
    assert [way.tile_frames for way in ways[::6]] == [None, 64, 32, 16]
    assert {way.micro_batch_size for way in ways} == {None} and planner.smallest(whole).tile_frames == 16
    (_, denoise, decode), (_, same, tiled) = planner.stages(whole), planner.stages(planner.smallest(whole))
    assert tiled.activation_bytes < 0.6 * decode.activation_bytes
    assert tiled.weight_bytes == decode.weight_bytes and same.weight_bytes == denoise.weight_bytes


def test_offloading_takes_the_largest_stage(planner):
    stages = planner.stages(default(planner))
    assert planner.peak(default(planner)) == (
        sum(stage.weight_bytes for stage in stages),
        max(stage.activation_bytes for stage in stages),
    )
    offloaded = Choices(torch.float32, offload="networks", micro_batch_size=4)
    assert sum(planner.peak(offloaded)) == max(stage.weight_bytes + stage.activation_bytes for stage in stages)


def test_of_networks_whose_blocks_take_turns_two_blocks_count():
    transformer = make_pipeline().transformer
    blocks = [weight_bytes(block) for block in transformer.blocks]
    rest = weight_bytes(transformer) - sum(blocks)
    assert len(blocks) == 4
    # Small as they are, a block is less than a portion of a file.
    assert stored_weight_bytes(transformer) == (rest + 4 * blocks[0], rest + 3 * blocks[0])
    one_block = nn.ModuleList([nn.Linear(2, 2)])
    assert stored_weight_bytes(one_block) == (weight_bytes(one_block),) * 2


def test_what_fits_is_the_least_intrusive(planner):
    whole = default(planner)
    dtypes = [torch.float32, torch.bfloat16]
    assert planner.find(planner.needed_bytes(whole), dtypes) == whole
    assert planner.find(0, dtypes) is None
    everything = planner.smallest(planner.default(torch.bfloat16))
    assert planner.find(planner.needed_bytes(everything), [torch.bfloat16]) is not None
    # A little less than all at once: one frame at a time or one branch after the other, which change no result.
    less = planner.find(planner.needed_bytes(whole) - 1, dtypes)
    assert less is not None and less.dtype == torch.float32 and not less.offload
    for way in planner.alternatives(dtypes):
        found = planner.find(planner.needed_bytes(way), dtypes)
        assert found is not None and planner.needed_bytes(found) <= planner.needed_bytes(way)


def test_without_guidance_there_is_one_branch(folder):
    tracer = Tracer()
    pipeline = meta_pipeline(tracer, folder).pipeline
    guided, plain = (Planner(tracer, pipeline, Clip(SIZE, guided=guided)) for guided in (True, False))
    assert not any(way.sequential_guidance for way in plain.alternatives([torch.float32]))
    one, two = (planner.stages(Choices(torch.float32))[1].activation_bytes for planner in (plain, guided))
    assert one < 0.7 * two


class NullPrompt(T5Conditioner):
    """No text is the text of an empty prompt."""

    null_prompt = ""


@pytest.mark.parametrize("conditioner", [T5Conditioner, NullPrompt])
def test_all_branches_of_a_model_are_planned(conditioner):
    """On real networks: how many clips of one request go through the transformer at once."""
    pipeline = pipeline_of("opensora-1.3-i2v")
    pipeline.transformer.text_conditioner = conditioner
    sizes: list[int] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    size = VideoSize(17, 32, 48)
    clips = [Clip(size, guided=False), Clip(size), Clip(size, conditioned=True)]
    for clip in clips:
        run_stage(pipeline, "denoise", clip, Choices(torch.float32))
    assert sizes == [len(branches_of(pipeline, clip)) for clip in clips] == [1, 2, 3]


def test_devices_take_something_for_themselves(planner):
    weights, activations = planner.peak(default(planner))
    assert CPU.total_bytes(weights, activations) == weights + activations + CPU.fixed_bytes
    assert ACCELERATOR.total_bytes(0, 1000) == 1100 + ACCELERATOR.fixed_bytes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_measured_peaks_are_near(tmp_path):
    """One row of the table in docs/memory.md, measured now."""
    command = [sys.executable, "-m", "benchmarks", "memory", "--only", "text opensora-1.2"]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=root)
    assert result.returncode == 0, result.stderr
    row = result.stdout.splitlines()[-1]
    assert 0.85 < float(row.split("|")[-2]) < 1.15, row


def test_what_a_cpu_does_in_pieces_an_accelerator_does_in_whole(folder):
    tracer, choices = Tracer(), Choices(torch.float32)
    pipeline = meta_pipeline(tracer, folder).pipeline
    peaks = [
        Planner(tracer, pipeline, Clip(SIZE), where).stages(choices)[1].activation_bytes for where in (CPU, ACCELERATOR)
    ]
    assert peaks[0] < peaks[1]
