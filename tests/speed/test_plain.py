"""The plain renditions that speed is measured against compute what the package computes, forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cases.layers import SIZES, Pair, fill
from benchmarks.plain.frame_autoencoder import FrameAutoencoder as PlainFrameAutoencoder
from benchmarks.plain.temporal_autoencoder import TemporalAutoencoder as PlainTemporalAutoencoder
from benchmarks.plain.transformer import STDiT3 as PlainSTDiT3
from opensora.models.autoencoders.frames import FrameAutoencoder
from opensora.models.autoencoders.temporal import TemporalAutoencoder
from opensora.models.clip_conditions import ClipConditions
from opensora.models.stdit3 import STDiT3

TEMPORAL: dict[str, Any] = {
    "filters": 8,
    "num_res_blocks": 2,
    "channel_multipliers": [1, 2, 2, 4],
    "temporal_downsample": [False, True, True],
    "num_groups": 4,
}
SPATIAL: dict[str, Any] = {"block_out_channels": [8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}


def assert_close(ours: Tensor, plain: Tensor) -> None:
    """Within 1e-4 of the largest value."""
    largest = float(plain.detach().abs().max())
    assert largest > 0
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4 * largest)


def assert_same_gradients(ours: nn.Module, plain: nn.Module) -> None:
    """Of every parameter that is trained."""
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == {name for name, parameter in plain.named_parameters() if parameter.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            scale = max(float(parameter.grad.abs().max()), 1e-3 * largest)
            assert float((gradients[name] - parameter.grad).abs().max()) < 1e-4 * scale, name


def same_weights(ours: Any, plain: Any) -> tuple[Any, Any]:
    fill(ours)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def test_the_whole_transformer() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 48, "depth": 2, "num_heads": 2, "caption_channels": 10}
    ours, plain = same_weights(STDiT3(**sizes, model_max_length=9), PlainSTDiT3(**sizes, model_max_length=9))
    latents, timestep, text = torch.randn(2, 4, 3, 6, 4), torch.tensor([900.0, 30.0]), torch.randn(2, 9, 10)
    mask = torch.arange(9) < torch.tensor([[5], [3]])
    made = ours(
        latents, timestep, text, mask, clip_conditions=ClipConditions(fps=24.0, height=48.0, width=32.0, num_frames=9)
    ).sample
    expected = plain(latents, timestep, text, mask, torch.tensor([24.0, 24.0]), 48.0, 32.0)
    assert_close(made, expected)
    weights = torch.randn_like(expected)
    for output in (made, expected):
        (output * weights).sum().backward()
    assert_same_gradients(ours, plain)


@pytest.mark.parametrize("keep_text", [True, False])
def test_the_layer_pair_that_is_measured(keep_text: bool) -> None:
    pair = Pair(SIZES["tiny"], torch.float32)
    with torch.no_grad():
        ours = pair.run_ours(keep_text=keep_text)
        assert_close(ours.flatten(1, 2), pair.run_plain())
        assert not torch.allclose(ours, pair.tokens, atol=1e-3)  # the layers do something
    weights = torch.randn(ours.shape)
    (pair.run_ours(keep_text=False) * weights).sum().backward()
    (pair.run_plain() * weights.flatten(1, 2)).sum().backward()
    for one, other in zip(pair.ours.blocks, (*pair.plain.spatial_blocks, *pair.plain.temporal_blocks), strict=True):
        assert_same_gradients(one, other)


@pytest.mark.parametrize("num_frames", [1, 6, 17])
def test_the_autoencoder_over_time(num_frames: int) -> None:
    torch.manual_seed(0)
    ours, plain = same_weights(TemporalAutoencoder(**TEMPORAL), PlainTemporalAutoencoder(**TEMPORAL))
    frames = torch.randn(2, 4, num_frames, 4, 6)
    posterior, (mean, log_variance) = ours.encode(frames), plain.encode(frames)
    assert_close(posterior.mean, mean)
    assert_close(posterior.logvar, log_variance)
    latents = torch.randn(mean.shape)
    decoded, expected = ours.decode(latents, num_frames), plain.decode(latents, num_frames)
    assert expected.shape == frames.shape
    assert_close(decoded, expected)
    weights = torch.randn_like(expected)
    ((posterior.mean + posterior.logvar).sum() + (decoded * weights).sum()).backward()
    ((mean + log_variance).sum() + (expected * weights).sum()).backward()
    assert_same_gradients(ours, plain)


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_the_autoencoder_of_frames(micro_batch_size: int) -> None:
    torch.manual_seed(0)
    ours, plain = FrameAutoencoder(SPATIAL), PlainFrameAutoencoder(**SPATIAL)
    plain.load_state_dict(ours.module.state_dict())
    video, latents = torch.randn(2, 3, 3, 16, 24), torch.randn(2, 4, 3, 4, 6)
    posterior, (mean, log_variance) = ours.encode(video, micro_batch_size), plain.encode(video, micro_batch_size)
    assert mean.shape == latents.shape
    assert_close(posterior.mean, mean)
    assert_close(posterior.logvar, log_variance)
    made, expected = ours.decode(latents, micro_batch_size), plain.decode(latents, micro_batch_size)
    assert expected.shape == video.shape
    assert_close(made, expected)
    (posterior.mean.square().sum() + posterior.logvar.sum() + made.square().sum()).backward()
    (mean.square().sum() + log_variance.sum() + expected.square().sum()).backward()
    assert_same_gradients(ours.module, plain)
