"""Patches and positions."""

import pytest
import torch
import torch.nn.functional as F

from opensora.models.embeddings import PatchEmbed, position_embedding_2d, unpatchify


@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 2, 3)])
def test_patches_are_a_convolution(patch_size):
    """The projection is one for whatever stands in for a convolution, axes of its result included."""
    torch.manual_seed(0)
    embed, video = PatchEmbed(patch_size, 3, 8), torch.randn(2, 3, 4, 6, 6)
    expected = F.conv3d(video, embed.proj.weight, embed.proj.bias, stride=patch_size)
    torch.testing.assert_close(embed.proj(video), expected)
    tokens = embed(video)
    torch.testing.assert_close(tokens, expected.movedim(1, -1))
    assert tokens.is_contiguous()


def test_what_does_not_fill_a_patch_is_padded_and_cropped():
    video = torch.randn(1, 3, 3, 5, 7)
    tokens = PatchEmbed((2, 2, 3), 3, 2 * 2 * 3 * 3)(video)
    assert tokens.shape == (1, 2, 3, 3, 36)
    assert unpatchify(tokens, (2, 2, 3), (3, 5, 7)).shape == video.shape


def test_positions_of_a_denser_grid_coincide():
    """Twice the picture in twice the patches: every second patch stays where it was."""
    coarse = position_embedding_2d(3, 4, 16, torch.tensor([1.0])).unflatten(1, (3, 4))
    fine = position_embedding_2d(6, 8, 16, torch.tensor([2.0])).unflatten(1, (6, 8))
    torch.testing.assert_close(fine[:, ::2, ::2], coarse)
