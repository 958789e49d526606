"""Critics and losses of the autoencoders of 1.3 and 2.0 against the reference.

The reference's other losses of critics (vanilla, WGAN, LeCam) are options that no published configuration takes; they
are not ours.
"""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from opensora.models.autoencoders.posterior import Posterior
from opensora.training.vae.discriminator import DiscriminatorConfig, PatchGAN
from opensora.training.vae.losses import (
    adaptive_weight,
    adversarial_loss,
    critic_hinge_loss,
    kl_loss,
    reconstruction_loss,
)

NOT_OURS = {"disc_vanilla", "disc_wgan-gp", "lecam"}
BEFORE_START = {"disc_before_start", "generator_loss_before_start"}


def close(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours, reference, atol=2e-5, rtol=1e-4)


@pytest.fixture(params=["vae_gan_v1_3", "vae_gan_v2_0"])
def fixture(request, golden):
    return golden(request.param)


def critic_of(fixture) -> PatchGAN:
    config, weights = fixture.meta["config"], fixture.weights()
    has_dropout = "main.6.weight" in weights and "main.7.running_mean" in weights  # between the layers
    settings = DiscriminatorConfig(
        config["ndf"], config["n_layers"], architecture="patchgan", dropout=0.3 if has_dropout else None
    )
    critic = settings.build()
    assert isinstance(critic, PatchGAN)
    missing, unexpected = critic.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    return critic.eval()


def reconstruction(fixture) -> tuple[Tensor, Tensor]:
    """What a decoder whose last layer is a matrix makes of the features, and that layer."""
    last_layer = fixture["in.last_layer"].clone().requires_grad_()
    return torch.einsum("oc,bcthw->bothw", last_layer, fixture["in.features"]), last_layer


def test_critic(fixture):
    critic, made = critic_of(fixture), reconstruction(fixture)[0]
    close(critic(fixture["in.video"]), fixture["out.real_logits"])
    close(critic(made), fixture["out.fake_logits"])
    trained = copy.deepcopy(critic).train()
    for module in trained.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    close(trained(fixture["in.video"]), fixture["out.real_logits_batchstats"])
    hinge = critic_hinge_loss(fixture["out.real_logits"], fixture["out.fake_logits"]).mean()
    close(hinge, fixture["out.disc_hinge"])


def test_losses(fixture):
    """LPIPS is stood in for by 3 * mean squared difference of a frame, as in the fixture."""
    meta, video, critic = fixture.meta, fixture["in.video"], critic_of(fixture)
    made, last_layer = reconstruction(fixture)
    assert meta["logvar_init"] == 0.0
    absolute = reconstruction_loss(made, video, mse_weight=0.0, weights=None, reduction="sum")
    distance = 3 * (made - video).square().mean(dim=(1, 3, 4)).mean(dim=1) * video[0, :, 0].numel()
    nll = (absolute + meta["perceptual_loss_weight"] * distance).mean()
    for name, ours in {
        "recon_loss": absolute.mean(),
        "perceptual_loss": distance.mean(),
        "nll_loss": nll,
        "weighted_nll_loss": nll,
    }.items():
        if f"out.{name}" in fixture:
            close(ours, fixture[f"out.{name}"])
    gradient = torch.autograd.grad(nll, last_layer, retain_graph=True)[0]
    torch.testing.assert_close(gradient, fixture["out.grad_nll"], atol=2e-3, rtol=1e-4)
    deceived = adversarial_loss(critic(made)).mean()
    weight = meta["disc_weight"] * adaptive_weight(nll, deceived, last_layer)
    close(weight, fixture["out.adaptive_weight"])
    close(weight * deceived, fixture["out.generator_loss"])


def test_divergence(fixture):
    """A value a clip in 1.3, a value a frame in 2.0, where it weighs nothing."""
    posterior = Posterior.from_moments(fixture["in.moments"])
    expected = fixture["out.posterior_kl"]
    if len(expected) == len(posterior.mean):
        close(posterior.kl(), expected)
        weighed = fixture.meta["kl_loss_weight"] * kl_loss(posterior, "sum").mean()
        torch.testing.assert_close(weighed, fixture["out.kl_loss"], atol=0, rtol=1e-4)
    else:
        frames = fixture["in.moments"].transpose(1, 2).flatten(0, 1)
        close(Posterior.from_moments(frames).kl(), expected)
        assert fixture.meta["kl_loss_weight"] == 0.0 and fixture["out.kl_loss"] == 0.0


def test_nothing_goes_by_unseen(fixture):
    seen = {name for name in fixture.under("out") if name not in NOT_OURS | BEFORE_START}
    kinds = r"(real|fake)_logits(_batchstats)?|disc_hinge|(recon|perceptual|(weighted_)?nll|kl|generator)_loss"
    assert all(re.fullmatch(rf"{kinds}|grad_nll|adaptive_weight|posterior_kl", name) for name in seen)
    for name in BEFORE_START:
        assert fixture[f"out.{name}"] == 0, "as ours, see PictureTask and PictureCritic"
