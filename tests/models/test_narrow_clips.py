"""Encoders of clips so narrow that their latents are one column: where torch's own kernels for bfloat16 go wrong."""

import pytest
import torch
import torch.nn.functional as F
from unwritten_memory import forget_memory

from opensora.models.autoencoders.causal import CausalVideoAutoencoder
from opensora.models.autoencoders.dc_ae import PaddedConv3d, VideoDCAutoencoder
from opensora.models.autoencoders.hunyuan import HunyuanVideoAutoencoder
from opensora.models.autoencoders.strided import StridedConv3d

ENCODERS = {
    "dc_ae": (
        lambda: VideoDCAutoencoder(
            latent_channels=4,
            widths=[16, 16, 32],
            encoder_depths=[1, 1, 1],
            decoder_depths=[1, 1, 1],
            attention=[False, False, True],
            temporal_downsample=[False, True],
            head_dim=8,
        ),
        (8, 16, 4),
    ),
    "hunyuan": (
        lambda: HunyuanVideoAutoencoder(
            latent_channels=4, block_out_channels=[16, 16, 32, 32], layers_per_block=1, norm_num_groups=4
        ),
        (5, 32, 8),
    ),
    "causal": (
        lambda: CausalVideoAutoencoder(filters=16, latent_channels=4, num_res_blocks=1, num_groups=4),
        (9, 32, 8),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 2, 2)])
def test_a_result_of_one_column_is_right(frames: int, width: int, stride: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    for channels in (3, 16, 64):
        clip = torch.randn(2, channels, frames, 6, width).bfloat16()
        padded = PaddedConv3d(channels, 32, 3, stride).bfloat16()
        causal = StridedConv3d(channels, 32, 3, stride, padding=(0, 1, 1)).bfloat16()
        for layer, given in ((padded, clip), (causal, F.pad(clip, (0, 0, 0, 0, 2, 0)))):
            assert layer.bias is not None
            weight, bias = layer.weight.float(), layer.bias.float()
            expected = F.conv3d(given.float(), weight, bias, stride, layer.padding)
            forget_memory()
            torch.testing.assert_close(layer(given).float(), expected, rtol=2e-2, atol=2e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_a_clip_one_latent_wide_is_encoded_as_in_full_precision(name: str) -> None:
    torch.manual_seed(0)
    make, (frames, height, width) = ENCODERS[name]
    full = make().eval()
    half = make().eval()
    half.load_state_dict(full.state_dict())
    half = half.bfloat16()
    clip = torch.rand(1, 3, frames, height, width) * 2 - 1
    expected = full.encode_raw(clip).mean
    assert expected.shape[-1] == 1
    for _ in range(3):
        forget_memory()
        made = half.encode_raw(clip).mean
        assert (made - expected).square().mean() < 1e-3 * expected.square().mean()
