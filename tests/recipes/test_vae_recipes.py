"""The autoencoder's stages: what the published ones train is what was published, and the debug recipe runs."""

import json
from pathlib import Path

import pytest

from opensora.data.clips import ManifestClips
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.overrides import apply_overrides
from opensora.recipes import RECIPES, find_recipe
from opensora.settings import from_dict, to_dict
from opensora.training.trainer import Trainer
from opensora.training.vae.config import VAETaskConfig

NAMES = [make.__name__ for make in RECIPES if "vae" in make.__name__]
PUBLISHED = ["vae_v1_2_stage1", "vae_v1_2_stage2", "vae_v1_2_stage3"]


def config(name: str) -> VAETaskConfig:
    objective = find_recipe(name).objective
    assert isinstance(objective, VAETaskConfig)
    return objective


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_those_of_the_published_autoencoder(name: str, golden_dir: Path) -> None:
    published = json.loads((golden_dir / "checkpoint_keys" / "opensora_vae_v1_2.json").read_text())
    module = config(name).plan().setup.task.module
    theirs = {key: shape for key, (shape, _) in published["keys"].items() if key not in ("scale", "shift")}
    ours = {key: list(value.shape) for key, value in module.state_dict().items() if key not in ("scale", "shift")}
    assert ours == theirs
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    temporal = sum(p.numel() for n, p in module.named_parameters() if n.startswith("temporal_vae."))
    assert trained == (sum(p.numel() for p in module.parameters()) if name.endswith("3") else temporal)


@pytest.mark.parametrize(
    ("name", "keys"),
    [("vae_v1_3", "opensora_vae_v1_3"), ("vae_v2_0_dc_stage2", "dc_ae_f32t4c128_v2_0")],
)
def test_later_ones_are_trained_whole(name: str, keys: str, golden_dir: Path) -> None:
    published = json.loads((golden_dir / "checkpoint_keys" / f"{keys}.json").read_text())
    module = config(name).plan().setup.task.module
    assert {key: list(p.shape) for key, p in module.named_parameters() if p.requires_grad} == {
        key: shape for key, (shape, _) in published["keys"].items()
    }


def test_what_later_ones_were_trained_with() -> None:
    one, two, three = (config(name) for name in ("vae_v1_3", "vae_v2_0_dc_stage1", "vae_v2_0_dc_stage2"))
    assert [max(shape.num_frames for shape in stage.plan().shapes()) for stage in (one, two, three)] == [17, 32, 32]
    assert (one.kl_weight, one.perceptual_weight, two.kl_weight, two.perceptual_weight) == (1e-6, 1.0, 0.0, 0.5)
    assert two.discriminator is None and one.discriminator is not None and three.discriminator is not None
    assert (one.discriminator.weight, one.discriminator.depth, one.discriminator.start) == (0.5, 3, 0)
    assert (three.discriminator.weight, three.discriminator.depth, three.discriminator.dropout) == (0.05, 5, 0.3)


def test_what_each_stage_was_trained_with() -> None:
    one, two, three = (config(name) for name in PUBLISHED)
    assert (one.identity_weight, two.identity_weight) == (1.0, 0.0)
    assert one.cut.image_share == two.cut.image_share == 0.2
    assert three.cut.random_lengths and max(shape.num_frames for shape in three.plan().shapes()) == 34
    assert (three.kl_weight, three.perceptual, three.perceptual_weight) == (1e-6, "lpips", 0.1)
    loops = [find_recipe(name).loop for name in PUBLISHED]
    assert [loop.steps for loop in loops] == [380_000, 260_000, 540_000]
    assert {loop.optimizer.lr for loop in loops} == {1e-5} and {loop.max_grad_norm for loop in loops} == {1.0}
    for stage in (one, two, three):
        assert isinstance(stage.data, ManifestClips)
        assert {(shape.batch_size, shape.height, shape.width) for shape in stage.plan().shapes()} == {(1, 256, 256)}
    assert one.scaling_factor is None, "from scratch, the 2D autoencoder's own"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_survives_its_file_and_is_planned_without_any_other(name: str) -> None:
    written = json.loads(json.dumps(to_dict(find_recipe(name).objective)))
    plan = from_dict(VAETaskConfig, written).plan()
    assert all(parameter.is_meta for parameter in plan.setup.task.module.parameters())
    assert sum(shape.share for shape in plan.shapes()) == pytest.approx(1)


def test_a_user_names_clips_and_what_to_compare_pictures_with() -> None:
    named = apply_overrides(
        find_recipe("vae_v1_2_stage3"),
        ["objective.data.manifest=clips.csv", "objective.perceptual=efficientnet", "objective.discriminator={}"],
    )
    objective = named.objective
    assert isinstance(objective, VAETaskConfig) and isinstance(objective.data, ManifestClips)
    assert objective.data.manifest == Path("clips.csv") and objective.discriminator is not None
    with pytest.raises(OpenSoraError, match=r"pixart_sigma.* is missing; put a spatial autoencoder"):
        small = {"spatial": {"block_out_channels": [8], "norm_num_groups": 4}, "temporal": {"type": "folded", "dim": 8}}
        VAETaskConfig("latents", autoencoder=small, spatial_from="pixart_sigma").build("cpu")


def test_the_debug_recipe_runs(tmp_path: Path) -> None:
    recipe = apply_overrides(find_recipe("vae_debug"), ["loop.precision=fp32", "loop.steps=4"])
    Trainer(recipe, tmp_path).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert losses[0]["adversarial"] == 0 and losses[-1]["adversarial"] != 0, "the critic joins at step 2"
    assert any("bilinear_psnr" in line for line in lines)
    autoencoder = VideoAutoencoder.from_pretrained(tmp_path / "model")
    assert autoencoder.latent_space.shift is not None and autoencoder.latent_space.scaling_factor != 1
