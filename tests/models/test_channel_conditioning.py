"""Known frames in channels beside the noise."""

from types import SimpleNamespace

import pytest
import torch

from opensora.denoiser import Denoiser, predict
from opensora.errors import OpenSoraError
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.clip_conditions import ClipConditions
from opensora.models.network import VideoTransformer
from opensora.models.text.conditioner import TextStates

CLIP = ClipConditions(24.0, 16.0, 16.0, 5)


class Adding(VideoTransformer):
    """Returns the noise and what is known beside it."""

    reads_channels = True

    def forward(self, hidden_states, timestep, *, clip_conditions, channel_conditioning=None, frame_mask=None, **text):
        known = 0.0 if channel_conditioning is None else channel_conditioning.masked_latents
        return SimpleNamespace(sample=hidden_states + known)


def text(batch: int) -> TextStates:
    return TextStates(torch.zeros(batch, 1, 1))


def test_frames_that_are_not_known_are_not_read():
    conditioning = ChannelConditioning(torch.full((1, 2, 3, 4, 4), float("nan")), torch.tensor([[False, True, False]]))
    conditioning.latents[:, :, 1] = 7.0
    expected = torch.zeros(1, 2, 3, 4, 4)
    expected[:, :, 1] = 7.0
    assert conditioning.masked_latents.equal(expected)
    assert not conditioning.without_latents().masked_latents.any()
    assert conditioning.without_latents().mask.equal(conditioning.mask)


def test_pictures_are_frames_that_are_known_by_themselves():
    mask = torch.tensor([[1, 0, 0, 0, 1], [1, 1, 0, 0, 1], [0, 1, 1, 1, 0], [1, 0, 1, 0, 0]], dtype=torch.bool)
    pictures = torch.tensor([[1, 0, 0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]], dtype=torch.bool)
    assert ChannelConditioning(torch.zeros(4, 1, 5, 2, 2), mask).single_frames.equal(pictures)


@pytest.mark.parametrize("mask", [torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3)])
def test_a_mask_that_does_not_fit(mask):
    with pytest.raises(OpenSoraError, match=r"expected .* torch.bool \(B, T\)"):
        ChannelConditioning(torch.zeros(2, 4, 3, 8, 8), mask)


def test_networks_that_read_no_channels_are_given_none():
    class Strict(VideoTransformer):
        def forward(self, hidden_states, timestep, *, clip_conditions, frame_mask=None, encoder_hidden_states=None):
            return SimpleNamespace(sample=hidden_states)

    latents = torch.ones(1, 1, 1, 2, 2)
    assert predict(Strict(), latents, torch.zeros(1), text(1), CLIP).equal(latents)


@pytest.mark.parametrize("sequential", [False, True])
def test_all_texts_read_the_known_frames_and_the_unconditional_branch_none(sequential):
    latents = torch.arange(2.0).view(2, 1, 1, 1, 1).expand(2, 1, 2, 1, 1)
    known = ChannelConditioning(torch.full((2, 1, 2, 1, 1), 10.0), torch.tensor([[True, False], [False, True]]))
    texts = {"text": text(2), "null": TextStates(torch.ones(2, 1, 1))}
    denoiser = Denoiser(Adding(), texts, CLIP, channels=known, sequential=sequential)
    predictions = denoiser(("text", "null", "unconditional"), latents, torch.tensor([500.0]), step=0, num_steps=1)
    assert predictions["text"].flatten().tolist() == [10.0, 0.0, 1.0, 11.0]
    assert predictions["null"].equal(predictions["text"])
    assert predictions["unconditional"].equal(latents)
    assert denoiser.num_evaluations == 6
