"""The published stages of Open-Sora 2.0: sizes, parameters, conditions, and where each begins."""

import gzip
import json

import pytest
from recipes.test_published_recipes import planned

from opensora.checkpoints.published import PUBLISHED
from opensora.data.buckets import Buckets
from opensora.recipes import RECIPES, find_recipe
from opensora.recipes.v2_0 import FLUX
from opensora.training.diffusion.config import DiffusionTaskConfig

STAGES = [make.__name__ for make in RECIPES if make.__name__.startswith("v2_0") and "debug" not in make.__name__]
FROM_TEXT = ["v2_0_image", "v2_0_stage1", "v2_0_stage2"]


def objective_of(name: str) -> DiffusionTaskConfig:
    objective = find_recipe(name).objective
    assert isinstance(objective, DiffusionTaskConfig)
    return objective


@pytest.mark.parametrize("name", STAGES)
def test_parameters_are_those_of_the_published_model(name: str, golden_dir) -> None:
    """Networks that are shown nothing yet lack the layer that takes it in; of an adapter its base is."""
    keys = "mmdit_11b_v2_0_dcae" if name == "v2_0_high_compression" else "mmdit_11b_v2_0"
    published = json.loads(gzip.decompress((golden_dir / "checkpoint_keys" / f"{keys}.json.gz").read_bytes()))
    theirs = {key: shape for key, (shape, _) in published["keys"].items()}
    if name in FROM_TEXT:
        theirs = {key: shape for key, shape in theirs.items() if not key.startswith("cond_in.")}
    transformer = planned(name).networks.transformer
    ours = {key.replace(".base_layer.", "."): list(tensor.shape) for key, tensor in transformer.state_dict().items()}
    assert {key: shape for key, shape in ours.items() if ".lora_" not in key} == theirs
    assert any(".lora_" in key for key in ours) == (name == "v2_0_lora")


def test_sizes_and_batches() -> None:
    """As the released configurations have them, for GPUs of 140 GB."""
    told = {}
    for name in STAGES:
        buckets = Buckets(objective_of(name).data.buckets)
        told[name] = {(r.resolution, r.num_frames): (r.keep, r.batch_size) for r in buckets.rules}
    stage1, large = told["v2_0_stage1"], told["v2_0_stage2_i2v"]
    small = {length for resolution, length in stage1 if resolution == "256px"}
    assert small == {1, *range(5, 130, 4)} == {length for resolution, length in large if resolution == "768px"}
    assert [stage1["256px", length] for length in (1, 5, 33, 37, 65, 69, 97, 101, 129)] == [
        (1.0, batch) for batch in (45, 12, 12, 6, 6, 4, 4, 3, 3)
    ]
    assert stage1["768px", 1] == (0.5, 13) and stage1["1024px", 1] == (0.5, 7) and len(stage1) == 35
    assert told["v2_0_stage1_i2v"] == stage1
    assert told["v2_0_image"] == {("256px", 1): (1.0, 50), ("768px", 1): (0.5, 11), ("1024px", 1): (0.5, 7)}
    assert [large["768px", length] for length in (1, 33, 65, 97, 129)] == [(0.5, n) for n in (38, 10, 5, 3, 2)]
    assert ("768px", 69) in told["v2_0_stage2"], "the released table lacks it, in the middle of the others"
    compressed = told["v2_0_high_compression"]
    assert [compressed["768px_32d", n] for n in (1, 4, 32, 36, 64, 68, 96, 100, 128)] == [
        (1.0, batch) for batch in (20, 8, 8, 4, 4, 3, 3, 2, 2)
    ]


def test_what_it_was_trained_with() -> None:
    for name in STAGES:
        loop, objective = find_recipe(name).loop, objective_of(name)
        data, process = objective.data, planned(name).networks.noise_process
        assert (loop.optimizer.eps, loop.optimizer.weight_decay, loop.max_grad_norm) == (1e-15, 0.0, 1.0), name
        assert (data.max_fps, data.rate_told) == (24, True), name
        assert objective.drop_text**2 == pytest.approx(0.1) and objective.drop_pooled == objective.drop_text, name
        assert (process.sigma_min, process.velocity, process.times) == (1e-5, "noise - data", "logit-normal"), name
        known, networks = objective.known_frames, planned(name).networks
        reads = networks.transformer.reads_channels
        assert reads == (name not in FROM_TEXT) == bool(known) == networks.known_alone, name
        if known:
            assert known["none"] == sum(known.values()) / 8 and known["i2v_head"] in (5.0, 7.0), name
        if name != "v2_0_lora":
            assert loop.optimizer.warmup_steps == 0 and loop.ema_decay == 0.0, name
    rates = {name: find_recipe(name).loop.optimizer.lr for name in STAGES}
    assert [rates[f"v2_0_{name}"] for name in ("image", "stage1", "stage1_i2v", "stage2", "high_compression")] == [
        1e-5, 5e-5, 1e-5, 5e-5, 3e-5,
    ]  # fmt: skip
    assert [find_recipe(f"v2_0_{name}").loop.sequence_parallel for name in ("stage1", "stage2", "stage2_i2v")] == [
        1,
        4,
        4,
    ]


def test_times_are_shifted_by_tokens() -> None:
    """768px at 16:9: as in sampling for HunyuanVideo's latents, by a quarter of the tokens for the compressed ones."""
    ratios = {}
    for name, frames, latents in (("v2_0_stage2_i2v", 129, 33), ("v2_0_high_compression", 128, 32)):
        shift = planned(name).networks.noise_process.time_shift
        ratios[name] = shift.ratio(576, 1024, frames, latents)
    assert ratios == {
        "v2_0_stage2_i2v": pytest.approx(11.872, abs=1e-3),
        "v2_0_high_compression": pytest.approx(5.327, abs=1e-3),
    }


@pytest.mark.parametrize("name", STAGES)
def test_the_chain_of_stages_is_whole(name: str) -> None:
    objective = objective_of(name)
    start = objective.init_from
    assert start is not None and objective.transformer is not None
    if start == FLUX:
        assert name in ("v2_0_image", "v2_0_stage1") and objective.new_parts == ("conditions",)
    elif start in PUBLISHED:
        assert name in ("v2_0_high_compression", "v2_0_adapt_i2v", "v2_0_lora")
    else:
        before = objective_of(start.split("/")[1]).transformer
        assert before is not None
        gains = objective.transformer["cond_embed"] and not before["cond_embed"]
        assert ("conditions" in objective.new_parts) == gains
