"""The published stages: what they train is what was published, and all of it can be planned without a file."""

import functools
import json
import math
from typing import Any

import pytest

from opensora.checkpoints.published import PUBLISHED
from opensora.data.clips import ManifestClips
from opensora.data.degradation import Degradation
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.overrides import apply_overrides
from opensora.recipes import RECIPES, find_recipe
from opensora.settings import from_dict, to_dict
from opensora.training.diffusion.config import DiffusionTaskConfig
from opensora.training.diffusion.plan import DiffusionPlan

FAMILY = [make.__name__ for make in RECIPES if make.__name__.startswith(("v1_", "v2_"))]
PUBLISHED_STAGES = [name for name in FAMILY if not name.endswith(("_debug", "_lora"))]
STAGES = [name for name in PUBLISHED_STAGES if name.startswith("v1_")]  # of 2.0 see test_recipes_v2_0.py

KEYS = {
    "v1_0_16x256x256": "stdit_xl2_v1_0_16x256x256",
    "v1_0_16x256x256_hq": "stdit_xl2_v1_0_16x256x256",
    "v1_0_16x512x512": "stdit_xl2_v1_0_16x512x512",
    "v1_0_64x512x512": "stdit_xl2_v1_0_64x512x512",
    "v1_1": "stdit2_xl2_v1_1",
    "v1_2": "stdit3_xl2_v1_2",
    "v1_3": "stdit3_xl2_v1_3",
}


@functools.cache
def planned(name: str) -> DiffusionPlan:
    objective = find_recipe(name).objective
    assert isinstance(objective, DiffusionTaskConfig)
    return objective.plan()


@pytest.mark.parametrize("name", STAGES)
def test_parameters_are_those_of_the_published_model(name: str, golden_dir) -> None:
    """Number and shapes; norms of queries and keys join after the images of 1.1."""
    path = golden_dir / "checkpoint_keys" / f"{KEYS.get(name, KEYS.get(name[:4]))}.json"
    published = json.loads(path.read_text())
    transformer = planned(name).networks.transformer
    ours = {key: list(tensor.shape) for key, tensor in transformer.state_dict().items()}
    theirs = {key: shape for key, (shape, _) in published["keys"].items()}
    count = sum(parameter.numel() for parameter in transformer.parameters())
    if name == "v1_1_image":
        norms = {key: shape for key, shape in theirs.items() if "_norm." in key}
        assert norms and not norms.keys() & ours.keys()
        theirs = {key: shape for key, shape in theirs.items() if key not in norms}
        count += sum(map(math.prod, norms.values()))
    assert ours == theirs
    assert count == published["num_parameters"]


@pytest.mark.parametrize("name", FAMILY)
def test_every_size_can_be_traced(name: str) -> None:
    """Frozen networks are traced too, and batches have the sizes of their buckets."""
    plan = planned(name)
    frozen, module = plan.setup.frozen, plan.setup.task.module
    second = {"text_encoder_2"} if name.startswith("v2_0") else set()
    assert set(frozen) == {"autoencoder", "text_encoder"} | second
    everything = [*module.parameters(), *(p for part in frozen.values() for p in part.parameters())]
    assert all(parameter.is_meta for parameter in everything)
    assert not any(p.requires_grad for part in frozen.values() for p in part.parameters())
    shapes = plan.shapes()
    assert sum(shape.share for shape in shapes) == pytest.approx(1)
    for shape in shapes:
        batch = plan.meta_batch(shape)
        factor = plan.networks.autoencoder.spatial_factor
        cells = (shape.height // factor, shape.width // factor)
        assert batch.clips.latents.shape == (
            shape.batch_size,
            plan.networks.autoencoder.latent_channels,
            plan.networks.autoencoder.latent_frames(shape.num_frames),
            *cells,
        )
    assert len(plan.setup.partition.blocks) == len(plan.networks.transformer.blocks) > 0


@pytest.mark.parametrize(
    "name", ["v1_0_16x256x256", "v1_1_stage3", "v1_2_stage3", "v1_3_adapt_i2v", "v2_0_high_compression"]
)
def test_a_step_can_be_traced(name: str) -> None:
    plan = planned(name)
    shape = min(plan.shapes(), key=lambda shape: shape.batch_size * shape.num_frames * shape.height)
    terms = plan.setup.task.loss(plan.meta_batch(shape), BatchKey(0, 0))
    assert all(term.shape == (shape.batch_size,) and term.is_meta for term in terms.values())


@pytest.mark.parametrize("name", FAMILY)
def test_recipes_are_data(name: str) -> None:
    recipe = find_recipe(name)
    objective = recipe.objective
    assert isinstance(objective, DiffusionTaskConfig)
    assert recipe.name == name
    written = json.loads(json.dumps(to_dict(objective)))
    assert to_dict(from_dict(DiffusionTaskConfig, written)) == written


@pytest.mark.parametrize("name", PUBLISHED_STAGES)
def test_clips_have_to_be_named(name: str) -> None:
    with pytest.raises(OpenSoraError, match=r"objective\.data\.manifest=FILE") as error:
        find_recipe(name).objective.build("cpu")
    assert "\n" not in str(error.value)
    named = apply_overrides(find_recipe(name), ["objective.data.manifest=clips.csv"]).objective
    assert isinstance(named, DiffusionTaskConfig) and isinstance(named.data, ManifestClips)
    assert str(named.data.manifest) == "clips.csv"


def test_what_each_generation_was_trained_with() -> None:
    """Facts of the released configurations that are easily lost: rates, epsilon, average, warm-up, frames, text."""
    told: dict[str, Any] = {name: find_recipe(name) for name in STAGES}
    for name, recipe in told.items():
        loop, objective = recipe.loop, recipe.objective
        version = name[:4]
        optimizer = loop.optimizer
        assert optimizer.matrices == "adamw" and optimizer.weight_decay == 0, name
        assert optimizer.decay == (1 if name in ("v1_3_stage1", "v1_3_stage1_hq") else 0), name
        assert (loop.seed, loop.max_grad_norm, loop.precision, loop.ema_warmup) == (42, 1.0, "bf16", False), name
        late = version in ("v1_2", "v1_3")
        assert optimizer.lr == (5e-5 if name == "v1_3_stage2" else 1e-4 if late else 2e-5), name
        assert optimizer.eps == (1e-15 if late and name != "v1_3_adapt" else 1e-8), name
        assert loop.ema_decay == {"v1_0": 0.9999, "v1_1": 0.0}.get(version, 0.99), name
        assert objective.data.frame_interval == (1 if late else 2 if "64x" in name else 3), name
        assert objective.data.told_fps == ("file" if version == "v1_1" else "taken"), name
        assert objective.transformer["model_max_length"] == {"v1_0": 120, "v1_1": 200}.get(version, 300), name
        assert objective.freeze_text_embedder == name.startswith("v1_2_stage"), name
        assert objective.drop_text == 0.1 and objective.sample_posterior, name
        assert objective.defaults["clean_prompts"], name
    assert [told[f"v1_2_stage{n}"].loop.optimizer.warmup_steps for n in (1, 2, 3)] == [1000, 0, 1000]
    assert [told[f"v1_3_{n}"].loop.optimizer.warmup_steps for n in ("stage1", "stage1_hq", "stage2")] == [0, 1000, 1000]
    for name in ("stage1_hq", "stage2", "adapt_i2v"):
        conditions = told[f"v1_3_{name}"].objective
        none = conditions.known_frames["none"] / sum(conditions.known_frames.values())
        assert none == pytest.approx(2 / 16 if name == "adapt_i2v" else 8 / 17)
        assert sum(conditions.drop_of_known.values()) == pytest.approx(0.15)
    assert not told["v1_3_stage1"].objective.known_frames
    noisy = told["v1_3_stage1_noise"]
    assert noisy.loop.optimizer.warmup_steps == 100 and not noisy.objective.known_frames
    assert noisy.objective.degradation == Degradation()
    assert sum(told["v1_2_stage3"].objective.frame_masks.values()) == pytest.approx(0.25, abs=0.005)
    assert told["v1_1_stage2"].objective.frame_masks["identity"] == 0.75
    assert told["v1_1_image"].objective.diffusion.steps == "speed"


@pytest.mark.parametrize("name", STAGES)
def test_the_chain_of_stages_is_whole(name: str) -> None:
    """A stage starts from the one before or from a released image model, and names what that one lacks."""
    objective = find_recipe(name).objective
    assert isinstance(objective, DiffusionTaskConfig) and objective.init_from is not None
    parts = objective.init_from.split("/")
    if parts[0] == "runs":
        before = find_recipe(parts[1]).objective
        assert isinstance(before, DiffusionTaskConfig) and before.transformer and objective.transformer
        gains_norms = objective.transformer.get("qk_norm") and not before.transformer.get("qk_norm")
        assert ("qk_norm" in objective.new_parts) == bool(gains_norms)
        assert before.architecture == objective.architecture
    else:
        assert parts[-1].startswith("PixArt") and "temporal_blocks" in objective.new_parts


def test_exports_sample_like_the_published_models() -> None:
    for name, model in (
        ("v1_0_16x512x512", "opensora-1.0-hq-16x512x512"),
        ("v1_1_stage3", "opensora-1.1-stage3"),
        ("v1_2_stage3", "opensora-1.2"),
        ("v1_3_stage2", "opensora-1.3"),
        ("v2_0_stage2_i2v", "opensora-2.0"),
        ("v2_0_high_compression", "opensora-2.0-dc-ae"),
    ):
        networks, released = planned(name).networks, PUBLISHED[model]
        scheduler = networks.scheduler
        assert type(scheduler).__name__ == released.scheduler_class.rpartition(".")[2]
        config = dict(scheduler.config)
        assert {key: config[key] for key in released.scheduler_config} == dict(released.scheduler_config)
        assert networks.defaults == dict(released.defaults)
