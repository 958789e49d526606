"""Autoencoders that are one network, trained on pixels against the published critic."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.causal import CausalVideoAutoencoder
from opensora.models.autoencoders.dc_ae import VideoDCAutoencoder
from opensora.recipes import find_recipe
from opensora.training.config import LoopConfig, Recipe
from opensora.training.trainer import Trainer
from opensora.training.vae.clips import Cut
from opensora.training.vae.config import VAETaskConfig
from opensora.training.vae.discriminator import DiscriminatorConfig
from opensora.training.vae.losses import kl_loss

RECIPES = {"vae_v1_3_debug": CausalVideoAutoencoder, "vae_v2_0_dc_debug": VideoDCAutoencoder}


def config_of(name: str, **changes: Any) -> VAETaskConfig:
    objective = find_recipe(name).objective
    assert isinstance(objective, VAETaskConfig)
    return VAETaskConfig(**{**vars(objective), **changes})


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains_and_is_saved_with_the_latent_space_it_makes(name: str, tmp_path: Path) -> None:
    recipe = find_recipe(name)
    trainer = Trainer(replace(recipe, loop=replace(recipe.loop, steps=3)), tmp_path / "run")
    before = {key: value.clone() for key, value in trainer.module.state_dict().items()}
    trainer.run()
    assert all(not torch.equal(value, before[key]) for key, value in trainer.module.named_parameters())
    saved = RECIPES[name].from_pretrained(tmp_path / "run" / "model")
    assert saved.latent_space.shift is not None and "toybox" in saved.latent_space.trained_with


def test_training_resumes_bit_for_bit_with_the_published_critic(tmp_path: Path) -> None:
    """Whose norms keep statistics, and which leaves features out at random."""
    critic = DiscriminatorConfig(dim=4, depth=2, architecture="patchgan", dropout=0.3)
    loop = LoopConfig(steps=3, precision="fp32", checkpoint_every=1)
    recipe = Recipe("tiny", config_of("vae_v2_0_dc_debug", discriminator=critic), loop)
    runs = [Trainer(recipe, tmp_path / "whole"), Trainer(recipe, tmp_path / "halves")]
    runs[1].on_step = lambda step, *_: setattr(runs[1], "stop_requested", step == 1)
    with pytest.raises(KeyboardInterrupt):
        runs[1].run()
    runs[1] = Trainer(recipe, tmp_path / "halves")
    for run in runs:
        run.run()
    assert runs[0].critic is not None and runs[1].critic is not None
    for one, two in ((runs[0].module, runs[1].module), (runs[0].critic.module, runs[1].critic.module)):
        for name, weight in one.state_dict().items():
            assert torch.equal(weight, two.state_dict()[name]), name


@pytest.mark.parametrize("name", RECIPES)
def test_its_terms(name: str) -> None:
    setup = config_of(name, kl_weight=1.0).build("cpu")
    task, key = setup.task, BatchKey(0, 0, step=2)
    batch = task.prepare(key)
    made = task.decoded(batch, key)
    assert made.pictures.shape == batch.video.shape
    terms = task.loss(batch, key)
    torch.testing.assert_close(terms["reconstruction"], (made.pictures - batch.video).abs().flatten(1).mean(dim=1))
    torch.testing.assert_close(terms["kl"], kl_loss(made.posterior, "mean"))
    assert terms["kl"].any() == (name == "vae_v1_3_debug"), "what is certain has no posterior that could diverge"
    assert terms["adversarial"].all()
    torch.stack(list(terms.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in setup.task.module.parameters())
    assert setup.partition.blocks and all(any(True for _ in block.parameters()) for block in setup.partition.blocks)


def test_stages_and_autoencoders_that_do_not_fit() -> None:
    with pytest.raises(
        OpenSoraError, match="stage pixels trains parts, but a CausalVideoAutoencoder is a single network"
    ):
        config_of("vae_v1_3_debug", stage="pixels").build("cpu")
    with pytest.raises(OpenSoraError, match="has parts; use stage pixels"):
        config_of("vae_debug", stage="whole", cut=Cut()).build("cpu")
    for changes in ({"cut": Cut(random_lengths=True)}, {"scaling_factor": 2.0}, {"frames_per_clip": 2}):
        with pytest.raises(OpenSoraError, match=next(iter(changes)).partition("=")[0]):
            config_of("vae_v1_3_debug", **changes)
