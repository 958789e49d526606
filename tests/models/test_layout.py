"""How frames and clips lie in memory where they are convolved."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from unwritten_memory import forget_memory

from opensora.models.autoencoders.frames import FrameAutoencoder
from opensora.models.autoencoders.layout import for_convolution
from opensora.models.autoencoders.temporal import CausalConv3d, TemporalAutoencoder


def test_only_half_precision_on_a_cpu_is_put_in_another_order() -> None:
    clip = torch.randn(1, 8, 3, 4, 5)
    assert for_convolution(clip) is clip
    half = for_convolution(clip.bfloat16())
    assert half.is_contiguous(memory_format=torch.channels_last_3d) and torch.equal(half, clip.bfloat16())
    assert for_convolution(half) is half
    frames = for_convolution(clip[:, :, 0].bfloat16())
    assert frames.is_contiguous(memory_format=torch.channels_last) and torch.equal(frames, half[:, :, 0])


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3, 4, 16, 48])
@pytest.mark.parametrize(("frames", "stride"), [(1, 1), (2, 1), (5, 1), (2, 2), (5, 2)])
def test_convolutions_read_zeros_in_front_and_nothing_else(channels: int, frames: int, stride: int) -> None:
    """Kernels of torch for bfloat16 have been seen to read memory that was never written."""
    torch.manual_seed(0)
    layer = CausalConv3d(channels, 16, time_stride=stride).bfloat16()
    x = torch.randn(2, channels, frames, 5, 7).bfloat16()
    full = CausalConv3d(channels, 16, time_stride=stride)
    full.load_state_dict(layer.state_dict())
    expected = full.conv(F.pad(x.float(), (0, 0, 0, 0, layer.front, 0)))
    forget_memory()
    torch.testing.assert_close(layer(x).float(), expected, rtol=1e-2, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("frames", [2, 3, 5, 10, 11])
def test_the_first_frames_are_as_with_zeros_in_front(frames: int) -> None:
    torch.manual_seed(0)
    layer, x = CausalConv3d(4, 6).bfloat16(), torch.randn(2, 4, frames, 5, 7).bfloat16()
    convolved: list[int] = []
    hook = layer.conv.register_forward_pre_hook(lambda _, given: convolved.append(given[0].shape[2]))
    expected = layer(x)
    assert convolved == [frames + 2]
    hook.remove()
    torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)


def assert_no_further(own: Tensor, usual: Tensor, wanted: Tensor) -> None:
    """From `wanted`, in full precision, than what the usual order makes."""
    own_error, usual_error = ((made.float() - wanted).square().mean() for made in (own, usual))
    assert own_error <= 1.1 * usual_error


@torch.no_grad()
def test_half_precision_is_no_further_from_full_than_in_the_usual_order(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    half = TemporalAutoencoder(filters=32, num_res_blocks=1, num_groups=8).bfloat16()
    full = TemporalAutoencoder(filters=32, num_res_blocks=1, num_groups=8)
    full.load_state_dict({name: weight.float() for name, weight in half.state_dict().items()})
    latents = torch.randn(1, 4, 5, 8, 8).bfloat16()
    wanted, own = full.decode(latents.float(), 17), half.decode(latents, 17)
    monkeypatch.setattr("opensora.models.autoencoders.temporal.for_convolution", lambda clip: clip)
    usual = half.decode(latents, 17)
    assert_no_further(own, usual, wanted)


@torch.no_grad()
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_frames_are_encoded_in_that_order(micro_batch_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    half = FrameAutoencoder({"block_out_channels": [16, 32], "norm_num_groups": 4}).bfloat16()
    full = FrameAutoencoder({"block_out_channels": [16, 32], "norm_num_groups": 4})
    full.load_state_dict({name: weight.float() for name, weight in half.state_dict().items()})
    video = torch.randn(1, 3, 3, 16, 24).bfloat16()
    wanted, own = full.encode(video.float(), micro_batch_size).mean, half.encode(video, micro_batch_size).mean
    monkeypatch.setattr("opensora.models.autoencoders.frames.for_convolution", lambda frames: frames)
    usual = half.encode(video, micro_batch_size).mean
    assert_no_further(own, usual, wanted)
