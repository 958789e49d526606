import pytest
import torch
from torch import nn

from opensora.errors import OpenSoraError
from opensora.models.autoencoders.posterior import Posterior
from opensora.models.autoencoders.temporal import CausalConv3d, TemporalAutoencoder

TINY = {"filters": 4, "num_groups": 2, "num_res_blocks": 1, "channel_multipliers": (1, 2, 2)}


def make(**options) -> TemporalAutoencoder:
    torch.manual_seed(0)
    return TemporalAutoencoder(**{**TINY, "temporal_downsample": (True, True), **options}).eval()


def clip(num_frames: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 4, num_frames, 3, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("time_stride", [1, 2])
def test_convolution_equals_its_definition(time_stride):
    torch.manual_seed(1)
    layer = CausalConv3d(2, 3, time_stride=time_stride)
    x = torch.randn(1, 2, 4, 3, 3)
    padded = nn.functional.pad(x, (1, 1, 1, 1, 3 - time_stride, 0))
    expected = nn.functional.conv3d(padded, layer.conv.weight, layer.conv.bias, stride=(time_stride, 1, 1))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("downsample", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("num_frames", [1, 3, 4, 9])
@torch.no_grad()
def test_shapes(downsample, num_frames):
    autoencoder = make(temporal_downsample=downsample)
    posterior = autoencoder.encode(clip(num_frames))
    latent_frames = autoencoder.latent_frames(num_frames)
    assert latent_frames == -(-num_frames // 2 ** sum(downsample))
    assert posterior.mean.shape == posterior.logvar.shape == (1, 4, latent_frames, 3, 4)
    assert autoencoder.decode(posterior.mode(), num_frames).shape == (1, 4, num_frames, 3, 4)


@torch.no_grad()
def test_convolutions_are_causal():
    """Group norm's statistics run over the chunk by design; with it out of the way nothing looks ahead."""
    autoencoder = make()
    for module in list(autoencoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    first, second = clip(12), clip(12)
    second[:, :, 8:] = clip(4, seed=1)
    before, after = autoencoder.encode(first).mean, autoencoder.encode(second).mean
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2:], after[:, :, 2:])
    latents = torch.cat([before[:, :, :2], after[:, :, 2:]], dim=2)
    assert torch.equal(autoencoder.decode(before, 12)[:, :, :8], autoencoder.decode(latents, 12)[:, :, :8])


@torch.no_grad()
def test_batch_of_two_is_two_of_one():
    autoencoder, clips = make(), clip(5, batch=2)
    both = autoencoder.encode(clips).mean
    torch.testing.assert_close(both, torch.cat([autoencoder.encode(one).mean for one in clips.split(1)]))


def test_decode_refuses_latents_of_another_length():
    with pytest.raises(OpenSoraError, match="2 latent frames given for 9 frames, which need 3"):
        make().decode(torch.zeros(1, 4, 2, 3, 4), 9)


def test_downsampling_must_fit_the_levels():
    with pytest.raises(OpenSoraError, match="1 entries for 3 levels"):
        make(temporal_downsample=(True,))


def test_posterior_terms_against_torch():
    torch.manual_seed(0)
    mean, logvar, z = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    posterior = Posterior(mean, logvar)
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    kl = torch.distributions.kl_divergence(normal, standard).flatten(1).sum(dim=1)
    torch.testing.assert_close(posterior.kl(), kl)
    torch.testing.assert_close(posterior.nll(z), -normal.log_prob(z).flatten(1).sum(dim=1))
    noise = torch.randn_like(mean)
    torch.testing.assert_close(posterior.sample(noise=noise), mean + normal.stddev * noise)
    drawn = [posterior.sample(torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert torch.isfinite(Posterior(mean, torch.full_like(mean, 1e4)).kl()).all()
